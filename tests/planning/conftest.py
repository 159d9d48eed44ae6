"""Configurations to plan: files of configs/ with overrides, and a model of middle size that compiles in seconds."""

from pathlib import Path

import pytest

from neva_jax.configfile import load_config

ROOT = Path(__file__).parent.parent.parent
MIDDLE = [
    "model.attention=xla",
    "model.allow_random_frozen=true",
    "model.vision.freeze=true",
    "model.llm.vocab_size=32000",
    "model.llm.num_layers=16",
    "data.max_length=512",
    "train.micro_batch=8",
    "train.global_batch=8",
    "train.loss_chunk=256",
    "precision.compute=fp32",
]


@pytest.fixture
def shipped():
    """`shipped("pretrain_7b", *overrides)`: a configuration of configs/."""

    def load(name: str, *overrides: str):
        return load_config(ROOT / "configs" / f"{name}.yaml", overrides)

    return load


@pytest.fixture
def middle():
    """`middle(*overrides)`: 16 layers of 7B in fp32, 8 rows of 512 tokens, the encoder frozen."""

    def load(*overrides: str):
        return load_config(None, [*MIDDLE, *overrides])

    return load
