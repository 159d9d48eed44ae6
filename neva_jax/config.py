"""The configuration: its schema, and the numbers that follow from it.

A run is described by frozen dataclasses; `configfile.py` makes them from a YAML file and overrides, `checks.py` finds
what contradicts itself. `docs/configuration.md` is generated from the sentences below.
"""

# ruff: noqa: RUF009 (`key` makes a dataclass field)

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal


def key(default: Any, doc: str) -> Any:
    """A field of the schema with its default and the sentence that documents it."""
    if isinstance(default, list | tuple):
        return field(default_factory=lambda: list(default), metadata={"doc": doc})
    if isinstance(default, type):
        return field(default_factory=default, metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and how it starts."""

    dir: str | None = key(None, "Directory of the run: config, metrics, plots and checkpoints are written here.")
    seed: int = key(1234, "Seed of the data order and of every random initialisation.")
    resume: Literal["auto", "never", "must"] = key(
        "auto",
        "`auto` continues from the newest checkpoint in `run.dir` if there is one; `must` needs one; `never` refuses "
        "to start where there is one.",
    )
    allow_fallback: bool = key(
        False, "Where the newest checkpoint is damaged, continue from the newest good one (`--allow-fallback`)."
    )
    allow_changed: list[str] = key(
        [], "Keys that may differ from the run that is continued although they change it (`--allow-changed KEY`)."
    )
    compile_cache: str | None = key(
        None,
        "Folder of compiled programs, shared by all runs; null: neva_jax/compiled in $XDG_CACHE_HOME, else in "
        "~/.cache; `off`: none.",
    )


@dataclass(frozen=True)
class VisionConfig:
    """The vision transformer, CLIP's or SigLIP's. The defaults are CLIP ViT-L/14 at 224 px."""

    kind: Literal["clip", "siglip"] = key(
        "clip", "`clip`: a class token, and a norm before the layers; `siglip`: neither, but a bias on the patches."
    )
    image_size: int = key(224, "Side of the square image that the encoder sees, in pixels.")
    patch_size: int = key(14, "Side of a patch, in pixels.")
    hidden_size: int = key(1024, "Width of the encoder.")
    intermediate_size: int = key(4096, "Width inside the MLP.")
    num_layers: int = key(24, "Number of transformer layers.")
    num_heads: int = key(16, "Number of attention heads.")
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = key("quick_gelu", "Activation of the MLP.")
    norm_eps: float = key(1e-5, "Epsilon of the layer norms.")
    position_image_size: int | None = key(
        None,
        "Image size that the position table is made for; where it is not `image_size`, the table is interpolated "
        "(bicubic). null: `image_size`.",
    )
    select_layer: int = key(-2, "Whose output feeds the projector: -1 is the last layer, -2 the one before it.")
    select_feature: Literal["patch", "cls_patch"] = key(
        "patch", "`patch` drops the class token, `cls_patch` keeps it as an image token."
    )
    image_mean: list[float] = key([0.48145466, 0.4578275, 0.40821073], "Mean of each channel, for values in 0..1.")
    image_std: list[float] = key([0.26862954, 0.26130258, 0.27577711], "Standard deviation of each channel.")
    position_init_std: float = key(
        0.02,
        "Standard deviation of a random position table (CLIP's own: 0.02). A random encoder that stays frozen needs a "
        "larger one: nothing can learn later where a patch lies if its features do not tell.",
    )
    freeze: bool = key(True, "Keep the encoder's weights as they are.")


@dataclass(frozen=True)
class ProjectorConfig:
    """The projector from image features to the language model's embeddings."""

    kind: str = key(
        "mlp2x_gelu",
        "`linear` (LLaVA 1.0, NeVA), `mlp2x_gelu` (LLaVA 1.5; any number of layers), `identity`, or `mlp_downsample` "
        "(2 x 2 neighbouring patches become one token).",
    )
    newline: bool = key(False, "A learned embedding at the end of each row of an `anyres` image (LLaVA-NeXT).")
    freeze: bool = key(False, "Keep the projector's weights as they are.")


@dataclass(frozen=True)
class LlmConfig:
    """The language model: Llama, Mistral, Qwen2 and their like. The defaults are Llama-2 7B."""

    vocab_size: int | None = key(None, "Number of token ids; null takes the tokenizer's size.")
    vocab_multiple: int = key(
        1, "The embedding's rows are padded up to a multiple of this (NeVA: 128 x tensor size); padded ids never win."
    )
    hidden_size: int = key(4096, "Width of the residual stream.")
    intermediate_size: int = key(11008, "Width inside the SwiGLU MLP.")
    num_layers: int = key(32, "Number of transformer layers.")
    num_heads: int = key(32, "Number of query heads.")
    num_kv_heads: int | None = key(None, "Number of key and value heads (NeMo: num_query_groups); null: num_heads.")
    head_dim: int | None = key(None, "Width of a head; null: hidden_size / num_heads.")
    rope_base: float = key(10000.0, "Base of the rotary position embedding.")
    rope_fraction: float = key(1.0, "Part of a head's width that is rotated (NeMo: rotary_percentage).")
    rope_scaling: Literal["none", "linear", "dynamic", "llama3"] = key(
        "none", "How the rotary embedding is stretched to longer rows (NeMo: seq_len_interpolation_factor is `linear`)."
    )
    rope_factor: float = key(1.0, "By how much it is stretched.")
    rope_original_length: int = key(
        8192,
        "`dynamic` and `llama3`: the length that the model was first trained with (Hugging Face: "
        "max_position_embeddings for `dynamic`, original_max_position_embeddings for `llama3`).",
    )
    rope_low_freq_factor: float = key(1.0, "`llama3`: waves longer than original length / this are stretched in full.")
    rope_high_freq_factor: float = key(4.0, "`llama3`: waves shorter than original length / this stay as they are.")
    sliding_window: int | None = key(None, "A token sees this many tokens, itself included (Mistral); null: all.")
    qkv_bias: bool = key(False, "Biases on queries, keys and values (Qwen2).")
    o_bias: bool = key(False, "A bias on the attention's output projection.")
    mlp_bias: bool = key(False, "Biases in the MLP.")
    norm_eps: float = key(1e-5, "Epsilon of the RMS norms.")
    tie_embeddings: bool = key(False, "Use the input embedding as the output head.")
    init_std: float = key(0.02, "Standard deviation of random weights (NeMo: init_method_std).")
    scaled_output_init: bool = key(
        False, "Random output projections of attention and MLP get init_std / sqrt(2 x num_layers), as NeMo's."
    )
    hidden_dropout: float = key(
        0.0,
        "Training zeroes this part of the embeddings (image features among them) and of what attention and MLP add.",
    )
    attention_dropout: float = key(
        0.0, "Training zeroes this part of the attention weights; model.attention=xla alone can, and `auto` takes it."
    )
    ffn_dropout: float = key(0.0, "Training zeroes this part of what enters the MLP's output projection.")
    freeze: bool = key(False, "Keep the language model's weights as they are.")


@dataclass(frozen=True)
class ModelConfig:
    """The model and where its starting weights come from."""

    tokenizer: str | None = key(
        None, "Tokenizer file: SentencePiece's tokenizer.model, or Hugging Face's tokenizer.json."
    )
    init_from: str | None = key(
        None, "Checkpoint (a run's directory or one of its steps) that supplies the starting weights; null: random."
    )
    init_parts: list[str] = key(
        ["vision", "projector", "llm"], "Components that `model.init_from` supplies; the others start at random."
    )
    init_ema: bool = key(False, "Take the averaged weights (`optimizer.ema_decay`) of `model.init_from`.")
    init_partial: bool = key(
        False, "Parameters that `model.init_from` lacks, or has in another shape, start at random; a table says which."
    )
    allow_random_frozen: bool = key(
        False, "Permit frozen parts without weights from `model.init_from`: they stay random, as in the quickstart."
    )
    attention: Literal["auto", "xla", "cudnn", "te"] = key(
        "auto",
        "Attention kernel; `auto` takes the fastest that can mask the batch: for bf16 on an NVIDIA GPU cuDNN, and "
        "Transformer Engine's ragged one for packed rows; XLA elsewhere.",
    )
    vision: VisionConfig = key(VisionConfig, "")
    projector: ProjectorConfig = key(ProjectorConfig, "")
    llm: LlmConfig = key(LlmConfig, "")


@dataclass(frozen=True)
class SourceConfig:
    """One source of rows: `json` and `images`, or `records`."""

    json: str = key(
        "",
        "LLaVA JSON (a list of `{id, image, conversations: [{from, value}]}`), JSON lines, NeVA's SteerLM lines; "
        "`.gz` too.",
    )
    images: str | None = key(
        None, "The images that rows name: a folder, a `.tar` or a Parquet file; null only if no row has one."
    )
    records: str | None = key(
        None, "Rows and images together, instead of `json`: a TFDS directory, an ArrayRecord or a Parquet file."
    )
    weight: float = key(1.0, "How often each row is seen in an epoch; 0.5 takes a different half each epoch.")


@dataclass(frozen=True)
class DataConfig:
    """Rows, images and how they become batches."""

    train: list[SourceConfig] = key([], "Sources of training rows.")
    val: list[SourceConfig] = key([], "Sources of validation rows; may be empty.")
    val_fraction: float = key(
        0.0, "Part of the training rows held out for validation instead of `val`, chosen by a hash of their ids."
    )
    sampling: Literal["epochs", "replacement"] = key(
        "epochs",
        "`epochs`: every row comes once before any comes again, as often as its source's weight says; `replacement`: "
        "each sample's source is drawn by weight times rows, and its row at random.",
    )
    template: Literal[
        "plain",
        "v0",
        "v1",
        "llava_v1",
        "v1_mmtag",
        "llama_2",
        "llama_2_long",
        "llama_3",
        "mistral",
        "chatml",
        "nvgpt",
        "nv_dpo",
        "mpt",
        "jinja",
    ] = key(
        "v1",
        "Conversation template (docs/data.md shows each): `plain` for captions, `v1` for Vicuna and LLaVA 1.5; `jinja` "
        "is the one in `chat_template`.",
    )
    chat_template: str | None = key(
        None, "`jinja`: a Jinja file, or a `tokenizer_config.json` that holds the template, with generation markers."
    )
    compat: Literal["none", "neva"] = key(
        "none", "`neva`: the token stream that NeVA published, with its missing BOS and rewritten ids."
    )
    image_position: Literal["in_place", "front"] = key(
        "in_place", "`front` moves a turn's images before its text (NeMo: sep_image_conv_front)."
    )
    max_length: int = key(2048, "Tokens per row, image tokens included.")
    on_long_row: Literal["error", "drop", "truncate_text"] = key(
        "error",
        "A conversation longer than `max_length`: `error` makes it a bad row, `drop` leaves it out, `truncate_text` "
        "cuts its end off, but never through an image. All are counted.",
    )
    length_buckets: list[int] = key(
        [], "Lengths that batches are padded to, the smallest that holds all rows of a batch; `max_length` is added."
    )
    pack: bool = key(False, "Several samples in one row of `max_length`, by a plan made from cached lengths.")
    segments_per_row: int = key(16, "`pack`: most samples in one row.")
    images_per_row: int = key(1, "Most images in one row.")
    image_mode: Literal["square", "pad", "keep", "squash", "anyres"] = key(
        "square",
        "`square`: CLIP's resize and centre crop; `pad`: pad to a square with the mean colour first; `keep`: resize "
        "with its proportions until it fits, and pad (NeVA's `keep`, on a square); `squash`: resize to the square "
        "whatever its proportions (SigLIP's own); `anyres`: the whole image and crops of it on the grid that suits it "
        "best (LLaVA-NeXT).",
    )
    exif_rotate: bool = key(True, "Turn photographs upright, as their EXIF orientation says (LLaVA does not).")
    max_pixels: int = key(40_000_000, "Images of more pixels are refused from their header, before they are decoded.")
    image_grids: list[list[int]] = key(
        [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "`anyres`: the [height, width] that an image may be cut from, multiples of model.vision.image_size.",
    )
    image_start: str | None = key(
        None, "Token before each image, one of the tokenizer's (NeMo's use_im_start_end: `<extra_id_4>`); null: none."
    )
    image_end: str | None = key(None, "Token after each image (NeMo: `<extra_id_5>`); null: none.")
    video_frames: int = key(
        0, "Frames taken of a video, evenly; a shorter one repeats its last (NeMo: num_frames). 0 refuses videos."
    )
    splice_single_frame: Literal["none", "first", "middle", "last"] = key(
        "none", "Take this one frame of a video instead of `video_frames`."
    )
    on_bad_row: Literal["error", "skip"] = key(
        "error", "`error` stops at a broken row or image; `skip` counts it and takes the next good row instead."
    )
    max_bad_fraction: float = key(0.01, "With `skip`: the run stops when more than this fraction of the rows is bad.")
    workers: int = key(8, "Worker processes that load rows; 0 loads in threads of the main process.")
    worker_timeout: float = key(300.0, "Seconds without a batch after which the run stops and says what workers do.")
    cache: str | None = key(
        None, "Folder of row indexes, lengths and plans; null: neva_jax in $XDG_CACHE_HOME, else in ~/.cache."
    )


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged."""

    shape: str = key("data=-1", "Sizes of the axes data, fsdp and tensor; absent ones are 1, one may be -1 (the rest).")
    sequence_parallel: bool = key(
        False,
        "Split the language model's residual stream over `tensor` too: its rows, or their length if they are too few.",
    )
    overlap: bool = key(
        False,
        "With `tensor`: each micro batch goes through the language model in two halves of its rows, and what one half "
        "sends over `tensor` travels while the other is computed.",
    )
    zero1: bool = key(False, "Split the optimizer's moments over `data` too (ZeRO-1).")
    vision_tensor: bool = key(
        True, "Split the vision encoder over `tensor`; `false` gives each device of `tensor` other images instead."
    )


@dataclass(frozen=True)
class Fp8Config:
    """FP8, for `precision.compute` fp8_delayed and fp8_current."""

    backend: Literal["auto", "te", "xla"] = key(
        "auto", "`te`: Transformer Engine; `xla`: plain XLA; `auto`: the first where it is there and runs, else `xla`."
    )
    format: Literal["hybrid", "e4m3"] = key(
        "hybrid", "`hybrid`: gradients in e5m2, all else in e4m3; `e4m3`: everything (NeMo: fp8_hybrid, fp8_e4m3)."
    )
    margin: int = key(0, "`fp8_delayed`: the scale leaves this many powers of two free (NeMo: fp8_margin).")
    amax_history: int = key(
        1024, "`fp8_delayed`: steps whose largest values are remembered (NeMo: fp8_amax_history_len)."
    )
    amax_algorithm: Literal["max", "most_recent"] = key(
        "max", "`fp8_delayed`: which of the remembered values sets the scale (NeMo: fp8_amax_compute_algo)."
    )
    layers: Literal["all", "mlp", "attention"] = key("all", "Which of the language model's linear layers run in FP8.")
    first_layers_bf16: int = key(0, "The first layers of the language model that stay in bf16.")
    last_layers_bf16: int = key(0, "The last layers of the language model that stay in bf16.")
    vision: bool = key(False, "The vision encoder's linear layers in FP8 too, if it is frozen.")
    quantize_frozen: bool = key(
        True, "Frozen weights are quantized once, when they are loaded, instead of in every step."
    )


@dataclass(frozen=True)
class PrecisionConfig:
    """Dtypes. Trained parameters are always fp32 masters."""

    compute: Literal["fp32", "bf16", "fp8_delayed", "fp8_current"] = key("bf16", "Dtype of the matrix products.")
    frozen: Literal["fp32", "bf16"] | None = key(
        None, "Dtype in which frozen weights are stored; null: fp32 for fp32 compute, else bf16."
    )
    fp8: Fp8Config = key(Fp8Config, "")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = key(4650, "Optimizer steps.")
    micro_batch: int = key(16, "Rows per device group and forward pass.")
    global_batch: int = key(128, "Rows per optimizer step; accumulation follows from it, micro_batch and the mesh.")
    remat: Literal["none", "dots", "full"] = key(
        "dots", "Activations kept for the backward pass: all, the matrix products' results, or the layer inputs only."
    )
    remat_method: Literal["uniform", "block"] = key(
        "uniform",
        "`uniform`: groups of `remat_layers` layers, each recomputed from its input; `block`: the first "
        "`remat_layers` layers are recomputed, the others keep all (NeMo: activations_checkpoint_method).",
    )
    remat_layers: int = key(1, "See `remat_method` (NeMo: activations_checkpoint_num_layers).")
    unroll: int = key(
        1,
        "Layers per iteration of the scan over layers. All of them: faster, compiled for longer, and `remat: none` "
        "takes what `dots` takes in a loop (over fsdp: docs/parallelism.md).",
    )
    loss_chunk: int = key(512, "Positions per row whose logits exist at a time.")
    labelled_positions: int | None = key(
        None,
        "Behind the last layer's attention, compute this many positions of a row: the labelled ones. Batches with more "
        "are computed whole, by a program of their own that takes as long to compile. With all layers unrolled. null: "
        "all positions always.",
    )
    constant_prefix: int = key(
        0,
        "Tokens that all rows begin with, as the system text does: with a frozen language model, their keys and values "
        "are computed once. Batches that begin otherwise are computed whole.",
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with decoupled weight decay, and a cosine schedule with warm-up."""

    lr: float = key(2e-3, "Peak learning rate.")
    min_lr: float = key(2e-5, "Learning rate at the end of the cosine and after it.")
    warmup_steps: int = key(140, "Steps of linear warm-up.")
    constant_steps: int = key(0, "Steps at `min_lr` at the end of the run.")
    beta1: float = key(0.9, "Adam's decay of the first moment.")
    beta2: float = key(0.95, "Adam's decay of the second moment.")
    eps: float = key(1e-8, "Adam's epsilon.")
    weight_decay: float = key(0.0, "Decoupled weight decay; norms, biases and other vectors are never decayed.")
    clip_norm: float | None = key(1.0, "Gradients are scaled down to this global norm; null: never.")
    ema_decay: float | None = key(
        None, "Keep an exponential moving average of the trained weights with this decay (NeMo: 0.9999); null: none."
    )
    ema_every: int = key(1, "Steps between updates of the average (NeMo: every_n_steps).")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = key(100, "Steps between checkpoints; the last step is always saved.")
    every_minutes: float | None = key(None, "Minutes after which one is written in any case; null: steps alone count.")
    keep: int | None = key(2, "Checkpoints kept, newest first; null: all.")
    keep_every: int | None = key(None, "Checkpoints at multiples of this step are kept as well; null: none.")
    keep_best: int = key(0, "Checkpoints with the smallest `val_loss` that are kept as well (NeMo: save_top_k).")
    verify: Literal["full", "size", "off"] = key(
        "full", "What is compared with the digest manifest before a checkpoint is used: contents, sizes, or nothing."
    )
    contents: Literal["auto", "trained", "full"] = key(
        "auto",
        "`trained` saves what is trained and refers to `model.init_from` for the rest; `full` saves every weight; "
        "`auto` is `trained` where `model.init_from` supplies the frozen parts, else `full`.",
    )


@dataclass(frozen=True)
class GuardConfig:
    """What stops a run that goes wrong, and how."""

    on_bad: Literal["stop", "rollback"] = key(
        "stop",
        "After `max_bad_steps` steps in a row without finite loss and gradients: `stop`, or `rollback` to the last "
        "checkpoint, to go on with other batches.",
    )
    max_bad_steps: int = key(5, "Such steps in a row that are skipped: they change nothing.")
    max_rollbacks: int = key(2, "Rollbacks after which the run stops all the same.")
    spike_factor: float | None = key(
        None,
        "A step whose loss lies more than this many times the spread (median absolute deviation) of the last "
        "`spike_window` losses above their median is skipped too; null: never.",
    )
    spike_window: int = key(128, "See `spike_factor`.")
    step_timeout: float | None = key(
        1800.0,
        "Seconds without a completed step, compiling included, after which the run says where it hangs and ends; "
        "null: never.",
    )
    peer_timeout: float = key(60.0, "Seconds after which the other processes of a run end when one has died.")


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training."""

    every: int = key(100, "Steps between validations.")
    batches: int = key(50, "Global batches per validation, at most one pass over `data.val`.")


@dataclass(frozen=True)
class LogConfig:
    """Logging. `metrics.jsonl`, `log.txt` and `plots/loss.png` are always written."""

    every: int = key(10, "Steps between logged rows.")
    tensorboard: bool = key(True, "Write TensorBoard event files.")
    wandb: Literal["off", "online", "offline"] = key("off", "Weights & Biases, if the package is installed.")
    wandb_project: str = key("neva_jax", "W&B project.")
    wandb_name: str | None = key(None, "W&B run name; null: the name of `run.dir`.")


@dataclass(frozen=True)
class ProfileConfig:
    """A trace by jax.profiler, written to `RUN/profile`."""

    start_step: int | None = key(None, "First step of the trace; null: no trace.")
    steps: int = key(3, "Steps in the trace.")


@dataclass(frozen=True)
class Config:
    """Everything that a run needs to be told."""

    run: RunConfig = key(RunConfig, "")
    model: ModelConfig = key(ModelConfig, "")
    data: DataConfig = key(DataConfig, "")
    mesh: MeshConfig = key(MeshConfig, "")
    precision: PrecisionConfig = key(PrecisionConfig, "")
    train: TrainConfig = key(TrainConfig, "")
    optimizer: OptimizerConfig = key(OptimizerConfig, "")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "")
    guard: GuardConfig = key(GuardConfig, "")
    eval: EvalConfig = key(EvalConfig, "")
    log: LogConfig = key(LogConfig, "")
    profile: ProfileConfig = key(ProfileConfig, "")


COMPONENTS = ("vision", "projector", "llm")
MESH_AXES = ("data", "fsdp", "tensor")


def walk(schema: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every leaf of the schema as (dotted key, dataclass field), in order."""
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(item.type):
            yield from walk(item.type, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item


def lookup(config: Any, name: str) -> Any:
    """The value of a dotted key."""
    for part in name.split("."):
        config = getattr(config, part)
    return config
