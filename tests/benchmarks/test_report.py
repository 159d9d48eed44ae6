"""`bench report`: tables and plots from lines, with made-up rows; and the repository's page is current."""

import json
from pathlib import Path

import pytest

from neva_jax import bench
from neva_jax.benchmarks.report import filled
from neva_jax.benchmarks.tables import TABLES
from neva_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def row(**changes) -> dict:
    return {
        "bench": "train", "impl": "neva_jax", "stage": "pretrain", "model": "7B", "layers": 32, "projector": "linear",
        "image_px": 224, "precision": "bf16", "template": "plain", "packed": False, "micro_batch": 32,
        "global_batch": 128, "seed": 1, "backend": "xla", "attention": "cudnn", "remat": "dots", "unroll": 1,
        "mesh": {}, "sequence_parallel": False, "accumulate": 4, "tokens_useful": 300.0, "tokens_computed": 320.0,
        "samples_per_step": 128, "step_ms": 2000.0, "step_ms_p10": 1990.0, "step_ms_p90": 2010.0, "steps": 20,
        "samples_per_s": 64.0, "samples_per_s_per_gpu": 64.0, "data": "synthetic", "tflop_per_sample": 8.5,
        "peak_tflops": 790.0, "utilisation": 0.69, "peak_gib": 41.2, "compile_s": 19.0, "losses": [1.0],
        "gpu": "NVIDIA H200", "gpus": 1, "xla_flags": "", "date": "2026-11-27T14:32:58+00:00", **changes,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A page with all tables, and no lines yet."""
    (tmp_path / "results").mkdir()
    marks = "\n".join(f"## {name}\n<!-- bench: {name} -->\nold\n<!-- end -->" for name in TABLES)
    (tmp_path / "page.md").write_text(f"before\n{marks}\nafter\n", encoding="utf-8")
    return tmp_path


def report(folder, *more, rows=None) -> int:
    if rows is not None:
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (folder / "results" / "a.jsonl").write_text(text, encoding="utf-8")
    places = ["--results", folder / "results", "--page", folder / "page.md", "--images", folder / "images"]
    return bench.main(["report", *map(str, places), *more])


def section(folder, name) -> list[list[str]]:
    text = (folder / "page.md").read_text(encoding="utf-8").split(f"<!-- bench: {name} -->\n")[1].split("<!-- end")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_without_rows_nothing_was_measured(folder, capsys):
    assert report(folder, rows=[{"case": "of another kind"}, {"bench": "input"}]) == 0
    assert "plots: none" in capsys.readouterr().out
    assert all("not measured" in line for line in section(folder, "workflow"))
    for name in TABLES:
        assert all(any(cell == "not measured" for cell in line) for line in section(folder, name)), name


def test_each_layout_has_a_line_of_its_own(folder):
    two = {"mesh": {"tensor": 2}, "gpus": 2, "samples_per_s": 110.0}
    traced = {"kernels_ms": {"gemm": 100.0}, "busy_ms": 100.0, "idle_ms": 1.0}
    rows = [
        row(**two, samples_per_s_per_gpu=55.0),  # of before `overlap` was there
        row(**two, samples_per_s_per_gpu=54.0, overlap=False, exposed_communication_ms=7.0),
        row(**two, samples_per_s_per_gpu=57.0, overlap=True, **traced, exposed_communication_ms=3.0),
        row(**two, samples_per_s_per_gpu=56.0, overlap=True, sequence_parallel=True),
    ]
    report(folder, rows=rows)
    shown = {(line[4], line[8], line[10]) for line in section(folder, "layouts")}
    both = "tensor=2, sequence parallel, overlap"
    assert shown == {("tensor=2", "55.0", "7.0"), ("tensor=2, overlap", "57.0", "3.0"), (both, "56.0", "not measured")}
    assert section(folder, "kernels")[0][0] == "H200, pretrain 7B, bf16, dots, tensor=2, overlap"


def test_tables(folder, capsys):
    rows = [
        row(),
        row(samples_per_s=50.0, samples_per_s_per_gpu=50.0),  # slower: not shown
        row(mesh={"tensor": 2}, gpus=2, samples_per_s=110.0, samples_per_s_per_gpu=55.0, exposed_communication_ms=7.0),
        row(precision="fp8_delayed", samples_per_s=96.0, samples_per_s_per_gpu=96.0),
        row(impl="hf_torch", remat="none", samples_per_s=40.0, samples_per_s_per_gpu=40.0),
        row(impl="hf_torch", remat="full", samples_per_s=32.0, samples_per_s_per_gpu=32.0),
        {"bench": "train", "impl": "hf_torch", "stage": "pretrain", "model": "7B", "precision": "bf16",
         "micro_batch": 64, "global_batch": 64, "image_px": 224, "error": "out of memory: tried to allocate"},
        row(stage="finetune", layers=16, model="16 x 4096/11008", peak_gib=30.5, mesh={"tensor": 2}, gpus=2,
            micro_batch=4),
        row(kernels_ms={"gemm": 1500.0, "copy": 100.0}, busy_ms=1900.0, idle_ms=100.0, scopes_ms={"mlp": 900.0}),
        {"bench": "attention", "backend": "te", "rows": 2, "tokens": 4096, "heads": 32, "kv_heads": 8, "width": 128,
         "segments": 13, "dtype": "bf16", "ms": 0.76, "tflops": 99.5, "error": 0.002, "gradient_error": 0.003,
         "gpu": "NVIDIA H200"},
    ]  # fmt: skip
    assert report(folder, rows=rows) == 0
    workflow = section(folder, "workflow")
    assert workflow[0][:7] == ["pretrain", "7B", "bf16", "1 GPU", "32/128", "29.19", "**64.0**"]
    assert workflow[0][8:] == ["300/320", "224", "H200", "69.0 %"]
    assert workflow[1][6] == "**96.0**"
    assert [line[6] for line in workflow if line[3] == "tensor=2"] == ["**55.0**", *["not measured"] * 3]
    bf16, fp8 = section(folder, "baseline")
    assert bf16[5:] == ["bf16", "64.0", "40.0", "32.0", "1.60", "2.00"]
    assert fp8[5:] == ["fp8", "96.0", "40.0", "32.0", "2.40", "3.00"]
    assert section(folder, "memory")[0] == ["H200", "tensor=2", "bf16", "4", "dots", "16", "30.5", "34.7"]
    pair = [line for line in section(folder, "layouts") if line[1] == "pretrain"]
    assert pair[0][4] == "tensor=2" and pair[0][-2:] == ["7.0", f"{55 / 64:.3f}"]
    assert section(folder, "kernels")[0][1:] == [
        "gemm", "1500.0", "75.0 %", f"{8.5 * 128 / 0.79:.0f} (the model's operations at 790 TFLOP/s)",
    ]  # fmt: skip
    assert any("out of memory" in cell for line in section(folder, "variants") for cell in line)
    assert section(folder, "attention")[0][5:] == ["0.76", "99.5", "0.0020 / 0.0030"]
    capsys.readouterr()
    assert report(folder, "--check") == 0
    (folder / "page.md").write_text((folder / "page.md").read_text(encoding="utf-8").replace("64.0", "65.0"))
    assert report(folder, "--check") == 1
    assert "is not current" in capsys.readouterr().err


def test_efficiency_is_against_one_gpu_of_the_same_session_and_rows(folder):
    rows = [
        row(
            mesh={"data": 2}, gpus=2, samples_per_s=120.0, samples_per_s_per_gpu=60.0, date="2026-11-27T16:00:00+00:00"
        ),
        row(),
        row(samples_per_s_per_gpu=80.0, date="2026-11-27T18:30:00+00:00"),  # another machine's, maybe a faster card
        row(samples_per_s_per_gpu=90.0, packed=True),  # more samples in a row
    ]
    assert report(folder, rows=rows) == 0
    assert [line[-1] for line in section(folder, "layouts")] == [f"{60 / 64:.3f}"]
    assert report(folder, rows=[rows[0], *rows[2:]]) == 0
    assert [line[-1] for line in section(folder, "layouts")] == ["not measured"]


def test_rows_with_shortcuts_have_a_table_of_their_own(folder):
    shortcuts = {"labelled_positions": 64, "constant_prefix": 47}
    rows = [row(tokens_labelled=64.0), row(tokens_labelled=64.0, shortcuts=shortcuts, short=1.0, samples_per_s=80.0,
        samples_per_s_per_gpu=80.0)]  # fmt: skip
    assert report(folder, rows=rows) == 0
    (line,) = section(folder, "shortcuts")
    assert line[6:8] == ["train.labelled_positions=64, train.constant_prefix=47", "100.0 %"]
    assert line[9:12] == ["**80.0**", "64.0", f"{80 / 64:.2f}"]
    assert "**64.0**" in section(folder, "workflow")[0]


def test_rows_with_settings_of_xla_or_nccl_are_against_the_same_step_without(folder):
    two = {"mesh": {"fsdp": 2}, "gpus": 2, "samples_per_s": 100.0, "samples_per_s_per_gpu": 50.0}
    trace = {"kernels_ms": {"gemm": 100.0}, "busy_ms": 100.0, "idle_ms": 1.0}
    faster = two | {"samples_per_s": 110.0, "samples_per_s_per_gpu": 55.0, "step_ms": 1800.0}
    rows = [
        row(**two),
        row(**faster, xla_flags="--xla_gpu_a=1 --xla_b=2", nccl={"NCCL_CTA_POLICY": "2", "NCCL_NVLS_ENABLE": "0"}),
        row(**faster, nccl={"NCCL_MAX_NCHANNELS": "8"}, remat="full"),  # none without is like it
        row(**faster, xla_flags="--xla_gpu_a=1", **trace),
        row(sweep={"layers": "8"}),
    ]
    assert report(folder, rows=rows) == 0
    assert [line[2:6] for line in section(folder, "flags")] == [
        ["gpu_a=1 b=2 NCCL_CTA_POLICY=2", "1800.0", "2000.0", "1.10"],
        ["NCCL_MAX_NCHANNELS=8", "1800.0", "not measured", "not measured"],
    ]
    (line,) = section(folder, "layouts")
    assert (line[8], line[-1]) == ("50.0", "not measured")  # a row of a sweep is no measure of efficiency
    assert report(folder, rows=[*rows, row(**faster, xla_flags="--xla_gpu_enable_command_buffer=", **trace)]) == 0
    assert section(folder, "layouts")[0][8] == "55.0"


def test_the_workflows_figures_are_beaten_without_settings(folder):
    two = {"mesh": {"tensor": 2}, "gpus": 2, "samples_per_s": 100.0, "samples_per_s_per_gpu": 50.0}
    flagged = two | {"samples_per_s_per_gpu": 60.0, "xla_flags": "--xla_gpu_a=1"}
    assert report(folder, rows=[row(**two), row(**flagged)]) == 0
    assert next(line[6] for line in section(folder, "workflow") if line[3] == "tensor=2") == "**50.0**"


def test_curves_and_sweeps_are_drawn(folder):
    rows = [row(sweep={"tokens": str(256 * n)}, step_ms=100.0 * n * n, tokens_computed=256.0 * n) for n in (1, 2, 4)]
    rows += [
        row(losses=[2.0] * 90 + [1.0] * 10),
        row(losses=[2.0] * 90 + [1.01] * 10, precision="fp8_current"),
        row(losses=[2.0] * 90 + [1.1] * 10, precision="fp8_delayed", seed=2),
        row(losses=[2.0] * 100, stage="finetune"),  # alone
        row(losses=[2.0] * 100, global_batch=64),  # other rows in a step: other data
    ]
    assert report(folder, rows=rows) == 0
    assert [line[5:7] + line[9:] for line in section(folder, "cost")] == [
        ["256", "100.0", ""], ["512", "400.0", "2.00"], ["1024", "1600.0", "2.00"],
    ]  # fmt: skip
    assert [line[5:] for line in section(folder, "losses")] == [
        ["bf16, 1 GPU, seed 1", "100", "1.0000", "+0.00 %"],
        ["fp8_current, 1 GPU, seed 1", "100", "1.0100", "+1.00 %"],
        ["fp8_delayed, 1 GPU, seed 2", "100", "1.1000", "+10.00 %"],
    ]
    drawn = sorted(path.name for path in (folder / "images").iterdir())
    assert drawn == ["cost_tokens.png", "losses_h200_pretrain_7b_320_128.png"]


def test_errors(folder):
    (folder / "results" / "b.jsonl").write_text('{"bench": "train"\n')
    with pytest.raises(UserError, match=r"b\.jsonl: line 1 is no JSON"):
        report(folder)
    (folder / "results" / "b.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match=r"b\.jsonl: line 1 must be an object"):
        report(folder)
    with pytest.raises(UserError, match="there is no table 'speed'"):
        filled("<!-- bench: speed -->\n<!-- end -->", [], "page.md")
    with pytest.raises(UserError, match="has no <!-- bench: NAME -->"):
        filled("nothing", [], "page.md")
    with pytest.raises(UserError, match=r"nowhere\.md: cannot be read"):
        bench.main(["report", "--results", str(folder), "--page", "nowhere.md"])


def test_the_page_is_current(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert bench.main(["report", "--check"]) == 0, "run python -m neva_jax.bench report"
