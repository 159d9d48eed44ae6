"""Adam with decoupled weight decay, and NeVA's cosine schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from neva_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """NeMo's CosineAnnealing: linear warm-up, cosine to `min_lr`, then constant.

    With W warm-up steps, C constant steps, T = `steps` and n = 0 for the first step:
      n <= W       lr * (n + 1) / (W + 1)
      n <= T - C   min + (lr - min) / 2 * (1 + cos(pi * (n - W) / (T - C - W)))
      after        min
    (NeMo's warm-up is n / W where C > 0, so that the first step learns nothing; ours is the same for every C.)
    """
    warmup, last = config.warmup_steps, steps - config.constant_steps

    def schedule(step: jax.Array) -> jax.Array:
        n = jnp.asarray(step, jnp.float32)
        rising = config.lr * (n + 1) / (warmup + 1)
        progress = jnp.clip((n - warmup) / max(last - warmup, 1), 0, 1)
        falling = config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(n <= warmup, rising, falling)

    return schedule


def decay_mask(params: Any) -> Any:
    """True for matrices and tables, False for norms, biases and the class token: those are never decayed."""

    def decays(path: tuple, _: Any) -> bool:
        name = path[-1].key
        return "bias" not in name and name not in ("scale", "class_token")

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam (fp32 moments), decoupled weight decay, learning rate: in this order."""
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )
