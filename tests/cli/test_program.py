"""Promises of the program itself: its commands, its help, and what it costs to ask for that."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loraloom
from loraloom.cli import main


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "loraloom.cli", *map(str, arguments)]


def test_help_lists_the_commands_and_every_option(call: Callable[..., Any]) -> None:
    ended = call("--help")
    assert ended.code == 0
    for word in ("train", "tune", "plan", "inspect", "--version"):
        assert word in ended.out
    ended = call("tune", "-h")
    assert ended.code == 0
    for word in ("--preset", "--trials", "--sampler", "--metric", "--slots", "--memory", "--set", "RUN.yaml"):
        assert word in ended.out
    ended = call("train", "-h")
    assert ended.code == 0
    for word in (
        "--eval-split",
        "--max-steps",
        "--lr",
        "--dtype",
        "--max-length",
        "--target-modules",
        "--r ",
        "--set",
        "RUN.yaml",
    ):
        assert word in ended.out


def test_the_version_is_that_of_the_package(call: Callable[..., Any]) -> None:
    ended = call("--version")
    assert (ended.code, ended.out, ended.err) == (0, f"loraloom {loraloom.__version__}\n", "")


def test_main_exits_with_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    assert "trian" in capsys.readouterr().err


def test_the_program_is_installed_and_help_loads_no_model_library() -> None:
    program = Path(sys.executable).with_name("loraloom")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"loraloom {loraloom.__version__}\n"
    code = (
        "import sys, loraloom.cli as cli; cli._run(['train', '-h']); print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
