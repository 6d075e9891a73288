"""Every shape of data by task: the columns that it needs, and how a row of it becomes a checked record.

This file knows what each column must hold. Which shape a file has is found out by ``shapes``; how conversations are
read is known to ``conversations``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loraloom.config.lora import TaskType
from loraloom.data.records import Asked, Labelled, Record, Tagged, Text, Translated
from loraloom.data.rows import Row, shown
from loraloom.data.shape.conversations import read_alpaca, read_messages, read_prompt_completion, read_sharegpt
from loraloom.data.shape.fields import ABSENT, Fields, is_name, lookup, text_fault

#: True and false as JSON has them.
JSON_NAMES = ("false", "true")
#: What to do where a class turns out to be a number.
REGRESSION = "; where labels are numbers to be predicted, set problem_type: regression"

SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"

#: A number with a point or an exponent, as CSV has it, and any number; Python would take ``1_000`` for one, too.
FRACTION = re.compile(r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?")
NUMERIC = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)


@dataclass(frozen=True)
class Labels:
    """What the labels of seq-cls are, as the first rows have them.

    ``problem`` is transformers' ``problem_type``. ``whole``: nobody said so, and all are whole numbers, also as text.
    ``multi_hot``: how many classes lists of 0 and 1 are of, one place for each; 0 where lists name the classes.
    """

    problem: str | None = None
    whole: bool = False
    multi_hot: int = 0


@dataclass(frozen=True)
class Form:
    """How one shape is read: the columns that it needs, those that it may have, and the record they make."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Fields, Labels], Record]
    may: tuple[str, ...] = ()


# Labels ---------------------------------------------------------------------------------------------------


def labels_of(rows: Sequence[Row], column: str, problem: str | None = None) -> Labels:
    """What the labels of these rows are: several classes each, numbers, or one class each, unless ``problem`` says."""
    labels = [label for label in (lookup(row, column) for row in rows) if label is not ABSENT]
    if problem == SEVERAL or (problem is None and any(_as_list(label) is not None for label in labels)):
        return Labels(SEVERAL, multi_hot=_multi_hot(labels))
    numbers = [_number(label) for label in labels if label is not None]
    numeric = all(number is not None for number in numbers)
    if problem is None and numeric and any(map(_has_fraction, labels)):
        return Labels(NUMBER)
    return Labels(problem or SINGLE, whole=problem is None and numeric and bool(numbers))


def _as_list(label: object) -> list[Any] | None:
    """A list, also one that is written as JSON in a string."""
    if isinstance(label, str) and label.startswith("["):
        try:
            label = json.loads(label)
        except (ValueError, RecursionError):
            return None
    return label if isinstance(label, list) else None


def _multi_hot(labels: Sequence[object]) -> int:
    """The length of all these lists, if it is one and they hold 0 and 1 (or false and true) alone; else 0."""
    lists = [_as_list(label) for label in labels]
    size = len(lists[0]) if lists and lists[0] is not None else 0
    # Of one place alone it may as well be the name of the one class that applies.
    alike = size > 1 and all(one is not None and len(one) == size and all(map(_is_bit, one)) for one in lists)
    return size if alike else 0


def _is_bit(value: object) -> bool:
    return isinstance(value, int | float) and value in (0, 1)  # also False and True


def _has_fraction(label: object) -> bool:
    if isinstance(label, str) and not FRACTION.fullmatch(label.strip()):
        return False
    number = _number(label)
    return number is not None and math.isfinite(number) and not number.is_integer()


def _number(label: object) -> float | None:
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    if isinstance(label, str) and not NUMERIC.fullmatch(label.strip()):
        return None
    try:
        return float(label)
    except (ValueError, OverflowError):
        return None


def _label(fields: Fields, labels: Labels) -> str | int | float | list[str | int]:
    if labels.multi_hot:
        return _bits(fields, labels.multi_hot)
    if labels.problem == SEVERAL:
        classes = fields.items("label")
        for item in classes:
            if not is_name(item) or (isinstance(item, str) and text_fault(item)):
                raise fields.wrong("label", f"must hold strings or whole numbers, found {shown(item)}")
            if classes.count(item) > 1:
                raise fields.wrong("label", f"names {item!r} twice")
        return list(classes)
    value = fields.get("label")
    if labels.problem == NUMBER:
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise fields.wrong("label", f"must be a number that is finite (regression), found {shown(value)}")
        return number
    if isinstance(value, bool):
        return JSON_NAMES[value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if labels.whole and isinstance(value, str):
        value = _whole(fields, value)
    if not is_name(value):
        hint = ""
        if isinstance(value, float) and math.isfinite(value):
            hint = REGRESSION
        if isinstance(value, list):
            hint = f"; where a text has several labels, set problem_type: {SEVERAL}"
        raise fields.wrong("label", f"must be a string or a whole number, found {shown(value)}{hint}")
    if isinstance(value, str) and (fault := text_fault(value)):
        raise fields.wrong("label", fault)
    return value  # type: ignore[no-any-return]


def _bits(fields: Fields, size: int) -> list[str | int]:
    """The numbers of the classes at whose places there is a 1."""
    bits = fields.items("label")
    if len(bits) != size or not all(map(_is_bit, bits)):
        raise fields.wrong(
            "label", f"must be multi-hot, {size} times 0 or 1 as in the rows before, found {shown(bits)}"
        )
    return [place for place, bit in enumerate(bits) if bit]


def _whole(fields: Fields, value: str) -> str | int:
    """A label of text where the others are whole numbers: ``1.0`` is 1, and a fraction is no class, as in JSON.

    Text that is no number is a class like any other.
    """
    number = _number(value)
    if number is None:
        return value
    if not number.is_integer():  # nor are NaN and infinity
        hint = REGRESSION if math.isfinite(number) else ""
        raise fields.wrong("label", f"must be a whole number as in the rows before, found {value.strip()}{hint}")
    return int(number) if FRACTION.fullmatch(value.strip()) else value


# The shapes -----------------------------------------------------------------------------------------------


def _read_text(fields: Fields, labels: Labels) -> Text:
    return Text(fields.text("text"))


def _read_labelled(fields: Fields, labels: Labels) -> Labelled:
    return Labelled(fields.text("text"), None, _label(fields, labels))


def _read_pair(fields: Fields, labels: Labels) -> Labelled:
    return Labelled(fields.text("text1"), fields.text("text2"), _label(fields, labels))


def _read_tagged(fields: Fields, labels: Labels) -> Tagged:
    tokens, tags = fields.items("tokens"), fields.items("tags")
    if not tokens:
        raise fields.wrong("tokens", "is empty")
    for number, token in enumerate(tokens, start=1):
        if fault := text_fault(token):
            raise fields.wrong("tokens", f"item {number} {fault}")
    if len(tags) != len(tokens):
        raise fields.wrong("tags", f"has {len(tags)} items, where {fields.named('tokens')!r} has {len(tokens)}")
    tags = [JSON_NAMES[tag] if isinstance(tag, bool) else tag for tag in tags]
    for number, tag in enumerate(tags, start=1):
        if not is_name(tag) or (isinstance(tag, str) and text_fault(tag)):
            raise fields.wrong("tags", f"item {number} must be a string or a whole number, found {shown(tag)}")
    return Tagged(list(tokens), tags)


def _read_translated(fields: Fields, labels: Labels) -> Translated:
    return Translated(fields.text("source"), fields.text("target"))


def _read_asked(fields: Fields, labels: Labels) -> Asked:
    question, context = fields.text("question"), fields.text("context")
    value = fields.parsed("answers", dict | list, "an object with 'text' and 'answer_start', or a list of such")
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise fields.wrong("answers", f"needs lists 'text' and 'answer_start' of one length, found {shown(value)}")
        found = list(zip(texts, starts, strict=True))
    else:
        if not all(isinstance(item, dict) for item in value):
            raise fields.wrong("answers", f"must hold objects with 'text' and 'answer_start', found {shown(value)}")
        found = [(item.get("text"), item.get("answer_start")) for item in value]
    for text, start in found:
        if fault := text_fault(text):
            raise fields.wrong("answers", f"'text' {fault}")
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise fields.wrong("answers", f"'answer_start' must be a whole number from 0 on, found {shown(start)}")
        if not context.startswith(text, start):
            place = context.find(text)
            where = f"it is at {place}" if place >= 0 else "it is nowhere in the context"
            raise fields.wrong("answers", f"{text!r} is not at character {start} of the context; {where}")
    return Asked(question, context, found)


#: The shapes of each task, in the order in which they are tried.
SHAPES: dict[TaskType, tuple[Form, ...]] = {
    TaskType.CAUSAL_LM: (
        Form("messages", ("messages",), lambda fields, _: read_messages(fields), ("tools",)),
        Form("sharegpt", ("conversations",), lambda fields, _: read_sharegpt(fields), ("system", "tools")),
        Form(
            "alpaca",
            ("instruction", "output"),
            lambda fields, _: read_alpaca(fields),
            ("input", "system", "history"),
        ),
        Form(
            "prompt-completion", ("prompt", "completion"), lambda fields, _: read_prompt_completion(fields), ("tools",)
        ),
        Form("text", ("text",), _read_text),
    ),
    TaskType.SEQ_CLS: (
        Form("text-label", ("text", "label"), _read_labelled),
        Form("pair-label", ("text1", "text2", "label"), _read_pair),
    ),
    TaskType.TOKEN_CLS: (Form("tokens-tags", ("tokens", "tags"), _read_tagged),),
    TaskType.SEQ_2_SEQ_LM: (Form("source-target", ("source", "target"), _read_translated),),
    TaskType.QUESTION_ANS: (Form("squad", ("question", "context", "answers"), _read_asked),),
}
