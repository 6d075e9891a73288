"""The shape of rows: their form, recognised or selected, with the user's names of its columns.

This file knows how a form is recognised, and the error if none fits. The forms themselves are in ``forms``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loraloom.data.records import Record
from loraloom.data.rows import Row, RowError, row_error, shown
from loraloom.data.shape.fields import ABSENT, Fields, Labels, lookup
from loraloom.data.shape.forms import Form
from loraloom.data.shape.labels import labels_of
from loraloom.data.task import RowTask
from loraloom.errors import ConfigError, DataError, nearest

#: Our name of the column whose equal values are held out together. Any shape may have one.
GROUP = "group"
#: Values of ``format`` that say how plain text is divided into rows; their form is ``text``.
TEXT_FORMATS = ("text-lines", "text-file")


@dataclass(frozen=True)
class Shape:
    """A recognised shape. ``columns`` maps our names to the user's where they differ.

    ``labels`` is for seq-cls. ``ignored`` are the user's columns that are not read, ``also`` the other shapes that
    would fit as well.
    """

    form: Form
    columns: dict[str, str] = field(default_factory=dict)
    labels: Labels = field(default_factory=Labels)
    ignored: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.form.name

    @property
    def problem_type(self) -> str | None:
        return self.labels.problem

    def plain(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {"name": self.name, **{key: value for key, value in asdict(self).items() if key != "form"}}

    def read(self, row: Row) -> Record:
        """The record of ``row``; ``RowError`` with file, line and column if the row does not have this shape."""
        return self.form.read(Fields(row, self.columns, self.labels))

    def describe(self) -> str:
        """The shape in a few words, for a note to the user."""
        renamed = [f"{ours} from {theirs!r}" for ours, theirs in self.columns.items()]
        said = f"{self.name} ({', '.join(renamed)})" if renamed else self.name
        if self.problem_type:
            said += f", {self.problem_type.replace('_', ' ')}"
        if self.labels.multi_hot:
            said += f" (multi-hot lists of {self.labels.multi_hot} classes)"
        if self.ignored:
            said += f"; not read: {', '.join(map(repr, self.ignored))}"
        if self.also:
            said += f"; would also fit: {', '.join(self.also)} (choose with format)"
        return said


def recognise(
    rows: Row | Sequence[Row],
    task: RowTask,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    problem_type: str | None = None,
    skip: bool = False,
) -> Shape:
    """The shape of ``rows``, the first ones of a source: the first form whose columns the first row has.

    Args:
        format: the name of the form.
        columns: our names of columns → the user's; ``a.b`` is the key b of the column a.
        problem_type: the kind of seq-cls labels. By default lists are several classes (lists of 0 and 1 of one length
            are multi-hot), labels with a fraction are numbers, and all others are classes.
        skip: use the first row that has any form; if none has one, the error is that of the first row.

    Raises:
        DataError: columns are missing; the message has the nearest names.
        ConfigError: a ``format`` or ``columns`` that the task does not have.
    """
    first = [rows] if isinstance(rows, Row) else list(rows)
    for place in range(1, len(first)) if skip else ():
        try:
            return recognise(first[place - 1 :], task, format, columns, problem_type)
        except RowError:
            continue
    named = dict(columns or {})
    forms = _forms(task, format, named)
    row = first[0]
    for ours, theirs in named.items():
        theirs = named[ours] = _as_written(row, theirs)
        if all(lookup(other, theirs) is ABSENT for other in first):
            there = ", ".join(map(repr, row.fields)) or "none"
            reason = f"no column {theirs!r}, which columns maps to {ours!r}; the columns are {there}"
            raise row_error(row, f"{reason}{nearest(theirs, row.fields)}", theirs)
    fitting = [(form, renamed) for form in forms for renamed in _fits(form, row, named, len(forms) == 1)]
    if not fitting:
        raise _nothing_fits(row, task, forms, named)
    form, renamed = fitting[0]
    labels = Labels(form.problem or problem_type)
    if "label" in form.needs:
        labels = labels_of(first, renamed.get("label", "label"), problem_type)
    used = {renamed.get(name, name).split(".")[0] for name in (*form.needs, *form.may)} | set(renamed.values())
    ignored = dict.fromkeys(name for other in first for name in other.fields if name not in used)
    also = tuple(dict.fromkeys(other.name for other, _ in fitting[1:] if other.name != form.name))
    return Shape(form, renamed, labels, tuple(ignored), also)


def _forms(task: RowTask, format: str | None, columns: dict[str, str]) -> list[Form]:
    """The forms of the task that match ``format`` and the names in ``columns``."""
    option, forms = task.name, list(task.forms)
    if format is not None:
        wanted = "text" if format in TEXT_FORMATS else format
        names = [form.name for form in forms]
        if wanted not in names:
            known = [*names, *TEXT_FORMATS] if "text" in names else names
            raise ConfigError(
                f"format: {format!r} is not a shape of {option}, which are {', '.join(known)}{nearest(format, known)}"
            )
        forms = [form for form in forms if form.name == wanted]
    known = list(dict.fromkeys(name for form in forms for name in (*form.needs, *form.may)))
    known.append(GROUP)
    for ours in columns:
        if ours not in known:
            raise ConfigError(
                f"columns: {ours!r} is no column of {format or option}, which are {', '.join(known)}"
                f"{nearest(ours, known)} (columns maps these names to yours: {{{known[0]}: ...}})"
            )
    left = [form for form in forms if set(columns) <= {*form.needs, *form.may, GROUP}]
    if not left:
        raise ConfigError(f"columns: no shape of {option} has all of {', '.join(columns)}")
    return left


#: Keys that tell the two forms of conversations apart.
_ITEMS = ("role", "from")


def _fits(form: Form, row: Row, columns: dict[str, str], forced: bool) -> Iterator[dict[str, str]]:
    """The mapping of columns with which the row has all columns of the form; none if there is no such mapping."""
    for names in (form.needs, *form.aliases):
        called = dict(zip(form.needs, names, strict=True)) | {name: name for name in form.may}
        found = {ours: _as_written(row, theirs) for ours, theirs in called.items() if ours not in columns}
        found = columns | {ours: theirs for ours, theirs in found.items() if ours != theirs}
        if form.item:
            yield from _talk(form, row, found, forced)
        elif all(lookup(row, found.get(name, name)) is not ABSENT for name in form.needs):
            yield found
            return


def _talk(form: Form, row: Row, columns: dict[str, str], forced: bool) -> Iterator[dict[str, str]]:
    """The same for a conversation."""
    # The contents of the column tell the two forms apart, because both names are used for both.
    ours = form.needs[0]
    own = columns.get(ours, ours)
    other = next(item for item in _ITEMS if item != form.item)
    for theirs in [own] if ours in columns else dict.fromkeys([own, "messages", "conversations"]):
        value = lookup(row, theirs)
        item = value[0] if isinstance(value, list) and value else value  # or an object of lists
        keys = item if isinstance(item, dict) else {}
        # A column with neither key is taken by its name, so that the error fits the form.
        if form.item in keys or (theirs == own and value is not ABSENT and (forced or other not in keys)):
            yield columns if theirs == own else {**columns, ours: theirs}


def _as_written(row: Row, name: str) -> str:
    """``name`` in the row's spelling: case is ignored if only one column then matches."""
    if lookup(row, name) is not ABSENT:
        return name
    same = [other for other in row.fields if isinstance(other, str) and other.strip().casefold() == name.casefold()]
    return same[0] if len(same) == 1 else name


#: Common names of our columns in other data: for hints, never used without the user's consent.
OTHER_NAMES = {
    "prompt": ("question", "query", "instruction", "input"),
    "completion": ("answer", "response", "output", "target", "completions"),
    "output": ("response",),
    "text": ("sentence", "message", "content", "body", "document", "review", "article", "comment", "tweet"),
    "label": ("labels", "category", "class", "intent", "target", "score", "sentiment", "rating", "topic"),
    "text1": ("sentence1", "premise", "question1"),
    "text2": ("sentence2", "hypothesis", "question2"),
    "tokens": ("words",),
    "tags": ("ner_tags", "pos_tags", "labels", "labels_ner"),
    "source": ("document", "article", "dialogue", "input", "src", "text"),
    "target": ("summary", "highlights", "output", "tgt"),
    "messages": ("conversation", "chat", "dialog", "dialogue", "turns"),
    "answers": ("answer",),
    "context": ("passage", "paragraph", "document"),
}


def _nothing_fits(row: Row, task: RowTask, forms: Sequence[Form], columns: dict[str, str]) -> DataError:
    """The error with the missing columns of the form that fits best."""

    def there(form: Form) -> float:
        return sum(lookup(row, columns.get(name, name)) is not ABSENT for name in form.needs) / len(form.needs)

    best, hint = max(forms, key=there), ""
    for form in forms:
        if shifted := _renamed(row, form, columns):
            names = ", ".join(f"{ours}: {theirs}" for ours, theirs in shifted.items())
            best, hint = form, f"; to read yours, set columns: {{{names}}} ({option_for(shifted)})"
            break
    missing = next((name for name in best.needs if lookup(row, columns.get(name, name)) is ABSENT), best.needs[0])
    wanted = columns.get(missing, missing)
    forms_said = "; ".join(f"{' and '.join(map(repr, form.needs))} ({form.name})" for form in forms)
    found = ", ".join(map(repr, row.fields)) or "none"
    reason = (
        f"no column {wanted!r}; {task.name} reads {forms_said}; "
        f"the columns are {found}{hint or nearest(wanted, row.fields)}"
    )
    if lookup(row, wanted) is not ABSENT:
        reason = f"{wanted!r} is not what {best.name} needs, found {shown(lookup(row, wanted))}"
    inside = [name for name, value in row.fields.items() if isinstance(value, list) and value]
    if len(row.fields) == 1 and inside and isinstance(row.fields[inside[0]][0], dict):
        reason += f"; {inside[0]!r} is a list of objects: are these the rows? Then make that list the file"
    return row_error(row, reason, wanted)


def _renamed(row: Row, form: Form, columns: dict[str, str]) -> dict[str, str]:
    """Our names → the row's, where they differ, if the row has all that the form needs under names of ``OTHER_NAMES``.

    Empty if it has not.
    """
    found = {}
    for name in form.needs:
        names = (_as_written(row, other) for other in (columns.get(name, name), *OTHER_NAMES.get(name, ())))
        found[name] = next((other for other in names if lookup(row, other) is not ABSENT), None)
    if None in found.values() or len(set(found.values())) < len(found):
        return {}
    return {ours: theirs for ours, theirs in found.items() if theirs is not None and ours != theirs}


def option_for(renamed: Mapping[str, str]) -> str:
    """The option that maps our names to the user's, as typed in a shell."""
    return f"--columns {shlex.quote(json.dumps(renamed, ensure_ascii=False))}"


def proposals(row: Row, task: RowTask) -> list[str]:
    """The options with which ``row`` could be read for ``task``, if its columns contain what their names suggest."""
    return [option_for(renamed) for form in task.forms if (renamed := _renamed(row, form, {}))]
