"""Train a small SentencePiece tokenizer, built as Llama's is, on the text of LLaVA JSON files.

    python scripts/train_tokenizer.py --json data/finetune.json --vocab-size 400 --output tokenizer.model

Llama's options are BPE with byte fallback, single digits, no normalisation, and <unk>, <s>, </s> as pieces 0, 1, 2. A
small text may not have enough pairs for --vocab-size; the tokenizer is then smaller, and its size is printed.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from neva_jax.errors import UserError
from neva_jax.files import check_output, replacing

BYTES_AND_CONTROLS = 256 + 3


def texts(path: Path) -> Iterator[str]:
    """What both sides say in a LLaVA JSON file, without the marks of images."""
    for row in json.loads(path.read_text(encoding="utf-8-sig")):
        for turn in row["conversations"]:
            yield turn["value"].replace("<image>", "").strip()


def train(sentences: Sequence[str], vocab_size: int) -> bytes:
    """The serialized model; it follows from the arguments alone."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # Sorted and without repetitions: a small data set of templates says the same sentence thousands of times.
        sentence_iterator=iter(sorted({line for text in sentences for line in text.splitlines() if line})),
        max_sentence_length=2**20,  # in bytes; longer ones are left out without a word
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and train; return the exit status."""
    parser = argparse.ArgumentParser(description="Train a small Llama-like SentencePiece tokenizer on LLaVA JSON.")
    parser.add_argument("--json", type=Path, required=True, nargs="+", metavar="F", help="LLaVA JSON files")
    parser.add_argument("--output", type=Path, required=True, metavar="F")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N")
    parser.add_argument("--extra-text", nargs="*", default=[], metavar="S", help="more text to learn from")
    parser.add_argument("--force", action="store_true", help="overwrite --output")
    options = parser.parse_args(arguments)
    try:
        check_output("--output", options.output)
    except UserError as error:
        parser.error(str(error))
    if options.output.exists() and not options.force:
        parser.error(f"--output {options.output}: exists; name another file, or add --force")
    sentences = list(options.extra_text)
    for path in options.json:
        try:
            sentences += texts(path)
        except OSError as error:
            parser.error(f"--json {path}: cannot be read ({error.strerror})")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            parser.error(f"--json {path}: no LLaVA JSON ({type(error).__name__}: {error})")
    characters = set("".join(sentences)) - {"\n"}
    if not characters - {" "}:
        parser.error("--json: holds no text to learn from")
    least = BYTES_AND_CONTROLS + len(characters | {" "})  # SentencePiece puts a space before each sentence
    if options.vocab_size < least:
        parser.error(
            f"--vocab-size {options.vocab_size}: must be at least {least}: 256 bytes, 3 control pieces and the "
            f"{least - BYTES_AND_CONTROLS} characters of the text"
        )
    model = train(sentences, options.vocab_size)
    with replacing(options.output) as fresh:
        fresh.write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    print(f"{options.output}: {pieces} pieces, learned from {len(sentences)} texts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
