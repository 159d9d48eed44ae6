"""Where each row of a JSON file begins and ends, in bytes, found in one pass that never holds more than a few MiB.

A list is cut at the commas that stand one level deep, outside of strings. NumPy finds the few bytes that matter
(quotes, backslashes, brackets, commas) in a piece of the file, and the rest is done on their positions alone:

    piece      [{"a": "x,\\"y"}, {"b": [1, 2]}]
    strings     .4-5.  .8------15.                   quotes that no backslash escapes, taken in pairs
    depth      12                1, 2    3    2  10   cumulated sum of +1 and -1 over the brackets outside of strings
    cuts       |                 |               |    the list's bracket, a comma at depth 1, the bracket back to 0

Each row is then parsed once and forgotten, so that a file whose rows cannot be told apart is refused before a run.
"""

import json
from array import array
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from neva_jax.errors import UserError

MAX_ROW_BYTES = 64 * 2**20
_PIECE = 2**20
_STRUCTURAL = np.zeros(256, bool)
_STRUCTURAL[list(b"[]{},")] = True


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


# Knows no NaN and no Infinity. Built once: json.loads with an option would build one for each row.
_DECODER = json.JSONDecoder(parse_constant=_refuse)


def parse_json(text: str) -> Any:
    """One JSON value. Raises json.JSONDecodeError; ValueError: NaN, or a number too long; RecursionError: too deep."""
    return _DECODER.decode(text)


def index_list(
    path: str, file: BinaryIO, start: int, size: int, advance: Callable[[int], Any] = lambda count: None
) -> np.ndarray:
    """The rows of a JSON list: [n, 2] int64, the first byte and the one after the last, blanks around included.

    Args:
      path: for messages.
      file: the opened file; `start` is the position of the list's bracket.
      size: bytes of the file.
      advance: is told how many bytes are done.

    Raises:
      UserError: no JSON, with the line, column and byte where it ends being any; what is wrong inside a row without a
        doubt where the row ends (bad UTF-8, NaN, too deep, too long) is left to the reader of the row.
    """
    file.seek(start + 1)
    position = start + 1  # of the piece in the file
    depth, in_string, escaped, ended = 1, False, False, False
    first = position  # of the row that is not yet whole
    pending: list[bytes] | None = []  # its bytes before this piece; None: too long to be a row
    pending_bytes = 0
    bounds = array("q")  # as a list of pairs it would take ten times the memory
    while piece := file.read(_PIECE):
        cuts, depth, in_string, escaped = _cuts(piece, depth, in_string, escaped)
        begin = 0
        for cut in cuts:
            if pending is not None and pending_bytes + cut - begin <= MAX_ROW_BYTES:
                _check_row(path, file, b"".join(pending) + piece[begin:cut], first, piece[cut : cut + 1], not bounds)
            bounds.extend((first, position + cut))
            first, begin, pending, pending_bytes = position + cut + 1, cut + 1, [], 0
        if depth == 0:
            _check_end(path, piece[begin:], file, position + begin, piece[begin - 1 : begin])
            ended = True
            break
        pending_bytes += len(piece) - begin
        if pending is not None:
            pending = [*pending, piece[begin:]] if pending_bytes <= MAX_ROW_BYTES else None
        position += len(piece)
        advance(len(piece))
    if not ended:
        if pending is not None:
            _check_row(path, file, b"".join(pending), first, b"", False)
        raise no_json(path, file, size, "the list does not end", truncated=True)
    if len(bounds) == 2 and bounds[1] - bounds[0] <= MAX_ROW_BYTES and not _read(file, *bounds).strip():
        return np.zeros((0, 2), np.int64)
    return np.array(bounds, np.int64).reshape(-1, 2)


def _cuts(piece: bytes, depth: int, in_string: bool, escaped: bool) -> tuple[list[int], int, bool, bool]:
    """Where a piece is cut, up to the list's end, and the state after it (depth 0: the list has ended)."""
    data = np.frombuffer(piece, np.uint8)
    # [ \ ] and { | } differ in one bit
    found = ((data | 0x20) - np.uint8(ord("{")) <= 2) | (data == ord('"')) | (data == ord(","))
    places = np.flatnonzero(found)
    marks = data[places]
    is_quote = marks == ord('"')
    slashes = places[marks == ord("\\")]
    after = np.zeros(0, np.int64)  # what an odd run of backslashes escapes
    if escaped:
        if len(slashes) and slashes[0] == 0:
            slashes = slashes[1:]
        after = np.zeros(1, np.int64)
    escaped = False
    if len(slashes):
        breaks = np.flatnonzero(np.diff(slashes) != 1)
        starts, ends = slashes[np.r_[0, breaks + 1]], slashes[np.r_[breaks, len(slashes) - 1]]
        odd = ends[(ends - starts) % 2 == 0] + 1
        after = np.concatenate([after, odd])
        escaped = bool(len(odd)) and int(odd[-1]) == len(piece)
    if len(after) and len(places):
        at = np.minimum(np.searchsorted(places, after), len(places) - 1)
        is_quote[at[places[at] == after]] = False  # an escaped bracket stands in a string anyway
    inside = np.bitwise_xor.accumulate(is_quote.view(np.uint8)) ^ np.uint8(in_string)
    in_string = bool(inside[-1]) if len(inside) else in_string
    kept = np.flatnonzero((inside == 0) & _STRUCTURAL[marks])
    places, marks = places[kept], marks[kept]
    comma, closes = marks == ord(","), (marks & 0xDF) == ord("]")  # ] and }
    depths = depth + np.cumsum(np.where(comma, 0, np.where(closes, -1, 1)))
    cut = ((depths == 1) & comma) | (depths == 0)
    closed = np.flatnonzero(depths == 0)
    if len(closed):
        return places[: closed[0] + 1][cut[: closed[0] + 1]].tolist(), 0, False, False
    return places[cut].tolist(), int(depths[-1]) if len(depths) else depth, in_string, escaped


def _check_row(path: str, file: BinaryIO, row: bytes, first: int, end: bytes, may_be_empty: bool) -> None:
    text = row.decode("utf-8", "replace")
    try:
        if not (may_be_empty and end == b"]" and not text.strip()):
            parse_json(text)
    except json.JSONDecodeError as error:
        raise no_json(path, file, first + byte_of(row, error.pos), error.msg) from None
    except (ValueError, RecursionError):
        pass  # its bounds are sure; whoever reads the row is told


def byte_of(row: bytes, character: int) -> int:
    """The byte of a character, where bytes that are no UTF-8 count as `bytes.decode` replaces them."""
    low, high = 0, len(row)
    while low < high:
        middle = (low + high) // 2
        if len(row[:middle].decode("utf-8", "replace")) < character:
            low = middle + 1
        else:
            high = middle
    return low


def _check_end(path: str, rest: bytes, file: BinaryIO, position: int, bracket: bytes) -> None:
    if bracket != b"]":
        raise no_json(path, file, position - 1, "the list ends with a wrong bracket")
    while rest:
        if text := rest.lstrip(b" \t\r\n"):
            raise no_json(path, file, position + len(rest) - len(text), "Extra data after the list")
        position += len(rest)
        rest = file.read(_PIECE)


def index_lines(
    file: BinaryIO, start: int, size: int, advance: Callable[[int], Any] = lambda count: None
) -> np.ndarray:
    """The lines of a file from byte `start` on that hold more than blanks: [n, 2] int64, as `index_list`."""
    file.seek(start)
    position, first, parts = start, start, []
    head = b""  # the first bytes of the line that is not yet whole, without its blanks
    while piece := file.read(_PIECE):
        ends = np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) + position
        bounds = np.stack([np.r_[first, ends[:-1] + 1], ends], axis=1) if len(ends) else np.zeros((0, 2), np.int64)
        keep = np.ones(len(bounds), bool)
        local = bounds - position
        # Only a line that begins with a blank, or is empty, can be blank.
        data = np.frombuffer(piece, np.uint8)
        for i in np.flatnonzero(data[np.clip(local[:, 0], 0, len(data) - 1)] <= ord(" ")).tolist():
            keep[i] = bool(piece[max(local[i, 0], 0) : local[i, 1]].strip())
        if len(bounds):
            keep[0] = bool(head) or bool(piece[max(local[0, 0], 0) : local[0, 1]].strip())
            head, first = b"", int(ends[-1]) + 1
        head = head or piece[first - position if first > position else 0 :].strip()[:1]
        parts.append(bounds[keep])
        position += len(piece)
        advance(len(piece))
    if head:
        parts.append(np.array([[first, size]], np.int64))
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)


def _read(file: BinaryIO, first: int, end: int) -> bytes:
    file.seek(first)
    return file.read(end - first)


def no_json(path: str, file: BinaryIO, byte: int, reason: str, truncated: bool = False) -> UserError:
    """The error of a file that is no JSON from `byte` (from 0) on, with its line and column (from 1, in characters)."""
    line, column = _line_and_column(file, byte)
    advice = "; the file is cut off" if truncated else ""
    return UserError(f"{path}: line {line} column {column} (byte {byte}) is no JSON ({reason}){advice}")


def _line_and_column(file: BinaryIO, byte: int) -> tuple[int, int]:
    line = column = 1
    file.seek(0)
    while piece := file.read(min(_PIECE, byte)):
        byte -= len(piece)
        if newlines := piece.count(b"\n"):
            line, column = line + newlines, 1
        last = np.frombuffer(piece, np.uint8)[piece.rfind(b"\n") + 1 :]
        column += int(np.count_nonzero(last & 0xC0 != 0x80))  # bytes that go on with a character do not count
    return line, column
