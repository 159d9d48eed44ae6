"""Text that is safe to print."""

import unicodedata

import pytest

from neva_jax.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Grüße, 象, 🙂👩‍🚀, a\\b", "plain, Grüße, 象, 🙂👩‍🚀, a\\b"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\nb\tc\rd\x00", "a\\nb\\tc\\rd\\x00"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("half \ud83d", "half \\ud83d"),
        ("line\u2028end", "line\\u2028end"),
    ],
)
def test_what_steers_a_terminal_is_spelled_out(text, shown):
    assert printable(text) == shown


def test_some_may_be_kept_and_long_text_is_cut():
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert printable("x" * 10, most=10) == "x" * 10
    assert printable("x" * 11, most=10) == "x" * 9 + "…"


def test_no_control_character_of_unicode_is_left():
    every = "".join(map(chr, range(0x110000)))
    left = {character for character in printable(every) if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")}
    assert left == set()
    assert not {"\u202a", "\u202e", "\u2066", "\u2069", "\u200f"} & set(printable(every))
