"""Every check of a configuration that needs no data: a failure is one line with the key and the numbers."""

import math
from pathlib import Path

from neva_jax.config import COMPONENTS, Config, DataConfig, LlmConfig, ModelConfig, SourceConfig, lookup, walk
from neva_jax.data.templates import NEVA
from neva_jax.data.tiles import tiles_per_row
from neva_jax.derived import (
    all_unrolled,
    dropout_seed,
    frozen_components,
    head_dim,
    image_tokens,
    kv_heads,
    nearest,
    padded_vocab,
    projector_layers,
    remat_group,
    rotary_width,
    rows_at_once,
)
from neva_jax.errors import UserError


def check(config: Config) -> None:
    """Every contradiction that can be seen without data, tokenizer or devices.

    Raises:
      UserError: one line that names the key and quotes the numbers.
    """
    for name in ("run.dir", "model.tokenizer", "data.train"):
        if not lookup(config, name):
            raise UserError(f"{name} is not set; give it in --config or as {name}=…")
    check_numbers(config)
    _check_start(config)
    _check_files(config)


def check_numbers(config: Config) -> None:
    """`check` without files: what a plan needs, which nobody has to have data for.

    Raises:
      UserError: one line that names the key and quotes the numbers.
    """
    check_ranges(config)
    _check_model(config.model)
    _check_images(config)
    _check_split(config.data)
    _check_rows(config)
    _check_template(config.data)
    _check_training(config)


def check_data(config: Config) -> None:
    """What concerns rows and images alone: the commands that prepare data need neither a run nor a model.

    Raises:
      UserError: one line that names the key and quotes the numbers.
    """
    if not config.data.train:
        raise UserError("data.train is not set; give it in --config, as data.train=…, or as --json and --images")
    check_ranges(config)
    _check_images(config)
    _check_split(config.data)
    _check_rows(config)
    _check_template(config.data)


def check_mesh(config: Config, sizes: dict[str, int]) -> int:
    """Checks batch and model sizes against the mesh; returns A, the number of accumulated micro batches per step.

    Raises:
      UserError: a dimension does not divide over its axis, with both numbers.
    """
    train, tensor = config.train, sizes["tensor"]
    rows = train.micro_batch * sizes["data"] * sizes["fsdp"]
    if train.global_batch % rows:
        raise UserError(
            f"train.global_batch={train.global_batch} is not divisible by train.micro_batch={train.micro_batch} x "
            f"{sizes['data'] * sizes['fsdp']} data-parallel groups (data={sizes['data']}, fsdp={sizes['fsdp']}) "
            f"= {rows}"
        )
    _check_tensor(config, tensor)
    fsdp = sizes["fsdp"]
    for name in ("model.llm.hidden_size", "model.vision.hidden_size"):
        if (size := lookup(config, name)) % fsdp:
            raise UserError(
                f"{name}={size} is not divisible by the mesh axis fsdp={fsdp}; {nearest(size, fsdp)} would do"
            )
    return train.global_batch // rows


def _check_tensor(config: Config, tensor: int) -> None:
    """What the axis tensor must divide. (Only the vocabulary can be padded without changing what a weight means.)"""
    llm, groups = config.model.llm, kv_heads(config.model.llm)
    whole = ["model.llm.num_heads", "model.llm.intermediate_size"]
    if projector_layers(config.model.projector.kind) > 1:  # its width inside
        whole.append("model.llm.hidden_size")
    if config.mesh.vision_tensor:
        whole += ["model.vision.num_heads", "model.vision.intermediate_size"]
    for name in whole:
        if (size := lookup(config, name)) % tensor:
            raise UserError(
                f"{name}={size} is not divisible by the mesh axis tensor={tensor}; {nearest(size, tensor)} would do"
            )
    if groups % tensor and tensor % groups:
        raise UserError(
            f"model.llm.num_kv_heads={groups} does not divide the mesh axis tensor={tensor}, nor tensor them; "
            f"{nearest(groups, tensor)} would do"
        )
    if llm.vocab_size is not None and padded_vocab(llm) % tensor:
        multiple = math.lcm(llm.vocab_multiple, tensor)
        raise UserError(
            f"model.llm.vocab_size={padded_vocab(llm)} (padded) is not divisible by the mesh axis tensor={tensor}; "
            f"set model.llm.vocab_multiple={multiple}, which makes it {-(-llm.vocab_size // multiple) * multiple}"
        )
    images = config.train.micro_batch * tiles_per_row(config)
    if not config.mesh.vision_tensor and images % tensor:
        raise UserError(
            f"mesh.vision_tensor=false: the {images} images of a micro batch (train.micro_batch="
            f"{config.train.micro_batch}) do not divide over the mesh axis tensor={tensor}; use true, or another "
            "train.micro_batch"
        )
    if config.mesh.overlap and tensor > 1 and config.train.micro_batch % 2:
        raise UserError(
            f"mesh.overlap=true halves each micro batch, but train.micro_batch={config.train.micro_batch} is odd; "
            "use an even one, or false"
        )
    rows = rows_at_once(config, tensor)
    half = "half of " if rows < config.train.micro_batch else ""
    for whole in (config.data.max_length, *config.data.length_buckets):
        for length in {whole, whole - config.train.constant_prefix}:
            if config.mesh.sequence_parallel and rows % tensor and length % tensor:
                raise UserError(
                    f"data.max_length={length} (or data.length_buckets, less train.constant_prefix) is not divisible "
                    f"by the mesh axis tensor={tensor}, nor is {half}train.micro_batch={config.train.micro_batch}, and "
                    f"mesh.sequence_parallel=true needs one of them; {nearest(length, tensor)} would do"
                )


_AT_LEAST_ONE = """
    precision.fp8.amax_history
    train.steps train.micro_batch train.global_batch train.unroll train.remat_layers train.loss_chunk
    train.labelled_positions
    data.max_length data.images_per_row data.segments_per_row model.vision.position_image_size model.llm.sliding_window
    model.llm.rope_original_length guard.peer_timeout
    optimizer.ema_every checkpoint.every checkpoint.keep checkpoint.keep_every
    eval.every eval.batches log.every profile.start_step profile.steps
    model.vision.image_size model.vision.patch_size model.vision.hidden_size model.vision.intermediate_size
    model.vision.num_layers model.vision.num_heads model.llm.vocab_size model.llm.vocab_multiple model.llm.hidden_size
    model.llm.intermediate_size model.llm.num_layers model.llm.num_heads model.llm.num_kv_heads model.llm.head_dim
"""
_NOT_NEGATIVE = """
    precision.fp8.margin precision.fp8.first_layers_bf16 precision.fp8.last_layers_bf16
    run.seed train.constant_prefix data.workers data.video_frames data.max_bad_fraction checkpoint.keep_best
    optimizer.lr optimizer.min_lr optimizer.warmup_steps optimizer.constant_steps optimizer.weight_decay
"""
_ABOVE_ZERO = """
    data.worker_timeout checkpoint.every_minutes
    optimizer.eps optimizer.clip_norm model.vision.norm_eps model.vision.position_init_std model.llm.norm_eps
    model.llm.init_std model.llm.rope_base model.llm.rope_fraction model.llm.rope_factor model.llm.rope_low_freq_factor
    model.llm.rope_high_freq_factor
"""
_BELOW_ONE = """
    optimizer.beta1 optimizer.beta2 optimizer.ema_decay
    model.llm.hidden_dropout model.llm.attention_dropout model.llm.ffn_dropout
"""


def check_ranges(config: Config) -> None:
    """Every number by itself: its bounds, and that it is finite.

    Raises:
      UserError: one line with the key and its value.
    """
    for name, _ in walk():
        value = lookup(config, name)
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UserError(f"{name}={value} must be finite")
    if config.run.seed >= 2**32:
        raise UserError(f"run.seed={config.run.seed} must be less than 2^32")
    for name in _AT_LEAST_ONE.split():
        if (value := lookup(config, name)) is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    for name in _NOT_NEGATIVE.split():
        if not lookup(config, name) >= 0:  # `not >=` also catches NaN
            raise UserError(f"{name}={lookup(config, name)} must not be negative")
    for name in _ABOVE_ZERO.split():
        if (value := lookup(config, name)) is not None and not value > 0:
            raise UserError(f"{name}={value} must be above 0")
    for name in _BELOW_ONE.split():
        if (value := lookup(config, name)) is not None and not 0 <= value < 1:
            raise UserError(f"{name}={lookup(config, name)} must be in 0 … 1, 1 excluded")
    for split in ("train", "val"):
        for i, source in enumerate(getattr(config.data, split)):
            if not 0 < source.weight < math.inf:
                raise UserError(f"data.{split}[{i}].weight={source.weight} must be above 0 and finite")


def _check_model(model: ModelConfig) -> None:
    vision, llm = model.vision, model.llm
    if vision.image_size % vision.patch_size:
        raise UserError(
            f"model.vision.image_size={vision.image_size} is not divisible by "
            f"model.vision.patch_size={vision.patch_size}"
        )
    if vision.hidden_size % vision.num_heads:
        raise UserError(
            f"model.vision.hidden_size={vision.hidden_size} is not divisible by "
            f"model.vision.num_heads={vision.num_heads}"
        )
    if not -vision.num_layers <= vision.select_layer <= -1:
        raise UserError(
            f"model.vision.select_layer={vision.select_layer} must lie in -{vision.num_layers} … -1 "
            f"for model.vision.num_layers={vision.num_layers}"
        )
    for name in ("image_mean", "image_std"):
        values = getattr(vision, name)
        if len(values) != 3:
            raise UserError(f"model.vision.{name} needs 3 numbers, one for each channel, not {values}")
    if min(vision.image_std) <= 0:
        raise UserError(f"model.vision.image_std={vision.image_std}: every number must be above 0")
    if llm.head_dim is None and llm.hidden_size % llm.num_heads:
        raise UserError(
            f"model.llm.hidden_size={llm.hidden_size} is not divisible by model.llm.num_heads={llm.num_heads}; "
            "change one or set model.llm.head_dim"
        )
    _check_rope(llm)
    _check_image_tokens(model)
    if llm.num_heads % kv_heads(llm):
        raise UserError(
            f"model.llm.num_heads={llm.num_heads} is not divisible by model.llm.num_kv_heads={kv_heads(llm)}"
        )
    frozen = frozen_components(model)
    if len(frozen) == len(COMPONENTS):
        raise UserError("model.*.freeze: vision, projector and llm are all frozen; nothing would be trained")
    if frozen and model.init_from is None and not model.allow_random_frozen:
        raise UserError(
            f"model.init_from is not set, but {' and '.join(frozen)} would stay frozen at random weights; "
            "name a checkpoint, or set model.allow_random_frozen=true"
        )


def _check_rope(llm: LlmConfig) -> None:
    if llm.rope_fraction > 1:
        raise UserError(f"model.llm.rope_fraction={llm.rope_fraction} must be at most 1")
    width = rotary_width(llm)
    if width % 2 or width < 4:
        raise UserError(
            f"model.llm.head_dim={head_dim(llm)} x model.llm.rope_fraction={llm.rope_fraction} gives {width} channels: "
            f"{'an odd number' if width % 2 else 'too few'}; it must be an even number, 4 or more"
        )
    if llm.rope_scaling == "none" and llm.rope_factor != 1:
        raise UserError(f"model.llm.rope_factor={llm.rope_factor} has no effect with model.llm.rope_scaling=none")
    if llm.rope_scaling == "llama3" and llm.rope_high_freq_factor <= llm.rope_low_freq_factor:
        raise UserError(
            f"model.llm.rope_high_freq_factor={llm.rope_high_freq_factor} must be above "
            f"model.llm.rope_low_freq_factor={llm.rope_low_freq_factor}"
        )


def _check_image_tokens(model: ModelConfig) -> None:
    vision, projector = model.vision, model.projector
    projector_layers(projector.kind)
    if projector.kind == "identity" and vision.hidden_size != model.llm.hidden_size:
        raise UserError(
            f"model.projector.kind=identity needs model.vision.hidden_size={vision.hidden_size} and "
            f"model.llm.hidden_size={model.llm.hidden_size} to be equal"
        )
    if vision.select_feature == "cls_patch" and vision.kind != "clip":
        raise UserError(f"model.vision.select_feature=cls_patch: {vision.kind} has no class token; use patch")
    if vision.select_feature == "cls_patch" and projector.kind == "mlp_downsample":
        raise UserError("model.vision.select_feature=cls_patch: mlp_downsample needs a square of patches; use patch")
    if vision.position_image_size is not None and vision.position_image_size % vision.patch_size:
        raise UserError(
            f"model.vision.position_image_size={vision.position_image_size} is not divisible by "
            f"model.vision.patch_size={vision.patch_size}"
        )


def _check_images(config: Config) -> None:
    data, size = config.data, config.model.vision.image_size
    tokens = image_tokens(config.model)
    if data.max_length <= tokens:
        raise UserError(
            f"data.max_length={data.max_length} leaves no room for text: one image takes {tokens} tokens "
            f"(model.vision.image_size={size}, patch_size={config.model.vision.patch_size})"
        )
    frames = data.video_frames if data.splice_single_frame == "none" else 1
    if data.video_frames and data.max_length <= frames * tokens:
        raise UserError(
            f"data.max_length={data.max_length} leaves no room for text: {frames} frames of a video "
            f"(data.video_frames) take {frames * tokens} tokens"
        )
    if data.splice_single_frame != "none" and not data.video_frames:
        raise UserError(
            f"data.splice_single_frame={data.splice_single_frame} has no effect with data.video_frames=0, which "
            "refuses videos; set data.video_frames=1"
        )
    if data.image_mode != "anyres":
        return
    if not data.image_grids:
        raise UserError("data.image_grids=[] is empty; data.image_mode=anyres needs at least one [height, width]")
    for i, grid in enumerate(data.image_grids):
        if len(grid) != 2 or min(grid) < 1 or any(side % size for side in grid):
            raise UserError(
                f"data.image_grids[{i}]={grid} must be [height, width], both multiples of "
                f"model.vision.image_size={size}"
            )


def _check_rows(config: Config) -> None:
    data, model = config.data, config.model
    for length in data.length_buckets:
        if not 1 <= length <= data.max_length:
            raise UserError(
                f"data.length_buckets={data.length_buckets}: {length} must lie in 1 … data.max_length={data.max_length}"
            )
    if not data.pack:
        return
    if data.length_buckets:
        raise UserError(
            f"data.length_buckets={data.length_buckets} has no effect with data.pack=true, whose rows are all of "
            "data.max_length; set one of them"
        )
    if model.llm.rope_scaling == "dynamic":
        raise UserError(
            "model.llm.rope_scaling=dynamic stretches with the longest sample of a row, so that data.pack=true would "
            "change the samples beside it; set data.pack=false"
        )
    if model.attention == "cudnn":
        raise UserError("model.attention=cudnn has no mask for the rows of data.pack=true; use auto or xla")


def _check_template(data: DataConfig) -> None:
    if data.template == "jinja" and data.chat_template is None:
        raise UserError("data.template=jinja needs data.chat_template: a Jinja file or a tokenizer_config.json")
    if data.compat == "neva" and data.template not in NEVA:
        raise UserError(
            f"data.compat=neva: NeVA trains on no template {data.template}; it knows {', '.join(NEVA)}; set "
            "data.compat=none"
        )


def _check_training(config: Config) -> None:
    optimizer, train = config.optimizer, config.train
    _check_fp8(config)
    if optimizer.min_lr > optimizer.lr:
        raise UserError(f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}")
    if optimizer.warmup_steps + optimizer.constant_steps > train.steps:
        raise UserError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} + optimizer.constant_steps={optimizer.constant_steps} "
            f"exceed train.steps={train.steps}"
        )
    if train.global_batch % train.micro_batch:
        raise UserError(
            f"train.global_batch={train.global_batch} is not divisible by train.micro_batch={train.micro_batch}"
        )
    layers = config.model.llm.num_layers
    if layers % remat_group(train):
        raise UserError(
            f"train.remat_layers={train.remat_layers} does not divide model.llm.num_layers={layers}, which "
            "train.remat_method=uniform needs"
        )
    if not config.model.vision.freeze and remat_group(train) > 1:
        raise UserError(
            f"train.remat_layers={train.remat_layers} with model.vision.freeze=false: groups are of the language "
            "model's layers; use 1, or train.remat_method=block"
        )
    _check_shortcuts(config)
    if config.checkpoint.contents == "trained" and config.model.init_from is None and frozen_components(config.model):
        raise UserError(
            "checkpoint.contents=trained would lose the frozen random weights; use full, or set model.init_from"
        )


def _check_shortcuts(config: Config) -> None:
    train, llm = config.train, config.model.llm
    dropout = dropout_seed(config) is not None
    if train.labelled_positions is not None:
        looped = "would copy the weights of layers in a loop: all must be unrolled"
        reasons = {
            f"train.unroll={train.unroll} ({looped}, train.unroll={llm.num_layers})": not all_unrolled(config),
            f"train.remat_layers={train.remat_layers} (the last layer stands alone)": remat_group(train) > 1,
            "mesh.zero1=true and a trained language model (its gradients would be whole)": config.mesh.zero1
            and not llm.freeze,
            "dropout in model.llm (another would be drawn)": dropout,
        }
        _refuse("train.labelled_positions", train.labelled_positions, reasons, "null")
    if train.constant_prefix:
        reasons = {
            "model.llm.freeze=false": not llm.freeze,
            "data.pack=true": config.data.pack,
            "model.llm.rope_scaling=dynamic": llm.rope_scaling == "dynamic",
            "dropout in model.llm": dropout,
        }
        _refuse("train.constant_prefix", train.constant_prefix, reasons, "0")
        shortest = min([*config.data.length_buckets, config.data.max_length])
        if train.constant_prefix >= shortest:
            raise UserError(
                f"train.constant_prefix={train.constant_prefix} leaves nothing of rows of {shortest} tokens "
                "(data.max_length, or the shortest of data.length_buckets)"
            )


def _refuse(name: str, value: int, reasons: dict[str, bool], instead: str) -> None:
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{name}={value} does not go with {reason}; use {instead}")


def _check_fp8(config: Config) -> None:
    compute, fp8, layers = config.precision.compute, config.precision.fp8, config.model.llm.num_layers
    if not compute.startswith("fp8"):
        return
    first, last = fp8.first_layers_bf16, fp8.last_layers_bf16
    if first + last >= layers:
        raise UserError(
            f"precision.fp8.first_layers_bf16={first} and last_layers_bf16={last} leave none of "
            f"model.llm.num_layers={layers} in FP8; use precision.compute=bf16"
        )
    if config.precision.frozen == "fp32":
        raise UserError(f"precision.frozen=fp32 has no effect with precision.compute={compute}; use bf16")
    if fp8.vision and not config.model.vision.freeze:
        raise UserError("precision.fp8.vision=true needs model.vision.freeze=true")
    group = remat_group(config.train)
    if first % group or last % group:
        raise UserError(
            f"train.remat_layers={group} does not divide precision.fp8.first_layers_bf16={first} and "
            f"last_layers_bf16={last}, which train.remat_method=uniform needs"
        )


def _check_source(name: str, source: SourceConfig) -> None:
    if source.json and source.records is not None:
        raise UserError(f"{name}.json={source.json} and records={source.records}: give one of them, not both")
    if not source.json and source.records is None:
        raise UserError(f"{name}.json is not set; give it, or records")
    if source.records is None and not Path(source.json).is_file():
        raise UserError(f"{name}.json={source.json}: no such file")
    if source.records is not None and not Path(source.records).exists():
        raise UserError(f"{name}.records={source.records}: no such file or directory")
    images = None if source.images is None else Path(source.images)
    if images is not None and not images.exists():
        raise UserError(f"{name}.images={images}: no such directory or file")
    if images is not None and not images.is_dir() and images.suffix not in (".tar", ".parquet"):
        raise UserError(f"{name}.images={images}: must be a directory, a .tar or a .parquet file")


def _check_split(data: DataConfig) -> None:
    if not 0 <= data.val_fraction < 1:
        raise UserError(f"data.val_fraction={data.val_fraction} must be in 0 … 1, 1 excluded")
    if data.val_fraction and data.val:
        raise UserError(
            f"data.val_fraction={data.val_fraction} holds out training rows, but data.val has {len(data.val)} sources "
            "of its own; use one of them"
        )


def _check_start(config: Config) -> None:
    """Keys that say what a run starts from, or goes on from."""
    model = config.model
    if unknown := [name for name in model.init_parts if name not in COMPONENTS]:
        raise UserError(f"model.init_parts={model.init_parts}: {unknown[0]} is none of {', '.join(COMPONENTS)}")
    for name in ("init_ema", "init_partial"):
        if getattr(model, name) and model.init_from is None:
            raise UserError(f"model.{name}=true has no effect without model.init_from; name a checkpoint")
    known = {name for name, _ in walk()}
    for name in config.run.allow_changed:
        if name not in known:
            raise UserError(f"run.allow_changed (--allow-changed) names {name}, which is no key; docs/configuration.md")


def _check_files(config: Config) -> None:
    if not Path(config.model.tokenizer).is_file():
        raise UserError(f"model.tokenizer={config.model.tokenizer}: no such file")
    if config.model.init_from is not None and not Path(config.model.init_from).is_dir():
        raise UserError(f"model.init_from={config.model.init_from}: no such directory")
    for split in ("train", "val"):
        for i, source in enumerate(getattr(config.data, split)):
            _check_source(f"data.{split}[{i}]", source)
    for path in (Path(config.run.dir), *Path(config.run.dir).parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"run.dir={config.run.dir}: {path} is a file; name a directory")
