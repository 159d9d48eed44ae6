"""Text of strangers, made safe to show: what steers a terminal, or hides what it stands beside, is spelled out."""

import re

# Control characters (ESC begins the sequences that move a cursor or set a title), half surrogate pairs, separators of
# lines, and the marks that turn the direction of writing.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str, keep: str = "", most: int | None = None) -> str:
    """`text` with unsafe characters as `\\x1b` or `\\u202e`, except those in `keep`; cut to `most` characters."""
    if most is not None and len(text) > most:
        text = text[: most - 1] + "…"

    def spelled(match: re.Match[str]) -> str:
        character = match[0]
        return character if character in keep else character.encode("unicode_escape", "surrogatepass").decode()

    return _UNSAFE.sub(spelled, text)
