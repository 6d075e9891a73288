"""The one list of options: fields of config classes, with help, key, check and effect on a resume beside each.

From these fields come the command line, the keys of a run file, the comments in it, the tables of the documentation and
the JSON Schema. Knows no option itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, partial
from typing import Any, ClassVar, Literal

from loraloom.config.checks import Check
from loraloom.errors import ConfigError, nearest, short

#: The default of an option that must be given.
NEEDED = MISSING
#: The headings under which help and documentation list options, in order.
GROUPS = ("Run", "Search", "Model", "Data", "Adapter", "Training", "Evaluation", "Checkpoints and trackers")
#: What another value means for a run that is resumed. "result": the run is another one, and is refused. "evaluation":
#: the same, if evaluations decide when training ends or which adapter is kept. "rounding": the last bits may differ.
#: "nothing": the result is the same.
Resume = Literal["result", "evaluation", "rounding", "nothing"]


@dataclass(frozen=True)
class Option:
    """What is known of a field. ``name`` and ``default`` are the field's."""

    check: Check
    #: One sentence without a full stop, in ASCII. Without it the field is no option of a command.
    help: str = ""
    #: Dotted, as in ``train.learning_rate``; the beginning of the field's name that is not part of it.
    key: str = ""
    prefix: str = ""
    #: The heading under which help and documentation list it.
    group: str = ""
    resume: Resume = "result"
    #: What a search does with it: it may vary between trials, is the same in all, or is left to a training in full.
    search: Literal["varies", "same", "unused"] = "same"
    #: What None stands for.
    unset: str = ""
    #: What starter files have, and commands that are given neither this option nor a run file.
    starter: Any = None
    flags: tuple[str, ...] = ()
    #: The version that brought it, if later than 0.1. At its default it then has no part in what a search is known by,
    #: so that folders from before stay what they were.
    since: str = ""
    name: str = ""
    default: Any = None

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def summary(self) -> str:
        """The help, with the words to choose from."""
        return f"{self.help} ({', '.join(self.check.choices)})" if self.check.choices else self.help

    @property
    def optional(self) -> bool:
        return self.default is None


def option(
    default: Any,
    check: Check,
    help: str = "",
    *,
    section: str = "",
    key: str = "",
    metadata: Mapping[str, Any] | None = None,
    **more: Any,
) -> Any:
    """A dataclass field with its ``Option``.

    The key, if it is not given, is the field's name without ``prefix``, in ``section``.
    """
    made = Option(check, help, key=key or f"{section}.", **more)
    mutable = type(default).__hash__ is None
    kind = {"default_factory": partial(copy.copy, default)} if mutable else {"default": default}
    return field(metadata={"option": made, **(metadata or {})}, **kind)


def options_of(cls: Any) -> dict[str, Option]:
    """The options among the fields of a config class, by name."""
    return _options_of(cls)


@cache
def _options_of(cls: Any) -> dict[str, Option]:
    found = {}
    for spec in fields(cls):
        if made := spec.metadata.get("option"):
            default = spec.default if spec.default_factory is MISSING else spec.default_factory()
            section, _, leaf = made.key.partition(".")
            key = made.key if leaf else f"{section}.{spec.name.removeprefix(made.prefix)}".removeprefix(".")
            flags = made.flags or (f"--{spec.name.replace('_', '-')}",)
            found[spec.name] = replace(made, name=spec.name, default=default, key=key, flags=flags)
    return found


class Options:
    """A config class whose fields are ``option``s: no other name is accepted, and ``check_fields`` tests the values."""

    #: How an unknown name is refused.
    unknown: ClassVar[str] = "there is no such option"

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Before the generated __init__, whose TypeError would not name the nearest field.
        cls.check_names(kwargs)
        return super().__new__(cls)

    @classmethod
    def check_names(cls, given: Iterable[str]) -> None:
        """
        Raises:
            ConfigError: a name that is no field; the message names the nearest one.
        """
        known = [spec.name for spec in fields(cls)]  # type: ignore[arg-type]
        for name in given:
            if name not in known:
                raise ConfigError(f"{short(name)[1:-1]}: {cls.unknown}{nearest(name[:99], known)}")

    def check_fields(self) -> None:
        """Test every option, and keep what its check gives back.

        Raises:
            ConfigError: begins with the field's name.
        """
        for name, one in options_of(type(self)).items():
            value = getattr(self, name)
            if value is not None or not one.optional:
                setattr(self, name, one.check.test(name, value))
