"""A folder of rows and images with every kind of damage, and what is wrong with each row."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.rows import conversation

LONG = "word " * 300
MARK = "<image>\nWhat is it?"
BOMB = (8000, 6000)  # 48 million pixels, some kilobytes of file


def noise(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def write_damaged(folder: Path) -> Path:
    """Writes `folder/rows.json` and `folder/images`; returns the former."""
    images = folder / "images"
    (images / "sub").mkdir(parents=True)
    jpeg = encoded(noise(1), "JPEG", quality=90)
    png = encoded(noise(2, 30, 60), "PNG")
    files = {
        "a.jpg": jpeg,
        "sub/copy.jpg": jpeg,
        "b.png": png,
        "grey.png": encoded(noise(3).convert("L"), "PNG"),
        "zeros.jpg": jpeg[: len(jpeg) // 2] + bytes(len(jpeg) - len(jpeg) // 2),
        "half.png": png[: len(png) // 2],
        "text.png": b"no image",
        "bomb.png": encoded(Image.new("1", BOMB), "PNG"),
    }
    for name, content in files.items():
        (images / name).write_bytes(content)
    (folder / "outside.jpg").write_bytes(jpeg)
    path = folder / "rows.json"
    path.write_text(json.dumps([row for row, _ in ROWS]))
    return path


def _role(row: dict, role: str) -> dict:
    row["conversations"][0]["from"] = role
    return row


# (row, kind of its damage; None: it is good)
ROWS = [
    (conversation("good", MARK, "A circle.", "Sure?", "Yes.", image="a.jpg"), None),
    (conversation("text", "How many?", "Two."), None),
    (_role(conversation("role", "Hi", "Ho"), "robot"), "structure"),
    (17, "structure"),
    (conversation("odd", "Hi", "Ho", "He"), "structure"),
    (conversation("two-marks", "<image><image>", "x", image="a.jpg"), "marks"),
    (conversation("no-mark", "Hi", "x", image="a.jpg"), "marks"),
    (conversation("no-image", "<image>", "x"), "marks"),
    (conversation("number", "<image>", "x", image=3), "structure"),
    (conversation("two", "<image><image>", "x", image=["a.jpg", "b.png"]), "too_many_images"),
    (conversation("video", "<video>", "x", video="clip"), "video_refused"),
    (conversation("absent", MARK, "x", image="absent.jpg"), "image_missing"),
    (conversation("absent-too", MARK, "x", image="absent.jpg"), "image_missing"),
    (conversation("outside", MARK, "x", image="../outside.jpg"), "image_missing"),
    (conversation("folder", MARK, "x", image="sub"), "image_missing"),
    (conversation("zeros", MARK, "x", image="zeros.jpg"), "image_incomplete"),
    (conversation("half", MARK, "x", image="half.png"), "image_broken"),
    (conversation("no-picture", MARK, "x", image="text.png"), "image_broken"),
    (conversation("bomb", MARK, "x", image="bomb.png"), "image_too_large"),
    (conversation("long", MARK, LONG, image="b.png"), "too_long"),
    (conversation("long-and-absent", MARK, LONG, image="absent.jpg"), "image_missing"),
    (conversation("good", MARK, "A copy.", image="sub/copy.jpg"), None),
    (conversation("again", MARK, "The same image.", image="a.jpg"), None),
    (conversation("grey", MARK, "Grey.", image="grey.png"), None),
    ({**conversation("", "Hi", "Without an id."), "id": None}, None),
    ({**conversation("", "Hi", "Nor this one."), "id": None}, None),
]
NEEDS_DECODING = {"image_incomplete", "image_broken", "image_too_large"}
EXPECTED = {number: kind for number, (_, kind) in enumerate(ROWS) if kind}
