"""The whole model: images -> ViT -> projector, spliced into the token embeddings -> Llama.

slots   -1  -1   0   1  -2   2   3  -2  -1      (image_slots: -1 = text, -2 = end of a row of tiles, else k*P + p)
tokens   1  45   0   0   0   0   0   0  87      (what stands at an image slot is not read)
input    e   e   f   f   n   f   f   n   e      (e: token embedding, f: projected feature p of tile k, n: newline)

B rows, T tokens, K tiles per row (an image is one or several), P tokens per tile, S side in pixels, D hidden size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.config import MeshConfig, ModelConfig, PrecisionConfig
from neva_jax.models.attention import choose_backends
from neva_jax.models.layers import NO_REMAT, Remat
from neva_jax.models.llama import Llama
from neva_jax.models.llama_layer import LayerCache
from neva_jax.models.projector import Projector
from neva_jax.models.vision import Vision
from neva_jax.parallel.mesh import constrain
from neva_jax.precision import fp8
from neva_jax.precision.fp8_recipe import Recipe
from neva_jax.precision.policy import compute_dtype

NEWLINE_SLOT = -2


class Neva(nnx.Module):
    """A LLaVA-style vision-language model: `vision`, `projector`, `llm`."""

    def __init__(
        self,
        rngs: nnx.Rngs | None,
        config: ModelConfig,
        precision: PrecisionConfig,
        remat: Remat = NO_REMAT,
        unroll: int = 1,
        mesh: MeshConfig = MeshConfig(),  # noqa: B008 (it is frozen)
        recipe: Recipe | None = None,
        segments: int = 1,
        devices: int = 1,
    ):
        """recipe: of FP8; segments: most in a packed row, padding as one (1: never packed); devices: of the mesh."""
        dtype = compute_dtype(precision)
        # No gradient flows into a frozen encoder, so it has nothing to recompute.
        vision_remat = NO_REMAT if config.vision.freeze else remat
        backends = choose_backends(config, dtype, segments, devices)
        vision_recipe = recipe if recipe is not None and recipe.vision else None
        self.vision = Vision(
            rngs, config.vision, dtype, vision_remat, mesh.vision_tensor, backends.vision, vision_recipe
        )
        self.projector = Projector(rngs, config.projector, config.vision.hidden_size, config.llm.hidden_size, dtype)
        self.llm = Llama(rngs, config.llm, dtype, backends, remat, unroll, mesh, recipe)

    def image_features(self, images: jax.Array) -> jax.Array:
        """images [B, K, S, S, 3] uint8 -> [B, K*P, D]."""
        b, k = images.shape[:2]
        features = self.projector(self.vision(images.reshape(b * k, *images.shape[2:])))
        return constrain(features.reshape(b, -1, features.shape[-1]), "batch", "length", "features")

    def embed(self, tokens: jax.Array, images: jax.Array, image_slots: jax.Array) -> jax.Array:
        """Token embeddings [B, T, D] with the projected image features at their slots."""
        text = self.llm.embed(tokens)
        features = self.image_features(images)
        spliced = jnp.take_along_axis(features, jnp.maximum(image_slots, 0)[:, :, None], axis=1)
        x = constrain(jnp.where(image_slots[:, :, None] >= 0, spliced, text), "batch", "length", "features")
        if not self.projector.has_newline:
            return x
        return jnp.where(image_slots[:, :, None] == NEWLINE_SLOT, self.projector.newline[...].astype(x.dtype), x)

    def __call__(
        self,
        batch: dict[str, jax.Array],
        packed: bool = False,
        cache: LayerCache | None = None,
        rng: jax.Array | None = None,
        states: fp8.State | None = None,
        prefix: LayerCache | None = None,
        wanted: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Hidden states of a batch.

        Args:
          batch: `tokens`, `positions`, `segment_ids`, `image_slots` [B, T] i32 and `images` [B, K, S, S, 3] uint8.
          packed: rows may hold several segments; otherwise `segment_ids` is not read.
          cache: keys and values to extend; None in training.
          rng: the key of the language model's dropout; None: no dropout.
          states: what the FP8 layers remember; None or {} where they need nothing.
          prefix, wanted: tokens before the batch's, and the positions that are asked for, as in `Llama`.

        Returns:
          (hidden [B, T, D], or [B, N, D] with `wanted`, ready for `llm.logits`; the extended cache or None)
        """
        x = self.embed(batch["tokens"], batch["images"], batch["image_slots"])
        segment_ids = batch["segment_ids"] if packed else None
        return self.llm(x, batch["positions"], segment_ids, cache, rng, states, prefix, wanted)


def abstract_model(
    config: ModelConfig,
    precision: PrecisionConfig,
    remat: Remat = NO_REMAT,
    unroll: int = 1,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 (it is frozen)
    recipe: Recipe | None = None,
    segments: int = 1,
    devices: int = 1,
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's graph definition, and its parameters as shapes with their logical axes; nothing is allocated."""
    return nnx.split(Neva(None, config, precision, remat, unroll, mesh, recipe, segments, devices))


def random_parameters(config: ModelConfig, precision: PrecisionConfig, rng: jax.Array) -> dict[str, Any]:
    """Freshly initialised fp32 parameters as nested dictionaries; call it under `jit` with `out_shardings`."""
    return nnx.to_pure_dict(nnx.split(Neva(nnx.Rngs(rng), config, precision))[1])
