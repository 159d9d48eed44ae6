"""The golden files are what scripts/make_golden.py makes with the torch and transformers that are installed here."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from scripts.make_golden import GOLDEN, llava_arrays
from tests.models import helpers


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_file_is_reproduced(name):
    """Weights and inputs exactly, outputs and gradients within 1e-5 of their norm (kernels differ among machines)."""
    fresh = GOLDEN[name]()
    with np.load(helpers.GOLDEN / f"{name}.npz") as stored:
        assert fresh.keys() == set(stored.files)
        whole = np.linalg.norm([np.linalg.norm(stored[key]) for key in stored.files if key.startswith("grad/")])
        for key in stored.files:
            if key.startswith(("output/", "grad/")):
                # What is 0 but for rounding (a bias of the keys) is compared with the whole gradient.
                bound = 1e-5 * np.linalg.norm(stored[key]) + 1e-7 * whole * key.startswith("grad/")
                assert np.linalg.norm(fresh[key] - stored[key]) <= bound, key
            else:
                np.testing.assert_array_equal(fresh[key], stored[key], err_msg=key)


def test_other_weights_and_inputs():
    """Logits and gradients of the whole model against Hugging Face's, as in test_neva, for numbers not in a file."""
    golden = helpers.to_golden(llava_arrays(seed=99))
    assert np.any(golden.input["tokens"] != helpers.load_golden("llava").input["tokens"])
    loss, logits, grads = helpers.run_neva(golden)
    real = golden.input["mask"] == 1
    np.testing.assert_allclose(logits[real], golden.output["logits"][real], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, golden.output["loss"], rtol=1e-5)
    config = helpers.neva_config(golden.config)
    helpers.assert_gradients_close(grads, helpers.neva_tree(golden.grad, config), rtol=1e-4)
