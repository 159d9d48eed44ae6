"""Bad configurations: each ends in one line that names the key and quotes the numbers."""

import pytest

from neva_jax.checks import check, check_mesh
from neva_jax.config import Config
from neva_jax.configfile import load_config
from neva_jax.derived import parse_mesh_shape
from neva_jax.errors import UserError
from neva_jax.training import setup

DEVICES = 8


@pytest.fixture
def good(small_overrides, tmp_path) -> list[str]:
    """Overrides of a run that passes every check on 8 devices; `{tmp}/file` is a file, `{tmp}/folder` a folder."""
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    return [*small_overrides, "mesh.shape=data=-1", "train.micro_batch=1"]


def load_and_check(path, overrides: list[str]) -> Config:
    """What the train command does with a configuration before it looks at data."""
    config = load_config(path, overrides)
    check(config)
    check_mesh(config, parse_mesh_shape(config.mesh.shape, DEVICES))
    return config


def message(overrides: list[str], path=None) -> str:
    """The one line that a bad configuration ends with."""
    with pytest.raises(UserError) as caught:
        load_and_check(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert text == text.strip()
    assert len(text) < 400
    return text


def assert_says(text: str, fragments: list[str]) -> None:
    missing = [fragment for fragment in fragments if fragment not in text]
    assert not missing, f"{text!r} lacks {missing}"


def test_the_run_that_every_bad_input_spoils_is_good(good, tmp_path):
    config = load_and_check(None, good)
    assert config.run.dir == str(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layers_to_recompute_mean_nothing_where_nothing_is_recomputed(good):
    load_and_check(None, [*good, "train.remat=none", "train.remat_layers=2", "model.vision.freeze=false"])


SOURCE = "{{json: {tmp}/file, images: {tmp}/folder}}"

BAD_OVERRIDES = {
    # --- keys
    "unknown key": (["train.stpes=5"], ["train.stpes", "did you mean train.steps?"]),
    "unknown key, deep": (["model.llm.num_head=4"], ["model.llm.num_head;", "did you mean model.llm.num_heads?"]),
    "section forgotten": (["steps=5"], ["unknown key steps", "did you mean train.steps?"]),
    "dot forgotten": (["trainsteps=5"], ["trainsteps", "did you mean train.steps?"]),
    "section misspelt": (["trian.steps=5"], ["trian", "did you mean train.steps?"]),
    "section misspelt, deep": (["modle.llm.num_heads=4"], ["modle", "did you mean model.llm.num_heads?"]),
    "key too deep": (["train.steps.x=5"], ["train.steps"]),
    "dot at the end": (["train.=5"], ["train."]),
    "NeMo's name": (["optimizer.learning_rate=1e-3"], ["unknown key optimizer.learning_rate", "did you mean"]),
    "unknown key of a source": ([f"data.train=[{SOURCE[:-2]}, wieght: 2}}}}]"], ["data.train[0].wieght", "weight?"]),
    "no equals sign": (["train.steps"], ["'train.steps'", "section.key=value"]),
    "no key": (["=5"], ["'=5'", "section.key=value"]),
    # --- types
    "section set to a number": (["train=5"], ["train is a section", "5"]),
    "text for an integer": (["train.steps=many"], ["train.steps", "many"]),
    "fraction for an integer": (["train.steps=2.5"], ["train.steps", "2.5"]),
    "boolean for an integer": (["train.steps=true"], ["train.steps", "True"]),
    "null for an integer": (["train.steps=null"], ["train.steps", "None"]),
    "nothing for an integer": (["train.steps="], ["train.steps", "None"]),
    "list for an integer": (["train.steps=[4, 5]"], ["train.steps", "[4, 5]"]),
    "OmegaConf's mark of a missing value": (["train.steps=???"], ["train.steps", "???"]),
    "text for a number": (["optimizer.lr=fast"], ["optimizer.lr", "fast"]),
    "text for a boolean": (["model.llm.freeze=maybe"], ["model.llm.freeze", "maybe"]),
    "jinja without a template": (["data.template=jinja"], ["data.template=jinja needs data.chat_template"]),
    "a stream that NeVA has not": (
        ["data.compat=neva", "data.template=chatml"],
        ["data.compat=neva", "no template chatml", "plain, v1, llama_2"],
    ),
    "unknown choice": (["data.template=llama2"], ["data.template", "llama2", "plain", "v1"]),
    "unknown choice, precision": (["precision.compute=fp16"], ["precision.compute", "fp16", "bf16"]),
    "unknown choice, projector": (["model.projector.kind=mlp3x"], ["model.projector.kind", "mlp3x", "mlp2x_gelu"]),
    "number for a list": (["model.vision.image_mean=0.5"], ["model.vision.image_mean"]),
    "words in a list": (["model.vision.image_mean=[a, b, c]"], ["model.vision.image_mean", "'a'"]),
    "one source without list": ([f"data.train={SOURCE}"], ["data.train", "list"]),
    "source that is no mapping": (["data.train=[rows.json]"], ["data.train[0]", "rows.json"]),
    "number in a source": (
        [f"data.train=[{SOURCE}, {SOURCE[:-2]}, weight: heavy}}}}]"],
        ["data.train[1].weight", "heavy"],
    ),
    "value that is no YAML": (["data.train=[{{"], ["data.train=[{", "YAML"]),
    "mesh as a mapping": (["mesh.shape={{data: 8}}"], ["mesh.shape", "data"]),
    "unknown interpolation": (["run.dir=${{nowhere}}/run"], ["run.dir", "nowhere"]),
    # --- required keys and files
    "no run.dir": (["run.dir=null"], ["run.dir", "not set"]),
    "empty run.dir": (["run.dir="], ["run.dir", "not set"]),
    "no tokenizer": (["model.tokenizer=null"], ["model.tokenizer", "not set"]),
    "no training data": (["data.train=[]"], ["data.train", "not set"]),
    "tokenizer missing": (["model.tokenizer={tmp}/nope.model"], ["model.tokenizer=", "nope.model", "no such file"]),
    "tokenizer is a folder": (["model.tokenizer={tmp}/folder"], ["model.tokenizer=", "folder", "file"]),
    "JSON missing": (["data.train=[{{json: {tmp}/nope.json}}]"], ["data.train[0].json=", "nope.json", "no such file"]),
    "JSON forgotten": (["data.train=[{{images: {tmp}/folder}}]"], ["data.train[0].json"]),
    "second JSON missing": ([f"data.train=[{SOURCE}, {{{{json: {{tmp}}/nope.json}}}}]"], ["data.train[1].json="]),
    "validation JSON missing": (["data.val=[{{json: {tmp}/nope.json}}]"], ["data.val[0].json=", "nope.json"]),
    "image folder missing": (
        ["data.train=[{{json: {tmp}/file, images: {tmp}/nope}}]"],
        ["data.train[0].images=", "nope", "no such directory"],
    ),
    "image folder is a file": (["data.train=[{{json: {tmp}/file, images: {tmp}/file}}]"], ["data.train[0].images="]),
    "image archive missing": (
        ["data.train=[{{json: {tmp}/file, images: {tmp}/nope.tar}}]"],
        ["data.train[0].images=", "nope.tar", "no such directory or file"],
    ),
    "JSON and records": (
        ["data.train=[{{json: {tmp}/file, records: {tmp}/folder}}]"],
        ["data.train[0].json=", "records=", "not both"],
    ),
    "records missing": (
        ["data.train=[{{records: {tmp}/nope}}]"],
        ["data.train[0].records=", "nope", "no such file or directory"],
    ),
    "held-out part and val": (["data.val_fraction=0.1"], ["data.val_fraction=0.1", "data.val"]),
    "held-out part is everything": (["data.val=[]", "data.val_fraction=1"], ["data.val_fraction=1", "1 excluded"]),
    "held-out part below 0": (["data.val=[]", "data.val_fraction=-0.1"], ["data.val_fraction=-0.1", "0 … 1"]),
    "init_from missing": (["model.init_from={tmp}/nope"], ["model.init_from=", "nope", "no such directory"]),
    "run.dir is a file": (["run.dir={tmp}/file"], ["run.dir=", "is a file"]),
    "run.dir lies in a file": (["run.dir={tmp}/file/run"], ["run.dir=", "file/run"]),
    # --- model
    "hidden size and heads": (
        ["model.llm.num_heads=5", "model.llm.num_kv_heads=5"],
        ["model.llm.hidden_size=32", "model.llm.num_heads=5"],
    ),
    "vision's hidden size and heads": (
        ["model.vision.num_heads=3"],
        ["model.vision.hidden_size=32", "model.vision.num_heads=3"],
    ),
    "heads and kv heads": (["model.llm.num_kv_heads=3"], ["model.llm.num_heads=4", "model.llm.num_kv_heads=3"]),
    "more kv heads than heads": (["model.llm.num_kv_heads=8"], ["model.llm.num_heads=4", "model.llm.num_kv_heads=8"]),
    "odd head_dim": (["model.llm.head_dim=7"], ["model.llm.head_dim=7", "odd"]),
    "odd head_dim, derived": (["model.llm.hidden_size=12"], ["model.llm.head_dim=3", "odd"]),
    "image and patch": (["model.vision.image_size=33"], ["model.vision.image_size=33", "model.vision.patch_size=8"]),
    "select_layer 0": (["model.vision.select_layer=0"], ["model.vision.select_layer=0", "-1", "num_layers=2"]),
    "select_layer too far": (["model.vision.select_layer=-3"], ["model.vision.select_layer=-3", "-2", "num_layers=2"]),
    "image_mean of two": (["model.vision.image_mean=[0.5, 0.4]"], ["model.vision.image_mean", "3", "[0.5, 0.4]"]),
    "image_std of four": (["model.vision.image_std=[1, 2, 3, 4]"], ["model.vision.image_std", "3", "4.0"]),
    "image_std 0": (["model.vision.image_std=[0.2, 0, 0.2]"], ["model.vision.image_std", "0.0"]),
    "image_mean NaN": (["model.vision.image_mean=[0.2, .nan, 0.2]"], ["model.vision.image_mean", "nan"]),
    "everything frozen": (
        ["model.llm.freeze=true", "model.projector.freeze=true"],
        ["freeze", "nothing would be trained"],
    ),
    "frozen and random": (
        ["model.allow_random_frozen=false", "model.llm.freeze=true"],
        ["model.init_from", "vision and llm", "model.allow_random_frozen=true"],
    ),
    "vocabulary 0": (["model.llm.vocab_size=0"], ["model.llm.vocab_size=0"]),
    # --- numbers
    "no steps": (["train.steps=0"], ["train.steps=0", "at least 1"]),
    "negative batch": (["train.micro_batch=-1"], ["train.micro_batch=-1", "at least 1"]),
    "keep nothing": (["checkpoint.keep=0"], ["checkpoint.keep=0", "at least 1"]),
    "never log": (["log.every=0"], ["log.every=0", "at least 1"]),
    "profile before the first step": (["profile.start_step=0"], ["profile.start_step=0", "at least 1"]),
    "negative workers": (["data.workers=-1"], ["data.workers=-1", "negative"]),
    "value that is no key": (["run.dir={{{{x}}}}"], ["run.dir", "YAML"]),
    "rope fraction above 1": (["model.llm.rope_fraction=1.5"], ["model.llm.rope_fraction=1.5", "at most 1"]),
    "rope fraction of too few": (["model.llm.rope_fraction=0.25"], ["head_dim=8", "rope_fraction=0.25", "too few"]),
    "rope factor without scaling": (["model.llm.rope_factor=2"], ["rope_factor=2.0", "rope_scaling=none"]),
    "rope frequencies": (
        ["model.llm.rope_scaling=llama3", "model.llm.rope_high_freq_factor=0.5"],
        ["rope_high_freq_factor=0.5", "rope_low_freq_factor=1.0"],
    ),
    "rope scaling of another kind": (["model.llm.rope_scaling=yarn"], ["model.llm.rope_scaling", "yarn"]),
    "sliding window": (["model.llm.sliding_window=0"], ["model.llm.sliding_window=0", "at least 1"]),
    "projector": (["model.projector.kind=mlp0x_gelu"], ["model.projector.kind=mlp0x_gelu", "mlp2x_gelu"]),
    "identity": (
        ["model.projector.kind=identity", "model.vision.hidden_size=64"],
        ["model.vision.hidden_size=64", "model.llm.hidden_size=32"],
    ),
    "class token of SigLIP": (
        ["model.vision.kind=siglip", "model.vision.select_feature=cls_patch"],
        ["model.vision.select_feature=cls_patch", "siglip"],
    ),
    "class token in a square": (
        ["model.projector.kind=mlp_downsample", "model.vision.select_feature=cls_patch"],
        ["model.vision.select_feature=cls_patch", "mlp_downsample"],
    ),
    "position table": (["model.vision.position_image_size=36"], ["position_image_size=36", "patch_size=8"]),
    "groups with a trained encoder": (
        ["train.remat_layers=2", "model.vision.freeze=false"],
        ["train.remat_layers=2", "model.vision.freeze=false"],
    ),
    "layers to recompute": (["train.remat_layers=3"], ["train.remat_layers=3", "model.llm.num_layers=2"]),
    "negative seed": (["run.seed=-1"], ["run.seed=-1", "negative"]),
    "seed of more than 64 bits": (["run.seed=99999999999999999999"], ["run.seed=99999999999999999999"]),
    "negative lr": (["optimizer.lr=-1e-3"], ["optimizer.lr=-0.001", "negative"]),
    "NaN": (["optimizer.lr=.nan"], ["optimizer.lr=nan"]),
    "NaN, clip": (["optimizer.clip_norm=.nan"], ["optimizer.clip_norm=nan"]),
    "infinite lr": (["optimizer.lr=.inf"], ["optimizer.lr=inf"]),
    "infinite weight decay": (["optimizer.weight_decay=.inf"], ["optimizer.weight_decay=inf"]),
    "clip at 0": (["optimizer.clip_norm=0"], ["optimizer.clip_norm=0.0", "above 0"]),
    "norm_eps 0": (["model.llm.norm_eps=0"], ["model.llm.norm_eps=0.0", "above 0"]),
    "hidden_dropout is 1": (["model.llm.hidden_dropout=1"], ["model.llm.hidden_dropout=1.0", "1 excluded"]),
    "attention_dropout negative": (["model.llm.attention_dropout=-0.1"], ["model.llm.attention_dropout=-0.1"]),
    "ffn_dropout NaN": (["model.llm.ffn_dropout=.nan"], ["model.llm.ffn_dropout=nan"]),
    "beta1 is 1": (["optimizer.beta1=1"], ["optimizer.beta1=1.0"]),
    "beta2 negative": (["optimizer.beta2=-0.1"], ["optimizer.beta2=-0.1"]),
    "beta2 NaN": (["optimizer.beta2=.nan"], ["optimizer.beta2=nan"]),
    "min_lr above lr": (
        ["optimizer.lr=1e-4", "optimizer.min_lr=2e-4"],
        ["optimizer.min_lr=0.0002", "optimizer.lr=0.0001"],
    ),
    "warm-up longer than the run": (["optimizer.warmup_steps=5"], ["optimizer.warmup_steps=5", "train.steps=4"]),
    "warm-up and constant steps": (
        ["optimizer.warmup_steps=2", "optimizer.constant_steps=3"],
        ["optimizer.warmup_steps=2", "optimizer.constant_steps=3", "train.steps=4"],
    ),
    "weight 0": ([f"data.train=[{SOURCE[:-2]}, weight: 0}}}}]"], ["data.train[0].weight=0.0", "above 0"]),
    "negative weight": (
        [f"data.val=[{SOURCE}, {SOURCE[:-2]}, weight: -1}}}}]"],
        ["data.val[1].weight=-1.0", "above 0"],
    ),
    "infinite weight": ([f"data.train=[{SOURCE[:-2]}, weight: .inf}}}}]"], ["data.train[0].weight=inf"]),
    "no room for text": (["data.max_length=16"], ["data.max_length=16", "16 tokens", "image_size=32", "patch_size=8"]),
    "no layer in FP8": (
        ["precision.compute=fp8_current", "precision.fp8.first_layers_bf16=1", "precision.fp8.last_layers_bf16=1"],
        ["first_layers_bf16=1", "last_layers_bf16=1", "num_layers=2", "bf16"],
    ),
    "FP8 with fp32 weights": (
        ["precision.compute=fp8_current", "precision.frozen=fp32"],
        ["precision.frozen=fp32", "fp8_current"],
    ),
    "FP8 in a trained encoder": (
        ["precision.compute=fp8_delayed", "precision.fp8.vision=true", "model.vision.freeze=false"],
        ["precision.fp8.vision=true", "model.vision.freeze"],
    ),
    "groups of layers across FP8": (
        [
            *("precision.compute=fp8_delayed", "precision.fp8.first_layers_bf16=1", "model.llm.num_layers=4"),
            *("train.remat=full", "train.remat_layers=2"),
        ],
        ["train.remat_layers=2", "first_layers_bf16=1"],
    ),
    "no history": (["precision.fp8.amax_history=0"], ["precision.fp8.amax_history=0", "at least 1"]),
    "negative margin": (["precision.fp8.margin=-1"], ["precision.fp8.margin=-1", "not be negative"]),
    "trained without a base": (["checkpoint.contents=trained"], ["checkpoint.contents=trained", "model.init_from"]),
    # --- batch and mesh
    "global and micro batch": (["train.micro_batch=3"], ["train.global_batch=8", "train.micro_batch=3"]),
    "batch and mesh": (
        ["train.micro_batch=2", "mesh.shape=data=4,fsdp=2"],
        ["train.global_batch=8", "train.micro_batch=2", "data=4", "fsdp=2", "16"],
    ),
    "kv heads over tensor": (
        [
            "mesh.shape=data=4,tensor=2",
            "model.llm.hidden_size=36",
            "model.llm.num_heads=6",
            "model.llm.num_kv_heads=3",
        ],
        ["model.llm.num_kv_heads=3", "tensor=2", "2 or 4 (or an axis of 1 or 3)"],
    ),
    "heads over tensor": (
        ["mesh.shape=tensor=8"],
        ["model.llm.num_heads=4", "tensor=8", "8 (or an axis of 4) would do"],
    ),
    "MLP over tensor": (
        ["mesh.shape=data=2,tensor=4", "model.llm.intermediate_size=90"],
        ["model.llm.intermediate_size=90", "tensor=4", "88 or 92 (or an axis of 3 or 5) would do"],
    ),
    "length over tensor": (
        ["mesh.shape=data=4,tensor=2", "mesh.sequence_parallel=true", "data.max_length=191"],
        ["data.max_length=191", "tensor=2", "train.micro_batch=1", "mesh.sequence_parallel=true", "190 or 192"],
    ),
    "half of the rows over tensor": (
        [
            *("mesh.shape=data=2,tensor=4", "train.micro_batch=4", "mesh.overlap=true", "mesh.sequence_parallel=true"),
            *("data.max_length=190", "model.llm.num_kv_heads=4"),
        ],
        ["data.max_length=190", "half of train.micro_batch=4", "tensor=4", "188 or 192"],
    ),
    "rows that are halved": (
        ["mesh.shape=data=4,tensor=2", "mesh.overlap=true"],
        ["mesh.overlap=true", "train.micro_batch=1", "odd", "false"],
    ),
    "images over tensor": (
        ["mesh.shape=data=4,tensor=2", "mesh.vision_tensor=false"],
        ["mesh.vision_tensor=false", "1 images", "train.micro_batch=1", "tensor=2"],
    ),
    "vision's heads over tensor": (
        ["mesh.shape=tensor=8", "model.llm.num_heads=8", "model.llm.num_kv_heads=8"],
        ["model.vision.num_heads=4", "tensor=8"],
    ),
    "vocabulary over tensor": (
        ["mesh.shape=data=4,tensor=2", "model.llm.vocab_size=401"],
        ["model.llm.vocab_size=401", "tensor=2", "model.llm.vocab_multiple=2", "402"],
    ),
    "embedding over fsdp": (
        ["mesh.shape=fsdp=8", "model.llm.hidden_size=40", "model.vision.hidden_size=36"],
        ["model.vision.hidden_size=36", "fsdp=8", "32 or 40 (or an axis of 6 or 9) would do"],
    ),
    "unknown axis": (["mesh.shape=pipe=8"], ["mesh.shape=pipe=8", "'pipe'", "data, fsdp, tensor"]),
    "axis twice": (["mesh.shape=data=2,data=4"], ["mesh.shape=data=2,data=4", "data", "twice"]),
    "two axes -1": (["mesh.shape=data=-1,tensor=-1"], ["mesh.shape=", "-1", "data and tensor"]),
    "axis of size 0": (["mesh.shape=data=0"], ["mesh.shape=data=0", "at least 1"]),
    "axis of size -2": (["mesh.shape=data=-2"], ["mesh.shape=data=-2", "at least 1"]),
    "axis without size": (["mesh.shape=data"], ["mesh.shape=data", "whole number"]),
    "axis of half a device": (["mesh.shape=data=1.5"], ["mesh.shape=data=1.5", "whole number"]),
    "size without axis": (["mesh.shape=8"], ["mesh.shape=8", "data, fsdp, tensor"]),
    "too few devices": (["mesh.shape=data=2,tensor=2"], ["mesh.shape=data=2,tensor=2", "4 devices", "8"]),
    "too many devices": (["mesh.shape=data=16"], ["mesh.shape=data=16", "16 devices", "8"]),
    "rest that does not divide": (["mesh.shape=data=-1,tensor=3"], ["mesh.shape=data=-1,tensor=3", "3", "8"]),
}


@pytest.mark.parametrize("name", BAD_OVERRIDES)
def test_bad_override(name, good, tmp_path):
    overrides, fragments = BAD_OVERRIDES[name]
    text = message([*good, *(override.format(tmp=tmp_path) for override in overrides)])
    assert_says(text, fragments)
    assert not (tmp_path / "run").exists()


BAD_FILES = {
    "no YAML": ("train:\n  steps: [5\n", ["run.yaml", "line", "YAML"]),
    "tab": ("train:\n\tsteps: 5\n", ["run.yaml", "line 2", "YAML"]),
    "mapping as a key": ("{{x}}: 1\n", ["run.yaml", "YAML"]),
    "too deep": ("run: " + "[" * 5000 + "\n", ["run.yaml", "YAML"]),
    "two documents": ("train: {steps: 4}\n---\ntrain: {steps: 3}\n", ["run.yaml", "line 2", "YAML"]),
    "Python object": ("run: !!python/object/apply:os.getcwd []\n", ["run.yaml", "line 1", "python/object"]),
    "list": ("- train\n- data\n", ["run.yaml", "list"]),
    "word": ("train\n", ["run.yaml", "str"]),
    "unknown section": ("trian:\n  steps: 4\n", ["run.yaml", "trian", "did you mean train"]),
    "unknown key": ("train:\n  stpes: 4\n", ["run.yaml", "train.stpes", "did you mean train.steps?"]),
    "unknown key of a source": (
        "data:\n  val:\n  - {json: a, images: b}\n  - {json: a, image: b}\n",
        ["run.yaml", "data.val[1].image;", "images?"],
    ),
    "empty section": ("model:\n  llm:\n", ["run.yaml", "model.llm", "section"]),
    "section that is a list": ("train: [4]\n", ["run.yaml", "train", "[4]"]),
    "number as a key": ("train:\n  4: 4\n", ["run.yaml", "train.4"]),
    "wrong type": ("optimizer:\n  lr: fast\n", ["run.yaml", "optimizer.lr", "fast"]),
    "date": ("train:\n  steps: 2024-01-01\n", ["run.yaml", "train.steps", "date"]),
    "key twice": ("train:\n  steps: 4\ntrain:\n  micro_batch: 1\n", ["run.yaml", "line 3", "train"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(name, good, tmp_path):
    content, fragments = BAD_FILES[name]
    (tmp_path / "run.yaml").write_text(content)
    assert_says(message(good, tmp_path / "run.yaml"), fragments)


@pytest.mark.parametrize(
    ("name", "fragments"),
    [("nope.yaml", ["nope.yaml", "No such file"]), ("folder", ["folder", "directory"]), ("bytes", ["bytes", "utf-8"])],
)
def test_file_that_cannot_be_read(name, fragments, good, tmp_path):
    (tmp_path / "bytes").write_bytes(b"train: {steps: \xff}")
    assert_says(message(good, tmp_path / name), ["--config", *fragments])


def test_suggestions_come_from_the_whole_schema(good):
    """Every key with two letters exchanged leads back to itself."""
    from neva_jax.config import walk

    for name, _ in walk():
        section, _, key = name.rpartition(".")
        if len(key) < 5:
            continue
        wrong = f"{section}.{key[0]}{key[2]}{key[1]}{key[3:]}"
        if wrong != name:
            assert_says(message([*good, f"{wrong}=1"]), [f"unknown key {wrong};", f"did you mean {name}?"])


# --- checks that need the tokenizer or a checkpoint ------------------------------------------------------------------


def test_vocabulary_comes_from_the_tokenizer(good, tokenizer):
    config = setup.with_vocabulary(load_config(None, good), tokenizer)
    assert config.model.llm.vocab_size == tokenizer.size == 400


@pytest.mark.parametrize(
    "overrides",
    # Padding up to 512 rows does not help: a padded id never wins, so its loss would be infinite.
    [["model.llm.vocab_size=399"], ["model.llm.vocab_size=399", "model.llm.vocab_multiple=512"]],
    ids=["too small", "too small, padded"],
)
def test_vocabulary_smaller_than_the_tokenizer(overrides, good, tokenizer):
    with pytest.raises(UserError) as caught:
        setup.with_vocabulary(load_config(None, [*good, *overrides]), tokenizer)
    assert_says(str(caught.value), ["model.llm.vocab_size=399", "400", "tokenizer.model"])


def test_trained_contents_need_a_base_that_has_the_frozen_parts(good, tmp_path, monkeypatch):
    """`trained` refers to the base for the rest; a base that lacks it would lose the frozen random weights."""
    config = load_config(None, [*good, f"model.init_from={tmp_path}/folder", "checkpoint.contents=trained"])
    held = {"vision": tmp_path, "projector": tmp_path}
    monkeypatch.setattr(setup, "available_components", lambda path: held)
    monkeypatch.setattr(setup, "locate", lambda path: tmp_path / "folder" / "checkpoints" / "7")
    assert setup.saved_components(config) == (("projector", "llm"), str(tmp_path / "folder" / "checkpoints" / "7"))
    del held["vision"]
    with pytest.raises(UserError) as caught:
        setup.saved_components(config)
    assert_says(str(caught.value), ["checkpoint.contents=trained", "vision"])
