"""The command line, thin: parse, call, print. What it does, a library user can do with ``loraloom.train`` and ``tune``.

Exit codes: 0 done, 1 failed, 2 the user's input is wrong. Errors are one message on stderr, never a traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

import loraloom
from loraloom.cli import look, runs, start
from loraloom.cli.command import Command, Group, with_options
from loraloom.config.keys import OPTIONS
from loraloom.config.options import Option
from loraloom.errors import InputError, LoraloomError, TargetsWarning
from loraloom.report.screen import Text, log

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\
loraloom init mail.yaml --model MODEL --data mail.jsonl  # write a run file
loraloom tune mail.yaml                                  # try configurations
loraloom train runs/mail/best.yaml                       # train the best""",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"loraloom {loraloom.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit")
    ] = False,
) -> None:
    """Find and train the LoRA adapter that suits your model and your data.

    LoRA keeps a pretrained model frozen and trains a small adapter beside it. loraloom trains many configurations of an
    adapter at once and says which one to use.
    """


def _options(*wanted: str) -> list[Option]:
    """Options by key, or all of a section that have help."""
    listed = [one for one in OPTIONS.values() if one.help and (one.key in wanted or one.section in wanted)]
    return [one for one in listed if one.key != "tune.space"]


def _command(panel: str, function: Callable[..., None], options: Iterable[Option] = ()) -> None:
    app.command(function.__name__, cls=Command, rich_help_panel=panel)(with_options(function, options))


_START, _TRAIN, _LOOK = "Get started", "Train", "Look at results"
_PLANNED = ("train.batch_size", "data.max_length", "model.dtype", "train.gradient_checkpointing")
#: Of what may vary, the options that say how long a trial is.
_TRIAL = ("train.epochs", "train.max_steps", "train.batch_size", "train.gradient_accumulation_steps")
_RUN = ("task", "output", "overwrite")
_command(_START, start.init, _options("model", "data", "task", "output"))
_command(_START, start.data, [one for one in _options("model", "data", "task") if one.key != "data.train"])
_command(_START, start.plan, _options("model.name", "task", "lora", *_PLANNED))
_SHARED = [
    one.key
    for one in OPTIONS.values()
    if one.search == "same" and one.section in ("model", "data", "train", "eval") and one.name != "fsdp"
]
_command(_TRAIN, runs.tune, _options("tune", *_RUN, *_SHARED, *_TRIAL))
_command(_TRAIN, runs.train, _options("model", "data", "lora", "train", "eval", *_RUN))
_command(_LOOK, look.inspect)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: runs the command and exits with its code."""
    sys.exit(_run(sys.argv[1:] if arguments is None else list(arguments)))


def _run(arguments: list[str]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TargetsWarning)  # the doctor says it
            code = app(runs.whole_resume(arguments), prog_name="loraloom", standalone_mode=False)
        if code == 130:  # how the parser says Ctrl-C
            raise KeyboardInterrupt
        _leave()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", 1)
    except Exception as error:
        if os.environ.get("LORALOOM_TRACEBACK"):
            log(traceback.format_exc(), sys.stderr)
        return _fail(*_said(error))


def _leave() -> None:
    """Leave the process group of a run that ended well: a process that exits with its threads open may abort."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _said(error: Any) -> tuple[str, int]:
    """The message and the exit code of an error."""
    if isinstance(error, LoraloomError):
        return str(error), 2 if isinstance(error, InputError) else 1
    if hasattr(error, "format_message"):  # the parser's own: an unknown option, a number that is none
        missing = type(error).__name__ == "NoArgsIsHelpError"  # whose message is the whole help
        return "a command is missing; see loraloom --help" if missing else error.format_message(), 2
    if isinstance(error, OSError) and error.filename and error.strerror:
        place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
        return f"{place}: cannot be read or written ({error.strerror}); run the same command again", 1
    from loraloom.training.failures import explain

    what = explain(error)
    if what.startswith("out of memory"):
        return what, 1
    return f"unexpected, please report it: {what} (LORALOOM_TRACEBACK=1 shows where)", 1


def _fail(message: str, code: int) -> int:
    Console(stderr=True).print(Text.assemble(Text("error: ", "bold red"), Text(message)), soft_wrap=True)
    return code
