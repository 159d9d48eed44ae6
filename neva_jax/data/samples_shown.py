"""A sample as the model sees it: its tokens read back as text, with what is learned of them marked.

    <s> A chat … USER: [image 0: 576 tokens]
    What is it? ASSISTANT:⟦ a cat</s>⟧

Learned tokens are green on a terminal, and stand between ⟦ and ⟧ elsewhere. The text is made from the tokens, not from
the row: what is shown is what was encoded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from neva_jax.config import Config
from neva_jax.data.encoding import Encoded
from neva_jax.data.rows import BadRow, DroppedRow
from neva_jax.data.samples import Sample, Samples
from neva_jax.data.sources import RowRef, Sources
from neva_jax.data.tiles import TEXT
from neva_jax.data.tokenizer import Tokenizer
from neva_jax.printable import printable

TEXT_RUN, SPECIAL, IMAGE = "text", "special", "image"
_RESET, _GREEN, _CYAN, _YELLOW, _BOLD = "\x1b[0m", "\x1b[32m", "\x1b[36m", "\x1b[33m", "\x1b[1m"
_OPEN, _CLOSE = "⟦", "⟧"  # rare brackets, so that they hardly ever have to be told from the text's own
_COLORS = {TEXT_RUN: "", SPECIAL: _CYAN, IMAGE: _YELLOW}


@dataclass(frozen=True)
class Run:
    """Tokens `first` … `end - 1` of one kind, all learned or none. `text` is what they say, as it is."""

    kind: str
    learned: bool
    first: int
    end: int
    text: str


def runs(encoded: Encoded, tokenizer: Tokenizer) -> list[Run]:
    """The tokens of a sample as runs, in order, each token in one of them; a special token is a run of its own."""
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    learned = encoded.weights > 0
    learned[:1] = False  # nothing predicts the first token
    images = np.full(len(encoded.tokens), -1)
    for number, (first, end) in enumerate(encoded.spans):
        inside = np.flatnonzero(encoded.slots[first:end] != TEXT)
        images[first + inside] = number
    found, first = [], 0
    while first < len(encoded.tokens):
        token, image, end = int(encoded.tokens[first]), images[first], first + 1
        if image >= 0:
            end = _same(images, first)
            text = f"[image {image}: {end - first} tokens]"
            found.append(Run(IMAGE, bool(learned[first]), first, end, text))
        elif token in names:
            found.append(Run(SPECIAL, bool(learned[first]), first, end, names[token]))
        else:
            while (
                end < len(encoded.tokens)
                and images[end] < 0
                and int(encoded.tokens[end]) not in names
                and learned[end] == learned[first]
            ):
                end += 1
            text = _decode(encoded.tokens[first:end].tolist(), tokenizer)
            found.append(Run(TEXT_RUN, bool(learned[first]), first, end, text))
        first = end
    return found


def _same(values: np.ndarray, first: int) -> int:
    """The end of the run of equal values that begins at `first`."""
    other = np.flatnonzero(values[first:] != values[first])
    return len(values) if not len(other) else first + int(other[0])


def _decode(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of ids with their leading space, which a tokenizer drops where a text begins: so it is given a begin."""
    begin = tokenizer.encode("x", continues=False)
    return tokenizer.decode(begin + ids).removeprefix(tokenizer.decode(begin))


def shown(sample: Sample, tokenizer: Tokenizer, color: bool) -> str:
    """The text of a sample and a line of totals; what it says can neither steer a terminal nor feign a mark."""
    parts, open_mark = [], False
    encoded = sample.encoded
    for run in runs(encoded, tokenizer):
        text = run.text if run.kind == IMAGE else printable(run.text, keep="\n\t")
        if color:
            style = (_BOLD + _GREEN if run.learned else "") + ("" if run.learned else _COLORS[run.kind])
            # Each line by itself: a pager shows colors that begin on another line wrongly.
            lines = [f"{style}{line}{_RESET}" if style and line else line for line in text.split("\n")]
            parts.append("\n".join(lines))
            continue
        if run.learned != open_mark:
            parts.append(_OPEN if run.learned else _CLOSE)
            open_mark = run.learned
        parts.append(text.replace(_OPEN, "\\u27e6").replace(_CLOSE, "\\u27e7"))
    parts.append(_CLOSE if open_mark else "")
    return "".join(parts) + f"\n{_totals(sample)}"


def _totals(sample: Sample) -> str:
    encoded = sample.encoded
    weights = encoded.weights[1:]
    images = int((encoded.slots != TEXT).sum())
    text = (
        f"{len(encoded.tokens)} tokens: {images} of images (images: {len(encoded.spans)}, tiles: {len(sample.tiles)}), "
        f"{np.count_nonzero(weights)} supervised"
    )
    different = sorted({round(float(weight), 6) for weight in weights if weight} - {1.0})
    return text + (f", with loss weights {', '.join(f'{weight:g}' for weight in different[:5])}" if different else "")


def show(
    sources: Sources,
    config: Config,
    tokenizer: Tokenizer,
    refs: Sequence[RowRef],
    color: bool,
    say: Callable[[str], None],
) -> None:
    """Shows rows one after another; of one that cannot be used, why."""
    samples = Samples(sources, config, tokenizer)
    for ref in refs:
        file = sources.configs[ref.source]
        name = printable(sources.row_id(ref), most=80)
        title = f"--- {printable(file.records or file.json)}: row {ref.row}" + (f" (id '{name}')" if name else "")
        say(f"{_BOLD}{title}{_RESET}" if color else title)
        try:
            say(shown(samples.make(ref), tokenizer, color))
        except BadRow as error:
            state = "dropped" if isinstance(error, DroppedRow) else "bad"
            say(f"{state}: {printable(str(error), most=500)}")
        say("")


def spread_refs(sources: Sources, count: int) -> Iterator[RowRef]:
    """`count` rows, evenly over all files; fewer if there are fewer."""
    sizes = [sources.rows_in(source) for source in range(len(sources.configs))]
    total = sum(sizes)
    count = min(count, total)
    for i in range(count):
        place, source = i * total // count, 0
        while place >= sizes[source]:
            place, source = place - sizes[source], source + 1
        yield RowRef(source, place)
