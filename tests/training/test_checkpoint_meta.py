"""Which checkpoint is meant, what it says of itself, and the chain of its bases."""

import hashlib
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from neva_jax.configfile import to_dict
from neva_jax.errors import UserError
from neva_jax.training.checkpoint_meta import available_components, locate, newest_step, read_meta
from tests.training.saved import ALL, CONFIG, save

# --- which checkpoint -------------------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_named_with_the_way_back(run):
    """To go on from an older one without a word would lose steps."""
    newest = run / "checkpoints" / "9"
    (newest / "state").mkdir(parents=True)
    for find in (lambda: newest_step(run / "checkpoints"), lambda: locate(run)):
        with pytest.raises(UserError, match=rf"^{newest}: is damaged, .* move it away to go back to step 5$"):
            find()
    shutil.rmtree(run / "checkpoints" / "5")
    with pytest.raises(UserError, match=r"to go back to the start$"):
        newest_step(run / "checkpoints")


def test_steps_are_numbers(run, tokenizer):
    save(run, 10, tokenizer)
    assert newest_step(run / "checkpoints") == 10


def test_a_checkpoint_is_found_from_its_run_its_folder_and_itself(run):
    step_dir = run / "checkpoints" / "5"
    for path in (run, run / "checkpoints", step_dir, str(run)):
        assert locate(path) == step_dir


def test_a_folder_without_checkpoint_is_named(tmp_path):
    assert newest_step(tmp_path / "nope") is None
    for path in (tmp_path, tmp_path / "nope"):
        message = f"{path}: holds no checkpoint; name a run's directory, or a step in its checkpoints/"
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            locate(path)


# --- meta ------------------------------------------------------------------------------------------------------------


def test_meta_json(tokenizer, tokenizer_path, tmp_path):
    save(tmp_path, 5, tokenizer, components=("projector", "llm"), base="/somewhere/base")
    folder = tmp_path / "checkpoints" / "5" / "meta"
    assert (folder / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()
    sha256 = hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    packages = ("neva_jax", "jax", "flax", "optax", "orbax-checkpoint")
    assert json.loads((folder / "meta.json").read_text()) == {
        "format": 2,
        "step": 5,
        "components": ["projector", "llm"],
        "base": "/somewhere/base",
        "ema": False,
        "template": "plain",
        "tokenizer": {
            "file": "tokenizer.model",
            "sha256": sha256,
            "size": 400,
            "bos_token": "<s>",
            "eos_token": "</s>",
        },
        "versions": {name: version(name) for name in packages},
        "config": to_dict(CONFIG),
    }


def test_meta_is_read_back(run, tokenizer):
    meta = read_meta(run / "checkpoints" / "5")
    assert (meta.step, meta.config, meta.components, meta.base) == (5, CONFIG, ALL, None)
    assert meta.tokenizer.serialized == tokenizer.serialized


def set_json(path: Path, **changes) -> None:
    described = json.loads(path.read_text())
    for name, value in changes.items():
        described[name] = value
    path.write_text(json.dumps({name: value for name, value in described.items() if value is not None}))


BROKEN = {
    "a newer format": (
        lambda meta: set_json(meta / "meta.json", format=3),
        "{meta}/meta.json: is of format 3, this version reads 1 to 2: was written by a newer neva_jax; install that",
    ),
    "another tokenizer": (
        lambda meta: (meta / "tokenizer.model").write_bytes((meta / "tokenizer.model").read_bytes() + b"\x1a\x00"),
        "{meta}/tokenizer.model: is not the file that the checkpoint was saved with",
    ),
    "no tokenizer": (lambda meta: (meta / "tokenizer.model").unlink(), "{meta}/tokenizer.model: cannot be read"),
    "cut": (lambda meta: (meta / "meta.json").write_text('{"format": 1, '), "{meta}/meta.json: is broken"),
    "empty": (lambda meta: (meta / "meta.json").write_text(""), "{meta}/meta.json: is broken"),
    "a list": (lambda meta: (meta / "meta.json").write_text("[]"), "{meta}/meta.json: is broken"),
    "no text": (lambda meta: (meta / "meta.json").write_bytes(b"\xff\x00\xfe"), "{meta}/meta.json: is broken"),
    "a folder": (
        lambda meta: ((meta / "meta.json").unlink(), (meta / "meta.json").mkdir()),
        "{meta}/meta.json: is broken",
    ),
    "no components": (lambda meta: set_json(meta / "meta.json", components=None), "{meta}/meta.json: is broken"),
    "no configuration": (lambda meta: set_json(meta / "meta.json", config=None), "{meta}/meta.json: is broken"),
    "an unknown key": (
        lambda meta: set_json(meta / "meta.json", config={"model": {"lllm": {"hidden_size": 1}}}),
        "unknown key model.lllm",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_named(name, run):
    damage, message = BROKEN[name]
    meta = run / "checkpoints" / "5" / "meta"
    damage(meta)
    with pytest.raises(UserError) as caught:
        read_meta(meta.parent)
    assert message.format(meta=meta) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- bases ------------------------------------------------------------------------------------------------------------


def test_components_come_from_the_nearest_checkpoint_that_has_them(chain):
    first, second, third = (
        chain / name / "checkpoints" / step for name, step in (("first", "2"), ("second", "4"), ("third", "6"))
    )
    assert available_components(chain / "first") == dict.fromkeys(ALL, first)
    assert available_components(chain / "second") == {"vision": first, "projector": second, "llm": first}
    assert available_components(third) == {"vision": first, "projector": second, "llm": third}


def test_a_base_that_is_gone_is_named_with_the_checkpoint_that_needs_it(chain):
    (chain / "first").rename(chain / "away")
    second, third = chain / "second" / "checkpoints" / "4", chain / "third" / "checkpoints" / "6"
    with pytest.raises(UserError) as caught:
        available_components(chain / "third")
    assert str(caught.value).startswith(
        f"{third}: its base cannot be read: {second}: its base cannot be read: {chain}/first: holds no checkpoint"
    )
