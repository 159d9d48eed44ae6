"""The projector from image features to the language model's embedding space.

N images, P patches, E width of the features, D hidden size of the language model.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.config import ProjectorConfig
from neva_jax.models.layers import param, uniform


class Projector(nnx.Module):
    """`linear`: one layer with bias. `mlp2x_gelu`: Linear, exact GELU, Linear (LLaVA 1.5)."""

    def __init__(self, rngs: nnx.Rngs, config: ProjectorConfig, in_dim: int, out_dim: int, dtype: jnp.dtype):
        # torch.nn.Linear's initialisation, as LLaVA and NeVA use it: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), bias too.
        self.kernel_1 = param(rngs, (in_dim, out_dim), (None, "embed"), uniform(in_dim**-0.5))
        self.bias_1 = param(rngs, (out_dim,), ("norm",), uniform(in_dim**-0.5))
        if config.kind == "mlp2x_gelu":
            self.kernel_2 = param(rngs, (out_dim, out_dim), ("embed", None), uniform(out_dim**-0.5))
            self.bias_2 = param(rngs, (out_dim,), ("norm",), uniform(out_dim**-0.5))
        self.kind, self.dtype = config.kind, dtype

    def __call__(self, features: jax.Array) -> jax.Array:
        """[N, P, E] -> [N, P, D] in the compute dtype."""
        x = features.astype(self.dtype)
        x = jnp.einsum("npe,ed->npd", x, self.kernel_1[...].astype(self.dtype)) + self.bias_1[...].astype(self.dtype)
        if self.kind == "mlp2x_gelu":
            x = jax.nn.gelu(x, approximate=False)
            x = jnp.einsum("npd,de->npe", x, self.kernel_2[...].astype(self.dtype))
            x = x + self.bias_2[...].astype(self.dtype)
        return x
