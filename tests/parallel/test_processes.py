"""Which processes make a run; and real runs of 2 and 4 processes with made-up CPU devices, against one process.

One run goes from layout to layout: 1 device, `tensor=2`, `data=2,fsdp=2` on 2 processes, ended by a SIGTERM to one of
them, `fsdp=8` on 2 processes. Three training rows have no image.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from neva_jax import generate, train
from neva_jax.configfile import load_config, to_yaml
from neva_jax.data.sources import Sources
from neva_jax.errors import UserError
from neva_jax.parallel.processes import Cluster, _detected_address, add_process_arguments, find_cluster
from tests.test_train import losses, of_steps, repeatable, sigterm_before_data, state

ROOT = Path(__file__).parents[2]


# --- which processes there are ---------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "node1:4000", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}


def cluster(environment=None, *flags):
    parser = argparse.ArgumentParser()
    add_process_arguments(parser)
    return find_cluster(parser.parse_args(flags), environment or {})


FLAGS = ["--coordinator", "node1:4000", "--processes", "4", "--process", "2"]


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, [], None),
        ({}, FLAGS, Cluster("node1:4000", 4, 2)),
        (BY_HAND, [], Cluster("node1:4000", 4, 2)),
        (BY_HAND, FLAGS, Cluster("node1:4000", 4, 2)),
        (BY_HAND | SLURM, ["--local-devices", "0,1"], Cluster("node1:4000", 4, 2, (0, 1))),
        (BY_HAND | {"JAX_PROCESS_ID": ""}, FLAGS[4:], Cluster("node1:4000", 4, 2)),
        ({}, ["--coordinator", "[::1]:9", "--processes", "1", "--process", "0"], None),
        (SLURM, [], Cluster(None, 16, 11, (3,), "slurm")),
        (SLURM, ["--coordinator", "a:1"], Cluster("a:1", 16, 11, (3,), "slurm")),
        (SLURM, ["--processes", "16"], Cluster(None, 16, 11, (3,), "slurm")),
        # srun bound one GPU to each task; 8 GPUs for 4 tasks; one task for the whole node.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, [], Cluster(None, 16, 11, (), "slurm")),
        (
            SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_STEP_TASKS_PER_NODE": "12,4"},
            [],
            Cluster(None, 16, 11, (6, 7), "slurm"),
        ),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "15,1"}, [], Cluster(None, 16, 11, (), "slurm")),
        # A shell in an allocation (an interactive step has one task), a batch script, srun -n 1.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, [], None),
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, [], None),
        (OMPI, [], Cluster(None, 4, 3, (1,), "ompi")),
        (OMPI | SLURM, [], Cluster(None, 4, 3, (1,), "ompi")),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, [], None),
    ],
)
def test_processes_are_found(environment, flags, expected):
    assert cluster(environment, *flags) == expected


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        (
            {},
            FLAGS[:2],
            "--coordinator node1:4000: several processes also need --processes (or JAX_NUM_PROCESSES) and ",
        ),
        ({"JAX_NUM_PROCESSES": "2"}, [], "JAX_NUM_PROCESSES=2: several processes also need --coordinator (or JAX_C"),
        ({"JAX_NUM_PROCESSES": "8"}, FLAGS, "--processes 4 and JAX_NUM_PROCESSES=8 contradict each other"),
        (BY_HAND | {"JAX_PROCESS_ID": "4"}, [], "JAX_COORDINATOR_ADDRESS=node1:4000, JAX_NUM_PROCESSES=4, JAX_PROC"),
        (BY_HAND | {"JAX_PROCESS_ID": "one"}, [], "JAX_PROCESS_ID=one: must be a whole number"),
        (BY_HAND, ["--process", "3"], "--process 3 and JAX_PROCESS_ID=2 contradict each other"),
        (BY_HAND | {"JAX_COORDINATOR_ADDRESS": "node1"}, [], "JAX_COORDINATOR_ADDRESS=node1: must be host:port"),
        (BY_HAND | {"JAX_LOCAL_DEVICE_IDS": "0;1"}, [], "JAX_LOCAL_DEVICE_IDS=0;1: must be numbers of GPUs"),
        ({}, ["--local-devices", "0"], "--local-devices 0: is for one of several processes"),
        (SLURM, ["--processes", "8"], "--processes 8, but slurm says 16; give both"),
        (SLURM | {"SLURM_PROCID": "x"}, [], "SLURM_PROCID=x: must be a whole number"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "16"}, [], "SLURM_NODEID=1, but SLURM_STEP_TASKS_PER_NODE=16 has 1"),
        ({name: value for name, value in OMPI.items() if "RANK" not in name}, [], "OMPI_COMM_WORLD_RANK is not set"),
    ],
)
def test_what_does_not_fit_is_told_with_its_name_and_value(environment, flags, message):
    with pytest.raises(UserError) as error:
        cluster(environment, *flags)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("environment", "launcher", "address"),
    [(SLURM, "slurm", f"node07:{61440 + 71}"), (OMPI, "ompi", f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}")],
)
def test_the_launcher_says_where_the_first_process_is(environment, launcher, address, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _detected_address(launcher) == address


@pytest.mark.parametrize("uri", [None, "1531576320.0;usock"])
def test_a_launcher_that_does_not_say_it_needs_an_address(uri, monkeypatch):
    """Open MPI 5 has no such variable (and later versions of JAX ask mpi4py then, if it is there)."""
    for name, value in OMPI.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri")
    if uri is not None:
        monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", uri)
    with pytest.raises(UserError, match=r"^ompi does not say where process 0 runs .* give --coordinator HOST:PORT"):
        _detected_address("ompi")


# --- starting real ones ----------------------------------------------------------------------------------------------

SECONDS = 300  # until processes are given up


@dataclass(frozen=True)
class Launched:
    """What became of processes: the status of launch_local.sh, the lines of each on stderr."""

    status: int
    lines: dict[int, list[str]]


def launch(count: int, devices: int, *command: object, **environment: str) -> Launched:
    """Runs `python -m COMMAND` as `count` processes with so many devices each."""
    script = [ROOT / "scripts" / "launch_local.sh", count, "--cpu", devices, "python", "-m", *command]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        **environment,
    }
    started = subprocess.Popen(
        list(map(str, script)), cwd=ROOT, env=environment, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        _, text = started.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        raise
    lines = {index: [] for index in range(count)}
    # A progress bar's carriage returns end no line.
    for line in text.decode().removesuffix("\n").split("\n"):
        number, _, rest = line.removeprefix("[").partition("] ")
        lines[int(number)].append(rest)
    return Launched(started.returncode, lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict]:
    """A folder, and what has been made in it."""
    return tmp_path_factory.mktemp("processes"), {}


@pytest.fixture
def settings(small_overrides, llava_data, made) -> list[str]:
    """Six steps; no image for the rows of places 17, 19 and 22 of the order, which are read in step 3."""
    folder = made[0]
    if not (folder / "images").exists():
        shutil.copytree(llava_data.images, folder / "images")
        rows = json.loads(llava_data.json.read_text())
        order = Sources(load_config(None, small_overrides).data, "train", 1234, shuffle=True).order
        for place in BAD:
            (folder / "images" / rows[order(place).row]["image"]).unlink()
        (folder / "val.json").write_text(json.dumps(json.loads(llava_data.val_json.read_text())[:5]))
    return [
        *small_overrides,
        "model.llm.num_kv_heads=4",
        f"data.train=[{{json: {llava_data.json}, images: {folder / 'images'}}}]",
        f"data.val=[{{json: {folder / 'val.json'}, images: {llava_data.images}}}]",
        "data.on_bad_row=skip",
        "data.max_bad_fraction=0.5",
        f"data.cache={folder / 'cache'}",
        "eval.every=2",
        "checkpoint.every=100",
        "checkpoint.keep=null",
        *of_steps(6),
    ]


BAD = (17, 19, 22)


def alone(settings: list[str], run: Path, *overrides: str, devices: int = 1, stop_after: int | None = None) -> int:
    """A run in this process, which gets a SIGTERM before the batch of its `stop_after`-th step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: devices)
        if stop_after is not None:
            sigterm_before_data(patch, stop_after)
        return train.main([*settings, f"run.dir={run}", *overrides])


@dataclass(frozen=True)
class Story:
    """One run over four layouts, and the same run on one device; `opened`, `files`: of the processes of the third."""

    run: Path
    whole: Path
    third: Launched
    fourth: Launched
    folders: tuple[Path, Path]  # what the processes of the third and fourth layout have told


@pytest.fixture
def whole(made, settings) -> Path:
    """The run of one process with one device."""
    folder, made = made
    if "whole" not in made:
        made["whole"] = folder / "whole"
        assert alone(settings, made["whole"]) == 0
    return made["whole"]


@pytest.fixture
def story(made, settings, whole) -> Story:
    folder, made = made
    if "story" not in made:
        run = folder / "run"
        assert alone(settings, run, stop_after=1) == 143
        assert alone(settings, run, "mesh.shape=tensor=2", devices=2, stop_after=1) == 143
        told = (folder / "third", folder / "fourth")
        for one in told:
            one.mkdir()
        config = folder / "config.yaml"
        config.write_text(to_yaml(load_config(None, [*settings, f"run.dir={run}", "train.micro_batch=1"])))
        command = ["tests.parallel.several", told[0], "--config", config, "--mesh-shape", "data=2,fsdp=2"]
        third = launch(2, 2, *command, SIGNAL="1:2:15")
        command = ["tests.parallel.several", told[1], "--config", config, "--mesh-shape", "fsdp=8"]
        fourth = launch(2, 4, *command)
        made["story"] = Story(run, whole, third, fourth, told)
    return made["story"]


# --- the same run on any number of processes -------------------------------------------------------------------------


def test_processes_end_well(story):
    assert (story.third.status, story.fourth.status) == (143, 0), (story.third.lines, story.fourth.lines)


def test_losses_are_those_of_one_device(story):
    ours, theirs = repeatable(story.run), repeatable(story.whole)
    assert [row["step"] for row in ours] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_signal_to_one_process_stops_all_after_the_same_step(story):
    assert story.third.lines[0][-1] == "stopped by signal 15 after step 4, saved; the same command continues"
    assert "resumed from step 4" in story.fourth.lines[0]
    assert sorted(int(path.name) for path in (story.run / "checkpoints").iterdir()) == [1, 2, 4, 6]


def test_each_process_reads_only_its_rows(story, settings):
    """In two micro batches of four rows, of which process 0 has the first two; then in one of eight."""
    rows = json.loads(Path(load_config(None, settings).data.train[0].json).read_text())
    order = Sources(load_config(None, settings).data, "train", 1234, shuffle=True).order
    bad = {order(place).row for place in BAD}
    owned = ([{0, 1, 4, 5}, {2, 3, 6, 7}], [{0, 1, 2, 3}, {4, 5, 6, 7}])
    for folder, steps, parts in zip(story.folders, ((3, 4), (5, 6)), owned, strict=True):
        for index, part in enumerate(parts):
            lines = [line.split() for line in (folder / f"rows-{index}.txt").read_text().splitlines()]
            read = {int(number) for number, _ in lines}
            needed = {number for step in steps for number in range(8 * step - 8, 8 * step) if number % 8 in part}
            with_image = {number for number in needed if "image" in rows[order(number).row]}
            assert with_image <= read
            assert {number % 8 for number in read} <= part
            for number, image in lines:
                row = order(int(number)).row
                assert image == rows[row].get("image") or row in bad  # which the next one stands in for


def test_bad_rows_are_told_once_and_in_order(story):
    listed = (story.run / "bad_rows.jsonl").read_text()
    assert listed == (story.whole / "bad_rows.jsonl").read_text()
    assert [json.loads(line)["sample"] for line in listed.splitlines()] == list(BAD)


def test_only_the_first_process_writes_and_prints(story):
    def inside(line):
        return line.startswith(f"{story.run}/")

    for folder, launched in zip(story.folders, (story.third, story.fourth), strict=True):
        written = [
            {
                Path(line).relative_to(story.run).parts[0]
                for line in path.read_text().splitlines()
                if str(story.run) in line
            }
            for path in (folder / "files-0.txt", folder / "files-1.txt")
        ]
        assert {"config.yaml", "metrics.jsonl", "bad_rows.jsonl", "log.txt", "plots"} <= written[0]
        assert written[1] <= {"checkpoints"}
        assert [line for line in launched.lines[1] if line and not line.startswith("stopping: ")] == []


def test_parameters_and_moments_are_restored_bit_for_bit_onto_shards(story):
    def words(path):
        return "/".join(re.findall(r"\w+", path))

    saved = state(story.run, 4)
    arrays = {words(jax.tree_util.keystr(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}
    covered = {}
    for index in range(2):
        for key, shard in np.load(story.folders[1] / f"restored-{index}.npz").items():
            path, _, place = key.partition("|")
            part = tuple(
                slice(*(int(end) if end else None for end in ends.split(":"))) for ends in place.split(",") if ends
            )
            expected = arrays[words(path)][part]
            assert shard.dtype == expected.dtype
            assert shard.tobytes() == expected.tobytes(), key
            covered.setdefault(words(path), {})[place] = shard.size
    wanted = {path: np.size(leaf) for path, leaf in arrays.items() if path != "step"}
    assert {path: sum(sizes.values()) for path, sizes in covered.items()} == wanted


# --- four processes, of which one dies -------------------------------------------------------------------------------


@pytest.fixture
def killed(made, settings) -> tuple[Path, Path, Launched, float]:
    """(run of 4 processes, the same of one, what became of them): packed rows; process 2 is killed before step 3."""
    folder, made = made
    if "killed" not in made:
        run, whole = folder / "killed", folder / "packed"
        packed = [*settings, "data.pack=true", "data.max_length=256", "data.val=[]"]
        assert alone(packed, whole, stop_after=2) == 143
        (folder / "told").mkdir()
        config = folder / "packed.yaml"
        small = ["train.micro_batch=1", "guard.peer_timeout=5"]
        config.write_text(to_yaml(load_config(None, [*packed, *small, f"run.dir={run}"])))
        command = ["tests.parallel.several", folder / "told", "--config", config, "--mesh-shape", "data=4,tensor=2"]
        made["killed"] = run, whole, launch(4, 2, *command, SIGNAL="2:3:9")
    return made["killed"]


def test_the_others_end_and_name_the_one_that_died(killed):
    _, _, launched = killed
    assert launched.status not in (0, 2)
    assert launched.lines[2] == []
    for index in (0, 1, 3):
        error = launched.lines[index][-1].removeprefix(f"process {index}: ")
        assert re.fullmatch(
            r"error: process 2 of 4 \(\S+, process id \d+\) has died \(its connection is gone\); "
            "the same command continues from the last checkpoint",
            error,
        )


def test_packed_losses_of_four_processes_are_those_of_one(killed):
    run, whole, _ = killed
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    assert list(losses(run)) == [1, 2]


# --- generation ------------------------------------------------------------------------------------------------------


def test_processes_share_questions(made, whole, llava_data):
    folder = made[0]
    questions, one, two = folder / "questions.jsonl", folder / "one.jsonl", folder / "two.jsonl"
    images = sorted(str(path.relative_to(llava_data.images)) for path in llava_data.images.rglob("*.jpg"))[:7]
    asked = [{"question_id": i, "image": image, "text": "What is it?"} for i, image in enumerate(images)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    settings = ["--checkpoint", whole, "--input", questions, "--images", llava_data.images]
    settings = [*settings, "--batch-size", 2, "--max-new-tokens", 4]
    assert generate.main([*map(str, settings), "--output", str(one)]) == 0
    launched = launch(2, 1, "neva_jax.generate", *settings, "--output", two)
    assert launched.status == 0, launched.lines
    assert two.read_text() == one.read_text()
    assert launched.lines[0][-1] == f"7 answers in {two}"
    assert launched.lines[1] == []
