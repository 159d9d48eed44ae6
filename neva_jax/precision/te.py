"""Whether Transformer Engine is there; with `fp8_te.py` and `models/attention_te.py` the only code that imports it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version

OLDEST = (2, 11)
_TRACING = threading.RLock()


@cache
def problem() -> str | None:
    """Why Transformer Engine for JAX cannot be used here, or None."""
    try:
        found = version("transformer_engine")
    except PackageNotFoundError:
        return "Transformer Engine is not installed (requirements-gpu.txt)"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"Transformer Engine {found} is too old, {'.'.join(map(str, OLDEST))} is needed"
    try:
        import transformer_engine.jax  # noqa: F401
    except Exception as error:  # a CUDA library that is missing or of another version, too
        return f"Transformer Engine {found} cannot be imported ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


@contextmanager
def one_device() -> Iterator[None]:
    """A context in which its functions are traced for one device.

    It keeps its mesh in a global of the process, and the step is traced in a thread of its own (`training.ahead`).
    """
    from transformer_engine.jax.sharding import MeshResource, global_shard_guard

    with _TRACING, global_shard_guard(MeshResource()):
        yield
