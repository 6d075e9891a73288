"""What names the rows of a run: sources, the rows to validate on, columns, a date. Reads no file."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraloom.config.checks import Check, is_number, is_path, mapping, refuse
from loraloom.config.names import SOURCE_KEYS
from loraloom.errors import ConfigError, nearest


def _sources(name: str, value: Any) -> Any:
    """A path or name as text; a list of them as a list of these and of ``{"path", "weight"}``."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list | tuple) and value:
        return [_weighted(name, entry) if isinstance(entry, Mapping) else _sources(name, entry) for entry in value]
    if is_path(value):
        return str(value)
    return refuse(name, "a path or a name, or a list of these", value)


def _weighted(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    for key in entry:
        if key not in SOURCE_KEYS:
            raise ConfigError(
                f"{name}: a source has {', '.join(SOURCE_KEYS)}; found {key!r}{nearest(str(key), SOURCE_KEYS)}"
            )
    weight = entry.get("weight", 1)
    if not is_number(weight) or weight <= 0:
        raise ConfigError(f"{name}: a weight must be a number above 0, found {weight!r}")
    if not is_path(entry.get("path")):
        raise ConfigError(f"{name}: a source must have a path, found {dict(entry)!r}")
    return {**entry, "path": str(entry["path"]), "weight": weight}


def _split(name: str, value: Any) -> Any:
    if isinstance(value, list | Mapping):
        return _sources(name, value)
    if isinstance(value, str | Path):
        try:
            value = float(str(value))
        except ValueError:
            return _sources(name, value)  # reading it says whether it is there
    if not is_number(value) or value <= 0:
        refuse(name, "a share below 1, a count of rows, or a file", value)
    if value >= 1 and value != int(value):
        raise ConfigError(f"{name}: a count of rows must be whole, found {value!r}")
    return value if value < 1 else int(value)


def _date(name: str, value: Any) -> str:
    try:
        return datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError:
        return refuse(name, "a day such as 2026-07-26", value)


_PATH = {"type": "string", "minLength": 1}
_SOURCE = {
    "type": "object",
    "properties": {**dict.fromkeys(SOURCE_KEYS, _PATH), "weight": {"type": "number", "exclusiveMinimum": 0}},
    "required": ["path"],
    "additionalProperties": False,
}
_SOURCES: list[Any] = [_PATH, _SOURCE, {"type": "array", "items": {"anyOf": [_PATH, _SOURCE]}, "minItems": 1}]

SOURCES = Check(_sources, {"anyOf": _SOURCES})
SPLIT = Check(_split, {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, *_SOURCES]})
DATE = Check(_date, {"type": "string", "format": "date"})
COLUMNS = mapping(
    "give names for names, such as {prompt: question}", _PATH, lambda part: isinstance(part, str) and bool(part)
)
