"""The digest manifest of a checkpoint: what each of its files must be, bit for bit.

    STEP/manifest.json   {"hash": "xxh3_128", "files": {"state/d/ab12…": [bytes, digest], …}, "self": digest of "files"}

Orbax restores flipped bits without a word; the manifest does not let them pass. It is written when Orbax has committed
and before the checkpoint gets its name, so that no complete checkpoint is without one (format 1 had none). The hash
finds damage, not forgery: who can write the files can write the manifest as well.
"""

import json
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import xxhash

from neva_jax.errors import UserError

NAME = "manifest.json"
HASH = "xxh3_128"
THREADS = 4
_BLOCK = 4 * 2**20

Level = Literal["full", "size", "off"]
Progress = Callable[[int], object]


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was saved: which file, and how it differs."""


def files_of(step_dir: Path) -> list[str]:
    """Every entry below `step_dir` that is no directory, but the manifest: relative, sorted. Links are not followed."""

    def walk(folder: Path) -> Iterator[Path]:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from walk(Path(entry.path))
                else:
                    yield Path(entry.path)

    names = (path.relative_to(step_dir).as_posix() for path in walk(step_dir))
    return sorted(name for name in names if name != NAME)


def size_of(step_dir: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum((step_dir / name).lstat().st_size for name in files_of(step_dir))


def digest(path: Path, progress: Progress | None = None, sync: bool = False) -> str:
    """The digest of a regular file's contents.

    Args:
      progress: gets the bytes read so far, piece by piece. sync: the contents are on the disk when this returns.

    Raises:
      OSError: it cannot be read, or is no regular file.
    """
    state = xxhash.xxh3_128()
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("no regular file")
        buffer = memoryview(bytearray(_BLOCK))
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            if progress is not None:
                progress(count)
        if sync:
            os.fsync(descriptor)
    return state.hexdigest()


def write_manifest(step_dir: Path) -> int:
    """Reads all files and writes their manifest; when it returns, all of it is on the disk. Returns bytes read.

    Raises:
      OSError: a file cannot be read, or the manifest cannot be written.
    """
    names = files_of(step_dir)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(lambda name: digest(step_dir / name, sync=True), names))
    files = {name: [(step_dir / name).stat().st_size, d] for name, d in zip(names, digests, strict=True)}
    text = json.dumps({"hash": HASH, "files": files, "self": _self(files)}, indent=0)
    with (step_dir / NAME).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    for folder in {step_dir, *((step_dir / name).parent for name in names)}:
        sync_folder(folder)
    return sum(size for size, _ in files.values())


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _self(files: dict[str, list]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def read_manifest(step_dir: Path) -> dict[str, tuple[int, str]] | None:
    """File -> (bytes, digest); None where there is no manifest.

    Raises:
      DamagedCheckpoint: the manifest itself is not what was written.
    """
    path = step_dir / NAME
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        files = described["files"]
        if described["hash"] != HASH or described["self"] != _self(files):
            raise ValueError("its own digest does not fit")
        return {name: (int(size), str(d)) for name, (size, d) in files.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path}: is damaged ({error})") from None


def problems(step_dir: Path, level: Level, progress: Progress | None = None) -> list[str]:
    """Everything in which a checkpoint with a manifest differs from it: `FILE: how`, in the order of names.

    level: `full` compares contents, `size` sizes and names only.

    Raises:
      DamagedCheckpoint: the manifest is damaged or missing.
    """
    expected = read_manifest(step_dir)
    if expected is None:
        raise DamagedCheckpoint(f"{step_dir / NAME}: is missing")
    there = set(files_of(step_dir))

    def compare(name: str) -> str | None:
        if name not in there:
            return f"{name}: is missing"
        if name not in expected:
            return f"{name}: was not there when the checkpoint was saved"
        size, saved = expected[name]
        path = step_dir / name
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                return f"{name}: is no regular file"
            if (now := path.lstat().st_size) != size:
                return f"{name}: has {now} bytes, but was saved with {size}"
            if level == "full" and digest(path, progress) != saved:
                return f"{name}: its contents are not what was saved (another digest, the same {size} bytes)"
        except OSError as error:
            return f"{name}: cannot be read ({error.strerror or error})"
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        return [found for found in pool.map(compare, sorted(there | expected.keys())) if found]


def check_manifest(step_dir: Path, level: Level, progress: Progress | None = None) -> None:
    """Raises DamagedCheckpoint, naming the first file of `problems` and how many more there are."""
    if level == "off":
        return
    found = problems(step_dir, level, progress)
    if found:
        more = f" (and {len(found) - 1} more files)" if found[1:] else ""
        raise DamagedCheckpoint(f"{step_dir / found[0]}{more}")
