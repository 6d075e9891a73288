"""How a command is made: its options from the fields of the config classes, its help as plain text without a cut."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from loraloom.config.options import GROUPS, NEEDED, Option
from loraloom.config.runfile import missing_options
from loraloom.config.train import TrainConfig
from loraloom.errors import ConfigError

#: The heading of options that every command has, and what a word of each type is called.
_OTHER = "Other"
_WORDS = {bool: "", int: "N", float: "NUMBER", str: "TEXT"}

RunFile = Annotated[
    str | None, typer.Argument(metavar="RUN.yaml", help="Run file; options that are given beside it win over it")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A key of the run file, such as lora.r=8; repeatable",
        rich_help_panel=GROUPS[0],
    ),
]


def described(option: Option) -> str:
    """The help of an option, with the words to choose from and the default."""
    default = default_of(option)
    return option.summary + (f" [default: {default}]" if default else "")


def default_of(option: Option) -> str:
    """What a command has where the option is not given."""
    value = option.default if option.starter is None else option.starter
    if option.unset and option.starter is None:
        return option.unset
    if value in (None, {}, NEEDED) or (isinstance(value, bool) and option.check.kind is bool):
        return ""
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if value is True else str(value)


def with_options(function: Callable[..., None], options: Iterable[Option]) -> Callable[..., None]:
    """A function with ``options`` for parameters beside its own, for typer.

    ``function`` is called with ``given`` first: the dotted keys and values of those options that were given.
    """
    listed = list(options)
    _, *own = inspect.signature(function, eval_str=True).parameters.values()

    def run(**values: Any) -> None:
        given = {one.key: one.check.read(one.name, found) for one in listed if (found := values[one.name]) is not None}
        function(given, **{parameter.name: values[parameter.name] for parameter in own})

    shown = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    run.__signature__ = inspect.Signature([*map(_parameter, listed), *shown])  # type: ignore[attr-defined]
    run.__annotations__, run.__doc__ = {}, function.__doc__
    return run


def _parameter(option: Option) -> inspect.Parameter:
    kind = option.check.kind
    shown = typer.Option(
        *option.flags, help=described(option), metavar=_WORDS[kind], rich_help_panel=option.group, show_default=False
    )
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, shown]
    )


def need(given: Mapping[str, Any], *options: Option) -> None:
    """
    Raises:
        ConfigError: not all of ``options`` were given; the message names all that are missing.
    """
    if missing := [one.flags[0] for one in options if one.key not in given]:
        raise ConfigError(missing_options(missing))


def check_task(options: TrainConfig) -> None:
    """``tasks.check``, loaded once all else is right: it takes torch along."""
    from loraloom import tasks

    tasks.check(options)


# -- help -------------------------------------------------------------------------------------------------------------


class Command(TyperCommand):
    """A command whose help lists its options by group."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_options(self.get_params(ctx), formatter)


class Group(TyperGroup):
    """The program: its help lists the commands by what a user wants, and ends with examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            groups.setdefault(command.rich_help_panel, []).append((name, command.help.partition("\n\n")[0]))
        for title, rows in groups.items():
            _write(title, rows, formatter)
        _write_options(self.get_params(ctx), formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Examples"):
            for line in (self.epilog or "").splitlines():
                formatter.write(f"  {line}\n")


def _write_options(parameters: Iterable[Any], formatter: Any) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in parameters:
        option = parameter.param_type_name == "option"
        group = parameter.rich_help_panel or (_OTHER if option else "Arguments")
        names = sorted(parameter.opts, key=len) if parameter.name == "help" else parameter.opts if option else []
        word = "" if getattr(parameter, "is_flag", False) else parameter.metavar or ""
        help = (parameter.help or "").removesuffix(".")
        groups.setdefault(group, []).append((f"{', '.join(names)} {word}".strip(), help))
    for title in sorted(groups, key=["Arguments", *GROUPS, _OTHER].index):
        _write(title, groups[title], formatter)


def _write(title: str, rows: list[tuple[str, str]], formatter: Any) -> None:
    """Two columns; a name that is too long for the first has its text on the next line, and no word is broken."""
    left = min(max(len(name) for name, _ in rows), 28) + 4
    with formatter.section(title):
        for name, text in rows:
            first, *more = textwrap.wrap(" ".join(text.split()), formatter.width - left, break_on_hyphens=False) or [""]
            apart = "" if len(name) + 4 <= left else "\n"
            formatter.write(f"  {name}{apart or ' ' * (left - 2 - len(name))}{apart and ' ' * left}{first}\n")
            formatter.write("".join(f"{'':{left}}{line}\n" for line in more))
