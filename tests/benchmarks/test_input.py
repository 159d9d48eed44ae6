"""The lines of `bench input`: all fields are there and agree with each other. Nothing here is timed."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from neva_jax import bench
from neva_jax.benchmarks import input as input_rows
from neva_jax.benchmarks.synthetic import photograph, words, write_rows, write_tokenizer
from neva_jax.data.pipeline import batches_ahead
from neva_jax.errors import UserError

SMALL = ["--rows", "6", "--batch", "4", "--distinct", "3", "--source-size", "60x40", "--image-px", "28"]
FIELDS = """bench impl image_px image_mode workers images_per_s images_per_s_per_worker images_per_cpu_s cpu_ms
    first_batch_s rows tokens_per_row read_ms decode_ms resize_ms hf_ms max_pixel_difference source_width source_height
    source_bytes distinct_images text_ms rest_ms batch data quality template cpu cores load versions date"""


@pytest.fixture
def lines(capsys):
    def run(*arguments):
        assert bench.main(["input", *map(str, arguments)]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_a_line_for_each_size_and_number_of_workers(lines):
    made = [*lines(*SMALL, "--image-px", "28,42", "--workers", "0"), *lines(*SMALL, "--workers", "1")]
    assert [(line["image_px"], line["workers"]) for line in made] == [(28, 0), (42, 0), (28, 1)]
    for line in made:
        assert set(line) == set(FIELDS.split())
        measured = 4 * input_rows.LEAST if line["workers"] else 8
        assert (line["bench"], line["impl"], line["rows"], line["batch"]) == ("input", "neva_jax", measured, 4)
        assert (line["source_width"], line["source_height"], line["distinct_images"]) == (60, 40, 3)
        assert line["max_pixel_difference"] == 0
        assert min(line[name] for name in ("images_per_s", "images_per_cpu_s", "cpu_ms", "decode_ms", "hf_ms")) > 0
        assert line["tokens_per_row"] > (line["image_px"] // 14) ** 2
        assert set(line["versions"]) >= {"python", "pillow", "numba"}


def test_what_was_made_before_the_clock_runs_does_not_count(monkeypatch, lines):
    """A stream whose first batches are there at once, as many as there is room for; each later one takes 5 s."""
    clock = SimpleNamespace(now=0.0)
    asked = []

    def made_ahead(sources, config, tokenizer, first, rows):
        ahead = batches_ahead(config.data.workers)
        asked.append(SimpleNamespace(ahead=ahead, given=0, of=rows // 4))
        for i in range(rows // 4):
            clock.now += 5.0 * (i >= ahead)
            asked[-1].given += 1
            yield SimpleNamespace(bad_rows=[], arrays={"segment_ids": np.ones((4, 7), np.int32)})

    monkeypatch.setattr(input_rows, "batches", made_ahead)
    monkeypatch.setattr(input_rows.time, "perf_counter", lambda: clock.now)
    made = lines(*SMALL, "--rows", "200", "--workers", "0,3")
    assert [(line["images_per_s"], line["rows"]) for line in made] == [(0.8, 200), (0.8, 4 * 50)]
    # All workers have work left when their CPU time is read, and none afterwards.
    assert [stream.of - 3 * stream.ahead for stream in asked[1:]] == [50, 50]
    assert all(stream.given == stream.of for stream in asked)


@pytest.mark.parametrize(("mode", "compared"), [("squash", True), ("pad", False), ("keep", False), ("anyres", False)])
def test_other_modes(mode, compared, lines):
    (line,) = lines(*SMALL, "--mode", mode, "--workers", "0")
    assert line["image_mode"] == mode
    assert (line["max_pixel_difference"], line["hf_ms"] is None) == ((0, False) if compared else (None, True))


def test_own_data(tmp_path, lines):
    write_rows(tmp_path, 5, 2, (30, 20), 80)
    write_tokenizer(tmp_path / "tokenizer.model")
    own = ["--json", tmp_path / "rows.json", "--images", tmp_path, "--tokenizer", tmp_path / "tokenizer.model"]
    (line,) = lines(*SMALL, *own, "--workers", "0")
    assert line["data"] == str(tmp_path / "rows.json")
    assert [line[name] for name in ("source_width", "distinct_images", "quality", "text_ms")] == [30, 2, None, None]
    (tmp_path / "1.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"rows\.json: field image: 1\.jpg is no image that can be read"):
        lines(*SMALL, *own, "--workers", "0")
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"rows\.json: .*1\.jpg"):
        lines(*SMALL, *own, "--workers", "0")
    own[1] = tmp_path / "text.json"
    with pytest.raises(UserError, match=r"text\.json: no row has an image"):
        lines(*SMALL, *own, "--workers", "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "a.json"], "--json and --images belong together"),
        (["--json", "a.json", "--images", "b"], "--json: needs --tokenizer"),
        (["--rows", "0"], "--rows must be at least 1, not 0"),
        (["--workers", "0,x"], "--workers: '0,x' is no list of numbers"),
        (["--source-size", "640"], "--source-size: '640' is no size like 640x480"),
        (["--mode", "round"], "--mode: invalid choice"),
        (["--image-px", "30"], "--image-px 30: must be a multiple of 14"),
    ],
)
def test_bad_usage(arguments, message):
    with pytest.raises(UserError, match=message):
        bench.main(["input", *arguments])


def test_made_up_data_is_like_real_data():
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    picture = photograph(640, 480, rng)
    picture.save(file, "jpeg", quality=90)
    assert picture.size == (640, 480) and 100_000 < file.tell() < 150_000
    text = words(rng, 2000)
    assert len(text.split()) == 2000 and 300 < len(set(text.split())) < 2000
    assert np.array_equal(photograph(40, 30, np.random.default_rng(1)), photograph(40, 30, np.random.default_rng(1)))
    assert isinstance(Image.open(file), Image.Image)
