"""python -m neva_jax.plan: what it prints, and what it refuses."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from neva_jax import plan
from neva_jax.errors import exit_with
from neva_jax.planning.memory import GIB

ROOT = Path(__file__).parent.parent
PRETRAIN = ["--config", str(ROOT / "configs" / "pretrain_7b.yaml")]
FINETUNE = ["--config", str(ROOT / "configs" / "finetune_7b.yaml")]


@pytest.fixture
def planned(capsys):
    """Runs the command; returns what it printed."""

    def run(*arguments: str) -> str:
        assert plan.main(arguments) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys):
    """Runs the command, which must exit with 2; returns its one line."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            exit_with(lambda: plan.main(arguments))
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    return run


def test_a_process_needs_no_files_and_no_devices():
    command = [sys.executable, "-m", "neva_jax.plan", *FINETUNE, "--mesh-shape", "data=64,tensor=2"]
    done = subprocess.run([*command, "train.global_batch=256"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "mesh data=64,tensor=2 (128 devices)" in done.stdout
    assert done.stderr == ""


def test_every_part_adds_up(planned):
    values = json.loads(planned(*PRETRAIN, "--json"))
    parts = {name: size for name, size in values["memory"].items() if name != "total"}
    assert values["memory"]["total"] == sum(parts.values())
    assert values["fits"] is True
    assert values["limit"] == 140 * GIB
    assert values["parameters"]["llm"] > 6.7e9
    assert values["samples_per_s"] == pytest.approx(128 / values["step_seconds"])


def test_text_says_the_same(planned):
    text, values = planned(*PRETRAIN), json.loads(planned(*PRETRAIN, "--json"))
    peak = next(line for line in text.splitlines() if line.startswith("peak"))
    assert float(peak.split()[-1]) == pytest.approx(values["memory"]["total"] / GIB, abs=0.006)
    assert "fits: " in text


def test_what_does_not_fit_says_by_how_much_and_what_helps(planned):
    arguments = [*PRETRAIN, "--memory-gib", "30", "train.remat=none", "train.unroll=1"]
    text, values = planned(*arguments), json.loads(planned(*arguments, "--json"))
    over = values["memory"]["total"] / GIB - 29
    assert f"does not fit: {over:.1f} GiB more than 30 GiB" in text
    saved = [knob["saved"] for knob in values["knobs"]]
    assert saved == sorted(saved, reverse=True)
    best = values["knobs"][0]
    assert f"helps most: {best['override']} saves {best['saved'] / GIB:.1f} GiB" in text
    assert {"train.remat=dots", "train.remat=full", "train.micro_batch=8"} <= {k["override"] for k in values["knobs"]}


def test_a_knob_saves_what_it_says(planned):
    values = json.loads(planned(*PRETRAIN, "--json"))
    for knob in values["knobs"]:
        if knob["changes"].startswith("twice"):
            continue
        after = json.loads(planned(*PRETRAIN, "--json", *knob["override"].split()))
        assert values["memory"]["total"] - after["memory"]["total"] == knob["saved"], knob


def test_layers_that_fsdp_would_keep_whole_need_not_be(planned):
    """Unrolled still, but gathered twice: the loop is offered too, and saves the copy as well."""
    unrolled = ["train.remat=none", "train.unroll=32", "mesh.shape=fsdp=8", "--devices", "8", "--json"]
    knobs = {k["override"]: k for k in json.loads(planned(*FINETUNE, *unrolled))["knobs"]}
    copy = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    # The gradients' shards, fp32, would have taken the place of a quarter.
    assert knobs["train.remat=dots"]["saved"] == pytest.approx(copy * 3 / 4, rel=0.01)
    assert knobs["train.remat=dots"]["changes"] == "weights are gathered twice"
    assert knobs["train.remat=dots train.unroll=1"]["saved"] > copy * 3 / 4


def test_packed_rows_say_what_transformer_engine_would_save(planned):
    packed = [*FINETUNE, "data.pack=true", "--memory-gib", "60"]
    knobs = {k["override"]: k for k in json.loads(planned(*packed, "--json"))["knobs"]}
    assert knobs["model.attention=te"]["changes"] == "as auto does where Transformer Engine is installed"
    assert "model.attention=te plans that" in planned(*packed)
    for there in ([*packed, "model.attention=te"], FINETUNE, [*packed, "model.llm.attention_dropout=0.1"]):
        assert "Transformer Engine" not in planned(*there)


def test_a_plan_that_fits_within_its_error_is_tight(planned):
    total = json.loads(planned(*PRETRAIN, "--json"))["memory"]["total"] / GIB
    assert "tight" in planned(*PRETRAIN, "--memory-gib", f"{total + 2:.1f}")
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in planned(*PRETRAIN, "--memory-gib", f"{total + 2:.1f}")
    assert "tight" not in planned(*PRETRAIN)


def test_layers(planned):
    rows = json.loads(planned(*FINETUNE, "--layers", "8,16,32", "--json", "train.remat=full"))
    assert [row["layers"] for row in rows] == [8, 16, 32]
    totals = [row["memory"]["total"] for row in rows]
    # a straight line: each layer adds the same
    assert totals[2] - totals[1] == pytest.approx(2 * (totals[1] - totals[0]), rel=0.02)
    text = planned(*FINETUNE, "--layers", "8,16,32", "--memory-gib", "40", "train.remat=full").splitlines()
    assert [line.split()[-1] for line in text[-3:]] == ["yes", "yes", "no"]


def test_an_average_is_shown_where_there_is_one(planned):
    assert "moving average" not in planned(*FINETUNE)
    assert "moving average of the trained, fp32" in planned(*FINETUNE, "optimizer.ema_decay=0.9999")
    header = planned(*FINETUNE, "--layers", "8", "optimizer.ema_decay=0.9999").splitlines()[3]
    assert "average" in header.split()


def test_sweep_counts_what_an_encoder_sends_that_tensor_does_not_split(planned):
    settings = [*PRETRAIN, "--sweep", "8", "--json", "train.global_batch=256", "mesh.vision_tensor=false"]
    meshes = json.loads(planned(*settings))["meshes"]
    what = {mesh["mesh"]["tensor"]: {t["what"] for t in mesh["transfers"]} for mesh in meshes if "reason" not in mesh}
    assert {tensor: "image features" in names for tensor, names in what.items()} == {
        1: False,
        2: True,
        4: True,
        8: True,
    }


def test_sweep(planned):
    arguments = [*FINETUNE, "--sweep", "16", "train.global_batch=64", "--memory-gib", "79"]
    meshes = json.loads(planned(*arguments, "--json"))["meshes"]
    assert len(meshes) == 15  # 16 = 2^4 over three axes
    possible = [mesh for mesh in meshes if "reason" not in mesh]
    assert all(mesh["mesh"]["data"] * mesh["mesh"]["fsdp"] * mesh["mesh"]["tensor"] == 16 for mesh in meshes)
    times = [mesh["step_seconds"] for mesh in possible]
    assert times == sorted(times)
    lines = planned(*arguments).splitlines()
    fits = [line.split()[4] for line in lines[1:] if line.split()[0].isdecimal() and "mesh" not in line]
    assert fits == sorted(fits, reverse=True)
    assert fits.count("yes") == sum(mesh["fits"] for mesh in possible) > 0
    assert "no" in fits


def test_sweep_says_why_a_mesh_cannot_be(planned):
    text = planned(*PRETRAIN, "--sweep", "32")
    assert "not possible, as: model.vision.num_heads=16 is not divisible by the mesh axis tensor=32" in text
    assert "train.global_batch=128 is not divisible by train.micro_batch=16 x 16 data-parallel groups" in text


def test_compiled_beside_the_estimate(planned):
    small = [
        "model.llm.num_layers=4",
        "model.llm.hidden_size=1024",
        "model.llm.intermediate_size=2752",
        "model.llm.num_heads=8",
        "model.llm.num_kv_heads=8",
        "model.vision.num_layers=2",
        "precision.compute=fp32",
        "train.global_batch=16",
        "train.unroll=1",
    ]
    values = json.loads(planned(*PRETRAIN, "--compile", "--json", *small))["compiled"]
    assert values["platform"] == "cpu"
    assert values["total"] == values["arguments"] + values["results"] + values["temporary"]
    assert values["estimate"] == pytest.approx(values["total"], rel=0.15)
    assert values["collectives"] == []


def test_what_a_compiled_step_sends(planned):
    """Data parallel: the projector's gradients, once; each of two devices sends as much as they are, 2 (n - 1) / n."""
    small = ["model.llm.num_layers=1", "model.llm.hidden_size=64", "model.llm.intermediate_size=128"]
    small += ["model.llm.num_heads=2", "model.llm.num_kv_heads=2", "model.vision.num_layers=2", "train.unroll=1"]
    small += ["precision.compute=fp32", "train.micro_batch=1", "train.global_batch=2", "data.max_length=260"]
    text = planned(*PRETRAIN, "--compile", "--mesh-shape", "data=2", *small)
    table = text[text.index("sent by the compiled step  over") :].splitlines()
    assert table[1].split()[:2] == ["all-reduce", "data"]
    values = json.loads(planned(*PRETRAIN, "--compile", "--json", "--mesh-shape", "data=2", *small))["compiled"]
    (reduced,) = (row for row in values["collectives"] if row["kind"] == "all-reduce" and row["over"] == "data")
    assert reduced["sent"] == pytest.approx((1024 * 64 + 64) * 4, rel=0.01)


@pytest.mark.skipif(find_spec("jax_plugins") is not None, reason="JAX may compile for GPUs here")
def test_compiling_for_a_gpu_without_jax_cuda_packages(refused):
    said = refused(*PRETRAIN, "--compile-for", "h200")
    assert "--compile-for h200: JAX cannot compile for a GPU here" in said and 'pip install "jax[cuda13]"' in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.remat=some"], "train.remat"),
        (["train.remta=full"], "did you mean train.remat"),
        (["--mesh-shape", "tensor=3"], "model.llm.num_heads=32 is not divisible by the mesh axis tensor=3"),
        (["--mesh-shape", "data=3"], "= 48"),
        (["--mesh-shape", "data=2", "--devices", "3"], "make 2 devices, but 3"),
        (["--mesh-shape", "data=-1,tensor=2", "--devices", "7"], "7"),
        (["--compile-for", "a100"], "--compile-for a100: known are h100, h200"),
        (["--layers", "8,many"], "--layers 8,many"),
        (["--layers", "0"], "num_layers=0"),
        (["--sweep", "2048"], "at most 1024"),
        (["--sweep", "8", "--layers", "8"], "give one of them"),
        (["--memory-gib", "0"], "--memory-gib 0 must be above 0"),
        (["--per-node", "0"], "--per-node 0 must be above 0"),
        (["--compile", "--mesh-shape", "data=8,tensor=8", "train.global_batch=128"], "needs 64 devices"),
        (["model.attention=cudnn", "model.llm.attention_dropout=0.1"], "model.attention=cudnn has no dropout"),
        (["model.llm.vocab_size=null"], "model.llm.vocab_size is not set"),
        (["--no-such-flag"], "--help"),
    ],
)
def test_refused(refused, arguments, said):
    assert said in refused(*PRETRAIN, *arguments)
