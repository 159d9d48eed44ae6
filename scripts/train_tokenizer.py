"""Train a small SentencePiece tokenizer, built as Llama's is, on the text of LLaVA JSON files.

    python scripts/train_tokenizer.py --json data/finetune.json --vocab-size 400 --output tokenizer.model

Llama's options are BPE with byte fallback, single digits, no normalisation, and <unk>, <s>, </s> as pieces 0, 1, 2. A
small text may not have enough pairs for --vocab-size; the tokenizer is then smaller, and its size is printed.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

BYTES_AND_CONTROLS = 256 + 3


def texts(path: Path) -> Iterator[str]:
    """What both sides say in a LLaVA JSON file, without the marks of images."""
    for row in json.loads(path.read_text(encoding="utf-8")):
        for turn in row["conversations"]:
            yield turn["value"].replace("<image>", "").strip()


def train(sentences: Sequence[str], vocab_size: int) -> bytes:
    """The serialized model; it follows from the arguments alone."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # Sorted and without repetitions: a small data set of templates says the same sentence thousands of times.
        sentence_iterator=iter(sorted({line for text in sentences for line in text.splitlines() if line})),
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
    if options.output.exists() and not options.force:
        parser.error(f"--output {options.output}: exists; name another file, or add --force")
    try:
        sentences = [text for path in options.json for text in texts(path)] + options.extra_text
        characters = len(set("".join(sentences)) - {"\n"})
        if options.vocab_size < BYTES_AND_CONTROLS + characters:
            parser.error(
                f"--vocab-size {options.vocab_size}: must be at least {BYTES_AND_CONTROLS + characters}: 256 bytes, "
                f"3 control pieces and the {characters} characters of the text"
            )
        model = train(sentences, options.vocab_size)
    except OSError as error:
        parser.error(f"--json {error.filename}: cannot be read ({error.strerror})")
    except (ValueError, KeyError, TypeError) as error:
        parser.error(f"--json: no LLaVA JSON ({type(error).__name__}: {error})")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    fresh = options.output.with_name(f".{options.output.name}.tmp")
    fresh.write_bytes(model)
    os.replace(fresh, options.output)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    print(f"{options.output}: {pieces} pieces, learned from {len(sentences)} texts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
