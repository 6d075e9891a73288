"""What the value of an option may be: one ``Check`` for each kind of value, for adapters, runs and searches alike.

Knows no options: a check is called with the name of one, which opens its error.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn

from loraloom.errors import ConfigError, nearest, short
from loraloom.files import durations, sizes


def as_it_is(name: str, value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Check:
    """A kind of value. ``test`` and ``read`` raise ``ConfigError``, which begins with the name that they are given."""

    #: (name, value) → the value as it is kept.
    test: Callable[[str, Any], Any]
    #: What a JSON Schema says of the value in a run file.
    schema: Mapping[str, Any]
    #: The type of a word on the command line, and (name, word) → the value that it stands for.
    kind: type = str
    read: Callable[[str, Any], Any] = as_it_is
    #: The words to choose from, if they are fixed.
    choices: tuple[str, ...] = ()


def refuse(name: str, wanted: str, value: Any, hint: str = "") -> NoReturn:
    raise ConfigError(f"{name}: must be {wanted}, found {short(value)}{hint}") from None


def is_number(value: Any) -> bool:
    """True for a finite number of any type that is one, numpy's among them."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def whole(low: int, high: int | None = None) -> Check:
    """A whole number from ``low`` to ``high``, of any type that is one."""

    def test(name: str, value: Any) -> int:
        found = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
        if found is None or found < low:
            refuse(name, f"a whole number of at least {low}", value)
        if high is not None and found > high:
            refuse(name, f"a whole number of at most {high}", value)
        return found

    return Check(test, {"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high}), int)


def number(
    low: float = 0, high: float | None = None, *, above: bool = False, below: bool = False, what: str = "a number"
) -> Check:
    """A finite number from ``low`` (with ``above``: beyond it) to ``high`` (with ``below``: short of it)."""
    wanted = f"{what} {'above' if above else 'of at least'} {low}"
    schema: dict[str, Any] = {"type": "number", "exclusiveMinimum" if above else "minimum": low}
    if high is not None:
        wanted += f" and {'below' if below else 'at most'} {high}"
        schema["exclusiveMaximum" if below else "maximum"] = high

    def test(name: str, value: Any) -> Any:
        if not is_number(value) or value < low or (above and value == low):
            refuse(name, wanted, value)
        if high is not None and (value > high or (below and value == high)):
            refuse(name, wanted, value)
        return int(value) if isinstance(value, Integral) else float(value)

    return Check(test, schema, float)


def choice(*values: Any) -> Check:
    """One of ``values``, which are words, or true and false."""
    words = {str(value).lower() if isinstance(value, bool) else value: value for value in values}

    def test(name: str, value: Any) -> Any:
        if not any(value is one or (isinstance(one, str) and value == one) for one in values):
            refuse(name, f"one of {', '.join(words)}", value, nearest(str(value)[:99], words))
        return value

    def read(name: str, word: str) -> Any:
        return words.get(word.lower(), word)

    return Check(test, {"enum": [*values]}, read=read, choices=tuple(words))


def text(wanted: str = "text", advice: str = "; leave it out for the default") -> Check:
    """A string that is not blank."""

    def test(name: str, value: Any) -> str:
        return value if isinstance(value, str) and value.strip() else refuse(name, wanted, value, advice)

    return Check(test, {"type": "string", "pattern": r"\S"})


def is_path(value: Any) -> bool:
    return isinstance(value, str | Path) and bool(str(value)) and "\0" not in str(value)


def path() -> Check:
    """A path, or a name of the hub, kept as text."""

    def test(name: str, value: Any) -> str:
        return str(value) if is_path(value) else refuse(name, "a path or a name", value)

    return Check(test, {"type": "string", "minLength": 1})


def kind_of(kind: type, wanted: str, schema: Mapping[str, Any]) -> Check:
    """A value of a type; what is kept is a copy."""

    def test(name: str, value: Any) -> Any:
        return copy.deepcopy(value) if isinstance(value, kind) else refuse(name, wanted, value)

    return Check(test, schema, kind)


def flag() -> Check:
    """True or false."""
    return kind_of(bool, "true or false", {"type": "boolean"})


def names(none: bool = False) -> Check:
    """A list of names, or a string of them with commas between; with ``none``, the name "none" is the empty list."""

    def test(name: str, value: Any) -> list[str]:
        found = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        good = isinstance(found, list | tuple) and all(isinstance(part, str) and part for part in found)
        if not good or (isinstance(value, str) and not found):
            refuse(name, "a list of names", value)
        return [] if none and [*found] == ["none"] else [*found]

    item = {"type": "string", "minLength": 1}
    return Check(test, {"anyOf": [{"type": "array", "items": item}, item]})


def mapping(must: str, values: Mapping[str, Any], test_value: Callable[[Any], bool] = lambda value: True) -> Check:
    """Keys, each with a value; JSON on the command line. ``must`` says so, ``values`` is the schema of a value."""

    def test(name: str, value: Any) -> dict[str, Any]:
        good = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        if not good or not all(test_value(part) for part in value.values()):
            raise ConfigError(f"{name}: must {must}, found {short(value)}")
        return dict(value)

    return Check(test, {"type": "object", "additionalProperties": dict(values)}, read=read_json)


def read_json(name: str, word: str, example: str = '{"name": "value"}') -> dict[str, Any]:
    """A JSON object from the command line."""
    try:
        found = json.loads(word)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: not JSON ({error.msg}); write it as '{example}', found {word!r}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: must be a JSON object, found {word!r}")
    return found


def size() -> Check:
    """Bytes as a whole number, or as text with a unit: ``"8GiB"``, ``"500 MB"``."""

    def test(name: str, value: Any) -> int:
        found = sizes.read(str(value))
        if isinstance(value, bool) or found is None:
            refuse(name, "bytes or a size such as 8GiB or 500MB", value)
        if found < 1:
            raise ConfigError(f"{name}: must be above 0, found {value!r}")
        return found

    return Check(test, {"type": ["integer", "string"], "minimum": 1})


def duration() -> Check:
    """Seconds, or text with units: ``"2h"``, ``"90m"``, ``"1h30m"``."""

    def test(name: str, value: Any) -> float:
        found = durations.read(str(value)) if not isinstance(value, bool) else None
        if found is None:
            refuse(name, "a time such as 2h, 90m or 30s", value)
        if not found > 0:
            raise ConfigError(f"{name}: must be above 0, found {value!r}")
        return found

    return Check(test, {"type": ["number", "string"], "exclusiveMinimum": 0})
