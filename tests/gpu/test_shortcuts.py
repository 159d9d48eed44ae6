"""The shortcuts of a step on a GPU's own kernels: cuDNN's attention behind a prefix, Transformer Engine's products."""

import numpy as np
import pytest

from neva_jax.config import PrecisionConfig
from tests.training.layouts import Layout
from tests.training.micro_batches import FP8, MOST, compute, flat, rows

# Wide enough for the kernels.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "num_kv_heads": 4, "init_std": 0.05}
PRECISIONS = {"bf16": PrecisionConfig(compute="bf16"), **FP8}


@pytest.mark.parametrize("kind", PRECISIONS)
def test_both_shortcuts_are_as_near_to_fp32_as_the_whole(kind):
    layout, given = Layout("data=1", "pretrain"), {"llm": WIDE, "unroll": 2}
    exact, _ = compute(layout, rows(), **given)
    whole, _ = compute(layout, rows(), precision=PRECISIONS[kind], **given)
    short, _ = compute(layout, rows(), prefix=True, labelled=MOST, precision=PRECISIONS[kind], **given)
    assert short[0] == pytest.approx(whole[0], rel=0.01)
    ours, theirs, wanted = (flat(gradients) for _, gradients in (short, whole, exact))
    assert 1e-3 < np.linalg.norm(theirs - wanted) / np.linalg.norm(wanted) < 0.3
    assert np.linalg.norm(ours - wanted) < 1.3 * np.linalg.norm(theirs - wanted)
