"""Promises of the program itself: its commands, its help, and what it costs to ask for that."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loraloom
from loraloom.cli import app, main


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "loraloom.cli", *map(str, arguments)]


def test_help_says_what_the_program_is_for_groups_the_commands_and_ends_with_three_examples(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ended = call("--help")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.rstrip().splitlines()
    assert lines[2] == "  Find and train the LoRA adapter that suits your model and your data."
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Get started:", "Train:", "Look at results:", "Other:", "Examples:"]
    assert [line.split()[:2] for line in lines[-3:]] == [["loraloom", name] for name in ("init", "tune", "train")]
    for name in ("init", "data", "plan", "tune", "train", "inspect"):
        assert any(line.startswith(f"  {name} ") for line in lines), name


@pytest.mark.parametrize("command", ["", "init", "data", "plan", "tune", "train", "inspect"])
def test_help_at_80_columns_has_every_option_whole(
    command: str, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer

    monkeypatch.setenv("COLUMNS", "80")
    ended = call(*[command] * bool(command), "-h")
    assert (ended.code, ended.err) == (0, "")
    assert max(map(len, ended.out.splitlines())) <= 80
    assert not re.search("[…╭│]|<bool>", ended.out)
    parsed: Any = typer.main.get_command(app)
    parsed = parsed.commands[command] if command else parsed
    shown = set(re.findall(r"(?<!\S)--?[a-z][\w-]*(?=[,\s])", ended.out))
    assert {name for parameter in parsed.params for name in parameter.opts if name.startswith("-")} <= shown


def test_an_options_help_names_its_choices_and_the_default_of_the_command(call: Callable[..., Any]) -> None:
    text = " ".join(call("train", "-h").out.split())
    for part in (
        "--lora-r, --rank, --r N Rank of the update [default: 16]",
        "(linear, cosine, constant, warmup_stable_decay) [default: linear]",
        "[default: 0.0002]",
        "[default: all-linear]",
    ):
        assert part in text


def test_all_options_that_are_missing_are_named_at_once(call: Callable[..., Any], tmp_path: Path) -> None:
    ended = call("train", "--data", "rows.jsonl")
    assert ended.code == 2
    assert ended.err == (
        "error: Missing options --model, --task, --output; give them, or a run file, which loraloom init writes\n"
    )
    assert call("init").err == "error: Missing options --model, --data\n"
    assert call("plan").err == "error: Missing options --model, --task\n"
    assert call("plan", "--task", "seq-cls").err == "error: Missing option '--model'.\n"
    (tmp_path / "run.yaml").write_text("task: seq-cls\n")
    ended = call("tune", tmp_path / "run.yaml", "--output", "o")
    said = "run.yaml: model.name, data.train: not given, and a run needs them; add them to the file, or give --model, "
    assert ended.err.endswith(f"{said}--data\n")


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
    for start in ([program], [sys.executable, "-m", "loraloom"], [sys.executable, "-m", "loraloom.cli"]):
        done = subprocess.run([*start, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"loraloom {loraloom.__version__}\n"
    code = (
        "import sys, loraloom.cli as cli; cli._run(['train', '-h']); print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
