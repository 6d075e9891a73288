"""The forms of rows: the columns that a form needs, and how its rows become checked records.

This file knows what each column must contain, except for conversations (``conversations``). ``shapes`` recognises the
form of a file; the tasks list the forms that they read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loraloom.data.records import Asked, Labelled, Record, Related, Tagged, Text, Translated
from loraloom.data.rows import shown
from loraloom.data.shape.fields import JSON_NAMES, Fields, name_fault, text_fault
from loraloom.data.shape.labels import as_number, label


@dataclass(frozen=True)
class Form:
    """The columns that a form ``needs``, those that it ``may`` have, and the function that makes a record of them.

    ``item``: a key of the objects in its only column, to tell it from another form with the same column. ``aliases``:
    other names of all the needed columns. ``problem``: the problem type of its rows.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Fields], Record]
    may: tuple[str, ...] = ()
    item: str = ""
    aliases: tuple[tuple[str, ...], ...] = ()
    problem: str | None = None


def read_text(fields: Fields) -> Text:
    return Text(fields.text("text"))


def read_labelled(fields: Fields) -> Labelled:
    return Labelled(fields.text("text"), None, label(fields))


def read_pair(fields: Fields) -> Labelled:
    return Labelled(fields.text("text1"), fields.text("text2"), label(fields))


def read_related(fields: Fields) -> Related:
    return Related((fields.text("text1"), fields.text("text2")))


def read_triplet(fields: Fields) -> Related:
    return Related((fields.text("text1"), fields.text("text2"), fields.text("negative")))


def read_scored(fields: Fields) -> Related:
    score = as_number(fields.get("score"))
    if score is None or not -1 <= score <= 1:
        raise fields.wrong(
            "score",
            f"must be a number from -1 to 1, the cosine that the two texts should have, found "
            f"{shown(fields.get('score'))}; divide scores of 0 to 5 by 5",
        )
    return Related((fields.text("text1"), fields.text("text2")), score)


def read_tagged(fields: Fields) -> Tagged:
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
        if fault := name_fault(tag):
            raise fields.wrong("tags", f"item {number} {fault}")
    return Tagged(list(tokens), tags)


def read_translated(fields: Fields) -> Translated:
    return Translated(fields.text("source"), fields.text("target"))


def read_asked(fields: Fields) -> Asked:
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
