"""neva_jax: train, evaluate and serve LLaVA-style vision-language models in JAX."""

__version__ = "0.1.0"
