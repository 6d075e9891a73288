"""The command line as a function, a world of files for it, and how a refusal is checked."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from loraloom.cli import _run


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        code = _run([str(argument) for argument in arguments])
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def trained(encoder_folder: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that ``loraloom train`` wrote, with checkpoint-1 and checkpoint-2."""
    output = tmp_path_factory.mktemp("trained") / "adapter"
    arguments = ["train", "--model", encoder_folder, "--data", reviews, "--task", "seq-cls", "--output", output]
    assert _run([*map(str, [*arguments, "--max-steps", 2, "--save-steps", 1, "--init-lora-weights", "false"])]) == 0
    return output


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, str]]:
    """Every path below a folder with the hash of what it holds."""

    def look(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(folder.rglob("*"))
        }

    return look


@pytest.fixture
def refused(
    call: Callable[..., Ended], snapshot: Callable[[Path], dict[str, str]], tmp_path: Path
) -> Callable[..., None]:
    """Checks that arguments are refused: one message with all ``parts`` (it begins with the first), nothing written."""

    def check(arguments: list[object], *parts: str, begins: bool = True) -> None:
        before = snapshot(tmp_path)
        ended = call(*arguments)
        assert ended.code == 2, ended
        lines = ended.err.splitlines()
        assert len(lines) == 1, ended.err
        assert lines[0].startswith("error: ")
        message = lines[0].removeprefix("error: ").removeprefix(f"{tmp_path}/")
        if begins:
            assert message.startswith(parts[0]), message
        for part in parts:
            assert part in message
        assert "please report it" not in message
        assert snapshot(tmp_path) == before

    return check


@dataclass
class ProcessGroup:
    """What the rows of the table are made from. Everything they write lies in ``tmp``."""

    tmp: Path
    encoder: Path
    decoder: Path
    reviews: Path
    chats: Path
    adapter: Path
    translator: Path

    def file(self, name: str, text: str) -> Path:
        path = self.tmp / name
        path.write_text(text, encoding="utf-8")
        return path

    def put(self, folder: Path, name: str, text: str) -> Path:
        """``folder``, with a file in it."""
        (folder / name).write_text(text, encoding="utf-8")
        return folder

    def copy(self, source: Path) -> Path:
        return Path(shutil.copytree(source, self.tmp / "copy"))

    def cut(self, source: Path, name: str) -> Path:
        """A copy of a folder with a file that ends too early."""
        folder = self.copy(source)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) - 100])
        return folder

    def config(self, source: Path, **changes: Any) -> Path:
        folder = self.copy(source)
        values = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps(values | changes))
        return folder

    def without(self, source: Path, *names: str) -> Path:
        folder = self.copy(source)
        for name in names:
            (folder / name).unlink()
        return folder

    def train(self, *more: object, model: object = None, data: object = None, task: str = "seq-cls") -> list[object]:
        model, data = model or self.encoder, data or (self.chats if task == "causal-lm" else self.reviews)
        arguments = ["train", "--model", model, "--data", data, "--task", task, "--max-steps", "1"]
        return [*arguments, *([] if "--output" in more else ["--output", self.tmp / "out"]), *more]

    def tune(self, *more: object, space: object = None, data: object = None, task: str = "seq-cls") -> list[object]:
        """A search over two ranks, in slots that need no measuring."""
        chosen = {"lora.r": [2, 4]} if space is None else space
        model, data = self.decoder if task == "causal-lm" else self.encoder, data or self.reviews
        arguments = ["tune", "--model", model, "--data", data, "--task", task, "--max-steps", 1, "--slots", 2]
        arguments += [] if "--output" in more else ["--output", self.tmp / "out"]
        return [*arguments, "--set", f"tune.space={json.dumps(dict(chosen))}", *more]

    #: options and a space with which a search over ``reviews`` learns something
    learns = ("--max-steps", 72, "--eval-split", 40, "--set", "train.batch_size=16",
              "--set", "lora.target_modules=all-linear")  # fmt: skip
    space = MappingProxyType({"lora.r": [2, 4], "train.learning_rate": [0.01, 0.015]})

    def searched(self, text: str) -> Path:
        """A folder with a ``search.json`` of ``text``."""
        folder = self.tmp / "out"
        folder.mkdir()
        (folder / "search.json").write_text(text)
        return folder

    def bytes(self, name: str, content: bytes) -> Path:
        path = self.tmp / name
        path.write_bytes(content)
        return path

    def lines(self, name: str, *rows: object) -> Path:
        """A file of JSON lines."""
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows))

    def run_file(self, text: str) -> Path:
        """A run file that trains a classifier, but for what ``text`` adds or has otherwise."""
        return self.file("run.yaml", text)

    def rows(self, *rows: object) -> Path:
        good = [{"text": "good film", "label": "a"}, {"text": "bad film", "label": "b"}] * 5
        return self.file("rows.jsonl", "".join(json.dumps(row) + "\n" for row in [*good, *rows]))


@pytest.fixture
def world(
    tmp_path: Path,
    encoder_folder: Path,
    decoder_folder: Path,
    translator_folder: Path,
    reviews: Path,
    chats: Path,
    trained: Path,
) -> ProcessGroup:
    return ProcessGroup(tmp_path, encoder_folder, decoder_folder, reviews, chats, trained, translator_folder)
