"""Labels of classification and regression: one class, several classes, or a number.

The first rows decide for all. This file does not know which columns make a shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from loraloom.data.rows import Row, shown
from loraloom.data.shape.fields import ABSENT, JSON_NAMES, Fields, Labels, from_json, lookup, name_fault

#: The hint for a class that is a number.
REGRESSION = "; where labels are numbers to be predicted, set problem_type: regression"

SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"

#: A number with a point or an exponent, and any number, as text in CSV; ``1_000``, which Python accepts, is none.
FRACTION = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?")
NUMERIC = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)


def labels_of(rows: Sequence[Row], column: str, problem: str | None = None) -> Labels:
    """The kind of the labels of these rows: several classes each, numbers, or one class each; ``problem`` decides."""
    labels = [label for label in (lookup(row, column) for row in rows) if label is not ABSENT]
    if problem == SEVERAL or (problem is None and any(_as_list(label) is not None for label in labels)):
        return Labels(SEVERAL, multi_hot=_multi_hot(labels))
    numbers = [as_number(label) for label in labels if label is not None]
    numeric = all(number is not None for number in numbers)
    if problem is None and numeric and any(map(_has_fraction, labels)):
        return Labels(NUMBER)
    return Labels(problem or SINGLE, whole=problem is None and numeric and bool(numbers))


def _as_list(label: object) -> list[Any] | None:
    """A list, also as JSON in a string; None for anything else."""
    if isinstance(label, str) and label.startswith("["):
        label = from_json(label)
    return label if isinstance(label, list) else None


def _multi_hot(labels: Sequence[object]) -> int:
    """The common length of these lists if they contain only 0 and 1 (or false and true); otherwise 0."""
    lists = [_as_list(label) for label in labels]
    size = len(lists[0]) if lists and lists[0] is not None else 0
    # A list of one item may be the name of the one class that applies.
    alike = size > 1 and all(one is not None and len(one) == size and all(map(_is_bit, one)) for one in lists)
    return size if alike else 0


def _is_bit(value: object) -> bool:
    return isinstance(value, int | float) and value in (0, 1)  # also False and True


def _has_fraction(label: object) -> bool:
    if isinstance(label, str) and not FRACTION.fullmatch(label.strip()):
        return False
    number = as_number(label)
    return number is not None and math.isfinite(number) and not number.is_integer()


def as_number(label: object) -> float | None:
    """A number, also as text; None for anything else."""
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    if isinstance(label, str) and not NUMERIC.fullmatch(label.strip()):
        return None
    try:
        return float(label)
    except (ValueError, OverflowError):
        return None


def label(fields: Fields) -> str | int | float | list[str | int]:
    """The label of one row, by the kind of the labels."""
    labels = fields.labels
    if labels.multi_hot:
        return _bits(fields, labels.multi_hot)
    if labels.problem == SEVERAL:
        classes = fields.items("label")
        for item in classes:
            if name_fault(item):
                raise fields.wrong("label", f"must hold strings or whole numbers, found {shown(item)}")
            if classes.count(item) > 1:
                raise fields.wrong("label", f"names {item!r} twice")
        return list(classes)
    value = fields.get("label")
    if labels.problem == NUMBER:
        number = as_number(value)
        if number is None or not math.isfinite(number):
            raise fields.wrong("label", f"must be a number that is finite (regression), found {shown(value)}")
        return number
    if isinstance(value, bool):
        return JSON_NAMES[value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if labels.whole and isinstance(value, str):
        value = _whole(fields, value)
    if fault := name_fault(value):
        hint = REGRESSION if isinstance(value, float) and math.isfinite(value) else ""
        if isinstance(value, list):
            hint = f"; where a text has several labels, set problem_type: {SEVERAL}"
        raise fields.wrong("label", f"{fault}{hint}")
    return value  # type: ignore[no-any-return]


def _bits(fields: Fields, size: int) -> list[str | int]:
    """The positions of the 1s: the numbers of the classes that apply."""
    bits = fields.items("label")
    if len(bits) != size or not all(map(_is_bit, bits)):
        raise fields.wrong(
            "label", f"must be multi-hot, {size} times 0 or 1 as in the rows before, found {shown(bits)}"
        )
    return [place for place, bit in enumerate(bits) if bit]


def _whole(fields: Fields, value: str) -> str | int:
    """A label as text, if the first labels are whole numbers: ``1.0`` is 1, a fraction is no class, as in JSON.

    Text that is no number is a class.
    """
    number = as_number(value)
    if number is None:
        return value
    if not number.is_integer():  # nor are NaN and infinity
        hint = REGRESSION if math.isfinite(number) else ""
        raise fields.wrong("label", f"must be a whole number as in the rows before, found {value.strip()}{hint}")
    return int(number) if FRACTION.fullmatch(value.strip()) else value
