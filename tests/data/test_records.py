"""Rows with images in one file: what is written is what was read, bit for bit; files of others; damaged files."""

import io
import json
import pickle
import sys
import threading

import msgpack
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from neva_jax.config import DataConfig, SourceConfig
from neva_jax.data.record_files import open_records
from neva_jax.data.records import write_records
from neva_jax.data.rows import BadRow, Turn
from neva_jax.data.sources import RowRef, Sources
from neva_jax.errors import UserError

KINDS = ("array_record", "tfds")


def turns(question, answer="yes", **fields):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer, **fields}]


def picture(seed, kind="JPEG", mode="RGB"):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


@pytest.fixture
def plain(tmp_path):
    """A source of every kind of row, with images of several formats."""
    files = {f"coco/{i}.jpg": picture(i) for i in range(6)}
    files |= {"b.png": picture(7, "PNG"), "grey.jpg": picture(8, "JPEG", "L"), "cmyk.jpg": picture(9, "JPEG", "CMYK")}
    files |= {f"clip/{i}.png": picture(20 + i, "PNG") for i in range(3)}
    for name, content in files.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    rows = [{"id": f"r{i}", "image": f"coco/{i}.jpg", "conversations": turns("<image>\nGrüße 🙂")} for i in range(6)]
    rows += [
        {"id": 17, "image": ["b.png", "grey.jpg", "b.png"], "conversations": turns("<image><image> <image>")},
        {"id": "four channels", "image": "cmyk.jpg", "conversations": turns("<image>")},
        {"conversations": turns("text only", label="quality:4", weight=0.5), "system": "S", "other": [1, None]},
        {"id": "moving", "video": "clip", "conversations": turns("<video>")},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False))
    return SourceConfig(json=str(tmp_path / "rows.json"), images=str(tmp_path / "images"))


def opened(source, **settings):
    return Sources(DataConfig(train=[source], **settings), "train", 0, shuffle=False)


def write(source, out, kind, shard_rows=4, skip_bad=False):
    out.mkdir()
    return write_records(DataConfig(train=[source]), out, kind, "pictures", shard_rows, skip_bad)


def assert_same(one, other):
    assert one.row_count == other.row_count
    for i in range(one.row_count):
        ref = RowRef(0, i)
        assert one.raw(ref) == other.raw(ref)
        row = one.read(ref)
        assert row == other.read(ref)
        for name in row.images:
            assert one.read_image(ref, name) == other.read_image(ref, name)
        if row.video:
            assert one.frames(ref, row.video) == other.frames(ref, row.video)
            for name in one.frames(ref, row.video):
                assert one.read_image(ref, name, "video") == other.read_image(ref, name, "video")


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_what_they_were_made_from(plain, tmp_path, kind):
    done = write(plain, tmp_path / "out", kind)
    assert (done.rows, done.images, done.bad) == (10, 12, [])
    assert len(list((tmp_path / "out").rglob("*.array_record*"))) == 3
    records = opened(SourceConfig(records=str(tmp_path / "out")))
    assert_same(opened(plain), records)
    sent = pickle.dumps(records)
    assert len(sent) < 5000
    assert_same(opened(plain), pickle.loads(sent))
    assert records.describe(RowRef(0, 6)) == f"{tmp_path / 'out'}: row 6 (id 17)"
    assert "tensorflow" not in sys.modules


def test_plain_tfds_reads_them_too(plain, tmp_path):
    write(plain, tmp_path / "out", "tfds")
    data = tfds.data_source("pictures", split="train", data_dir=str(tmp_path / "out"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [json.loads(data[i]["row"]) for i in range(10)] == rows
    assert data[0]["id"] == b"r0"
    with Image.open(tmp_path / "images/coco/3.jpg") as image:
        np.testing.assert_array_equal(data[3]["images"][0], np.asarray(image))
    assert [name.decode() for name in data[6]["image_names"]] == ["b.png", "grey.jpg"]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_mix_rows_up(plain, tmp_path, kind):
    write(plain, tmp_path / "out", kind)
    records, wanted, wrong = opened(SourceConfig(records=str(tmp_path / "out"))), opened(plain), []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 6, 100).tolist():
            ref = RowRef(0, i)
            if records.read(ref).id != f"r{i}" or records.read_image(ref, f"coco/{i}.jpg") != wanted.read_image(
                ref, f"coco/{i}.jpg"
            ):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_video_file_is_stored_as_it_is(tmp_path):
    av = pytest.importorskip("av")
    (tmp_path / "images").mkdir()
    with av.open(str(tmp_path / "images/a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 50 * i, np.uint8), "rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode())
    (tmp_path / "rows.json").write_text(json.dumps([{"video": "a.mkv", "conversations": turns("<video>")}]))
    plain = SourceConfig(json=str(tmp_path / "rows.json"), images=str(tmp_path / "images"))
    assert write(plain, tmp_path / "out", "array_record").images == 1
    assert_same(opened(plain), opened(SourceConfig(records=str(tmp_path / "out"))))


def test_steerlm_lines_become_llava_rows(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1, "PNG"))
    line = {"system": "S", "mask": "User", "conversations": turns('<img src="x/a.png"> what?', label="quality:4")}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line))
    plain = SourceConfig(json=str(tmp_path / "rows.jsonl"), images=str(tmp_path))
    write(plain, tmp_path / "out", "array_record")
    row = opened(SourceConfig(records=str(tmp_path / "out"))).read(RowRef(0, 0))
    assert (row.images, row.turns[0].text, row.turns[1].label) == (("a.png",), "<image> what?", "quality:4")


# --- bad rows --------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(plain, tmp_path):
    """The plain source with a missing image in row 2 and a row that is none."""
    (tmp_path / "images/coco/2.jpg").unlink()
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps([*rows, 4]))
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_row_is_refused(damaged, tmp_path, kind):
    with pytest.raises(UserError) as error:
        write(damaged, tmp_path / "out", kind)
    assert str(error.value) == (
        f"{damaged.json}: row 2 (id 'r2'): field image: coco/2.jpg is not in {damaged.images}; mend the row, or add "
        "--skip-bad"
    )
    assert not (tmp_path / "out/records.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_or_left_out(damaged, tmp_path, kind):
    done = write(damaged, tmp_path / "out", kind, skip_bad=True)
    assert (done.rows, len(done.bad)) == (9, 2)
    assert done.bad[1] == f"{damaged.json}: row 10: must be an object, not 4"
    records = opened(SourceConfig(records=str(tmp_path / "out")))
    assert [records.row_id(RowRef(0, i)) for i in range(9)] == [
        "r0",
        "r1",
        "r3",
        "r4",
        "r5",
        "17",
        "four channels",
        "",
        "moving",
    ]


def test_nothing_but_bad_rows(tmp_path):
    (tmp_path / "rows.json").write_text("[1, 2]")
    with pytest.raises(
        UserError, match=r"^all 2 rows are bad; the first: .*rows.json: row 0: must be an object, not 1$"
    ):
        write(SourceConfig(json=str(tmp_path / "rows.json")), tmp_path / "out", "array_record", skip_bad=True)


# --- files of others -------------------------------------------------------------------------------------------------


def tfds_folder(folder, features, examples, splits=("train",)):
    folder.mkdir(parents=True)
    identity = DatasetIdentity(name="x", version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features), description="x")
    writer = tfds.core.SequentialWriter(info, 2, file_format="array_record")
    writer.initialize_splits(list(splits))
    for split in splits:
        writer.add_examples({split: examples})
    writer.close_all()


LLAVA = {
    "id": tfds.features.Text(),
    "image": tfds.features.Image(),
    "conversations": tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()}),
}


@pytest.mark.parametrize("below", ["", "x/1.0.0"])
def test_a_tfds_directory_with_the_fields_of_llava(tmp_path, below):
    examples = [{"id": f"a{i}", "image": picture(i), "conversations": turns(f"<image>\n{i} é")} for i in range(5)]
    tfds_folder(tmp_path / "data" / below, LLAVA, examples)
    sources = opened(SourceConfig(records=str(tmp_path / "data")))
    for i in range(5):
        row = sources.read(RowRef(0, i))
        assert (row.id, row.images) == (f"a{i}", ("image-0",))
        assert row.turns == (Turn("user", f"<image>\n{i} é"), Turn("assistant", "yes"))
        assert sources.read_image(RowRef(0, i), "image-0") == picture(i)


def test_a_tfds_directory_of_several_splits(tmp_path):
    example = {"id": "a", "image": picture(0), "conversations": turns("<image>")}
    tfds_folder(tmp_path / "one", LLAVA, [example], ["test"])
    tfds_folder(tmp_path / "train", LLAVA, [example] * 3, ["train", "test"])
    tfds_folder(tmp_path / "none", LLAVA, [example], ["left", "right"])
    assert [len(open_records(tmp_path / name)) for name in ("one", "train")] == [1, 3]
    with pytest.raises(UserError, match=r"none: has the splits left, right, and none is called train$"):
        open_records(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds 3 TFDS versions; name one, as "):
        open_records(tmp_path)


STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_parquet_of_hugging_face(tmp_path, as_text, several):
    said = [turns(f"<image>{i}") for i in range(4)] + [turns("no image")]
    images = [
        {"bytes": picture(0), "path": "a/0.jpg"},
        {"bytes": picture(1), "path": None},
        {"bytes": picture(2), "path": "../2.jpg"},
        {"bytes": picture(3), "path": "3.jpg"},
        None,
    ]
    if several:
        images, kind, name = [[image] if image else [] for image in images], pyarrow.list_(STRUCT), "images"
    else:
        kind, name = STRUCT, "image"
    columns = {
        "id": [f"i{i}" for i in range(5)],
        name: pyarrow.array(images, kind),
        "conversations": [json.dumps(one) for one in said] if as_text else said,
        "extra": [b"x"] * 5,
    }
    for file, rows in (("0", slice(0, 3)), ("1", slice(3, 5))):
        parquet(tmp_path / "data" / f"{file}.parquet", **{key: value[rows] for key, value in columns.items()})
    sources = pickle.loads(pickle.dumps(opened(SourceConfig(records=str(tmp_path / "data")))))
    rows = [sources.read(RowRef(0, i)) for i in range(5)]
    assert [row.images for row in rows] == [("a/0.jpg",), ("image-0",), ("image-0",), ("3.jpg",), ()]
    assert [row.id for row in rows] == columns["id"]
    assert [row.turns[0].text for row in rows] == [said[i][0]["value"] for i in range(5)]
    for i in (3, 0, 2, 1):
        assert sources.read_image(RowRef(0, i), rows[i].images[0]) == picture(i)


def test_one_parquet_file_whose_images_lie_in_a_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"x")
    image = pyarrow.array([{"bytes": None, "path": "a.png"}, {"bytes": b"own", "path": "b.png"}], STRUCT)
    parquet(tmp_path / "a.parquet", conversations=[turns("<image>")] * 2, image=image)
    path = str(tmp_path / "a.parquet")
    sources = opened(SourceConfig(records=path, images=str(tmp_path / "images")))
    assert [sources.read_image(RowRef(0, i), name) for i, name in enumerate(("a.png", "b.png"))] == [b"x", b"own"]
    with pytest.raises(BadRow, match=r"^field image: a.png did not come with its row in .*a.parquet$"):
        opened(SourceConfig(records=path)).read_image(RowRef(0, 0), "a.png")


# --- damaged files ---------------------------------------------------------------------------------------------------


def refused(path):
    with pytest.raises(UserError) as error:
        open_records(path)
    return str(error.value)


def test_what_is_no_record_file(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.array_record").write_bytes(b"text")
    (tmp_path / "text.parquet").write_bytes(b"text")
    parquet(tmp_path / "other.parquet", text=["a"])
    (tmp_path / "tfds").mkdir()
    (tmp_path / "tfds/dataset_info.json").write_text("{")
    ArrayRecordWriter(str(tmp_path / "none.array_record"), "group_size:1").close()
    for name, message in {
        "absent": "absent: no such file or directory",
        "empty": "holds neither a TFDS data set, nor .array_record files, nor .parquet files",
        "text.array_record": "is no ArrayRecord that can be read",
        "text.parquet": "is no Parquet file that can be read",
        "other.parquet": "has no column conversations; its columns are text",
        "tfds": "is no TFDS directory that can be read",
        "none.array_record": "holds no rows",
    }.items():
        assert message in refused(tmp_path / name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_that_lacks_a_file_or_its_end(plain, tmp_path, kind):
    write(plain, tmp_path / "out", kind)
    file = sorted((tmp_path / "out").rglob("*.array_record*"))[-1]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "is no ArrayRecord that can be read" in refused(tmp_path / "out")
    file.unlink()
    assert "copy it again" in refused(tmp_path / "out")


def test_a_damaged_record_is_a_bad_row(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for record in (
        b"\xc1",
        msgpack.packb({"row": "{}"}),
        msgpack.packb({"row": "{", "images": {}}),
        msgpack.packb([1]),
    ):
        writer.write(record)
    writer.write(msgpack.packb({"row": '{"id": 4}', "images": {}}))
    writer.close()
    rows = open_records(tmp_path / "a.array_record")
    assert rows.raw(4) == {"id": 4}
    for i in range(4):
        with pytest.raises(BadRow, match=r"^cannot be read \("):
            rows.raw(i)


def test_records_that_change_are_noticed(plain, tmp_path):
    write(plain, tmp_path / "out", "array_record", shard_rows=100)
    rows = open_records(tmp_path / "out")
    with (tmp_path / "out/rows-00000.array_record").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="has changed since it was opened"):
        pickle.loads(pickle.dumps(rows))
