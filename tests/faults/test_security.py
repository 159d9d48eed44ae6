"""Nothing in a configuration is executed or looked up, and nothing of the environment is written down."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from neva_jax.config import Config
from neva_jax.configfile import config_from_dict, load_config, to_dict, to_yaml
from neva_jax.errors import UserError

ROOT = Path(__file__).parent.parent.parent
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef-wandb-secret",
    "HF_TOKEN": "hf_secretsecretsecret",
    "AWS_SECRET_ACCESS_KEY": "aws/secret+secret",
    "MY_PRIVATE_PASSWORD": "correct-horse-battery-staple",
}


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${oc.decode:1}", "a ${run.seed} b", "${oc.env:NO_SUCH,x}"])
@pytest.mark.parametrize("key", ["run.dir", "model.tokenizer", "log.wandb_name", "data.cache", "data.chat_template"])
def test_references_to_the_environment_are_refused(text, key, tmp_path):
    with pytest.raises(UserError, match=rf"^override {key}.*: \$\{{…\}} is not replaced in a configuration"):
        load_config(None, [f"{key}={text}"])
    path = tmp_path / "run.yaml"
    section, _, name = key.partition(".")
    path.write_text(yaml.safe_dump({section: {name: text}}))
    with pytest.raises(UserError, match="is not replaced"):
        load_config(path)


def test_references_in_lists_of_sources_are_refused():
    with pytest.raises(UserError, match=r"data\.train\[0\]\.json=\$\{oc\.env:HOME\}/a\.json: "):
        load_config(None, ["data.train=[{json: '${oc.env:HOME}/a.json'}]"])
    with pytest.raises(UserError, match=r"is not replaced"):
        load_config(None, ["data.length_buckets=['${oc.env:HOME}']"])


def test_a_checkpoint_cannot_look_into_the_environment(monkeypatch):
    monkeypatch.setenv("MY_PRIVATE_PASSWORD", SECRETS["MY_PRIVATE_PASSWORD"])
    values = to_dict(Config())
    with pytest.raises(UserError, match="is not replaced"):
        config_from_dict({**values, "run": {**values["run"], "dir": "${oc.env:MY_PRIVATE_PASSWORD}"}})
    for template in ("{{ m }} ${oc.env:MY_PRIVATE_PASSWORD}", "${{ x }}", "${"):
        config = config_from_dict({**values, "data": {**values["data"], "chat_template": template}})
        assert config.data.chat_template == template
        assert yaml.safe_load(to_yaml(config))["data"]["chat_template"] == template


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch {file}']", "!!python/name:os.system", "!x y"])
def test_yaml_makes_no_objects(tag, tmp_path):
    tag = tag.format(file=tmp_path / "executed")
    path = tmp_path / "run.yaml"
    path.write_text(f"run:\n  dir: {tag}\n")
    for load in (lambda: load_config(path), lambda: load_config(None, [f"run.dir={tag}"])):
        with pytest.raises(UserError, match="YAML"):
            load()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["~/run", "$HOME/run", "${HOME}/run"[1:], "`touch x`", "$(touch x)", "a;touch x"])
def test_paths_are_not_expanded(name):
    assert load_config(None, [f"run.dir={name!r}"]).run.dir == name


# --- what a run leaves behind ----------------------------------------------------------------------------------------


@pytest.fixture
def finished(run, tmp_path) -> Path:
    """A run with secrets in its environment, which also fails in the end: tracebacks are output too."""
    before = f"""
import os
os.umask(0o027)
os.environ.update({SECRETS!r})
class Package:
    def init(**settings):
        open({str(tmp_path / "wandb.json")!r}, "w").write(repr(settings))
        raise ConnectionError("no route")
import sys
sys.modules["wandb"] = Package
Package.__spec__ = type(sys)("spec")
"""
    options = ["log.tensorboard=true", "log.wandb=online", "train.steps=3", "checkpoint.every=1"]
    outcome = run(*options, "profile.start_step=2", "profile.steps=1", before=before)
    assert outcome.status == 0, outcome.stderr
    return outcome.dir


def test_no_secret_is_written_and_no_pickle_and_nobody_else_can_read(finished, tmp_path):
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "log.txt", "metrics.jsonl", "meta.json", "stderr", "wandb.json"} <= names
    assert any(path.name.startswith("events.") for path in files)
    for path in files:
        content = path.read_bytes()
        assert not content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")), path  # a pickle
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, (path, name)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in finished.rglob("*")}
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o027} == {}


def test_print_config_shows_nothing_of_the_environment(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "neva_jax.train", "--print-config", f"run.dir={tmp_path}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **SECRETS},
    )
    assert done.returncode == 0
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS.values())
    assert json.dumps(yaml.safe_load(done.stdout)["run"]["dir"]) == f'"{tmp_path}"'
