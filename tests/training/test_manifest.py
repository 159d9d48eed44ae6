"""The digest manifest: any difference between a checkpoint and what was saved is found, and its file is named."""

import json
import os
import re
from pathlib import Path

import pytest
import xxhash

from neva_jax.training.manifest import (
    DamagedCheckpoint,
    check_manifest,
    digest,
    files_of,
    problems,
    read_manifest,
    size_of,
    write_manifest,
)

FILES = {
    "state/d/0a1b": bytes(range(256)) * 64,  # 4 pages
    "state/manifest.ocdbt": b"\x0c\xdb\x3a\x2a",
    "data/metadata": b"{}",
    "meta/meta.json": b'{"format": 2}',
    "empty": b"",
    "_CHECKPOINT_METADATA": b"{ }",
}


@pytest.fixture
def step(tmp_path) -> Path:
    folder = tmp_path / "5"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert write_manifest(folder) == sum(map(len, FILES.values()))
    return folder


def test_the_manifest_has_size_and_digest_of_every_file(step):
    expected = {name: (len(content), xxhash.xxh3_128_hexdigest(content)) for name, content in FILES.items()}
    assert read_manifest(step) == expected
    assert files_of(step) == sorted(FILES)
    assert size_of(step) == sum(map(len, FILES.values()))
    for level in ("full", "size", "off"):
        check_manifest(step, level)
    assert problems(step, "full") == []


def test_a_large_file_is_read_in_pieces(tmp_path):
    content = os.urandom(10 * 2**20 + 7)
    (tmp_path / "x").write_bytes(content)
    seen = []
    assert digest(tmp_path / "x", seen.append) == xxhash.xxh3_128_hexdigest(content)
    assert sum(seen) == len(content)
    assert len(seen) > 1


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
def test_one_flipped_bit_in_any_file_is_found(name, step):
    flip_bit(step / name)
    same = f"{name}: its contents are not what was saved (another digest, the same {len(FILES[name])} bytes)"
    assert problems(step, "full") == [same]
    assert problems(step, "size") == []
    with pytest.raises(DamagedCheckpoint, match=f"^{re.escape(f'{step}/{same}')}$"):
        check_manifest(step, "full")


def zero_page(step: Path) -> None:
    path = step / "state/d/0a1b"
    path.write_bytes(FILES["state/d/0a1b"][:4096] + bytes(4096) + FILES["state/d/0a1b"][8192:])


def test_a_zeroed_page_is_found(step):
    zero_page(step)
    assert [line.split(":")[0] for line in problems(step, "full")] == ["state/d/0a1b"]


@pytest.mark.parametrize("level", ["full", "size"])
@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda s: os.truncate(s / "state/d/0a1b", 100), "state/d/0a1b: has 100 bytes, but was saved with 16384"),
        (lambda s: (s / "data/metadata").write_bytes(b"{}\n"), "data/metadata: has 3 bytes, but was saved with 2"),
        (lambda s: (s / "state/d/0a1b").unlink(), "state/d/0a1b: is missing"),
        (lambda s: (s / "empty").unlink(), "empty: is missing"),
        (lambda s: (s / "state/x").touch(), "state/x: was not there when the checkpoint was saved"),
        (lambda s: (s / "state/d/0a1b").rename(s / "y"), "state/d/0a1b: is missing"),
    ],
)
def test_sizes_and_names_are_compared_at_every_level(damage, found, level, step):
    damage(step)
    assert found in problems(step, level)


def test_a_link_is_no_file_and_is_not_followed(step, tmp_path):
    """The contents are right: a link out of the checkpoint may point to something else tomorrow."""
    (step / "state/d/0a1b").rename(tmp_path / "outside")
    (step / "state/d/0a1b").symlink_to(tmp_path / "outside")
    assert problems(step, "full") == ["state/d/0a1b: is no regular file"]
    (step / "state/d/0a1b").unlink()
    os.mkfifo(step / "state/d/0a1b")  # nor waited for
    assert problems(step, "full") == ["state/d/0a1b: is no regular file"]


def test_names_in_the_manifest_lead_nowhere(step, tmp_path):
    """A name is compared with the names that are there; nothing outside is opened."""
    (tmp_path / "secret").write_text("x")
    described = json.loads((step / "manifest.json").read_text())
    described["files"]["../secret"] = [1, xxhash.xxh3_128_hexdigest(b"x")]
    described["self"] = xxhash.xxh3_128_hexdigest(json.dumps(described["files"], sort_keys=True).encode())
    (step / "manifest.json").write_text(json.dumps(described))
    assert problems(step, "full") == ["../secret: is missing"]


def test_all_problems_are_found_and_the_first_is_told(step):
    flip_bit(step / "data/metadata")
    (step / "empty").unlink()
    assert len(problems(step, "full")) == 2
    with pytest.raises(DamagedCheckpoint, match=r"/5/data/metadata: its contents .* \(and 1 more files\)$"):
        check_manifest(step, "full")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: path.write_text(path.read_text().replace("2", "3", 1)), r"is damaged \("),
        (lambda path: path.write_text(path.read_text()[:-9]), r"is damaged \("),
        (lambda path: path.write_text("[]"), r"is damaged \("),
        (lambda path: path.write_bytes(b"\xff"), r"is damaged \("),
        (lambda path: path.unlink(), "is missing$"),
    ],
)
def test_a_manifest_that_is_damaged_itself_is_named(damage, why, step):
    damage(step / "manifest.json")
    with pytest.raises(DamagedCheckpoint, match=f"^{re.escape(str(step))}/manifest.json: {why}"):
        check_manifest(step, "size")


def test_every_bit_of_the_manifest_counts(step):
    path = step / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        try:
            assert problems(step, "full") != [], place
        except DamagedCheckpoint:
            continue
