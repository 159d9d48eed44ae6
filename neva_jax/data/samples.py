"""One sample: a row of the sources -> its tokens and the tiles of its images, or only how many there will be."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from neva_jax.config import Config, DataConfig
from neva_jax.data.encoding import Encoded, conversation_encoder, fit_length
from neva_jax.data.images import decode_image, image_size, sample_frames
from neva_jax.data.rows import VIDEO_MARK, BadRow, Row, Turn
from neva_jax.data.sources import RowRef, Sources
from neva_jax.data.tiles import ImageSpan, Picture, frames_per_video, image_span, tiles_per_image
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.derived import image_tokens


@dataclass(frozen=True)
class Sample:
    """What one row becomes: tokens, and tiles [N, S, S, 3] uint8; `ref` is the row."""

    encoded: Encoded
    tiles: np.ndarray
    ref: RowRef | None = None


class Measure(NamedTuple):
    """Room that a sample needs: positions, tiles at most, and how many positions are supervised."""

    tokens: int
    tiles: int
    supervised: int


# What an image of one slot would be: text is measured with these, which is faster than with hundreds of slots each.
_STAND_IN = ImageSpan(np.zeros(1, np.int32), 1)


class Samples:
    """Makes samples; runs in the workers."""

    def __init__(self, sources: Sources, config: Config, tokenizer: Tokenizer):
        """Raises UserError: the tokenizer lacks a token of the template, or `data.image_start` or `_end` is none."""
        self.sources, self.config = sources, config
        self.conversations = conversation_encoder(config.data, tokenizer)
        tokens = image_tokens(config.model)
        self.one_tile = ImageSpan(np.arange(tokens, dtype=np.int32), tokens)

    def make(self, ref: RowRef) -> Sample:
        """Reads a row and its images.

        Raises:
          BadRow: it cannot be used.
          DroppedRow: it is left out on purpose.
        """
        row = self._read(ref)
        if row.video is None:
            pictures = [self._picture(ref, name) for name in row.images]
        else:
            pictures = self._video(ref, row.video)
        encoded = self._encode(row, self._turns(row), [picture.span for picture in pictures])
        encoded = fit_length(encoded, self.config.data)
        size = self.config.model.vision.image_size
        none = np.zeros((0, size, size, 3), np.uint8)
        return Sample(encoded, np.concatenate([picture.tiles for picture in pictures]) if pictures else none, ref)

    def measure(self, ref: RowRef) -> Measure:
        """The room that `make` will need; images are not decoded, and not even opened where their size is no matter.

        Raises:
          BadRow, DroppedRow: as `make`, unless it is the images' fault.
        """
        return self.measured(ref)[0]

    def measured(self, ref: RowRef) -> tuple[Measure, Encoded]:
        """`measure`, and the row as if each image had one slot."""
        row, data = self._read(ref), self.config.data
        turns = self._turns(row)
        if row.video is None:
            count, tiles = len(row.images), len(row.images) * tiles_per_image(self.config)
        else:
            count = tiles = frames_per_video(data)
        if row.video is None and data.image_mode == "anyres":
            spans = [image_span(*self._size(ref, name), self.config) for name in row.images]
        else:
            spans = [self.one_tile] * count
        text = encoded = self._encode(row, turns, [_STAND_IN] * count)
        tokens = len(encoded.tokens) - 1 + sum(len(span.slots) - 1 for span in spans)
        supervised = np.count_nonzero(encoded.weights[1:])
        if tokens > data.max_length or not supervised:  # rare; what happens to it depends on where the images stand
            encoded = fit_length(self._encode(row, turns, spans), data)
            tokens, supervised = len(encoded.tokens) - 1, np.count_nonzero(encoded.weights[1:])
        return Measure(tokens, tiles, supervised), text

    # --- its parts

    def _encode(self, row: Row, turns: tuple[Turn, ...], spans: list[ImageSpan]) -> Encoded:
        return self.conversations.encode(turns, spans, row.system)

    def _picture(self, ref: RowRef, name: str) -> Picture:
        return decode_image(self.sources.read_image(ref, name), name, self.config)

    def _video(self, ref: RowRef, name: str) -> list[Picture]:
        data = self.config.data
        frames = sample_frames(self.sources.frames(ref, name), data.video_frames, data.splice_single_frame)
        decoded = {
            frame: decode_image(self.sources.read_image(ref, frame, "video"), frame, self.config, "video", frame=True)
            for frame in dict.fromkeys(frames)
        }
        return [decoded[frame] for frame in frames]

    def _size(self, ref: RowRef, name: str) -> tuple[int, int]:
        return image_size(self.sources.read_image(ref, name), name, self.config)

    # --- a row

    def _read(self, ref: RowRef) -> Row:
        return check_row(self.sources.read(ref), self.config.data)

    def _turns(self, row: Row) -> tuple[Turn, ...]:
        return row.turns if row.video is None else row.with_frames(frames_per_video(self.config.data))


def check_row(row: Row, data: DataConfig) -> Row:
    """The row itself, if the configuration takes so many images, or videos at all.

    Raises:
      BadRow: it does not.
    """
    if row.video is not None:
        if not data.video_frames:
            raise BadRow("has a field video, but data.video_frames is 0; set the number of frames to take of a video")
        return row
    if len(row.images) > data.images_per_row:
        raise BadRow(f"field image has {len(row.images)} images, but data.images_per_row is {data.images_per_row}")
    # Where there are no videos, the word is text: of HTML, say.
    if data.video_frames and (marks := row.count(VIDEO_MARK)):
        raise BadRow(f"field conversations has {marks} {VIDEO_MARK} marks in human turns, but no field video")
    return row
