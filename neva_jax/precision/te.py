"""Whether Transformer Engine is there; with `fp8_te.py` and `models/attention_te.py` the only code that imports it."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

OLDEST = (2, 11)


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
