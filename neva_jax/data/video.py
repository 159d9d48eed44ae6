"""Frames of a video file, through PyAV (FFmpeg): an optional dependency, `pip install neva_jax[video]`."""

import io
import threading

from PIL import Image

from neva_jax.data.rows import BadRow
from neva_jax.errors import UserError

MAX_FRAME_PIXELS = 40_000_000


class Video:
    """The frames of one video file, in the order of their display.

    Frame i is the i-th that the decoder gives, so a later frame costs decoding those before it; going on from the last
    one asked for costs only those between. That is slower than jumping to key frames, but exact in any file.
    """

    def __init__(self, name: str, content: bytes):
        """Counts the frames without decoding them.

        Raises:
          BadRow: no video, or none that can be read.
          UserError: PyAV is not installed.
        """
        try:
            import av
        except ImportError:
            raise UserError(f"{name} is a video file, which needs PyAV: pip install av") from None
        self.name, self.content, self.av = name, content, av
        self.lock = threading.Lock()
        self.next = 0
        try:
            with self._open() as container:
                stream = container.streams.video[0]
                size = stream.codec_context.width * stream.codec_context.height
                if size > MAX_FRAME_PIXELS:
                    raise BadRow(f"field video: {name} has frames of {size:,} pixels, more than {MAX_FRAME_PIXELS:,}")
                self.count = sum(1 for packet in container.demux(stream) if packet.size)
        except BadRow:
            raise
        except Exception as error:  # FFmpeg's errors have no common class, and damaged files raise any of them
            raise BadRow(f"field video: {name} is no video that can be read ({error})") from None
        if not self.count:
            raise BadRow(f"field video: {name} holds no frames")

    def _open(self):
        return self.av.open(io.BytesIO(self.content), metadata_errors="ignore")

    def frame(self, number: int) -> bytes:
        """Frame `number` as a BMP file: its very pixels, quick to write and to read. Raises BadRow: it is broken."""
        with self.lock:
            try:
                if self.next == 0 or number < self.next:
                    self.container = self._open()
                    self.decoded, self.next = self.container.decode(video=0), 0
                while True:
                    frame = next(self.decoded)
                    self.next += 1
                    if self.next > number:
                        break
                pixels = frame.to_ndarray(format="rgb24")
            except StopIteration:
                self.next = 0
                raise BadRow(f"field video: {self.name} ends before frame {number} of {self.count}") from None
            except Exception as error:
                self.next = 0
                raise BadRow(f"field video: {self.name} is broken at frame {number} ({error})") from None
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "BMP")
        return out.getvalue()
