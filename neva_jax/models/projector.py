"""The projector from image features to the language model's embedding space.

mlp_downsample joins 2 x 2 neighbours; with an odd side a row and a column of zeros are added:

    a b c        a b e f | c 0 g 0          4 tokens of 4 E features
    e f g   ->   --------+--------
    i j k        i j 0 0 | k 0 0 0

N tiles, P patches (n x n), E width of the features, D hidden size of the language model.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from neva_jax.config import ProjectorConfig
from neva_jax.derived import projector_layers
from neva_jax.models.layers import LayerNorm, normal, param, uniform
from neva_jax.parallel.mesh import constrain

NORM_EPS = 1e-5  # torch.nn.LayerNorm's default


class Projector(nnx.Module):
    """`linear`: one layer with bias. `mlpNx_gelu`: N layers with exact GELU between them (LLaVA 1.5: N = 2).

    `identity`: none. `mlp_downsample`: 2 x 2 neighbours, LayerNorm, Linear, GELU, Linear (VILA, NeVA).
    """

    def __init__(self, rngs: nnx.Rngs | None, config: ProjectorConfig, in_dim: int, out_dim: int, dtype: jnp.dtype):
        self.layers = projector_layers(config.kind)
        if config.kind == "mlp_downsample":
            in_dim = 4 * in_dim
            self.norm = LayerNorm(rngs, in_dim, NORM_EPS)
        # torch.nn.Linear's initialisation, as LLaVA and NeVA use it: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), bias too.
        for i in range(self.layers):
            fan_in = out_dim if i else in_dim
            axes = self._axes(i)
            setattr(self, f"kernel_{i + 1}", param(rngs, (fan_in, out_dim), axes, uniform(fan_in**-0.5)))
            bias_axes = ("mlp",) if axes[1] == "mlp" else ("norm",)
            setattr(self, f"bias_{i + 1}", param(rngs, (out_dim,), bias_axes, uniform(fan_in**-0.5)))
        if config.newline:
            self.newline = param(rngs, (out_dim,), ("norm",), normal(out_dim**-0.5))
        self.kind, self.has_newline, self.dtype = config.kind, config.newline, dtype

    def _axes(self, i: int) -> tuple[str | None, str | None]:
        """Layers in pairs: the first of a pair is split by its outputs, the second by its inputs; an odd one is not."""
        if i == self.layers - 1 and i % 2 == 0:
            return "embed", None
        return ("mlp", "embed") if i % 2 else ("embed", "mlp")

    def __call__(self, features: jax.Array) -> jax.Array:
        """[N, P, E] -> [N, P, D] (after mlp_downsample a quarter of the P) in the compute dtype."""
        x = features.astype(self.dtype)
        if self.kind == "mlp_downsample":
            x = self.norm(join_neighbours(x))
        for i in range(self.layers):
            if i:
                x = jax.nn.gelu(x, approximate=False)
            kernel, bias = getattr(self, f"kernel_{i + 1}")[...], getattr(self, f"bias_{i + 1}")[...]
            x = jnp.einsum("npe,ed->npd", x, kernel.astype(self.dtype)) + bias.astype(self.dtype)
            x = constrain(x, "batch", "length", "mlp" if self._axes(i)[1] == "mlp" else "features")
        return x


def join_neighbours(x: jax.Array) -> jax.Array:
    """[N, n*n, E] -> [N, m*m, 4E] with m = ceil(n / 2): 2 x 2 neighbours (see the drawing above).

    Tokens come row by row, as in NeMo 2 and today's VILA; VILA's first version gave them column by column.
    """
    count, patches, width = x.shape
    side = round(patches**0.5)
    x = jnp.pad(x.reshape(count, side, side, width), ((0, 0), (0, side % 2), (0, side % 2), (0, 0)))
    half = x.shape[1] // 2
    x = x.reshape(count, half, 2, half, 2, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(count, half * half, 4 * width)
