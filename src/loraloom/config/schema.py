"""The JSON Schema of run files (draft 2020-12), from the list of options. Editors complete and check keys by it."""

from __future__ import annotations

from enum import Enum
from typing import Any

from loraloom.config.keys import OPTIONS
from loraloom.config.options import NEEDED, Option

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """What a run file may hold. Keys that a run needs may be missing in it: a command's own options can give them."""
    sections: dict[str, Any] = {}
    top: dict[str, Any] = {}
    for one in OPTIONS.values():
        home = sections.setdefault(one.section, {}) if one.section else top
        home[one.leaf] = _value(one)
    sections["tune"]["space"] |= _space()
    properties = {
        name: {"type": ["object", "null"], "properties": keys, "additionalProperties": False}
        for name, keys in sections.items()
    }
    return {
        "$schema": _DRAFT,
        "title": "A run file of loraloom",
        "type": "object",
        "properties": {**top, **properties},
        "additionalProperties": False,
    }


def _value(option: Option) -> dict[str, Any]:
    check = dict(option.check.schema)
    if option.optional and check:
        check = {"anyOf": [check, {"type": "null"}]}
    said = {"description": option.help} if option.help else {}
    default = option.default.value if isinstance(option.default, Enum) else option.default
    plain = isinstance(default, bool | int | float | str | list | dict)
    return said | check | ({"default": default} if default is not NEEDED and plain and option.help else {})


def _space() -> dict[str, Any]:
    ends = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    varying = {
        "anyOf": [
            {"type": "array", "minItems": 1},
            {"type": ["string", "number", "boolean", "null"]},
            {
                "type": "object",
                "properties": {"log": ends, "range": ends, "step": {"type": "number"}},
                "additionalProperties": False,
            },
        ]
    }
    patterns = ("lora.rank_pattern", "lora.alpha_pattern")  # of which one value is a mapping
    keys = {one.key: {} if one.key in patterns else varying for one in OPTIONS.values() if one.search == "varies"}
    return {"type": "object", "minProperties": 1, "properties": keys, "additionalProperties": False}
