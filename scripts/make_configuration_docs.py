"""Write docs/configuration.md from the schema in neva_jax/config.py.

python scripts/make_configuration_docs.py            writes it
python scripts/make_configuration_docs.py --check    exits 1 if it is not current
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from neva_jax.config import Config, SourceConfig  # noqa: E402 (the package need not be installed)

INTRODUCTION = """\
# Configuration

<!-- Written by scripts/make_configuration_docs.py from neva_jax/config.py; do not edit. -->

A training run is described by one YAML file, and by what the command line changes in it:

```
python -m neva_jax.train --config FILE [--mesh-shape data=2,tensor=4] [--print-config] [section.key=value ...]
```

1. Every key has a default (the tables below). Without `--config` only the defaults and the command line count.
2. `--config FILE` sets the keys that it holds; the others keep their defaults. [`configs/`](../configs) has a file for
   each kind of run, and [`configs/template.yaml`](../configs/template.yaml) has every key, to copy from.
3. `section.key=value` overrides the file, the later one of two wins. The value is read as YAML: `optimizer.lr=1e-3`,
   `model.init_from=null`, `'data.train=[{json: rows.json, images: images}]'`. A list is replaced as a whole.
4. `--mesh-shape SHAPE` is `mesh.shape=SHAPE`, and wins over both.

`--print-config` prints the result as YAML, with the numbers that follow from it as comments, and starts nothing;
the output can be given to `--config` again.

Four keys are required: `run.dir`, `model.tokenizer`, `data.train`, and `model.init_from` where something is frozen
(or `model.allow_random_frozen=true`).

An unknown key (the nearest one is named), a value of the wrong type, a missing file, or numbers that contradict each
other end the command with **exit status 2** and one line that names the key and quotes the numbers. All of that is
checked before anything is written to `run.dir`:

```
error: override train.micro_bach: unknown key train.micro_bach; did you mean train.micro_batch?
error: model.vision.image_size=225 is not divisible by model.vision.patch_size=14
```

Values are YAML 1.2's: only `true` and `false` are booleans (`off` is a word), `1e-3` is a number, and what looks like a
date or a time is text. An integer is written in digits: `1e3` is no integer, 1000 is.
"""

# The keys of the NeVA workflow's YAML: NeMo's name, our key or why there is none, a remark.
NOT_NEEDED, NOT_YET = "not needed", "not yet"
NEMO_KEYS: dict[str, list[tuple[str, str, str]]] = {
    "trainer": [
        ("trainer.devices, trainer.num_nodes", "mesh.shape", "all devices that JAX sees; `data=-1` takes them"),
        ("trainer.precision", "precision.compute", "`bf16`"),
        ("trainer.max_steps", "train.steps", ""),
        ("trainer.log_every_n_steps", "log.every", ""),
        ("trainer.val_check_interval", "eval.every", "`checkpoint.every` is a key of its own"),
        ("trainer.limit_val_batches", "eval.batches", ""),
        ("trainer.gradient_clip_val", "optimizer.clip_norm", ""),
    ],
    "exp_manager": [
        ("exp_manager.explicit_log_dir, exp_dir, name", "run.dir", "one directory"),
        ("exp_manager.create_wandb_logger", "log.wandb", "`off`, `online`, `offline`"),
        ("exp_manager.wandb_logger_kwargs.project, name", "log.wandb_project, log.wandb_name", ""),
        ("exp_manager.resume_if_exists", "run.resume", "`auto`"),
        ("exp_manager.resume_from_checkpoint", "model.init_from", "weights only; a run resumes from its own `run.dir`"),
        ("exp_manager.checkpoint_callback_params.monitor", NOT_NEEDED, "always `val_loss`"),
        ("exp_manager.checkpoint_callback_params.save_top_k", "checkpoint.keep_best", "besides the newest `keep`"),
        ("exp_manager.ema.enable, decay", "optimizer.ema_decay", "null is off"),
        ("exp_manager.ema.every_n_steps", "optimizer.ema_every", ""),
        ("exp_manager.ema.validate_original_weights", NOT_NEEDED, "validation is on the average, as NeMo's default"),
        ("exp_manager.ema.cpu_offload", NOT_NEEDED, "it is sharded as the weights are"),
    ],
    "model": [
        ("restore_from_path", "model.init_from", "NeVA ignores it; here a frozen part without weights is an error"),
        ("model.micro_batch_size", "train.micro_batch", ""),
        ("model.global_batch_size", "train.global_batch", "accumulation is derived, as in NeMo"),
        ("model.tensor_model_parallel_size", "mesh.shape", "`tensor=N`; checkpoints restore onto any mesh"),
        ("model.pipeline_model_parallel_size", NOT_NEEDED, "`fsdp` and `tensor` spread the model"),
        ("model.mm_cfg.llm.from_pretrained", "model.init_from", "one checkpoint supplies all parts"),
        ("model.mm_cfg.llm.freeze", "model.llm.freeze", ""),
        ("model.mm_cfg.llm.model_type", "data.template", "the model is Llama; the template has a key of its own"),
        ("model.mm_cfg.vision_encoder.from_pretrained", "model.init_from", ""),
        ("model.mm_cfg.vision_encoder.patch_dim", "model.vision.patch_size", ""),
        ("model.mm_cfg.vision_encoder.hidden_size", "model.vision.hidden_size", ""),
        ("model.mm_cfg.vision_encoder.vision_select_layer", "model.vision.select_layer", ""),
        ("model.mm_cfg.vision_encoder.class_token_length", "model.vision.kind", "`clip` has one, `siglip` none"),
        ("model.mm_cfg.vision_encoder.freeze", "model.vision.freeze", "false trains the encoder, which NeVA cannot"),
        ("model.mm_cfg.pretrain_mm_mlp_adapter", "model.init_from", "not yet from another checkpoint than the rest"),
        ("model.mm_cfg.mm_mlp_adapter_type", "model.projector.kind", "`linear` or `mlp2x_gelu`"),
        ("model.mm_cfg.use_im_start_end", "data.image_start, data.image_end", "`<extra_id_4>` and `<extra_id_5>`"),
        ("model.encoder_seq_length", "data.max_length", "rows are padded to it, and longer ones are bad, not cut"),
        ("model.num_layers", "model.llm.num_layers", ""),
        ("model.hidden_size", "model.llm.hidden_size", ""),
        ("model.ffn_hidden_size", "model.llm.intermediate_size", ""),
        ("model.num_attention_heads", "model.llm.num_heads", ""),
        ("model.num_query_groups", "model.llm.num_kv_heads", ""),
        ("model.kv_channels", "model.llm.head_dim", ""),
        ("model.position_embedding_type", NOT_NEEDED, "always rotary; its base is `model.llm.rope_base`"),
        ("model.rotary_percentage", "model.llm.rope_fraction", "1 for Llama; the workflow's 0.5 is wrong for Llama-2"),
        ("model.seq_len_interpolation_factor", "model.llm.rope_factor", "with `model.llm.rope_scaling: linear`"),
        ("model.normalization", NOT_NEEDED, "always RMSNorm"),
        ("model.layernorm_epsilon", "model.llm.norm_eps", ""),
        ("model.activation", NOT_NEEDED, "always SwiGLU"),
        ("model.init_method_std", "model.llm.init_std", ""),
        ("model.use_scaled_init_method", "model.llm.scaled_output_init", ""),
        ("model.hidden_dropout", "model.llm.hidden_dropout", "at NeMo's places"),
        ("model.attention_dropout", "model.llm.attention_dropout", "without cuDNN's kernel"),
        ("model.ffn_dropout", "model.llm.ffn_dropout", ""),
        ("model.share_embeddings_and_output_weights", "model.llm.tie_embeddings", ""),
        ("model.make_vocab_size_divisible_by", "model.llm.vocab_multiple", "not multiplied by the tensor size"),
        ("model.activations_checkpoint_granularity", "train.remat", "`selective`: `dots`, `full`: `full`"),
        ("model.activations_checkpoint_method", "train.remat_method", "`uniform` or `block`"),
        ("model.activations_checkpoint_num_layers", "train.remat_layers", ""),
        ("model.sequence_parallel", "mesh.sequence_parallel", ""),
        ("model.fp8", "precision.compute", "`fp8_delayed`; `fp8_current` scales by the tensor itself"),
        ("model.fp8_e4m3, fp8_hybrid", "precision.fp8.format", "`e4m3` or `hybrid`"),
        ("model.fp8_margin", "precision.fp8.margin", ""),
        ("model.fp8_interval", NOT_NEEDED, "scales follow in every step"),
        ("model.fp8_amax_history_len", "precision.fp8.amax_history", ""),
        ("model.fp8_amax_compute_algo", "precision.fp8.amax_algorithm", ""),
        ("model.seed", "run.seed", ""),
        ("model.tokenizer.model", "model.tokenizer", "a SentencePiece model file"),
        (
            "model.nsys_profile.enabled, start_step",
            "profile.start_step",
            "null is off; the trace is JAX's, not Nsight's",
        ),
        ("model.nsys_profile.end_step", "profile.steps", "a number of steps, not the last one"),
        ("model.nsys_profile.ranks", NOT_NEEDED, "one process drives all GPUs of a machine"),
    ],
    "model.data": [
        ("model.data.num_workers", "data.workers", ""),
        ("model.data.dataloader_type", NOT_NEEDED, "always shuffled anew each epoch, as `cyclic`"),
        ("model.data.data_path", "data.train", "field `json`; validation rows are `data.val`"),
        ("model.data.image_folder", "data.train", "field `images`, one folder for each JSON file"),
        (
            "model.data.conv_template",
            "data.template",
            "the same names; `data.compat=neva` gives its very tokens",
        ),
        ("model.data.image_token_len", NOT_NEEDED, "(`image_size` / `patch_size`)², shown by `--print-config`"),
        ("model.data.lazy_preprocess", NOT_NEEDED, "rows are always prepared when they are needed"),
        ("model.data.image_aspect_ratio", "data.image_mode", "`square`, `pad`, `keep` or `anyres`"),
        ("model.data.num_frames, splice_single_frame", "data.video_frames, data.splice_single_frame", ""),
        (
            "model.data.sep_image_conv_front",
            "data.image_position",
            "`front`; `in_place` is NeMo's false",
        ),
    ],
    "model.optim": [
        ("model.optim.name", NOT_NEEDED, "always Adam with decoupled weight decay"),
        ("model.optim.lr", "optimizer.lr", ""),
        ("model.optim.weight_decay", "optimizer.weight_decay", ""),
        ("model.optim.betas", "optimizer.beta1, optimizer.beta2", ""),
        ("model.optim.sched.name", NOT_NEEDED, "always CosineAnnealing"),
        ("model.optim.sched.warmup_steps", "optimizer.warmup_steps", ""),
        ("model.optim.sched.constant_steps", "optimizer.constant_steps", ""),
        ("model.optim.sched.min_lr", "optimizer.min_lr", ""),
    ],
}


def sections(schema: type = Config, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(dotted name, dataclass) of each section of the schema that has keys of its own, in order."""
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(item.type):
            yield f"{prefix}{item.name}", item.type
            yield from sections(item.type, f"{prefix}{item.name}.")


def type_text(kind: Any) -> str:
    """A field's type as a reader of YAML knows it."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(type_text(part) for part in get_args(kind))
    if kind == list[SourceConfig]:
        return "list of sources"
    if get_origin(kind) is list:
        inner = type_text(get_args(kind)[0])
        return f"list of {inner if inner.endswith('s') else f'{inner}s'}"
    return {NoneType: "null", str: "text", int: "integer", float: "number", bool: "true or false"}[kind]


def value_text(value: Any) -> str:
    """A default as it is written in YAML."""
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower()}`".replace("none", "null")
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if value != "" else "(required)"


def table(schema: type) -> str:
    """The keys of one section as a Markdown table."""
    lines = ["| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(item.type):
            continue
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        cells = (f"`{item.name}`", type_text(item.type), value_text(default), item.metadata["doc"].replace("|", "\\|"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def nemo_table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Keys of NeMo and what they are here, as a Markdown table."""
    lines = ["| NeMo | neva_jax | Remark |", "|---|---|---|"]
    for theirs, ours, remark in rows:
        names = ours if ours in (NOT_NEEDED, NOT_YET) else ", ".join(f"`{name}`" for name in ours.split(", "))
        lines.append(f"| {', '.join(f'`{name}`' for name in theirs.split(', '))} | {names} | {remark} |")
    return "\n".join(lines)


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for name, schema in sections():
        parts.append(f"## {name}\n\n{schema.__doc__.strip()}\n\n{table(schema)}\n")
        if name == "data":
            parts.append(
                f"### A source of `data.train` or `data.val`\n\n{SourceConfig.__doc__}\n\n{table(SourceConfig)}\n"
            )
    parts.append(
        "## From NeMo's keys\n\nWhat NeVA's YAML says, and where it is said here. “not yet”: there is no such thing so "
        "far. “not needed”:\nthere is only one way, or it follows from other keys.\n"
    )
    parts += [f"### {group}\n\n{nemo_table(rows)}\n" for group, rows in NEMO_KEYS.items()]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the page; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/configuration.md from the schema.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file is not current")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "configuration.md", metavar="F")
    options = parser.parse_args(arguments)
    page = render()
    if options.check:
        if options.output.is_file() and options.output.read_text(encoding="utf-8") == page:
            return 0
        print(f"{options.output} is not current; run python scripts/make_configuration_docs.py", file=sys.stderr)
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
