"""Checkpoints to read from."""

from pathlib import Path

import pytest

from tests.training.saved import save


@pytest.fixture
def run(tokenizer, tmp_path) -> Path:
    """A run with one complete checkpoint, of step 5."""
    save(tmp_path / "run", 5, tokenizer)
    return tmp_path / "run"


@pytest.fixture
def chain(tokenizer, tmp_path) -> Path:
    """Three runs: `first` has everything, `second` a projector, `third` a language model; each starts from the last."""
    save(tmp_path / "first", 2, tokenizer, seed=1)
    save(tmp_path / "second", 4, tokenizer, components=("projector",), seed=2, base=str(tmp_path / "first"))
    save(tmp_path / "third", 6, tokenizer, components=("llm",), seed=3, base=str(tmp_path / "second"))
    return tmp_path
