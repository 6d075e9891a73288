"""What can become of a file: its bytes, or the JSON in it, by a seed."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

DEEP = "[" * 100_000 + "]" * 100_000
#: Takes the place of a value in JSON text.
VALUES = ["null", "true", '"x"', "[]", "{}", "-1", "1e400", "NaN", "0.5", "9" * 5000, '"' + "y" * 70_000 + '"', DEEP]
_HOLE = "a value goes here"


def of_bytes(data: bytes, draw: random.Random) -> bytes:
    place, kind = draw.randrange(len(data)), draw.randrange(6)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes(min(64, len(data) - place)) + data[place + 64 :]
    if kind == 2:
        return data[:place] + data[place : place + 50] + data[place:]
    flipped = bytearray(data)
    flipped[place] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def of_json(data: bytes, draw: random.Random) -> bytes:
    """One place of it has another value, is gone, is there twice, or has changed places with another."""
    whole = copy.deepcopy(json.loads(data))
    places = list(_places(whole))
    holder, key = draw.choice(places)
    kind = draw.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other, there = draw.choice(places)
        holder[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(holder[key])
    elif kind == 2 and isinstance(holder, dict):
        text = json.dumps({_HOLE: 0, **holder})
        return json.dumps(whole).replace(json.dumps(holder), text.replace(_HOLE, key, 1), 1).encode()
    else:
        holder[key] = _HOLE
        return json.dumps(whole).replace(json.dumps(_HOLE), draw.choice(VALUES), 1).encode()
    return json.dumps(whole).encode()


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def mutated(name: str, data: bytes, draw: random.Random) -> bytes:
    return of_json(data, draw) if name.endswith(".json") and draw.random() < 0.6 else of_bytes(data, draw)
