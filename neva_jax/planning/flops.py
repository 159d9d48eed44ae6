"""Floating-point operations of a step, counted by hand (a multiplication and an addition are two).

A product of [M, K] and [K, N] is 2·M·K·N. Its backward pass is two more of that size: one for the gradient of the
operand that came from below ("dgrad"), one for the weight's ("wgrad", not of frozen weights). So per weight and token

    frozen, gradients pass through it      4     forward + dgrad: the language model in pretraining
    trained                                6     forward + dgrad + wgrad (Kaplan et al. 2020, section 2.1)
    frozen, nothing trained below it       2     forward: the frozen encoder

Causal attention counts half of the T x T products (FlashAttention-2's convention, Dao 2023, section 4.1), its backward
pass twice its forward pass. The head counts at labelled positions only, and the table look-up not at all. These are the
model's operations; `recomputed` adds what the hardware does again for the sake of memory.
"""

from dataclasses import dataclass

from neva_jax.config import Config, LlmConfig, VisionConfig
from neva_jax.data.tiles import tiles_per_row
from neva_jax.derived import head_dim, image_tokens, kv_heads, padded_vocab, patch_grid, projector_layers, remat_group


@dataclass(frozen=True)
class Flops:
    """Operations for one row (`data.max_length` tokens, and its images)."""

    llm: float
    head: float
    vision: float
    projector: float
    recomputed: float

    @property
    def model(self) -> float:
        """What the model needs."""
        return self.llm + self.head + self.vision + self.projector

    @property
    def hardware(self) -> float:
        """What the device does."""
        return self.model + self.recomputed


def labelled_positions(config: Config) -> int:
    """Most tokens of a row that can have a label: those that are no image token."""
    return max(config.data.max_length - tiles_per_row(config) * image_tokens(config.model), 1)


def flops_per_row(config: Config, backend: str) -> Flops:
    """Operations for one row; `backend` is that of attention, which says what `dots` computes again."""
    llm, model, train, length = config.model.llm, config.model, config.train, config.data.max_length
    passes = 2 if llm.freeze else 3
    products = 2.0 * length * layer_weights(llm) * llm.num_layers
    attention = 2.0 * length**2 * llm.num_heads * head_dim(llm) * llm.num_layers
    head = 2.0 * llm.hidden_size * padded_vocab(llm) * labelled_positions(config)

    images = tiles_per_row(config)
    vision = images * _vision_forward(model.vision)
    projector = 2.0 * images * image_tokens(model) * projector_weights(config)
    projector_passes = (
        1 + (not model.projector.freeze) + (not model.vision.freeze or projector_layers(model.projector.kind) > 1)
    )

    again = recomputed_fraction(config)
    recomputed = attention * 0.5 if backend != "xla" else 0.0  # the kernel's backward pass computes scores again
    if train.remat == "dots" and backend != "xla":
        recomputed += again * attention  # a kernel's result is no `dot`, so the policy does not save it
    elif train.remat == "full":
        # Nothing reads what the last product of a group adds to the residual stream.
        last = 2.0 * length * llm.intermediate_size * llm.hidden_size * llm.num_layers / remat_group(train)
        recomputed += again * (products + attention - last)
    return Flops(
        llm=passes * products + 3 * attention,
        head=passes * head,
        vision=vision * (1 if model.vision.freeze else 3),
        projector=projector * projector_passes,
        recomputed=recomputed,
    )


def recomputed_fraction(config: Config) -> float:
    """Part of the language model's layers whose forward pass runs again."""
    train = config.train
    if train.remat == "none":
        return 0.0
    return 1.0 if train.remat_method == "uniform" else min(train.remat_layers / config.model.llm.num_layers, 1.0)


def layer_weights(llm: LlmConfig) -> int:
    """Weights of one decoder layer's matrices."""
    d, k = llm.hidden_size, head_dim(llm)
    return 2 * d * llm.num_heads * k + 2 * d * kv_heads(llm) * k + 3 * d * llm.intermediate_size


def projector_weights(config: Config) -> int:
    """Weights of the projector's matrices."""
    kind, out = config.model.projector.kind, config.model.llm.hidden_size
    into = config.model.vision.hidden_size * (4 if kind == "mlp_downsample" else 1)
    layers = projector_layers(kind)
    return into * out + (layers - 1) * out * out if layers else 0


def vision_layers(vision: VisionConfig) -> int:
    """Encoder layers that run: those up to `select_layer`."""
    return vision.num_layers + 1 + vision.select_layer


def vision_tokens(vision: VisionConfig) -> int:
    """Tokens of one image inside the encoder."""
    return patch_grid(vision) ** 2 + (vision.kind == "clip")


def _vision_forward(vision: VisionConfig) -> float:
    d, tokens = vision.hidden_size, vision_tokens(vision)
    layer = 2.0 * tokens * (4 * d * d + 2 * d * vision.intermediate_size) + 4.0 * tokens**2 * d
    return layer * vision_layers(vision) + 2.0 * patch_grid(vision) ** 2 * vision.patch_size**2 * 3 * d
