"""The vision transformer (HF CLIPVisionModel, SiglipVisionModel), up to the layer whose output feeds the projector.

N images, S side in pixels, P patches, D hidden size, H heads, K head width, F MLP width, L layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from neva_jax.config import VisionConfig
from neva_jax.derived import patch_grid
from neva_jax.models.attention import attend
from neva_jax.models.layers import LayerNorm, Remat, normal, param, scan_layers
from neva_jax.parallel.mesh import constrain
from neva_jax.precision import fp8
from neva_jax.precision.fp8_recipe import Recipe

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class VisionBlock(nnx.Module):
    """One pre-norm encoder layer, or a stack of `layers` of them."""

    def __init__(
        self,
        rngs: nnx.Rngs | None,
        config: VisionConfig,
        layers: int | None = None,
        split: bool = True,
        backend: str = "xla",
        recipe: Recipe | None = None,
    ):
        d, h, f = config.hidden_size, config.num_heads, config.intermediate_size
        heads, self.mlp, self.images = ("heads", "mlp", "batch") if split else (None, None, "images")
        k = d // h
        # HF CLIPPreTrainedModel._init_weights
        in_std = d**-0.5 * (2 * config.num_layers) ** -0.5
        out_std = d**-0.5
        zeros = jax.nn.initializers.zeros
        self.attention_norm = LayerNorm(rngs, d, config.norm_eps, layers)
        self.q = param(rngs, (d, h, k), ("embed", heads, "head_dim"), normal(in_std), layers)
        self.k = param(rngs, (d, h, k), ("embed", heads, "head_dim"), normal(in_std), layers)
        self.v = param(rngs, (d, h, k), ("embed", heads, "head_dim"), normal(in_std), layers)
        self.o = param(rngs, (h, k, d), (heads, "head_dim", "embed"), normal(out_std), layers)
        self.q_bias = param(rngs, (h, k), (heads, "head_dim"), zeros, layers)
        self.k_bias = param(rngs, (h, k), (heads, "head_dim"), zeros, layers)
        self.v_bias = param(rngs, (h, k), (heads, "head_dim"), zeros, layers)
        self.o_bias = param(rngs, (d,), ("norm",), zeros, layers)
        self.mlp_norm = LayerNorm(rngs, d, config.norm_eps, layers)
        self.up = param(rngs, (d, f), ("embed", self.mlp), normal((2 * d) ** -0.5), layers)
        self.up_bias = param(rngs, (f,), (self.mlp,), zeros, layers)
        self.down = param(rngs, (f, d), (self.mlp, "embed"), normal(in_std), layers)
        self.down_bias = param(rngs, (d,), ("norm",), zeros, layers)
        self.activation, self.backend, self.recipe = config.activation, backend, recipe

    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, P + 1, D] -> [N, P + 1, D]."""
        dtype = x.dtype

        def product(equation: str, x: jax.Array, kernel: nnx.Param, bias: nnx.Param, inputs: int = 1) -> jax.Array:
            weight = kernel[...].astype(dtype)
            if self.recipe is None:
                y = jnp.einsum(equation, x, weight)
            else:
                y = fp8.linear(self.recipe, x, weight, {}, inputs=inputs)
            return y + bias[...].astype(dtype)

        with jax.named_scope("vision_attention"):
            y = self.attention_norm(x)
            q = product("npd,dhk->nphk", y, self.q, self.q_bias)
            k = product("npd,dhk->nphk", y, self.k, self.k_bias)
            v = product("npd,dhk->nphk", y, self.v, self.v_bias)
            attended = attend(q, k, v, causal=False, backend=self.backend)
            x = x + product("nphk,hkd->npd", attended, self.o, self.o_bias, inputs=2)
        with jax.named_scope("vision_mlp"):
            y = product("npd,df->npf", self.mlp_norm(x), self.up, self.up_bias)
            y = constrain(ACTIVATIONS[self.activation](y), self.images, "length", self.mlp)
            x = x + product("npf,fd->npd", y, self.down, self.down_bias)
            return constrain(x, self.images, "length", "features")


class Vision(nnx.Module):
    """Patch and position embedding, pre-norm, and L encoder layers.

    All layers and the final norm are held, as in the checkpoint they come from; those above `select_layer` never run.
    `split`: over the mesh like the language model; otherwise each of the devices that would share an image has its own.
    `backend`: of attention. `recipe`: of its linear layers in FP8, by current scaling.
    """

    def __init__(
        self,
        rngs: nnx.Rngs | None,
        config: VisionConfig,
        dtype: jnp.dtype,
        remat: Remat,
        split: bool = True,
        backend: str = "xla",
        recipe: Recipe | None = None,
    ):
        d, p = config.hidden_size, config.patch_size
        patches = ((config.position_image_size or config.image_size) // p) ** 2
        self.leading = 1 if config.kind == "clip" else 0  # tokens before the patches
        if config.kind == "clip":
            self.class_token = param(rngs, (d,), ("norm",), normal(d**-0.5))
        self.patch = param(rngs, (p * p * 3, d), ("patch", "embed"), normal(0.02))
        if config.kind == "siglip":
            self.patch_bias = param(rngs, (d,), ("norm",), jax.nn.initializers.zeros)
        self.position = param(
            rngs, (patches + self.leading, d), ("position", "embed"), normal(config.position_init_std)
        )
        if config.kind == "clip":
            self.pre_norm = LayerNorm(rngs, d, config.norm_eps)
        self.layers = VisionBlock(rngs, config, config.num_layers, split, backend, recipe)
        self.post_norm = LayerNorm(rngs, d, config.norm_eps)
        self.config, self.dtype, self.remat = config, dtype, remat
        self.images = "batch" if split else "images"

    def __call__(self, images: jax.Array) -> jax.Array:
        """images [N, S, S, 3] uint8 -> features of the patches [N, P, D], row by row from the top left.

        The output of layer L + 1 + select_layer without the final norm (HF vision_feature_layer); the class token goes
        first where select_feature keeps it (HF's strategy `full`), and is dropped otherwise (`default`).
        """
        config, dtype = self.config, self.dtype
        images = constrain(images, self.images, None, None, None)
        mean, std = (np.asarray(values, np.float32) * 255 for values in (config.image_mean, config.image_std))
        pixels = ((images.astype(jnp.float32) - mean) / std).astype(dtype)
        patches = self._patches(pixels)
        x = jnp.einsum("npi,id->npd", patches, constrain(self.patch[...].astype(dtype), None, None))
        if config.kind == "clip":
            first = jnp.broadcast_to(self.class_token[...].astype(dtype), (x.shape[0], 1, x.shape[2]))
            x = self.pre_norm(jnp.concatenate([first, x], axis=1) + self._positions().astype(dtype))
        else:
            x = x + self.patch_bias[...].astype(dtype) + self._positions().astype(dtype)
        x = constrain(x, self.images, "length", "features")
        x, _ = scan_layers(
            self.layers,
            x,
            remat=self.remat,
            span=(0, config.num_layers + 1 + config.select_layer),
            call=lambda layer, x, _: (layer(x), None),
        )
        x = x if config.select_feature == "cls_patch" else x[:, self.leading :]
        return constrain(x, "batch", "length", "features")

    def _positions(self) -> jax.Array:
        """The position table [P (+1), D], interpolated where it was made for another image size."""
        table, old = constrain(self.position[...], None, None), self.config.position_image_size
        if old is None or old == self.config.image_size:
            return table
        resize = cubic_matrix(old // self.config.patch_size, patch_grid(self.config))  # [new, old]
        grid = table[self.leading :].astype(jnp.float32).reshape(resize.shape[1], resize.shape[1], -1)
        grid = jnp.einsum("yi,xj,ijd->yxd", resize, resize, grid).reshape(-1, grid.shape[-1])
        return jnp.concatenate([table[: self.leading].astype(jnp.float32), grid])

    def _patches(self, pixels: jax.Array) -> jax.Array:
        """[N, S, S, 3] -> [N, P, p*p*3]: a patch's pixels row by row, channels last."""
        n, side, _, channels = pixels.shape
        p = self.config.patch_size
        grid = pixels.reshape(n, side // p, p, side // p, p, channels)
        return grid.transpose(0, 1, 3, 2, 4, 5).reshape(n, (side // p) ** 2, p * p * channels)


def cubic_matrix(old: int, new: int) -> np.ndarray:
    """The cubic interpolation of a line of `old` samples to `new`, as a matrix [new, old] f32.

    torch.nn.functional.interpolate(mode="bicubic", align_corners=False): Keys' kernel with a = -0.75, samples beyond
    the ends repeat the last one.
    """
    a = -0.75
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for offset in range(-1, 3):
        sample = np.floor(centre).astype(int) + offset
        t = np.abs(centre - sample)
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        np.add.at(matrix, (np.arange(new), np.clip(sample, 0, old - 1)), np.where(t <= 1, near, far))
    return matrix.astype(np.float32)
