"""Promises of messages: they say what was found, and command no terminal."""

from __future__ import annotations

import pickle

import pytest

from loraloom.errors import DataError, nearest, some, visible


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("bell\x07 back\x08 null\0", r"bell\x07 back\x08 null\x00"),
        ("over\rwritten", r"over\rwritten"),
        ("\x9b2J \x7f", r"\x9b2J \x7f"),
        ("\u202eabc\u202c \u2066x\u2069 \u200e \u061c", r"\u202eabc\u202c \u2066x\u2069 \u200e \u061c"),
        ("half \ud83d", r"half \ud83d"),
        ("line\u2028line", r"line\u2028line"),
        ("a\tb\nc", "a\tb\nc"),
        ("héllo 猫 👩‍👩‍👧 שלום", "héllo 猫 👩‍👩‍👧 שלום"),
        ("\\x1b", "\\x1b"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out_and_nothing_else(text: str, seen: str) -> None:
    assert visible(text) == seen == visible(seen)


def test_an_error_shows_what_it_names_and_still_travels() -> None:
    error = DataError("ev\x1bil.jsonl, line 3: no column 'x'" + nearest("x", ["xy\x07"]))
    assert str(error).startswith(r"ev\x1bil.jsonl, line 3")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_many_names_are_shown_in_part() -> None:
    assert some(["a", "b"], 5) == "a, b"
    assert some(list("abcdefg"), 5) == "a, b, c, d, e and 2 more"
    assert some(["a", "b"]) == "a and 1 more"
