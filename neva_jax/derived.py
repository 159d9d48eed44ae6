"""Numbers that follow from a configuration."""

import re

from neva_jax.config import COMPONENTS, MESH_AXES, Config, DataConfig, LlmConfig, ModelConfig, TrainConfig, VisionConfig
from neva_jax.errors import UserError


def patch_grid(vision: VisionConfig) -> int:
    """Patches along one side of the image that the encoder sees."""
    return vision.image_size // vision.patch_size


def token_grid(model: ModelConfig) -> int:
    """Image tokens along one side of a tile: its patches, or half as many after `mlp_downsample`."""
    patches = patch_grid(model.vision)
    return -(-patches // 2) if model.projector.kind == "mlp_downsample" else patches


def most_segments(data: DataConfig) -> int:
    """The most segments of a row, padding as one of them; 1: rows are never packed."""
    return data.segments_per_row + 1 if data.pack else 1


def remat_group(train: TrainConfig) -> int:
    """Layers that are recomputed together, from the first one's input: 1 where none are, or each alone."""
    return train.remat_layers if train.remat != "none" and train.remat_method == "uniform" else 1


def rows_at_once(config: Config, tensor: int) -> int:
    """Rows of a micro batch that go through a layer of the language model together, on `tensor` devices."""
    return config.train.micro_batch // 2 if config.mesh.overlap and tensor > 1 else config.train.micro_batch


def all_unrolled(config: Config) -> bool:
    """Whether the language model's layers follow one another without a loop."""
    return config.train.unroll >= config.model.llm.num_layers


def layers_kept_whole(config: Config) -> bool:
    """Whether XLA gathers the language model's layers over fsdp once for both passes, and keeps them in between.

    So it does where all are unrolled, trained, and not computed again; by FP8's casts not (docs/parallelism.md).
    """
    again = config.train.remat != "none" or config.precision.compute.startswith("fp8")
    return all_unrolled(config) and not config.model.llm.freeze and not again


def image_tokens(model: ModelConfig) -> int:
    """P, the number of tokens that one tile takes: its grid, and the class token where it is kept."""
    return token_grid(model) ** 2 + (model.vision.select_feature == "cls_patch")


def projector_layers(kind: str) -> int:
    """Linear layers of a projector; 0 for `identity`.

    Raises:
      UserError: no such kind.
    """
    if kind in ("identity", "linear", "mlp_downsample"):
        return ("identity", "linear", "mlp_downsample").index(kind)
    if match := re.fullmatch(r"mlp([1-9][0-9]*)x_gelu", kind):
        return int(match[1])
    raise UserError(
        f"model.projector.kind={kind}: must be linear, mlp2x_gelu (or another number), identity or mlp_downsample"
    )


def kv_heads(llm: LlmConfig) -> int:
    """G, the number of key and value heads."""
    return llm.num_kv_heads if llm.num_kv_heads is not None else llm.num_heads


def head_dim(llm: LlmConfig) -> int:
    """Width of one head of the language model."""
    return llm.head_dim if llm.head_dim is not None else llm.hidden_size // llm.num_heads


def rotary_width(llm: LlmConfig) -> int:
    """R, the channels of a head that the rotary embedding turns; the rest stay as they are."""
    return int(head_dim(llm) * llm.rope_fraction)


def dropout_seed(config: Config) -> int | None:
    """The seed of the language model's dropout; None where it has none."""
    llm = config.model.llm
    return config.run.seed if llm.hidden_dropout or llm.attention_dropout or llm.ffn_dropout else None


def padded_vocab(llm: LlmConfig) -> int:
    """Rows of the embedding: the vocabulary padded up to a multiple of `vocab_multiple`."""
    return -(-llm.vocab_size // llm.vocab_multiple) * llm.vocab_multiple


def trained_components(model: ModelConfig) -> tuple[str, ...]:
    """Names of the components that are trained, in order."""
    return tuple(name for name in COMPONENTS if not getattr(model, name).freeze)


def frozen_components(model: ModelConfig) -> tuple[str, ...]:
    """Names of the components that are frozen, in order."""
    return tuple(name for name in COMPONENTS if getattr(model, name).freeze)


def parse_mesh_shape(text: str, devices: int) -> dict[str, int]:
    """`data=2,tensor=4` and a number of devices -> sizes of all axes, in the order data, fsdp, tensor.

    Raises:
      UserError: bad syntax, an unknown or repeated axis, more than one -1, or sizes whose product is not `devices`.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in MESH_AXES:
            raise UserError(f"mesh.shape={text}: unknown axis {name!r}; the axes are {', '.join(MESH_AXES)}")
        if name in sizes:
            raise UserError(f"mesh.shape={text}: axis {name} is given twice")
        try:
            sizes[name] = int(number)
        except ValueError:
            raise UserError(f"mesh.shape={text}: {name} needs a whole number, as in data=2,tensor=4") from None
        if sizes[name] < 1 and sizes[name] != -1:
            raise UserError(f"mesh.shape={text}: {name}={sizes[name]} must be at least 1, or -1 for the rest")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh.shape={text}: only one axis may be -1, not {' and '.join(free)}")
    product = 1
    for size in sizes.values():
        product *= 1 if size == -1 else size
    if free and devices % product == 0:
        sizes[free[0]] = devices // product
        product = devices
    if product != devices:
        raise UserError(
            f"mesh.shape={text}: the sizes make {product} devices, but {devices} are there; one axis may be -1 for the "
            "rest, and CUDA_VISIBLE_DEVICES hides GPUs"
        )
    return {name: sizes.get(name, 1) for name in MESH_AXES}


def nearest(size: int, ways: int) -> str:
    """For a size that `ways` devices do not divide: the next sizes that they do, and numbers of devices that do."""
    sizes = [number for number in (size // ways * ways, (size // ways + 1) * ways) if number]
    fewer = max(number for number in range(1, ways) if size % number == 0)
    more = next((number for number in range(ways + 1, size + 1) if size % number == 0), None)
    counts = [fewer] if more is None else [fewer, more]
    return f"{' or '.join(map(str, sizes))} (or an axis of {' or '.join(map(str, counts))})"


def derived_comment(config: Config) -> str:
    """Numbers that follow from the configuration, as YAML comments for `--print-config`."""
    llm, vision = config.model.llm, config.model.vision
    lines = [
        f"image_tokens: {image_tokens(config.model)}   # per tile: {token_grid(config.model)} x "
        f"{token_grid(config.model)}, select_feature {vision.select_feature}, projector {config.model.projector.kind}",
        f"num_kv_heads: {kv_heads(llm)}",
        f"head_dim: {head_dim(llm)}",
        f"trained: {', '.join(trained_components(config.model)) or 'nothing'}",
        f"frozen: {', '.join(frozen_components(config.model)) or 'nothing'}",
    ]
    return "# derived:\n" + "".join(f"#   {line}\n" for line in lines)
