"""What `prepare check` finds out about each row and each image, in parallel processes.

    rows     read, parsed, held against the settings, measured     1000 at a time, in the order of the files
    images   found (and decoded), each name once                   in the order in which rows name them first
    rows     of images that cannot be used are bad too

What is wrong with a row is told apart by the step that refused it, not by the words of its message, and a row counts
once: under the first of the steps that training would stop it at.

Memory: about 50 bytes a row and 200 for each distinct image, and half a kilobyte for each row that cannot be used;
texts and pixels stay where they are read.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from neva_jax.config import Config
from neva_jax.data.images import decode_image, image_header, jpeg_is_complete, sample_frames
from neva_jax.data.processes import in_order
from neva_jax.data.rows import IMAGE_MARK, VIDEO_MARK, BadRow, DroppedRow, parse_row
from neva_jax.data.samples import Samples, check_row
from neva_jax.data.sources import RowRef, Sources
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.files import usable_cores
from neva_jax.printable import printable

# What can be wrong with a row, in the order of the steps; the names stand in report.json and do not change.
KINDS = {
    "no_json": "the row is no JSON",
    "structure": "a field is missing, or not what it should be",
    "marks": "the <image> or <video> marks do not fit the images that the row names",
    "too_many_images": "more images than data.images_per_row",
    "video_refused": "a video, but data.video_frames is 0",
    "image_missing": "an image is not there, or must not be read",
    "image_too_large": "an image has more pixels than data.max_pixels",
    "image_incomplete": "a JPEG without its end marker: the lower part is missing, or zeros",
    "image_broken": "an image cannot be decoded",
    "template": "the template refuses the conversation",
    "too_long": "more tokens than data.max_length",
    "nothing_supervised": "nothing to learn: no token of the answers has a loss weight",
}
_NUMBERS = {kind: number for number, kind in enumerate(KINDS, 1)}
GOOD, BAD, DROPPED = 0, 1, 2  # states
# kind: 0 or a number of KINDS. parsed: the row has a structure. tokens: positions that it would fill, 0 if that is not
# known; used: after cutting; supervised: of those. id: hash of the id, 0 if there is none.
ROW = np.dtype(
    [
        ("state", "u1"),
        ("kind", "u1"),
        ("parsed", "?"),
        ("video", "?"),
        ("cut", "?"),
        ("images", "<i4"),
        ("rounds", "<i4"),
        ("tokens", "<i4"),
        ("used", "<i4"),
        ("supervised", "<i4"),
        ("tiles", "<i4"),
        ("id", "<u8"),
    ]
)
ROWS, IMAGES, NAMES = 1000, 32, 2000  # that a process is given at a time; images to decode, or only to find
MOST_SHOWN = 500  # characters of a message
UNBOUNDED = 2**30  # tokens


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used; `state` is BAD or DROPPED, `kind` one of KINDS, `message` is safe to print."""

    ref: RowRef
    id: str
    state: int
    kind: str
    message: str


@dataclass(frozen=True)
class ImageItem:
    """An image or video, by the first row that names it; `field` is `image` or `video`."""

    ref: RowRef
    name: str
    field: str


@dataclass(frozen=True)
class ImageFinding:
    """`kind` and `message`: what is wrong, empty if nothing is. The rest is empty where the file was not opened."""

    kind: str = ""
    message: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    digest: bytes = b""


@dataclass
class RowsFound:
    """Of consecutive rows: a table of ROW, the problems, and the items that usable rows name: (number, items).

    beginning: the tokens [P] that all of those that were measured begin with; None: there are none.
    """

    table: np.ndarray
    problems: list[Problem]
    items: list[tuple[int, list[ImageItem]]]
    beginning: np.ndarray | None = None


@dataclass
class Findings:
    """Everything that was found out.

    tables: of each source, [rows] of ROW.
    problems: by source and row.
    items, images: each distinct image with what was found.
    beginning: the tokens [P] that all rows begin with, before images and labels; None: nothing was measured.
    """

    config: Config
    sources: Sources
    measured: bool
    decoded: bool
    tables: list[np.ndarray] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    items: list[ImageItem] = field(default_factory=list)
    images: list[ImageFinding] = field(default_factory=list)
    beginning: np.ndarray | None = None


class Inspector:
    """Looks at rows and images; runs in the processes."""

    def __init__(self, sources: Sources, config: Config, tokenizer: Tokenizer | None, decode: bool):
        """Without `tokenizer` nothing is measured; `decode`: images are decoded, not only looked for."""
        self.sources, self.config, self.decode = sources, config, decode
        self.samples = self.whole = None
        if tokenizer is not None:
            self.samples = Samples(sources, config, tokenizer)
            # Measures rows of any length as if nothing were cut.
            data = replace(config.data, max_length=UNBOUNDED, on_long_row="error")
            self.whole = Samples(sources, replace(config, data=data), tokenizer)

    # --- rows

    def rows(self, source: int, start: int, end: int) -> RowsFound:
        """Looks at the rows `start` … `end - 1` of a source."""
        found = RowsFound(np.zeros(end - start, ROW), [], [])
        for i in range(end - start):
            ref = RowRef(source, start + i)
            problem = self._row(ref, found.table[i : i + 1], found)
            if problem is not None:
                found.problems.append(problem)
        return found

    def _row(self, ref: RowRef, line: np.ndarray, found: RowsFound) -> Problem | None:
        raw: Any = None
        name = ""

        def refused(kind: str, error: BadRow) -> Problem:
            line["state"] = state = DROPPED if isinstance(error, DroppedRow) else BAD
            line["kind"] = _NUMBERS[kind]
            return Problem(ref, printable(name, most=80), state, kind, printable(str(error), most=MOST_SHOWN))

        try:
            raw = self.sources.raw(ref)
        except BadRow as error:
            return refused("no_json", error)
        if isinstance(raw, dict) and isinstance(raw.get("id"), str | int | float):
            name = str(raw["id"])
            line["id"] = _hash(name)
        try:
            row = parse_row(raw)
        except BadRow as error:
            return refused("marks" if _only_marks(raw) else "structure", error)
        line["parsed"], line["rounds"] = True, len(row.turns) // 2
        line["images"], line["video"] = len(row.images), row.video is not None
        try:
            check_row(row, self.config.data)
        except BadRow as error:
            many = len(row.images) > self.config.data.images_per_row
            return refused("video_refused" if row.video is not None else "too_many_images" if many else "marks", error)
        here = [ImageItem(ref, image, "image") for image in row.images]
        if row.video is not None:
            here = [ImageItem(ref, row.video, "video")]
        if here:
            found.items.append((ref.row, here))
        return None if self.samples is None else self._measure(ref, here, line, refused, found)

    def _measure(
        self, ref: RowRef, items: Sequence[ImageItem], line: np.ndarray, refused: Any, found: RowsFound
    ) -> Problem | None:
        try:
            whole, encoded = self.whole.measured(ref)
        except DroppedRow as error:
            return refused("nothing_supervised", error)
        except BadRow as error:
            # With anyres, lengths need the images' sizes: what is wrong with an image is found when images are.
            return None if any(self.image(item).kind for item in items) else refused("template", error)
        line["tokens"] = line["used"] = whole.tokens
        line["supervised"], line["tiles"] = whole.supervised, whole.tiles
        found.beginning = _common(found.beginning, encoded.beginning())
        if whole.tokens <= self.config.data.max_length:
            return None
        line["used"] = line["supervised"] = 0
        try:
            cut = self.samples.measure(ref)
        except BadRow as error:
            return refused("too_long", error)
        line["cut"], line["used"], line["supervised"] = True, cut.tokens, cut.supervised
        return None

    # --- images

    def image(self, item: ImageItem) -> ImageFinding:
        """Looks for an image, opens it where its size counts, and decodes it with `decode`."""
        try:
            if item.field == "video":
                names = self.sources.frames(item.ref, item.name)
            elif not self.decode and self.config.data.image_mode != "anyres":
                self.sources.check_image(item.ref, item.name)
                return ImageFinding()
            else:
                data = self.sources.read_image(item.ref, item.name)
        except BadRow as error:
            return ImageFinding("image_missing", printable(str(error), most=MOST_SHOWN))
        if item.field == "image":
            return self._content(data, item.name, item.field)
        if not self.decode:
            return ImageFinding()
        frames = sample_frames(names, self.config.data.video_frames, self.config.data.splice_single_frame)
        for frame in dict.fromkeys(frames):
            try:
                data = self.sources.read_image(item.ref, frame, "video")
            except BadRow as error:
                return ImageFinding("image_missing", printable(str(error), most=MOST_SHOWN))
            found = self._content(data, frame, "video")
            if found.kind:
                return ImageFinding(found.kind, found.message)
        return ImageFinding()

    def _content(self, data: bytes, name: str, field: str) -> ImageFinding:
        header, kind = None, "image_broken"
        try:
            header = image_header(data, name, self.config, field)
            if header.format in ("JPEG", "MPO") and not jpeg_is_complete(data):
                kind = "image_incomplete"
            if self.decode:
                decode_image(data, name, self.config, field, frame=field == "video")
        except BadRow as error:
            # The one kind that is told by its message: by the key that it names.
            kind = "image_too_large" if "data.max_pixels" in str(error) else kind
            found = ImageFinding(kind, printable(str(error), most=MOST_SHOWN))
        else:
            found = ImageFinding()
        if header is not None:
            found = replace(found, format=header.format, mode=header.mode, width=header.width, height=header.height)
        return replace(found, digest=hashlib.blake2b(data, digest_size=16).digest()) if self.decode else found


def _common(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    """What both begin with; None: no row has been seen."""
    if first is None or second is None:
        return second if first is None else first
    size = min(len(first), len(second))
    differ = np.flatnonzero(first[:size] != second[:size])
    return first[: differ[0] if len(differ) else size]


def _hash(text: str) -> int:
    """64 bits, never 0; 600,000 different ids have two of one hash with a probability of 10^-8."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _only_marks(raw: Any) -> bool:
    """Whether a row that is refused would be taken if it had as many marks as it names images and videos."""
    if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
        return False
    turns = raw["conversations"]
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        return False
    images = raw.get("image")
    count = len(images) if isinstance(images, list) else int(images is not None)
    marks = IMAGE_MARK * count + VIDEO_MARK * (raw.get("video") is not None)
    plain = [{**turn, "value": turn["value"].replace(IMAGE_MARK, "").replace(VIDEO_MARK, "")} for turn in turns]
    plain[:1] = [{**turn, "value": marks + turn["value"]} for turn in plain[:1]]
    try:
        parse_row({**raw, "conversations": plain})
    except BadRow:
        return False
    return True


def inspect(sources: Sources, config: Config, tokenizer: Tokenizer | None, decode: bool, workers: int) -> Findings:
    """Looks at all rows and images, in `workers` processes; the result does not depend on their number.

    Raises:
      UserError: a setting that rows are encoded by is wrong.
      WorkerError: a process has died.
    """
    inspector = Inspector(sources, config, tokenizer, decode)
    findings = Findings(config, sources, tokenizer is not None, decode)
    processes = min(workers, usable_cores())
    items, named = _inspect_rows(inspector, findings, processes)
    _inspect_images(inspector, findings, items, processes)
    _blame_rows(findings, named)
    return findings


@dataclass
class _Named:
    """Which images each row names: row -> numbers of items, flat; rows without any are not in it."""

    sources: array = field(default_factory=lambda: array("i"))
    rows: array = field(default_factory=lambda: array("q"))
    items: array = field(default_factory=lambda: array("q"))


def _inspect_rows(inspector: Inspector, findings: Findings, processes: int) -> tuple[list[ImageItem], _Named]:
    sources = inspector.sources
    jobs = [
        (source, start, min(start + ROWS, sources.rows_in(source)))
        for source in range(len(sources.configs))
        for start in range(0, sources.rows_in(source), ROWS)
    ]
    parts: list[list[np.ndarray]] = [[] for _ in sources.configs]
    numbers: dict[Any, dict[str, int]] = {}
    named = _Named()
    with tqdm(total=sum(end - start for _, start, end in jobs), unit="row", desc="rows", disable=None) as progress:
        results = in_order(Inspector.rows, inspector, jobs, min(processes, len(jobs)), "checked rows")
        for (source, start, end), found in zip(jobs, results, strict=True):
            parts[source].append(found.table)
            findings.problems += found.problems
            findings.beginning = _common(findings.beginning, found.beginning)
            for row, items in found.items:
                for item in items:
                    known = numbers.setdefault(_place(sources, item), {})
                    number = known.setdefault(item.name, len(findings.items))
                    if number == len(findings.items):
                        findings.items.append(item)
                    named.sources.append(source)
                    named.rows.append(row)
                    named.items.append(number)
            progress.update(end - start)
    findings.tables = [np.concatenate(part) if part else np.zeros(0, ROW) for part in parts]
    return findings.items, named


def _place(sources: Sources, item: ImageItem) -> Any:
    """Within what a name means one image: all sources of an images folder; in records, which bring their own, a row."""
    config = sources.configs[item.ref.source]
    return (item.ref if config.records else config.images), item.field


def _inspect_images(inspector: Inspector, findings: Findings, items: list[ImageItem], processes: int) -> None:
    opened = inspector.decode or inspector.config.data.image_mode == "anyres"
    size = IMAGES if opened else NAMES
    jobs = [(items[start : start + size],) for start in range(0, len(items), size)]
    title = "images" if opened else "image files"
    with tqdm(total=len(items), unit="image", desc=title, disable=None) as progress:
        for found in in_order(_images, inspector, jobs, min(processes, len(jobs)), "read images"):
            findings.images += found
            progress.update(len(found))


def _images(inspector: Inspector, items: Sequence[ImageItem]) -> list[ImageFinding]:
    return [inspector.image(item) for item in items]


def _blame_rows(findings: Findings, named: _Named) -> None:
    """A row is bad that names an image which cannot be used; its first one stands in the message."""
    blamed: dict[RowRef, Problem] = {}
    for source, row, number in zip(named.sources, named.rows, named.items, strict=True):
        found, ref = findings.images[number], RowRef(source, row)
        if not found.kind or ref in blamed:
            continue
        name = printable(findings.sources.row_id(ref), most=80)
        blamed[ref] = Problem(ref, name, BAD, found.kind, found.message)
        line = findings.tables[source][row : row + 1]
        line["state"], line["kind"] = BAD, _NUMBERS[found.kind]
        line["cut"] = False
    others = [problem for problem in findings.problems if problem.ref not in blamed]
    findings.problems = sorted([*others, *blamed.values()], key=lambda one: (one.ref.source, one.ref.row))


def usable(table: np.ndarray) -> np.ndarray:
    """The lines of the rows that training would take."""
    return table[table["state"] == GOOD]


def duplicates(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The places at which equal keys stand, for each key that occurs twice or more; [n] keys, 0 is none.

    Groups come by their first place, places in order.
    """
    order = np.argsort(keys, kind="stable")
    if not len(keys):
        return
    starts = np.flatnonzero(np.r_[True, np.diff(keys[order]) != 0])
    counts = np.diff(np.r_[starts, len(keys)])
    many = counts > 1
    several = [at for at in zip(starts[many], counts[many], strict=True) if keys[order[at[0]]]]
    yield from sorted((order[start : start + count] for start, count in several), key=lambda group: group[0])
