"""Promises of the YAML of run files: what is written is read back, and what is doubtful is an error with its line."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraloom.config.yamltext import parse, write
from loraloom.errors import ConfigError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=8)


@given(VALUES)
def test_any_value_is_written_on_one_line_and_read_back(value: object) -> None:
    text = write(value)
    assert "\n" not in text
    found = parse(f"key: {text}  # why\n", "x")[0]
    assert repr(found) == repr({"key": value})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("007", 7),
        ("no", "no"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-07-29", "2026-07-29"),
        ("~", None),
        ("", None),
        ("True", True),
        ("'2e-4'", "2e-4"),
        ("all-linear", "all-linear"),
        ("[1, 2.0, x]", [1, 2.0, "x"]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = parse(f"key: {text}", "x")[0]["key"]
    assert (found, type(found)) == (value, type(value))


def test_every_key_has_its_line() -> None:
    text = "a: 1\nb:\n  c: {d: 2,\n    e: 3}\n  f.g: [1, {h: 2}]\n"
    assert parse(text, "x")[1] == {"a": 1, "b": 2, "b.c": 3, "b.c.d": 3, "b.c.e": 4, "b.f.g": 5, "b.f.g.1.h": 5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "x:3: a is given twice, first in line 1; keep one"),
        ("b:\n  a: 1\n  a: 2\n", "x:3: b.a is given twice, first in line 2"),
        ("a: [1\n", "x:2: not YAML (while parsing a flow sequence"),
        ("a: 1\n\tb: 2\n", "x:2: not YAML"),
        ("a: 1\n---\nb: 2\n", "x:2: not YAML (expected a single document"),
        ("a: 1\nb: \x07\n", "x:2: a character that YAML does not allow"),
        ("a: &n [1]\nb: *n\n", "x:1: an alias (*name) is not read in a run file; write the value out"),
        ("a: &n [*n]\n", "x:1: an alias"),
        ("a: !!python/object/apply:os.getcwd []\n", "x:1: the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd'"),
        ("a: !mine 1\n", "x:1: the tag '!mine' does not fit '1'"),
        ("a: !!int one\n", "x:1: the tag 'tag:yaml.org,2002:int' does not fit 'one'"),
        ("[1]: 2\n", "x:1: a key must be a name, found a sequence"),
        (f"a: {'9' * 5000}\n", "x:1: a number of 5000 digits cannot be read"),
        ("[" * 5000, "x: nested too deeply to be read"),
    ],
)
def test_what_is_no_plain_value_is_an_error_with_its_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text, "x")
    assert str(error.value).startswith(said)
