"""How a file, overrides and --mesh-shape become one configuration, and what the example configurations say."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from neva_jax import train
from neva_jax.checks import check, check_mesh
from neva_jax.config import COMPONENTS, Config, walk
from neva_jax.configfile import config_from_dict, load_config, to_dict, to_yaml
from neva_jax.derived import (
    derived_comment,
    frozen_components,
    head_dim,
    image_tokens,
    kv_heads,
    padded_vocab,
    parse_mesh_shape,
    trained_components,
)
from neva_jax.training.weights import check_compatible

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "configs").glob("*.yaml"))

example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def value(config: Config, name: str):
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.fixture
def file(tmp_path) -> Path:
    """A configuration file that changes a few keys of several sections."""
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  steps: 11\n  micro_batch: 3\nmesh: {shape: data=2}\nmodel: {llm: {num_layers: 5}}\n")
    return path


def printed(capsys, *arguments: str) -> Config:
    """What `train --print-config` prints, read back."""
    assert train.main([*arguments, "--print-config"]) == 0
    return config_from_dict(yaml.safe_load(capsys.readouterr().out))


# --- precedence ------------------------------------------------------------------------------------------------------


def test_file_changes_only_its_own_keys(file):
    config = load_config(file)
    assert (config.train.steps, config.train.micro_batch, config.model.llm.num_layers) == (11, 3, 5)
    changed = {name for name, _ in walk() if value(config, name) != value(Config(), name)}
    assert changed == {"train.steps", "train.micro_batch", "mesh.shape", "model.llm.num_layers"}


def test_override_beats_file_and_later_override_beats_earlier(file):
    config = load_config(file, ["train.steps=12", "train.steps=13", "model.llm.num_heads=7"])
    assert config.train.steps == 13
    assert (config.train.micro_batch, config.model.llm.num_layers) == (3, 5)  # siblings from the file stay
    assert config.model.llm.num_heads == 7


def test_mesh_shape_flag_beats_override_and_file(file, capsys):
    assert printed(capsys, "--config", str(file)).mesh.shape == "data=2"
    assert printed(capsys, "--config", str(file), "mesh.shape=fsdp=4").mesh.shape == "fsdp=4"
    arguments = ["--config", str(file), "--mesh-shape", "data=2,tensor=4", "mesh.shape=fsdp=4"]
    assert printed(capsys, *arguments).mesh.shape == "data=2,tensor=4"


@pytest.mark.parametrize(
    "order",
    [
        ["--config", "FILE", "--mesh-shape", "tensor=2", "train.steps=5", "train.unroll=2"],
        ["train.steps=5", "train.unroll=2", "--config", "FILE", "--mesh-shape", "tensor=2"],
        ["train.steps=5", "--config", "FILE", "--mesh-shape", "tensor=2", "train.unroll=2"],
        ["--config", "FILE", "train.steps=5", "--mesh-shape", "tensor=2", "train.unroll=2"],
    ],
    ids=["flags first", "flags last", "flags between", "mixed"],
)
def test_flags_and_overrides_in_any_order(file, capsys, order):
    config = printed(capsys, *[str(file) if word == "FILE" else word for word in order])
    assert (config.train.steps, config.train.unroll, config.train.micro_batch) == (5, 2, 3)
    assert config.mesh.shape == "tensor=2"


def test_no_file_gives_the_defaults():
    assert load_config(None) == Config()


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_empty_file_gives_the_defaults(tmp_path, text):
    (tmp_path / "empty.yaml").write_text(text)
    assert load_config(tmp_path / "empty.yaml") == Config()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.lr=2", 2.0),
        ("optimizer.clip_norm=null", None),
        ("optimizer.clip_norm=", None),
        ("model.llm.freeze=true", True),
        ("model.vision.image_mean=[0.5, 0.4, 0.3]", [0.5, 0.4, 0.3]),
        ("run.dir=runs/a=b", "runs/a=b"),
        ("run.dir='a: b'", "a: b"),
        ("run.dir=5", "5"),
        ("log.wandb=offline", "offline"),
        ("log.wandb=off", "off"),  # false in YAML 1.1
        ("run.dir=truenas/run", "truenas/run"),
        ("run.dir=false_start", "false_start"),
        ("run.dir=2024-11-24", "2024-11-24"),
        ("run.dir=2024-13-45", "2024-13-45"),
        ("run.dir=007", "007"),
        ("run.dir=12:30:00", "12:30:00"),
        ("run.dir=1_000", "1_000"),
        ("optimizer.lr=2E3", 2000.0),
        ("optimizer.lr=.5", 0.5),
        ('log.wandb="off"', "off"),
    ],
)
def test_override_is_read_as_yaml(override, expected):
    found = value(load_config(None, [override]), override.split("=")[0])
    assert found == expected
    assert type(found) is type(expected)


def test_wandb_off_in_a_file_needs_no_quotes(tmp_path):
    (tmp_path / "run.yaml").write_text("log:\n  wandb: off\n")
    assert load_config(tmp_path / "run.yaml").log.wandb == "off"


def test_sources_are_replaced_as_a_whole(tmp_path):
    (tmp_path / "run.yaml").write_text("data:\n  train:\n  - {json: a, images: b, weight: 2}\n  - {json: c}\n")
    config = load_config(tmp_path / "run.yaml")
    assert [dataclasses.astuple(source) for source in config.data.train] == [
        ("a", "b", None, 2.0),
        ("c", None, None, 1.0),
    ]
    config = load_config(tmp_path / "run.yaml", ["data.train=[{json: d}]"])
    assert [dataclasses.astuple(source) for source in config.data.train] == [("d", None, None, 1.0)]


# --- out and in again ------------------------------------------------------------------------------------------------


def test_round_trip_of_values_that_yaml_could_mistake(tmp_path):
    overrides = ["run.dir='null'", "log.wandb_project='1e3'", "log.wandb_name='off'", "optimizer.lr=1e-300"]
    config = load_config(None, [*overrides, "data.train=[{json: 'ä: #b', images: '~'}]", "optimizer.beta1=0.1"])
    assert (config.run.dir, config.log.wandb_project, config.log.wandb_name) == ("null", "1e3", "off")
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config
    assert config_from_dict(to_dict(config)) == config


def test_nothing_can_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(None).train.steps = 5


# --- derived numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "devices", "sizes"),
    [
        ("data=-1", 8, (8, 1, 1)),
        ("data=1", 1, (1, 1, 1)),
        ("tensor=4,data=2", 8, (2, 1, 4)),
        ("data=-1,fsdp=2,tensor=2", 8, (2, 2, 2)),
        (" data=2, tensor=-1", 8, (2, 1, 4)),
        ("fsdp=-1,tensor=8", 8, (1, 1, 8)),
    ],
)
def test_mesh_shape(text, devices, sizes):
    assert tuple(parse_mesh_shape(text, devices).items()) == tuple(zip(("data", "fsdp", "tensor"), sizes, strict=True))


def test_derived_numbers():
    config = load_config(None, ["model.vision.image_size=336", "model.llm.vocab_size=32008", "model.llm.freeze=true"])
    assert image_tokens(config.model) == 576
    assert (kv_heads(config.model.llm), head_dim(config.model.llm), padded_vocab(config.model.llm)) == (32, 128, 32008)
    assert (trained_components(config.model), frozen_components(config.model)) == (("projector",), ("vision", "llm"))
    config = load_config(
        None,
        [
            "model.llm.num_kv_heads=8",
            "model.llm.head_dim=64",
            "model.llm.vocab_size=32008",
            "model.llm.vocab_multiple=128",
        ],
    )
    assert (kv_heads(config.model.llm), head_dim(config.model.llm), padded_vocab(config.model.llm)) == (8, 64, 32128)


def test_derived_comment_is_yaml_comment():
    text = derived_comment(load_config(None, ["model.vision.image_size=336"]))
    assert "image_tokens: 576" in text
    assert "trained: projector, llm" in text
    assert yaml.safe_load(text) is None


# --- example configurations ------------------------------------------------------------------------------------------


def with_files(config: Config, folder: Path) -> Config:
    """The configuration with its paths replaced by files and folders that exist."""
    (folder / "file").touch()
    (folder / "folder").mkdir()
    data = {
        split: [
            dataclasses.replace(source, json=str(folder / "file"), images=source.images and str(folder / "folder"))
            for source in getattr(config.data, split)
        ]
        for split in ("train", "val")
    }
    init_from = config.model.init_from and str(folder / "folder")
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(folder / "run")),
        model=dataclasses.replace(config.model, tokenizer=str(folder / "file"), init_from=init_from),
        data=dataclasses.replace(config.data, **data),
    )


def test_examples_are_there():
    names = {path.stem for path in EXAMPLES}
    assert names >= {"pretrain_7b", "pretrain_13b", "finetune_7b", "template"}


@example
def test_example_is_free_of_contradictions(path, tmp_path):
    config = load_config(path)
    check(with_files(config, tmp_path))
    parts = dict(part.split("=") for part in config.mesh.shape.split(","))
    smallest = 1
    for size in parts.values():
        smallest *= max(1, int(size))
    for devices in {smallest, 8} if "-1" in parts.values() else {smallest}:
        sizes = parse_mesh_shape(config.mesh.shape, devices)
        assert check_mesh(config, sizes) * config.train.micro_batch * sizes["data"] == config.train.global_batch


@example
def test_example_can_be_printed_and_read_again(path, tmp_path, capsys):
    assert train.main(["--config", str(path), "--print-config"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(text)
    assert load_config(tmp_path / "again.yaml") == load_config(path)
    assert f"image_tokens: {image_tokens(load_config(path).model)} " in text


@example
def test_example_says_what_it_is(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert max(map(len, text.splitlines())) <= 120
    for source in load_config(path).data.train:  # relative, so that it is a placeholder on every machine
        assert source.json and not Path(source.json).is_absolute()


PRETRAIN_7B = {
    "run.seed": 1234,
    "run.resume": "auto",
    "model.vision.image_size": 224,
    "model.vision.patch_size": 14,
    "model.vision.hidden_size": 1024,
    "model.vision.select_layer": -2,
    "model.vision.freeze": True,
    "model.projector.freeze": False,
    "model.llm.vocab_size": 32008,
    "model.llm.hidden_size": 4096,
    "model.llm.intermediate_size": 11008,
    "model.llm.num_layers": 32,
    "model.llm.num_heads": 32,
    "model.llm.norm_eps": 1e-5,
    "model.llm.init_std": 0.014,
    "model.llm.tie_embeddings": False,
    "model.llm.freeze": True,
    "data.template": "plain",
    "data.image_mode": "square",
    "data.workers": 8,
    "precision.compute": "bf16",
    "train.steps": 4650,
    "train.micro_batch": 16,
    "train.global_batch": 128,
    "optimizer.lr": 2e-3,
    "optimizer.min_lr": 2e-5,
    "optimizer.warmup_steps": 140,
    "optimizer.constant_steps": 0,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.95,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 1.0,
    "eval.every": 100,
    "eval.batches": 50,
    "log.every": 10,
    "log.wandb": "off",
}
PRETRAIN_13B = PRETRAIN_7B | {
    "model.llm.hidden_size": 5120,
    "model.llm.intermediate_size": 13824,
    "model.llm.num_layers": 40,
    "model.llm.num_heads": 40,
}
del PRETRAIN_13B["model.llm.init_std"]
FINETUNE_7B = {
    "model.vision.image_size": 336,
    "model.vision.freeze": True,
    "model.projector.freeze": False,
    "model.llm.freeze": False,
    "model.llm.vocab_size": 32008,
    "model.llm.hidden_size": 4096,
    "model.llm.num_layers": 32,
    "data.template": "v1",
    "mesh.shape": "data=-1,tensor=2",
    "train.steps": 4900,
    "train.micro_batch": 4,
    "train.global_batch": 32,
    "optimizer.lr": 2e-5,
    "optimizer.min_lr": 2e-7,
    "optimizer.warmup_steps": 200,
}


@pytest.mark.parametrize(
    ("name", "figures"),
    [("pretrain_7b", PRETRAIN_7B), ("pretrain_13b", PRETRAIN_13B), ("finetune_7b", FINETUNE_7B)],
)
def test_figures_of_the_workflow(name, figures):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert {key: value(config, key) for key in figures} == figures


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_embedding_divides_over_tensor(tensor):
    for name in ("pretrain_7b", "pretrain_13b", "finetune_7b"):
        llm = load_config(ROOT / "configs" / f"{name}.yaml").model.llm
        assert padded_vocab(llm) == 32128
        assert padded_vocab(llm) % tensor == 0


@pytest.mark.parametrize(
    ("finetune", "pretrain", "overrides"),
    [
        # The overrides are those that the header of finetune_7b.yaml tells the user to give.
        ("finetune_7b", "pretrain_7b", ["model.vision.image_size=336", "data.max_length=704"]),
        ("quickstart_finetune", "quickstart_pretrain", []),
    ],
)
def test_finetune_takes_the_weights_of_its_pretrain_run(finetune, pretrain, overrides, tmp_path):
    path = ROOT / "configs" / f"{pretrain}.yaml"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    ours, theirs = load_config(ROOT / "configs" / f"{finetune}.yaml"), load_config(path, overrides)
    check(with_files(theirs, tmp_path))
    check_compatible(ours, theirs, COMPONENTS, pretrain)


def test_a_key_left_to_its_rule_is_the_same_architecture_as_the_written_number():
    written = load_config(None, ["model.llm.num_kv_heads=32", "model.llm.head_dim=128"])
    check_compatible(load_config(None), written, COMPONENTS, "a checkpoint")
    check_compatible(written, load_config(None), COMPONENTS, "a checkpoint")
