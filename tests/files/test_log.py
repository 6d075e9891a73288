"""What happens is told to Python's logger; nothing is printed unless somebody asks for it."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from loraloom.files.log import info, warning

RUN = """
import sys
from loraloom.config.train import TrainConfig
from loraloom.training.run import prepare
from loraloom.training.trainer import Trainer
Trainer(prepare(TrainConfig(model=sys.argv[1], data=sys.argv[2], task="seq-cls", output=sys.argv[3], max_steps=1,
                        report_to=[]))).fit(True)
"""


def test_lines_go_to_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loraloom")
    info("resumes at step 3 of 100 %")
    warning("2 rows are the same")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "resumes at step 3 of 100 %"),
        ("WARNING", "2 rows are the same"),
    ]


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_from_code_prints_nothing_unless_logging_is_set_up(
    asked: bool, encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    code = (
        "import logging; logging.basicConfig(level='INFO', format='%(name)s %(levelname)s %(message)s')" * asked + RUN
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text(reviews.read_text() + reviews.read_text().splitlines()[0])  # one of them twice
    command = [sys.executable, "-c", code, str(encoder_folder), str(rows), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("loraloom ")]
    if not asked:
        assert done.stderr == ""
    else:
        assert f"loraloom INFO {rows}: text-label, single label classification" in lines
        assert any(line.startswith("loraloom WARNING ") and "the same as another one" in line for line in lines)
