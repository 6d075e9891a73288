"""Promises of ``run.json``: it has a format, and a file of a later one is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraloom.errors import ConfigError
from loraloom.training.run_record import FORMAT, as_json, read

RECORD: dict[str, Any] = {
    "steps": 3, "options": {"lora": {}}, "identity": {}, "versions": {}, "machine": {}, "files": {},
}  # fmt: skip


def test_a_record_is_read_back_with_and_without_a_format_and_a_later_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for found in (RECORD, {**RECORD, "format": FORMAT}):
        path.write_bytes(as_json(found))
        assert read(path) == json.loads(path.read_bytes())
    path.write_bytes(as_json({**RECORD, "format": FORMAT + 1}))
    with pytest.raises(ConfigError, match=f"run.json: is of format {FORMAT + 1}, and this version of loraloom reads"):
        read(path)
