"""Made-up training data that costs what real data costs: photographs of realistic file size, conversations of
realistic length. Everything follows from the seed."""

import io
import json
from pathlib import Path

import numpy as np
import sentencepiece
from PIL import Image

SYLLABLES = [
    first + vowel for first in ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v") for vowel in "aeiou"
]
WORDS = 4000
VOCABULARY = 4000


def photograph(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Waves of colour under noise on scales from a fifth of the picture to a pixel; 0.4 bytes a pixel at quality 90."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    pixels = np.full((height, width, 3), 128, np.float32)
    for c in range(3):
        across, down, left, top = rng.uniform(1, 6, 4)
        pixels[..., c] += 60 * np.sin(across * x / width + left) + 40 * np.cos(down * y / height + top)
    for cells, strength in ((5, 40), (17, 30), (60, 20), (200, 14)):
        for c in range(3):
            coarse = rng.normal(0, strength, (cells * height // width + 2, cells + 2)).astype(np.float32)
            pixels[..., c] += Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pixels += rng.normal(0, 5, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def words(rng: np.random.Generator, count: int) -> str:
    """Words of one to four syllables, few of them often (Zipf), as in a language."""
    return " ".join(_word(int(rank)) for rank in rng.zipf(1.3, count) % WORDS)


def _word(rank: int) -> str:
    number = (rank + 1) * 2654435761 % 2**32
    return "".join(SYLLABLES[number // len(SYLLABLES) ** i % len(SYLLABLES)] for i in range(1 + number % 4))


def write_rows(
    folder: Path, rows: int, images: int, size: tuple[int, int], quality: int, seed: int = 0, rounds: int = 4
) -> None:
    """`rows.json` and `text.json` (the same without images), of 1 to `rounds` rounds a row, and `images` JPEG files."""
    rng = np.random.default_rng(seed)
    for i in range(images):
        photograph(*size, rng).save(folder / f"{i}.jpg", quality=quality)
    with_image, text = [], []
    for i in range(rows):
        turns = []
        for _ in range(int(rng.integers(1, rounds + 1))):
            turns.append({"from": "human", "value": words(rng, int(rng.integers(5, 20))) + "?"})
            turns.append({"from": "gpt", "value": words(rng, int(rng.integers(5, 80))) + "."})
        text.append({"id": str(i), "conversations": turns})
        first = {"from": "human", "value": "<image>\n" + turns[0]["value"]}
        with_image.append({"id": str(i), "image": f"{i % images}.jpg", "conversations": [first, *turns[1:]]})
    (folder / "rows.json").write_text(json.dumps(with_image), encoding="utf-8")
    (folder / "text.json").write_text(json.dumps(text), encoding="utf-8")


def write_tokenizer(path: Path, seed: int = 1) -> None:
    """A SentencePiece model of the made-up language, as Llama's: BPE with bytes for what it does not know."""
    rng, model = np.random.default_rng(seed), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(words(rng, 30) for _ in range(2000)),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
