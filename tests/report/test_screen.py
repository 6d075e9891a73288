"""Promises of what is printed: nothing of the user's rows, names or files is a command to the terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

import loraloom
from loraloom.report.screen import Text, log

EVIL = "\x1b[31mred\x1b]0;t\x07 \x9b2J \u202eback\u202c"
SEEN = r"\x1b[31mred\x1b]0;t\x07 \x9b2J \u202eback\u202c"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def test_text_and_plain_lines_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(Text(EVIL).append(EVIL, "bold"), Text("\n").join([Text(EVIL)]))
    log(EVIL)
    printed = console.file.getvalue() + capsys.readouterr().out  # type: ignore[attr-defined]
    assert not RAW.search(printed)
    assert printed.count(SEEN) == 4


def test_everything_that_is_printed_passes_there() -> None:
    source = Path(loraloom.__file__).parent
    files = {str(path.relative_to(source)): path.read_text() for path in source.rglob("*.py")}
    assert [name for name, text in files.items() if "from rich.text" in text or "rich.markup" in text] == []
    prints = {name for name, text in files.items() if re.search(r"^\s*print\(", text, re.MULTILINE)}
    # A version, JSON, figures of an adapter, a sentence of our own.
    assert prints == {
        "report/screen.py",
        "cli/__init__.py",
        "cli/look.py",
        "cli/start.py",
        "lora/model.py",
        "training/signals.py",
    }
    # A string given to rich would be printed as it is.
    said = [
        line for text in files.values() for line in text.splitlines() if re.search(r"console\.print\(f?[\"']", line)
    ]
    assert said == ['        console.print("nothing was trained (--dry-run)", highlight=False)']
