"""Programs that XLA has compiled, kept on disk: a command that starts again compiles nothing.

JAX does the work. Its key of a program holds the program, the versions of jaxlib and of the backend, XLA's flags and
options, and what kind of devices there are, so what is found is what would be compiled. What JAX leaves open is decided
here: the folder, its size, and when several processes may use it.
"""

import os
import re
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from neva_jax.data.cache import cache_folder
from neva_jax.errors import UserError

MAX_BYTES = 4 * 2**30  # a training step of 7B parameters takes some tens of MiB
_ENTRY = re.compile(r".+-[0-9a-f]{64}-cache")


def use_compile_cache(configured: str | None = None) -> None:
    """Makes JAX keep the programs that it compiles from now on, and use those that it finds.

    configured: `run.compile_cache`: a folder; or `off`; or None for `$JAX_COMPILATION_CACHE_DIR`, which is left to JAX
    and to whoever set it, else for neva_jax/compiled in the user's cache folder. All processes of a run must call
    this, after `jax.distributed` has joined them.

    Where the default folder cannot be used, a warning says so and nothing is kept.

    Raises:
      UserError: the configured folder cannot be written to, or not every process sees the same one.
    """
    if configured == "off":
        _use(None)
        return
    if configured is None and (environment := os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        _use(environment)
        return
    folder = (cache_folder(None) / "compiled" if configured is None else Path(configured)).absolute()
    trouble = _prepare(folder)
    if trouble and configured is not None:
        raise UserError(f"run.compile_cache={configured}: {trouble}; name another folder, or off")
    if trouble and jax.process_index() == 0:
        print(f"warning: {folder}: {trouble}; compiled programs are not kept (run.compile_cache)", file=sys.stderr)
    _use(None if trouble else str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Small programs too: to read one takes a fraction of compiling it.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _use(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    reset_cache()  # JAX would go on with the folder of its first program


def _prepare(folder: Path) -> str | None:
    """Makes and prunes the folder; returns why no programs can be kept there, to every process the same yes or no.

    All processes must find the same programs, or those that compile wait for results from those that do not: XLA shares
    the timing of kernels among them.
    """
    token, trouble = np.frombuffer(uuid.uuid4().bytes, np.uint8), None
    if jax.process_index() == 0:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # whoever can write here can run code as this user
            _mark(folder, token).touch()
            prune(folder, MAX_BYTES)
        except OSError as error:
            trouble = f"cannot be written to ({error.strerror})"
    if jax.process_count() > 1:
        token = multihost_utils.process_allgather(token)[0]
        if not multihost_utils.process_allgather(_mark(folder, token).exists()).all():
            trouble = trouble or "process 0 cannot write to it, or another process does not see what it wrote"
    if jax.process_index() == 0:
        with suppress(OSError):
            _mark(folder, token).unlink()
    return trouble


def _mark(folder: Path, token: np.ndarray) -> Path:
    return folder / f".{token.tobytes().hex()}"


def prune(folder: Path, max_bytes: int) -> None:
    """Deletes the programs that were not used for longest, until at most `max_bytes` are left; nothing else."""
    programs = []
    for path in folder.iterdir():
        if _ENTRY.fullmatch(path.name):
            with suppress(FileNotFoundError):  # another process prunes at the same time
                status = path.stat()
                programs.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    excess = sum(size for _, size, _ in programs) - max_bytes
    for _, size, path in sorted(programs):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size
