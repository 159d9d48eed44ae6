"""Fixtures of the data tests."""

import pytest

from neva_jax.configfile import load_config
from neva_jax.data.sources import Sources
from tests.data.rows import LENGTH, conversation, write_rows


@pytest.fixture
def config(small_overrides, tmp_path):
    """Makes the configuration, and the sources of its training rows."""

    def make(*overrides):
        cache = f"data.cache={tmp_path / 'cache'}"
        made = load_config(None, [*small_overrides, f"data.max_length={LENGTH}", cache, *overrides])
        return made, Sources(made.data, "train", made.run.seed, shuffle=True)

    return make


@pytest.fixture
def broken_rows(tmp_path):
    """20 rows; 4 has no image file, 5 an unknown role, 12 a truncated image: (override, path, messages of the bad)."""
    rows = [conversation(f"row-{i}", f"<image>\nNumber {i}?", f"It is {i}.", image=f"{i % 3}.png") for i in range(20)]
    rows[4]["image"] = "absent.png"
    rows[5]["conversations"][1]["from"] = "bot"
    rows[12]["image"] = "half.png"
    override, path = write_rows(tmp_path, rows)
    folder = tmp_path / "images"
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:3000])
    messages = {
        4: f"{path}: row 4 (id 'row-4'): field image: absent.png is not in {folder}",
        5: f"{path}: row 5 (id 'row-5'): field conversations[1].from must be human or gpt, not 'bot'",
        12: f"{path}: row 12 (id 'row-12'): field image: half.png is broken (image file is truncated)",
    }
    return override, path, messages
