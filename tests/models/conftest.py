"""Most of the time of these tests is compilation, so XLA leaves out its expensive passes."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
