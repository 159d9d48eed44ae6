"""Rows and their images in one kind of file, to train from without a file per image: ArrayRecord, or a TFDS directory.

Images are stored as the bytes that they were, and rows as the JSON that they were, so records and their sources make
the same samples, bit for bit.

    ArrayRecord   rows-00000.array_record, …: one record a row, MessagePack of {row: JSON text, images: {name: bytes}};
                  records.json, written last: {format, version, rows}
    TFDS          NAME/1.0.0/…: features id, row (JSON text), image_names, images; split `train`, in the rows' order
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tqdm import tqdm

from neva_jax.config import DataConfig
from neva_jax.data.record_files import MANIFEST
from neva_jax.data.rows import BadRow, Row, parse_row
from neva_jax.data.sources import RowRef, Sources
from neva_jax.data.stores import is_video
from neva_jax.errors import UserError

_FLUSH_BYTES = 32 * 2**20


@dataclass
class Written:
    """What became of the rows; `bad`: the messages of those left out."""

    rows: int = 0
    images: int = 0
    image_bytes: int = 0
    bad: list[str] = field(default_factory=list)


def write_records(
    data: DataConfig, out: Path, kind: Literal["array_record", "tfds"], name: str, shard_rows: int, skip_bad: bool
) -> Written:
    """Writes all rows of `data.train` with their images to the empty folder `out`, with a progress bar.

    Args:
      name: of the TFDS data set.
      shard_rows: most rows in one file.
      skip_bad: leaves bad rows out instead of refusing them.

    Raises:
      UserError: a row is bad, or all are.
    """
    sources = Sources(data, "train", seed=0, shuffle=False)
    done = Written()
    writer = _ArrayRecords(out, shard_rows) if kind == "array_record" else _Tfds(out, name, shard_rows)
    with writer, tqdm(total=sources.row_count, unit="row", desc="writing") as bar:
        for number in range(sources.row_count):
            ref = sources.order(number)
            try:
                raw = sources.raw(ref)
                row = parse_row(raw)
                images = dict(_images(sources, ref, row))
            except BadRow as error:
                message = f"{sources.describe(ref)}: {error}"
                if not skip_bad:
                    raise UserError(f"{message}; mend the row, or add --skip-bad") from None
                done.bad.append(message)
            else:
                writer.add(row.id, json.dumps(raw), images)
                done.rows += 1
                done.images += len(images)
                done.image_bytes += sum(map(len, images.values()))
            bar.update()
        if not done.rows:
            raise UserError(f"all {sources.row_count} rows are bad; the first: {done.bad[0]}")
        writer.finish(done.rows)
    return done


def _images(sources: Sources, ref: RowRef, row: Row) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of all image files of a row: its images, the frames of its video, or its video file."""
    if row.video is None:
        names, kind = row.images, "image"
    elif is_video(row.video) and sources.frames(ref, row.video)[0] == f"{row.video}#0":
        names, kind = (row.video,), "video"
    else:
        names, kind = sources.frames(ref, row.video), "video"
    for name in dict.fromkeys(names):
        yield name, sources.read_image(ref, name, kind)


class _Writer(AbstractContextManager):
    def add(self, identity: str, row: str, images: dict[str, bytes]) -> None:
        """One row more."""
        raise NotImplementedError

    def finish(self, rows: int) -> None:
        """All rows were added."""
        raise NotImplementedError


class _ArrayRecords(_Writer):
    def __init__(self, out: Path, shard_rows: int):
        self.out, self.shard_rows, self.count, self.file = out, shard_rows, 0, None

    def add(self, identity: str, row: str, images: dict[str, bytes]) -> None:
        import msgpack
        from array_record.python.array_record_module import ArrayRecordWriter

        if self.count % self.shard_rows == 0:
            self._close()
            path = self.out / f"rows-{self.count // self.shard_rows:05d}.array_record"
            # One row a group is read alone; photographs do not get smaller, and unpacking takes time.
            self.file = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        self.file.write(msgpack.packb({"row": row, "images": images}))
        self.count += 1

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def finish(self, rows: int) -> None:
        self._close()
        manifest = {"format": "neva_jax rows with images", "version": 1, "rows": rows}
        (self.out / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()


class _Tfds(_Writer):
    def __init__(self, out: Path, name: str, shard_rows: int):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.dataset_info import DatasetIdentity

        folder = out / name / "1.0.0"
        folder.mkdir(parents=True)
        features = tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                "row": tfds.features.Text(doc="The row of LLaVA JSON."),
                "image_names": tfds.features.Sequence(tfds.features.Text(), doc="As the row names them."),
                "images": tfds.features.Sequence(tfds.features.Image()),
            }
        )
        identity = DatasetIdentity(name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name="")
        info = tfds.core.DatasetInfo(
            builder=identity, features=features, description="Conversations with images.", disable_shuffling=True
        )
        self.writer = tfds.core.SequentialWriter(info, shard_rows, file_format="array_record")
        self.writer.initialize_splits(["train"])
        self.waiting: list[dict[str, Any]] = []
        self.bytes = 0

    def add(self, identity: str, row: str, images: dict[str, bytes]) -> None:
        # Added in groups, because TFDS writes its description again each time.
        example = {"id": identity, "row": row, "image_names": list(images), "images": list(images.values())}
        self.waiting.append(example)
        self.bytes += len(row) + sum(map(len, images.values()))
        if self.bytes >= _FLUSH_BYTES or len(self.waiting) >= 1000:
            self._flush()

    def _flush(self) -> None:
        self.writer.add_examples({"train": self.waiting})
        self.waiting, self.bytes = [], 0

    def finish(self, rows: int) -> None:
        self._flush()
        self.writer.close_all()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass
