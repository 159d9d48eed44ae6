"""python -m neva_jax.convert: Hugging Face's checkpoints and ours, one into the other; new tokens for a tokenizer."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from neva_jax.data.tokenizer import add_tokens
from neva_jax.errors import CommandParser, UserError, exit_with
from neva_jax.files import check_output, replacing


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and converts; returns the exit status."""
    parser = CommandParser(prog="python -m neva_jax.convert", description="Convert checkpoints and tokenizers.")
    commands = parser.add_subparsers(dest="command", required=True)
    _from_hf_flags(commands.add_parser("from-hf", help="a folder of Hugging Face -> a checkpoint of neva_jax"))
    _to_hf_flags(commands.add_parser("to-hf", help="a checkpoint of neva_jax -> a folder of Hugging Face"))
    _add_tokens_flags(commands.add_parser("add-tokens", help="append special tokens to a tokenizer"))
    options = parser.parse_args(arguments)
    return {"from-hf": _from_hf, "to-hf": _to_hf, "add-tokens": _add_tokens}[options.command](options)


def _from_hf_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--src", required=True, type=Path, metavar="DIR", help="LLM, CLIP, SigLIP or LLaVA folder, or a projector file")
    add("--vision", type=Path, metavar="DIR", help="CLIP or SigLIP folder, where --src has no vision encoder")
    add("--projector", type=Path, metavar="F", help="mm_projector.bin or .safetensors (or its folder)")
    add("--tokenizer", type=Path, metavar="F", help="tokenizer.model or tokenizer.json; default: the one in --src")
    add("--out", required=True, type=Path, metavar="DIR", help="the checkpoint: DIR/checkpoints/0")
    add("--dtype", choices=("keep", "bf16", "fp32"), default="keep", help="dtype of the stored weights (default: keep)")
    add("--vocab-multiple", type=int, default=1, metavar="N", help="pad the embedding's rows to a multiple of N")
    add(
        "--new-rows",
        choices=("mean", "zero", "normal"),
        help="add rows for tokens that the embedding lacks: the mean of the others, zeros, or N(0, initializer_range)",
    )
    add("--select-layer", type=int, default=-2, metavar="N", help="whose output is taken (only with --vision; -2)")
    add("--select-feature", choices=("patch", "cls_patch"), default="patch", help="only with --vision (patch)")
    add("--check-finite", action="store_true", help="refuse weights that are NaN or infinite")
    add("--allow-pickle", action="store_true", help="read .bin files; only tensors in them are read, nothing is run")
    add("--force", action="store_true", help="replace what is in --out")


def _to_hf_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, metavar="DIR", help="a run, or one of its steps")
    add("--out", required=True, type=Path, metavar="DIR", help="the folder for from_pretrained")
    add("--text-only", action="store_true", help="the language model alone")
    add("--ema", action="store_true", help="the averaged weights (optimizer.ema_decay) of the checkpoint")
    add("--dtype", choices=("keep", "bf16", "fp32"), default="keep", help="dtype of the weights (default: keep)")
    add("--shard-gib", type=float, default=4.0, metavar="X", help="largest size of a file (default: 4)")
    add("--max-length", type=int, metavar="N", help="max_position_embeddings; default: data.max_length")
    add("--force", action="store_true", help="replace what is in --out")


def _add_tokens_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", required=True, metavar="F")
    add("--output", required=True, metavar="F")
    add("--tokens", required=True, nargs="+", metavar="T", help="the new tokens, in the order of their ids")
    add("--control", action="store_true", help="control pieces, which text never matches; default: user-defined pieces")
    add("--force", action="store_true", help="overwrite --output")


def _from_hf(options: argparse.Namespace) -> int:
    from neva_jax.interop.from_hf import Options, from_hf

    if options.vocab_multiple < 1:
        raise UserError(f"--vocab-multiple {options.vocab_multiple}: must be at least 1")
    from_hf(Options(**{name: value for name, value in vars(options).items() if name != "command"}))
    return 0


def _to_hf(options: argparse.Namespace) -> int:
    from neva_jax.interop.to_hf import Options, to_hf

    if not options.shard_gib > 0:
        raise UserError(f"--shard-gib {options.shard_gib}: must be above 0")
    if options.max_length is not None and options.max_length < 1:
        raise UserError(f"--max-length {options.max_length}: must be at least 1")
    to_hf(Options(**{name: value for name, value in vars(options).items() if name != "command"}))
    return 0


def _add_tokens(options: argparse.Namespace) -> int:
    output = Path(options.output)
    try:
        serialized = Path(options.input).read_bytes()
    except OSError as error:
        raise UserError(f"--input {options.input}: cannot be read ({error.strerror})") from None
    check_output("--output", output)
    if output.exists() and not options.force:
        raise UserError(f"--output {output}: exists; name another file, or add --force")
    serialized, ids = add_tokens(serialized, options.tokens, options.control, options.input)
    with replacing(output) as fresh:
        fresh.write_bytes(serialized)
    for token, identity in zip(options.tokens, ids, strict=True):
        print(f"{identity}  {token}")
    print(f"new size: {ids[-1] + 1}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Orbax starts JAX, but nothing here is computed on a device
    exit_with(main)
