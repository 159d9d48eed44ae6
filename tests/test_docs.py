"""Generated and copied documentation is current: docs/configuration.md, configs/template.yaml, NeMo's keys."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from neva_jax.config import Config, SourceConfig, walk
from neva_jax.configfile import load_config

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "configuration.md"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """scripts/make_configuration_docs.py as a module."""
    spec = importlib.util.spec_from_file_location("maker", ROOT / "scripts" / "make_configuration_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(values: dict, prefix: str = "") -> dict:
    """A tree of sections as {dotted key: value}."""
    found = {}
    for name, inner in values.items():
        found |= leaves(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return found


def read(name: str) -> dict:
    return leaves(yaml.safe_load((ROOT / "configs" / name).read_text(encoding="utf-8")))


def test_page_is_current(maker, capsys):
    assert maker.main(["--check"]) == 0, "run python scripts/make_configuration_docs.py"
    assert capsys.readouterr().err == ""


def test_check_finds_a_page_that_is_not_current(maker, tmp_path, capsys):
    page = tmp_path / "configuration.md"
    assert maker.main(["--check", "--output", str(page)]) == 1
    assert not page.exists()
    assert maker.main(["--output", str(page)]) == 0
    assert page.read_bytes() == PAGE.read_bytes()
    page.write_text(page.read_text(encoding="utf-8").replace("Optimizer steps.", "Steps."), encoding="utf-8")
    assert maker.main(["--check", "--output", str(page)]) == 1
    assert "is not current" in capsys.readouterr().err


def test_page_has_every_key_with_its_documentation():
    text = PAGE.read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    for name, item in walk():
        section, _, key = name.rpartition(".")
        assert f"| `{key}` |" in sections[section], name
        assert item.metadata["doc"] in sections[section], name


def test_every_key_is_documented():
    assert [name for name, item in walk() if not item.metadata["doc"].endswith(".")] == []


def test_template_holds_exactly_the_keys_of_the_schema():
    template = read("template.yaml")
    assert list(template) == [name for name, _ in walk()]  # in the same order, too
    for source in template["data.train"] + template["data.val"]:
        assert list(source) == list(SourceConfig.__dataclass_fields__)


# An example would switch profiling on, or want unrolled layers.
WITHOUT_EXAMPLE = ("profile.start_step", "train.labelled_positions")


def test_template_shows_the_defaults():
    config = load_config(ROOT / "configs" / "template.yaml")
    for name, _ in walk():
        shown, default = config, Config()
        for part in name.split("."):
            shown, default = getattr(shown, part), getattr(default, part)
        if default is not None and default != []:
            assert shown == default, name
        elif name not in WITHOUT_EXAMPLE:
            assert shown, f"{name} has no default, so the template should show an example"


def test_template_comments_every_example():
    lines = (ROOT / "configs" / "template.yaml").read_text(encoding="utf-8").splitlines()
    examples = {line.split(":")[0].strip() for line in lines if "# example" in line}
    expected = {
        name.rpartition(".")[2]
        for name, item in walk()
        if name in ("data.train", "data.val", "data.length_buckets", "run.allow_changed")
        or (item.default is None and name not in WITHOUT_EXAMPLE)
    }
    assert examples == expected


def test_every_key_that_nemo_is_mapped_to_exists_and_is_set_in_pretrain_7b(maker):
    known = {name for name, _ in walk()}
    written = set(read("pretrain_7b.yaml"))
    for rows in maker.NEMO_KEYS.values():
        for theirs, ours, _ in rows:
            if ours in (maker.NOT_NEEDED, maker.NOT_YET):
                continue
            for name in ours.split(", "):
                assert name in known, (theirs, name)
                # The workflow has no kv_channels.
                assert name in written or theirs == "model.kv_channels", (theirs, name)


def test_nemo_keys_are_listed_once(maker):
    theirs = [row[0] for rows in maker.NEMO_KEYS.values() for row in rows]
    assert len(theirs) == len(set(theirs))
