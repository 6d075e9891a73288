"""The fork server, and what a case comes to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).with_name("server.py")


@dataclass
class Ended:
    code: int
    said: str
    #: the operations on the files that an error can meet, and those at which a death is another: ``os.rename /a/b``
    looks: list[str]
    changes: list[str]


Case = Callable[..., Ended]


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path, few: Path) -> Iterator[Case]:
    """Runs a command: ``case(argv, roots, at=0, how="die")``."""
    folder = tmp_path_factory.mktemp("server")
    server = subprocess.Popen(
        [sys.executable, str(SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "TMPDIR": str(folder), "LORALOOM_TRACEBACK": ""},
    )
    assert server.stdin
    assert server.stdout

    def ask(**asked: Any) -> dict[str, Any]:
        print(json.dumps(asked), file=server.stdin, flush=True)
        answer = server.stdout.readline()  # type: ignore[union-attr]
        assert answer, (folder / "stderr").read_text()
        found: dict[str, Any] = json.loads(answer)
        return found

    def run(argv: list[object], roots: list[Path], at: int = 0, how: str = "die") -> Ended:
        log = folder / "said"
        answer = ask(argv=[*map(str, argv)], roots=[*map(str, roots)], log=str(log), at=at, how=how)
        return Ended(answer["code"], log.read_text(), *answer["taken"])

    warm = ["train", "--model", encoder_folder, "--data", few, "--task", "seq-cls", "--max-steps", 1]
    assert ask(warm=True, argv=[*map(str, [*warm, "--output", folder / "warm", "--set", "train.report_to=[]"])])
    yield run
    server.stdin.close()
    server.wait(timeout=60)


@pytest.fixture(scope="session")
def few(reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    path.write_text("".join(reviews.read_text().splitlines(keepends=True)[:24]))
    return path
