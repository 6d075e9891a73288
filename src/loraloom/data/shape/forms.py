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

from loraloom.config import TaskType
from loraloom.data.records import Asked, Labelled, Record, Tagged, Text, Translated
from loraloom.data.rows import Row, shown
from loraloom.data.shape.conversations import read_alpaca, read_messages, read_prompt_completion, read_sharegpt
from loraloom.data.shape.fields import ABSENT, Fields, is_name, lookup, text_fault

SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"

#: A number with a point or an exponent, as CSV has it.
FRACTION = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Form:
    """How one shape is read: the columns that it needs, those that it may have, and the record they make."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Fields, str | None], Record]
    may: tuple[str, ...] = ()


# Labels ---------------------------------------------------------------------------------------------------


def problem_of(rows: Sequence[Row], column: str) -> str:
    """What the labels of these rows are: several classes each, numbers, or one class each."""
    labels = [lookup(row, column) for row in rows]
    if any(isinstance(label, list) or _is_json_list(label) for label in labels):
        return SEVERAL
    numbers = [_number(label) for label in labels if label is not ABSENT and label is not None]
    if all(number is not None for number in numbers) and any(
        _has_fraction(label) for label in labels if label is not ABSENT
    ):
        return NUMBER
    return SINGLE


def _is_json_list(label: object) -> bool:
    if not (isinstance(label, str) and label.startswith("[")):
        return False
    try:
        return isinstance(json.loads(label), list)
    except (ValueError, RecursionError):
        return False


def _has_fraction(label: object) -> bool:
    if isinstance(label, str) and not FRACTION.fullmatch(label.strip()):
        return False
    number = _number(label)
    return number is not None and math.isfinite(number) and not number.is_integer()


def _number(label: object) -> float | None:
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    try:
        return float(label)
    except (ValueError, OverflowError):
        return None


def _label(fields: Fields, problem: str | None) -> str | int | float | list[str | int]:
    if problem == SEVERAL:
        classes = fields.items("label")
        for item in classes:
            if not is_name(item) or (isinstance(item, str) and text_fault(item)):
                raise fields.wrong("label", f"must hold strings or whole numbers, found {shown(item)}")
            if classes.count(item) > 1:
                raise fields.wrong("label", f"names {item!r} twice")
        return list(classes)
    value = fields.get("label")
    if problem == NUMBER:
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise fields.wrong("label", f"must be a number that is finite (regression), found {shown(value)}")
        return number
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not is_name(value):
        hint = ""
        if isinstance(value, float) and math.isfinite(value):
            hint = "; where labels are numbers to be predicted, set problem_type: regression"
        if isinstance(value, list):
            hint = f"; where a text has several labels, set problem_type: {SEVERAL}"
        raise fields.wrong("label", f"must be a string or a whole number, found {shown(value)}{hint}")
    if isinstance(value, str) and (fault := text_fault(value)):
        raise fields.wrong("label", fault)
    return value  # type: ignore[no-any-return]


# The shapes -----------------------------------------------------------------------------------------------


def _read_text(fields: Fields, problem: str | None) -> Text:
    return Text(fields.text("text"))


def _read_labelled(fields: Fields, problem: str | None) -> Labelled:
    return Labelled(fields.text("text"), None, _label(fields, problem))


def _read_pair(fields: Fields, problem: str | None) -> Labelled:
    return Labelled(fields.text("text1"), fields.text("text2"), _label(fields, problem))


def _read_tagged(fields: Fields, problem: str | None) -> Tagged:
    tokens, tags = fields.items("tokens"), fields.items("tags")
    if not tokens:
        raise fields.wrong("tokens", "is empty")
    for number, token in enumerate(tokens, start=1):
        if fault := text_fault(token):
            raise fields.wrong("tokens", f"item {number} {fault}")
    if len(tags) != len(tokens):
        raise fields.wrong("tags", f"has {len(tags)} items, where {fields.named('tokens')!r} has {len(tokens)}")
    for number, tag in enumerate(tags, start=1):
        if not is_name(tag) or (isinstance(tag, str) and text_fault(tag)):
            raise fields.wrong("tags", f"item {number} must be a string or a whole number, found {shown(tag)}")
    return Tagged(list(tokens), list(tags))


def _read_translated(fields: Fields, problem: str | None) -> Translated:
    return Translated(fields.text("source"), fields.text("target"))


def _read_asked(fields: Fields, problem: str | None) -> Asked:
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
