"""Fixtures that all tests share: a tiny tokenizer, a tiny LLaVA data set, and the settings of a tiny run."""

import atexit
import gc
import io
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# Before anything imports jax: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Half the time of compiling on a CPU goes into its fusion emitters. XLA aborts on a flag that it does not know, hence
# the version: with another jaxlib the tests only take longer.
if version("jaxlib").startswith("0.10.") and "xla_cpu_use_fusion_emitters" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] = (
        f"{os.environ['XLA_FLAGS']} --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
os.environ["HF_HUB_OFFLINE"] = "1"
# All processes of a session, the commands that tests start included, compile a program once. The folder begins empty,
# so that what a test proves does not depend on earlier sessions; name one to keep it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="neva-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Tiny programs take longer to compile than to run. The partitioner and the passes on HLO do all their work; only LLVM
# does less. `JAX_DISABLE_MOST_OPTIMIZATIONS=0` tests what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import numpy as np
import pytest
import sentencepiece
from PIL import Image, ImageDraw

# A session's process compiles mostly what it needs once; what it starts finds all of its programs (the variable above).
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# There are a few million objects that live as long as the session: looking for garbage among them less often.
gc.set_threshold(50_000, 50, 100)

# What the processes get that tests start and that have one device.
ONE_DEVICE_FLAGS = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)

COLORS = {"red": (210, 30, 40), "green": (30, 150, 50), "blue": (40, 60, 220), "yellow": (240, 210, 30)}
SHAPES = ("circle", "square")
CORPUS = """\
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and \
polite answers to the user's questions. USER: What is in the picture? ASSISTANT: A red circle on a white ground.
USER: Which colour does the shape have? ASSISTANT: It is blue. USER: Are you sure? ASSISTANT: Yes, it is.
Provide a brief description of the given image. A green square is on the left, a yellow circle is on the right.
How many shapes are there? There are 2 shapes: one circle, and one square (0123456789).
The quick brown fox jumps over the lazy dog; "JUST VIEW HER PICK OF ZIGZAG X QUILTS," the dog says - #1 & #2!
def area(side):    return side * side  # four  spaces, two  spaces
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run the cases too that are marked thorough")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("thorough"):
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]


@dataclass(frozen=True)
class LlavaData:
    """A LLaVA data set on disk: `json` (rows to train on) and `val_json`, image paths relative to `images`."""

    json: Path
    val_json: Path
    images: Path


@pytest.fixture(autouse=True)
def _stay(monkeypatch) -> None:
    """A command that ends this process at once, because threads are left, would end the tests: it exits."""
    monkeypatch.setattr("neva_jax.errors.leave_at_once", sys.exit)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    """A SentencePiece BPE model of 400 pieces, trained with the options of Llama's. Do not change the file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    """`tokenizer_path` as a `neva_jax.data.tokenizer.Tokenizer`."""
    from neva_jax.data.tokenizer import Tokenizer

    return Tokenizer.from_file(tokenizer_path)


@pytest.fixture(scope="session")
def llava_data(tmp_path_factory) -> LlavaData:
    """25 training rows (every fourth has two rounds, the last has no image), 8 validation rows. Do not change them."""
    folder = tmp_path_factory.mktemp("llava")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        color, shape = list(COLORS)[i % 4], SHAPES[i // 4 % 2]
        width, height = (int(n) for n in rng.integers(24, 64, 2))
        image = Image.new("RGB", (width, height), "white")
        box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=COLORS[color])
        name = f"{i // 12}/{i:02d}.jpg"
        (folder / "images" / name).parent.mkdir(exist_ok=True)
        image.save(folder / "images" / name, quality=90)
        turns = [("<image>\nWhat is in the picture?", f"A {color} {shape}.")]
        if i % 4 == 3:
            turns.append(("Which colour does it have?", color))
        rows.append(_row(f"shape-{i}", turns, name))
    text_only = _row("text-only", [("How many sides does a square have?", "4")])
    data = LlavaData(folder / "rows.json", folder / "val.json", folder / "images")
    data.json.write_text(json.dumps([*rows, text_only]))
    data.val_json.write_text(json.dumps(rows[::3]))
    return data


def _row(name: str, turns: list[tuple[str, str]], image: str | None = None) -> dict:
    said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"id": name, **({"image": image} if image else {}), "conversations": said}


@pytest.fixture
def small_overrides(tmp_path, tokenizer_path, llava_data) -> list[str]:
    """`section.key=value` overrides of a tiny run in `tmp_path / "run"`; append to the list to change one."""
    return [
        f"run.dir={tmp_path / 'run'}",
        f"model.tokenizer={tokenizer_path}",
        "model.allow_random_frozen=true",
        "model.vision.image_size=32",
        "model.vision.patch_size=8",
        "model.vision.hidden_size=32",
        "model.vision.intermediate_size=64",
        "model.vision.num_layers=2",
        "model.vision.num_heads=4",
        "model.vision.freeze=true",
        "model.llm.hidden_size=32",
        "model.llm.intermediate_size=64",
        "model.llm.num_layers=2",
        "model.llm.num_heads=4",
        "model.llm.num_kv_heads=2",
        f"data.train=[{{json: {llava_data.json}, images: {llava_data.images}}}]",
        f"data.val=[{{json: {llava_data.val_json}, images: {llava_data.images}}}]",
        "data.max_length=192",
        "data.workers=0",
        "precision.compute=fp32",
        "train.global_batch=8",
        "train.micro_batch=8",
        "train.steps=4",
        "optimizer.warmup_steps=1",
        "checkpoint.every=2",
        "eval.every=2",
        "eval.batches=1",
        "log.every=1",
        "log.tensorboard=false",
        # One device, whatever the machine has; a test of another mesh says so.
        "mesh.shape=data=1",
    ]
