"""The step that is compiled from shapes is the one that the run then calls."""

import logging
import re
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from neva_jax import train
from neva_jax.parallel.mesh import one_device_mesh
from neva_jax.training.ahead import CompiledAhead

CASES = {
    "averaged": ["train.micro_batch=2", "optimizer.ema_decay=0.9", "guard.spike_factor=9", "train.remat=dots"],
    "fp8": ["precision.compute=fp8_delayed", "precision.fp8.backend=xla"],
    "shortcuts": ["model.llm.freeze=true", "train.constant_prefix=8", "train.labelled_positions=12", "train.unroll=2"],
    "mesh": [
        "mesh.shape=data=2,fsdp=2,tensor=2",
        "mesh.zero1=true",
        "train.micro_batch=2",
        "data.pack=true",
        "data.max_length=200",
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_compiled_once_and_in_its_own_thread(case, small_overrides, tmp_path, caplog, monkeypatch):
    """Another shape, dtype or place of any argument would make the first step compile again; so would a resumed run."""
    monkeypatch.setattr(logging.getLogger("jax"), "propagate", True)
    if case == "averaged":  # a compilation that takes longer than all else is waited for
        compiles = CompiledAhead.run
        monkeypatch.setattr(CompiledAhead, "run", lambda self: time.sleep(3) or compiles(self))
    settings = [*small_overrides, f"run.dir={tmp_path / 'run'}", f"data.cache={tmp_path}", "data.val=[]", *CASES[case]]
    steps = ["train.global_batch=8", "optimizer.warmup_steps=0"]
    if case != "mesh":
        monkeypatch.setattr(jax, "device_count", lambda: 1)
    for count in (1, 2):  # fresh, and resumed
        caplog.clear()
        jax.config.update("jax_log_compiles", True)
        try:
            assert train.main([*settings, *steps, f"train.steps={count}", "run.allow_changed=[train.steps]"]) == 0
        finally:
            jax.config.update("jax_log_compiles", False)
        finished = r"Finished XLA compilation of jit\(train_step\)"
        assert [one.threadName for one in caplog.records if re.match(finished, one.getMessage())] == ["compile"]


def test_what_goes_wrong_is_kept_for_the_log():
    mesh = one_device_mesh()
    shape = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    ahead = CompiledAhead(jax.jit(lambda x: x @ jnp.ones(3)), mesh, (shape,))
    ahead.join(60)
    assert isinstance(ahead.error, TypeError)
    never = CompiledAhead(jax.jit(lambda x: x + 1), mesh, (shape,), ready=lambda: False)
    never.join(60)
    assert never.error is None
