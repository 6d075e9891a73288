"""What the fields of a ``LoraConfig`` may hold: ranks, scales, names of modules, regular expressions.

Values may come from a file that somebody else wrote, so their sizes have limits. Whether a pattern matches a module is
for ``lora.targets`` to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Integral
from typing import Any

from loraloom.config.checks import Check, is_number, number, read_json, refuse, whole
from loraloom.errors import ConfigError, short

#: Beyond this, scale times an update leaves float32 for every weight that means anything.
_MOST_ALPHA = 1e12
_MOST_INTEGER = 2**31 - 1
#: Characters of the longest name of a module, and of the longest regular expression: one that lists every module of a
#: large model has some 100,000.
_LONGEST_NAME = 1000
_LONGEST_PATTERN = 400_000
#: Names in the longest list.
_MOST_NAMES = 100_000
_NAMES = {"type": "array", "items": {"type": "string", "minLength": 1}}


def split_names(name: str, word: str) -> list[str] | str:
    """Names with commas between are a list; what holds other signs is an expression, and "all-linear" is itself.

    Raises:
        ConfigError: there is no name in it. Begins with ``name``.
    """
    if word.lower() == "all-linear" or not re.fullmatch(r"[\w.,\- ]+", word):
        return word
    return _read_names(name, word)


def _read_names(name: str, word: str) -> list[str]:
    names = [part.strip() for part in word.split(",") if part.strip()]
    if not names:
        raise ConfigError(f"{name}: holds no name, found {word!r}; give names with commas between, or leave it out")
    return names


def _scale(name: str, value: Any) -> float:
    """A ``lora_alpha``."""
    if not is_number(value):
        refuse(name, "a finite number", value)
    if value == 0:
        raise ConfigError(f"{name}: 0 would switch the adapter off; give a number that is not 0")
    if not 1 / _MOST_ALPHA <= abs(value) <= _MOST_ALPHA:
        raise ConfigError(f"{name}: {short(value)} times an update is no number in float32; give one near r")
    return int(value) if isinstance(value, Integral) else float(value)


def _names(name: str, value: Any) -> list[str]:
    """A copy of a list of names, duplicates removed, order kept."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        refuse(name, "a list of module names", value, f"; write [{short(value)}] for one name")
    for item in value:
        if not isinstance(item, str) or not item:
            raise ConfigError(f"{name}: every entry must be a module's name, found {short(item)}")
        if len(item) > _LONGEST_NAME:
            raise ConfigError(f"{name}: an entry of {len(item):,} characters, {short(item)}, is no module's name")
    names = sorted(value) if isinstance(value, set | frozenset) else list(value)
    if len(names) > _MOST_NAMES:
        raise ConfigError(f"{name}: {len(names):,} names, more than the {_MOST_NAMES:,} that are read")
    return list(dict.fromkeys(names))


def _names_or_pattern(name: str, value: Any) -> list[str] | str:
    if not isinstance(value, str):
        return _names(name, value)
    if not value:
        raise ConfigError(f"{name}: an empty string matches nothing; give names, a pattern, or leave it out")
    _regular_expression(name, value)
    return value


def _regular_expression(name: str, pattern: str) -> None:
    if len(pattern) > _LONGEST_PATTERN:
        raise ConfigError(
            f"{name}: a regular expression of {len(pattern):,} characters, more than the {_LONGEST_PATTERN:,} "
            "that are read"
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{name}: {short(pattern)} is not a regular expression ({error})") from None


def _by_pattern(name: str, value: Any, test: Callable[[str, Any], Any]) -> dict[str, Any]:
    """A mapping from names or patterns to what passes ``test``."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: must map module names to numbers, found {short(value)}")
    for key in value:
        if not isinstance(key, str) or not key:
            raise ConfigError(f"{name}: every key must be a module's name or a pattern, found {short(key)}")
        _regular_expression(name, key)
        _regular_expression(name, rf"(.*\.)?({key})$")  # as it is matched: an (?i) at its start would stand inside
    return {key: test(f"{name}[{short(key)}]", entry) for key, entry in value.items()}


def _layers(name: str, value: Any) -> list[int] | int:
    if isinstance(value, str) or not isinstance(value, Iterable):
        return int(_INDEX.test(name, value))
    found = [int(_INDEX.test(name, index)) for index in value]
    if not found:
        raise ConfigError(f"{name}: the list is empty, so no layer would be adapted")
    return found


def _read_layers(name: str, word: str) -> list[int]:
    try:
        return [int(index) for index in word.split(",")]
    except ValueError:
        raise ConfigError(f"{name}: must be whole numbers with commas, found {word!r}") from None


def _layer_lists(name: str, value: Any) -> list[str] | str:
    found = value if isinstance(value, str) else _names(name, value)
    for pattern in [found] if isinstance(found, str) else found:
        _regular_expression(name, pattern)
    return found


def _numbers(check: Check) -> Check:
    """Module names or patterns, each with a number; JSON on the command line."""
    schema = {"type": ["object", "null"], "additionalProperties": dict(check.schema)}
    return Check(partial(_by_pattern, test=check.test), schema, read=partial(read_json, example='{"q_proj": 16}'))


_INDEX = whole(0, _MOST_INTEGER)

RANK = whole(1, _MOST_INTEGER)
ALPHA = Check(_scale, {"type": "number", "not": {"const": 0}}, float)
DROPOUT = number(0, 1, below=True)
MODULES = Check(_names, _NAMES, read=_read_names)
MODULES_OR_PATTERN = Check(_names_or_pattern, {"anyOf": [_NAMES, {"type": "string", "minLength": 1}]}, read=split_names)
RANKS, ALPHAS = _numbers(RANK), _numbers(ALPHA)
LAYERS = Check(
    _layers,
    {"anyOf": [_INDEX.schema, {"type": "array", "items": _INDEX.schema, "minItems": 1}]},
    read=_read_layers,
)
LAYER_LISTS = Check(_layer_lists, {"anyOf": [{"type": "string"}, _NAMES]}, read=_read_names)
