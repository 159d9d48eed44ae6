"""Lengths against the rows that are made; what makes them anew; nothing half done."""

import json

import numpy as np
import pytest
from PIL import Image

from neva_jax.data import lengths as lengths_module
from neva_jax.data.lengths import BAD, DROPPED, GOOD, ROW, row_lengths, summary
from neva_jax.data.pipeline import SampleMaker
from neva_jax.data.rows import DroppedRow
from neva_jax.data.samples import Samples
from neva_jax.data.sources import RowRef
from neva_jax.data.tokenizer import Tokenizer, add_tokens
from neva_jax.errors import UserError
from tests.data.rows import PATCHES, conversation, write_rows

ANYRES = ["data.image_mode=anyres", "data.image_grids=[[32, 64], [64, 32], [64, 64]]", "model.projector.newline=true"]


@pytest.fixture
def measured(config, tokenizer):
    """Measures, and returns the lengths with what was said."""

    def measure(*overrides, with_tokenizer=tokenizer):
        settings, sources = config(*overrides)
        said = []
        return row_lengths(sources, settings, with_tokenizer, said.append), said

    return measure


@pytest.fixture
def pictures(tmp_path):
    """Rows of every kind, and images of several sizes: (override, number of rows)."""
    rows = [
        conversation(f"{i}", "<image> " * i + "?", "It is.", image=[f"{n}.png" for n in range(i)]) for i in (1, 2, 3)
    ]
    rows += [conversation("text", "Hi", "Hello"), conversation("rounds", "<image>Hi", "a", "b", "c", image="1.png")]
    override, _ = write_rows(tmp_path, rows)
    for i, size in enumerate([(64, 32), (64, 64), (30, 90)]):
        Image.new("RGB", size).save(tmp_path / "images" / f"{i}.png")
    return override, len(rows)


@pytest.mark.parametrize("mode", [["data.image_mode=square"], ["data.image_mode=pad", "data.image_start=<s4>"], ANYRES])
def test_lengths_are_those_of_the_rows_that_are_made(config, tokenizer, pictures, mode):
    grown = Tokenizer(add_tokens(tokenizer.serialized, ["<s4>"], True, "x")[0])
    settings, sources = config(pictures[0], *mode, "data.images_per_row=3", "data.max_length=512")
    (table,) = [row_lengths(sources, settings, grown, print)[0]]
    maker = SampleMaker(sources, settings, grown)
    assert len(table) == pictures[1]
    for number, line in enumerate(table):
        made = maker.make(RowRef(0, number))
        tiles = 1 + made["image_slots"].max() // PATCHES
        assert line["tokens"] == (made["segment_ids"] == 1).sum()
        assert line["supervised"] == (made["loss_weights"] > 0).sum()
        assert line["tiles"] >= tiles
        assert line["state"] == GOOD
    if mode is not ANYRES:
        assert table["tiles"].tolist() == [1, 2, 3, 0, 1]


def test_frames_of_a_video_are_counted_without_looking_at_them(measured, tmp_path):
    override, _ = write_rows(
        tmp_path, [conversation("v", "<video>", "x", video="absent"), conversation("t", "Hi", "x")]
    )
    lengths, _ = measured(override, "data.video_frames=3")
    assert lengths[0]["tiles"].tolist() == [3, 0]
    assert lengths[0]["tokens"][0] > 3 * PATCHES


def test_rows_that_cannot_be_used_are_marked(measured, tmp_path, monkeypatch):
    rows = [conversation("0", "Hi", "x"), {"id": "1"}, conversation("2", "Hi", "y" * 500), conversation("3", "Hi", "z")]
    real = Samples.measure

    def measure(self, ref):
        if ref.row == 3:
            raise DroppedRow("for the test")
        return real(self, ref)

    monkeypatch.setattr(Samples, "measure", measure)
    lengths, _ = measured(write_rows(tmp_path, rows)[0])
    assert lengths[0]["state"].tolist() == [GOOD, BAD, BAD, DROPPED]
    assert lengths[0]["tokens"][1:].tolist() == [0, 0, 0]


def test_processes_measure_what_one_measures(measured, config, tokenizer, tmp_path, monkeypatch):
    rows = [conversation(f"{i}", "Hi", "x" * (i % 50)) for i in range(30)]
    override, _ = write_rows(tmp_path, rows)
    settings, sources = config(override, "data.workers=2")
    alone = lengths_module.measure(sources, 0, config(override)[0], tokenizer)
    monkeypatch.setattr(lengths_module, "CHUNK", 7)
    monkeypatch.setattr(lengths_module, "usable_cores", lambda: 2)
    np.testing.assert_array_equal(lengths_module.measure(sources, 0, settings, tokenizer), alone)
    assert alone.dtype == ROW


def test_lengths_are_measured_once(measured, monkeypatch):
    first, said = measured()
    assert len(said) == 1
    monkeypatch.setattr(Samples, "measure", None)
    again, said = measured("data.workers=1", "run.seed=9", "data.segments_per_row=3", "optimizer.lr=1e-3")
    assert said == []
    assert again.digest == first.digest
    table = np.arange(3)
    np.testing.assert_array_equal(again.of(np.zeros(3, int), table), first[0][:3])


@pytest.mark.parametrize(
    "change",
    [
        "data.template=plain",
        "data.max_length=191",
        "data.images_per_row=2",
        "data.image_mode=pad",
        "data.video_frames=2",
        "model.projector.kind=mlp_downsample",
        "model.vision.select_feature=cls_patch",
    ],
)
def test_a_setting_that_changes_lengths_makes_them_anew(measured, change):
    measured()
    _, said = measured(change)
    assert [line.split(": ", 1)[1] for line in said] == [
        "no lengths are cached for this content, tokenizer and settings; measuring its rows"
    ]


def test_other_content_and_another_tokenizer_make_them_anew(measured, tokenizer, tmp_path):
    rows = [conversation("0", "Hi", "x"), conversation("1", "Hi", "y")]
    override, path = write_rows(tmp_path, rows)
    before, _ = measured(override)
    grown = Tokenizer(add_tokens(tokenizer.serialized, ["<s4>"], True, "x")[0])
    assert len(measured(override, with_tokenizer=grown)[1]) == 1
    rows[1]["conversations"][1]["value"] = "many more words than before"
    path.write_text(json.dumps(rows))
    after, said = measured(override)
    assert len(said) == 1
    assert after[0]["tokens"][1] > before[0]["tokens"][1]
    assert after.digest != before.digest


def test_the_same_lines_with_images_are_made_anew(measured, tmp_path):
    """A SteerLM line's `<img>` tag is text without an images folder, and an image with one."""
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps(conversation("0", '<img src="0.png"> What?', "x")) + "\n")
    text, _ = measured(f"data.train=[{{json: {lines}}}]")
    (tmp_path / "images").mkdir(exist_ok=True)
    image, said = measured(f"data.train=[{{json: {lines}, images: {tmp_path / 'images'}}}]")
    assert len(said) == 1
    assert (text[0]["tiles"][0], image[0]["tiles"][0]) == (0, 1)


def test_what_was_interrupted_leaves_nothing(measured, tmp_path, monkeypatch):
    real = Samples.measure

    def interrupt(self, ref):
        if ref.row == 11:
            raise KeyboardInterrupt
        return real(self, ref)

    with monkeypatch.context() as patch:
        patch.setattr(Samples, "measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            measured()
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".npy"] == []
    assert len(measured()[0][0]) == 25


def test_a_table_of_other_rows_is_refused(measured, tmp_path):
    lengths, _ = measured()
    np.save(tmp_path / "cache" / f"{lengths.names[0]}.npy", np.zeros(3, ROW))
    with pytest.raises(
        UserError, match=rf"^data\.cache: .*{lengths.names[0]}\.npy is not what it should be; delete it"
    ):
        measured()


def test_the_summary_of_a_table(measured, tmp_path):
    rows = [conversation("0", "Hi", "x"), {"id": "1"}, conversation("2", "Hi", "y" * 30)]
    lengths, _ = measured(write_rows(tmp_path, rows)[0])
    found = summary(lengths[0])
    good = lengths[0][[0, 2]]
    assert {name: found[name] for name in ("rows", "bad", "dropped")} == {"rows": 3, "bad": 1, "dropped": 0}
    assert found["tokens"] == good["tokens"].sum()
    assert found["supervised"] == good["supervised"].sum()
    assert found["longest"] == good["tokens"].max()
    assert found["tokens_mean"] == good["tokens"].mean()
    assert summary(lengths[0][:0])["longest"] == 0
