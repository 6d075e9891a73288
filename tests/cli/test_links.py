"""Promises about links: an output that is a symbolic link is replaced, and what it leads to is left alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FILES = [".loraloom.lock", "adapter_model.safetensors", "adapter_config.json", "run.json", "run.yaml", "curves.png"]
OF_A_SEARCH = [".loraloom.lock", "search.json", "study.log", "result.json", "best.yaml", "search.png", "tradeoff.png"]


def planted(output: Path, elsewhere: Path, files: list[str], folders: list[str]) -> dict[str, bytes]:
    """Links in ``output`` to files and to folders elsewhere. What those hold."""
    output.mkdir()
    elsewhere.mkdir()
    for name in files:
        (elsewhere / name).write_text(f"the user's {name}")
        (output / name).symlink_to(elsewhere / name)
    for name in folders:
        (elsewhere / name).mkdir()
        (elsewhere / name / "adapter_model.safetensors").write_text("the user's adapter")
        (output / name).symlink_to(elsewhere / name)
    return contents(elsewhere)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def links(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_symlink())


def test_a_training_writes_through_no_link(call: Callable[..., Any], world: Any) -> None:
    elsewhere = world.tmp / "elsewhere"
    before = planted(
        world.tmp / "out", elsewhere, [*FILES, "bad-rows.jsonl"], ["checkpoint-1", "checkpoint-2", "tensorboard"]
    )
    rows = world.rows({"text": "good film"})
    ended = call(*world.train("--overwrite", "--max-steps", 2, "--save-steps", 1, "--on-bad-row", "skip", data=rows))
    assert ended.code == 0, ended.err
    assert contents(elsewhere) == before
    assert links(world.tmp / "out") == []


def test_a_search_writes_through_no_link(call: Callable[..., Any], world: Any) -> None:
    elsewhere = world.tmp / "elsewhere"
    before = planted(world.tmp / "out", elsewhere, OF_A_SEARCH, ["best", "trials", "under-way"])
    (elsewhere / "search.json").unlink()  # there is no search yet
    before.pop("search.json")
    ended = call(*world.tune(*world.learns, space=world.space))
    assert ended.code == 0, ended.err
    assert contents(elsewhere) == before
    assert links(world.tmp / "out") == []


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_the_lock_is_a_file_of_its_own(tmp_path: Path, kind: str) -> None:
    from loraloom.files.lock import LOCK_NAME, held

    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "run").mkdir()
    (os.symlink if kind == "symbolic" else os.link)(mine, tmp_path / "run" / LOCK_NAME)
    with held(tmp_path / "run"):
        assert not (tmp_path / "run" / LOCK_NAME).is_symlink()
    assert mine.read_text() == "mine"


def test_a_journal_moves_nothing_through_a_linked_folder(tmp_path: Path) -> None:
    import json

    from loraloom.errors import AdapterError
    from loraloom.files.atomic import JOURNAL, recover

    there, folder = tmp_path / "there", tmp_path / "folder"
    there.mkdir()
    folder.mkdir()
    (there / "a").write_text("the user's")
    (there / ".a.0123abcd").write_text("planted")
    (folder / "b").symlink_to(there)
    for entry in ({"b/.a.0123abcd": "b/a"}, {"b/.a.0123abcd-": "b/a"}):
        (folder / JOURNAL).write_text(json.dumps(entry))
        with pytest.raises(AdapterError, match="loraloom did not write this"):
            recover(folder)
        assert (there / "a").read_text() == "the user's"


def test_a_config_alone_is_not_written_through_a_link(tmp_path: Path) -> None:
    from loraloom import LoraConfig

    (tmp_path / "mine").write_text("mine")
    (tmp_path / "adapter_config.json").symlink_to(tmp_path / "mine")
    LoraConfig(r=4).save_pretrained(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
    assert LoraConfig.from_pretrained(tmp_path).r == 4
