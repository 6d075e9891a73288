"""One family of exceptions. Each message says what was wrong, where, what was found, and what to do.

The exit code of the command line follows from the class: 2 when the user's input is wrong, 1 when the
work itself failed. Input errors are also ``ValueError`` and failures ``RuntimeError``, so that code written
against those keeps working.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

#: Control characters but for line breaks and tabs, marks that turn the direction of writing, other ends of lines, and
#: halves of surrogate pairs.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")


def visible(text: str) -> str:
    """``text`` as people may be shown it: what a terminal would obey is written out, ``\\x1b`` or ``\\u202e``."""
    if text.isascii() and text.isprintable():
        return text
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)


class LoraloomError(Exception):
    """Base of everything that loraloom raises on purpose. Its message may name files and rows, so it is ``visible``."""

    exit_code = 1

    def __str__(self) -> str:
        return visible(super().__str__())


class InputError(LoraloomError, ValueError):
    """What the user gave cannot be used."""

    exit_code = 2


class ConfigError(InputError):
    """A field of ``LoraConfig`` or an option is unknown, of the wrong type, or out of range."""


class FormatError(ConfigError):
    """A file was written by a later version of loraloom."""


class TargetError(ConfigError):
    """A pattern matches no module, or a module that cannot carry LoRA."""


class AdapterError(InputError):
    """An adapter directory, file or name cannot be used with this model."""


class DataError(InputError):
    """A data file cannot be read or does not hold what the task needs."""


class ModelError(InputError):
    """A model folder or name cannot be loaded, or does not fit the task."""


class FailureError(LoraloomError, RuntimeError):
    """The input was right, and the work still failed."""


class MergeError(FailureError):
    """A merge that cannot be done exactly. Nothing was changed."""


class SaveError(FailureError):
    """Writing failed. What was there before is still there."""


class TrainingError(FailureError):
    """Training cannot go on, for example because the loss is not finite."""


class TargetsWarning(UserWarning):
    """Nobody chose the modules that are adapted: they were found in the model."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'q_proj'?"``, or the empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank, or the name of its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def brief(error: BaseException) -> str:
    """``"ValueError: no such file"``: the class of an error and the first line of its text."""
    line = first_line(error).rstrip(".")
    return line if line == type(error).__name__ else f"{type(error).__name__}: {line}"


def some(names: Sequence[str], most: int = 1) -> str:
    """The first ``most`` of ``names``, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def short(value: object, most: int = 120) -> str:
    """``repr`` of a value for an error, cut after ``most`` characters: what a user gives may be of any length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits, or lists deeper, than Python writes
        return f"a {type(value).__name__} without end"
    return text if len(text) <= most else text[: most - 1] + "…"
