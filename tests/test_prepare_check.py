"""python -m neva_jax.prepare check and lengths: the whole way from flags to the report."""
