"""Hugging Face's tensors and ours: one table, used in both directions.

A row says how one parameter of our tree is called there, its shape there, and how the axes move:

    ours = theirs.transpose(axes).reshape(ours)          for each of L layers: ours [L, ...], theirs `layers.{}`

Names here are those within a component (vision encoder, projector, language model); `sort_names` takes off what
stands before them, which differs from one generation of files to the next. Torch stores a linear layer as [out, in],
ours is [in, out]. D width, H heads, G key/value heads, K head width, F MLP width, E width of the image features.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neva_jax.config import LlmConfig, ModelConfig, ProjectorConfig, VisionConfig
from neva_jax.derived import head_dim, kv_heads, projector_layers
from neva_jax.errors import UserError
from neva_jax.interop.tensors import Tensor, Tensors


@dataclass(frozen=True)
class Parameter:
    """One row of the table.

    path: where it stands in the component's tree.
    name: Hugging Face's name, `{}` for the layer.
    shape: Hugging Face's shape, of one layer.
    axes, ours: see above; `ours` is the shape of one layer.
    layers: L, or None where it is not stacked.
    vocabulary: its first axis there is the vocabulary, which may grow.
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    ours: tuple[int, ...]
    layers: int | None = None
    vocabulary: bool = False

    def names(self) -> list[str]:
        """Hugging Face's names, layer by layer."""
        return [self.name.format(layer) for layer in range(self.layers or 1)]

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """One layer's tensor in our layout."""
        return np.ascontiguousarray(theirs.transpose(self.axes)).reshape(self.ours)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """One layer of ours in Hugging Face's layout."""
        moved = ours.reshape([self.shape[axis] for axis in self.axes])
        return np.ascontiguousarray(moved.transpose(np.argsort(self.axes)))


def _linear(path: str, name: str, ours: tuple[int, ...], inputs: int = 1, layers: int | None = None) -> Parameter:
    """A linear layer's weight: the first `inputs` of our axes are what Torch has as its second."""
    theirs = (math.prod(ours[inputs:]), math.prod(ours[:inputs]))
    return Parameter(tuple(path.split(".")), name, theirs, (1, 0), ours, layers)


def _plain(path: str, name: str, ours: tuple[int, ...], layers: int | None = None) -> Parameter:
    """A vector (or a table), perhaps split into heads here."""
    theirs = (math.prod(ours),) if path.endswith("bias") else ours
    return Parameter(tuple(path.split(".")), name, theirs, tuple(range(len(theirs))), ours, layers)


def llm_parameters(c: LlmConfig, rows: int) -> list[Parameter]:
    """The language model (Llama, Mistral, Qwen2); `rows` of the embedding in the file."""
    d, h, g, k, f = c.hidden_size, c.num_heads, kv_heads(c), head_dim(c), c.intermediate_size

    def layer(path: str, name: str, ours: tuple[int, ...], inputs: int = 1) -> Parameter:
        name = f"model.layers.{{}}.{name}"
        if name.endswith("bias") or len(ours) == 1:
            return _plain(f"layers.{path}", name, ours, c.num_layers)
        return _linear(f"layers.{path}", name, ours, inputs, c.num_layers)

    table = [
        Parameter(("embedding",), "model.embed_tokens.weight", (rows, d), (0, 1), (rows, d), vocabulary=True),
        layer("attention_norm.scale", "input_layernorm.weight", (d,)),
        layer("q", "self_attn.q_proj.weight", (d, h, k)),
        layer("k", "self_attn.k_proj.weight", (d, g, k)),
        layer("v", "self_attn.v_proj.weight", (d, g, k)),
        layer("o", "self_attn.o_proj.weight", (h, k, d), inputs=2),
        layer("mlp_norm.scale", "post_attention_layernorm.weight", (d,)),
        layer("gate", "mlp.gate_proj.weight", (d, f)),
        layer("up", "mlp.up_proj.weight", (d, f)),
        layer("down", "mlp.down_proj.weight", (f, d)),
        _plain("norm.scale", "model.norm.weight", (d,)),
    ]
    if c.qkv_bias:
        table += [layer(f"{n}_bias", f"self_attn.{n}_proj.bias", (h if n == "q" else g, k)) for n in "qkv"]
    if c.o_bias:
        table.append(layer("o_bias", "self_attn.o_proj.bias", (d,)))
    if c.mlp_bias:
        table += [layer(f"{n}_bias", f"mlp.{n}_proj.bias", (d if n == "down" else f,)) for n in ("gate", "up", "down")]
    if not c.tie_embeddings:
        table.append(Parameter(("head",), "lm_head.weight", (rows, d), (1, 0), (d, rows), vocabulary=True))
    return table


def vision_parameters(c: VisionConfig) -> list[Parameter]:
    """The vision encoder, CLIP's or SigLIP's, with all layers and the final norm."""
    d, h, f, p, count = c.hidden_size, c.num_heads, c.intermediate_size, c.patch_size, c.num_layers
    clip = c.kind == "clip"
    positions = ((c.position_image_size or c.image_size) // p) ** 2 + clip

    def norm(path: str, name: str, layers: int | None = None) -> list[Parameter]:
        return [
            Parameter((*path.split("."), ours), f"{name}.{theirs}", (d,), (0,), (d,), layers)
            for ours, theirs in (("scale", "weight"), ("bias", "bias"))
        ]

    def layer(path: str, name: str, ours: tuple[int, ...], bias: tuple[int, ...], inputs: int = 1) -> list[Parameter]:
        path, name = f"layers.{path}", f"encoder.layers.{{}}.{name}"
        return [
            _linear(path, f"{name}.weight", ours, inputs, count),
            _plain(f"{path}_bias", f"{name}.bias", bias, count),
        ]

    patch = "embeddings.patch_embedding"
    table = [
        Parameter(("patch",), f"{patch}.weight", (d, 3, p, p), (2, 3, 1, 0), (p * p * 3, d)),
        _plain("position", "embeddings.position_embedding.weight", (positions, d)),
        *norm("layers.attention_norm", "encoder.layers.{}.layer_norm1", count),
        *layer("q", "self_attn.q_proj", (d, h, d // h), (h, d // h)),
        *layer("k", "self_attn.k_proj", (d, h, d // h), (h, d // h)),
        *layer("v", "self_attn.v_proj", (d, h, d // h), (h, d // h)),
        *layer("o", "self_attn.out_proj", (h, d // h, d), (d,), inputs=2),
        *norm("layers.mlp_norm", "encoder.layers.{}.layer_norm2", count),
        *layer("up", "mlp.fc1", (d, f), (f,)),
        *layer("down", "mlp.fc2", (f, d), (d,)),
        *norm("post_norm", "post_layernorm"),
    ]
    if clip:
        table += [_plain("class_token", "embeddings.class_embedding", (d,)), *norm("pre_norm", "pre_layrnorm")]
    else:
        table.append(_plain("patch_bias", f"{patch}.bias", (d,)))
    return table


def projector_parameters(c: ProjectorConfig, e: int, d: int) -> list[Parameter]:
    """The projector from E to D; its linear layers are called `linear_1`, `linear_2`, … whatever the file says."""
    table = []
    if c.kind == "mlp_downsample":
        e = 4 * e
        table += [_plain("norm.scale", "norm.weight", (e,)), _plain("norm.bias", "norm.bias", (e,))]
    for i in range(1, projector_layers(c.kind) + 1):
        table.append(_linear(f"kernel_{i}", f"linear_{i}.weight", (e if i == 1 else d, d)))
        table.append(Parameter((f"bias_{i}",), f"linear_{i}.bias", (d,), (0,), (d,)))
    if c.newline:
        table.append(_plain("newline", "image_newline", (d,)))
    return table


def parameters(component: str, model: ModelConfig, rows: int) -> list[Parameter]:
    """The table of one component; `rows` of the embedding in the file."""
    if component == "vision":
        return vision_parameters(model.vision)
    if component == "projector":
        return projector_parameters(model.projector, model.vision.hidden_size, model.llm.hidden_size)
    return llm_parameters(model.llm, rows)


# --- names in files --------------------------------------------------------------------------------------------------

VISION_PARTS = "embeddings|encoder|pre_layrnorm|post_layernorm"
PATTERNS = (  # component, pattern of the whole name with the part that stays in brackets
    ("vision", rf"(?:model\.)?(?:vision_tower\.)*(?:vision_model\.)?((?:{VISION_PARTS})\..*)"),
    ("projector", r"(?:.*\.)?(?:multi_modal_projector|mm_projector)\.(.*)"),
    ("projector", r"(?:model\.)?(image_newline)"),
    ("llm", r"(?:language_model\.|model\.language_model\.|)(?:model\.)?((?:embed_tokens|layers|norm)\..*)"),
    ("llm", r"(?:language_model\.|model\.)?(lm_head\..*)"),
)
UNUSED = (  # pattern of the whole name, why it is left out
    (r".*rotary_emb\.inv_freq", "computed from the configuration"),
    (r".*\.position_ids", "0, 1, 2, …"),
    (r"(?:.*\.)?(?:vision_tower\.|vision_model\.)*head\..*", "SigLIP's pooling, which no image token passes"),
    (r"text_model\..*|(?:text|visual)_projection\..*|logit_(?:scale|bias)", "CLIP's and SigLIP's text side"),
)


def sort_names(tensors: Tensors) -> dict[str, Tensors]:
    """Component -> its tensors under the names of the tables above.

    Raises:
      UserError: a tensor of another kind, or two that mean the same.
    """
    found: dict[str, Tensors] = {"vision": {}, "projector": {}, "llm": {}}
    for name, tensor in tensors.items():
        if any(re.fullmatch(pattern, name) for pattern, _ in UNUSED):
            continue
        matches = ((component, re.fullmatch(pattern, name)) for component, pattern in PATTERNS)
        component, match = next(((c, m) for c, m in matches if m), (None, None))
        if match is None:
            raise UserError(f"{tensor}: is of no model that can be converted; its name is not known")
        inner = match[1]
        if component == "llm" and not inner.startswith("lm_head"):
            inner = f"model.{inner}"
        if inner in found[component]:
            raise UserError(f"{tensor}: and {found[component][inner].name} are the same parameter")
        found[component][inner] = tensor
    found["projector"] = _projector_names(found["projector"])
    return found


def _projector_names(tensors: Tensors) -> Tensors:
    """LLaVA's names (`0.weight`, `2.weight`, …; `weight` of a single layer; VILA's `layers.1` … 4) as the table's."""
    plain = {name.removeprefix("layers."): tensor for name, tensor in tensors.items()}
    numbers = sorted({int(name.split(".")[0]) for name in plain if name.split(".")[0].isdigit()})
    if numbers == [1, 2, 4]:
        renamed = {1: "norm", 2: "linear_1", 4: "linear_2"}
    else:
        renamed = {number: f"linear_{i + 1}" for i, number in enumerate(numbers)}
    named = {}
    for name, tensor in plain.items():
        first, _, rest = name.partition(".")
        if first.isdigit():
            name = f"{renamed[int(first)]}.{rest}"
        elif name in ("weight", "bias"):
            name = f"linear_1.{name}"
        named[name] = tensor
    return named


def projector_kind(tensors: Tensors, file: Path | str) -> str:
    """The kind of a projector, from the original names of its tensors.

    Raises:
      UserError: they are of none.
    """
    layers = sum(bool(re.fullmatch(r"linear_\d+\.weight", name)) for name in tensors)
    if "norm.weight" in tensors:
        return "mlp_downsample"
    if not layers:
        raise UserError(f"{file}: holds no projector (no tensor mm_projector.* or multi_modal_projector.*)")
    numbered = any(re.search(r"projector\.(layers\.)?0\.", t.name) or "linear_1" in t.name for t in tensors.values())
    return f"mlp{layers}x_gelu" if numbered else "linear"


def check_tensors(
    table: Iterable[Parameter], tensors: Tensors, origin: str, ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Compares the table's names, shapes and dtypes with those of the files, before any weight is read.

    Raises:
      UserError: a tensor is missing, too many, of another shape, or of a dtype that is no float of 16 or 32 bits.
    """
    expected = {name: parameter for parameter in table for name in parameter.names()}
    if missing := [name for name in expected if name not in tensors]:
        more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
        raise UserError(f"{origin}: tensor {missing[0]}{more} is missing, which the config.json asks for")
    for name, tensor in tensors.items():
        if name in ignored:
            continue
        if name not in expected:
            raise UserError(f"{tensor}: is not part of the model that the config.json describes")
        if tensor.shape != expected[name].shape:
            raise UserError(f"{tensor}: has shape {tensor.shape}, but the config.json asks for {expected[name].shape}")
        if tensor.dtype not in ("F32", "F16", "BF16"):
            raise UserError(f"{tensor}: is {tensor.dtype}; only F32, F16 and BF16 can be converted")
    return tensors
