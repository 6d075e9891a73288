"""A file's hash is that of its bytes, and the first file that was changed is found."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from loraloom.files import hashing
from loraloom.files.hashing import file_hash, first_changed


def test_a_file_is_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(10_000)
    (tmp_path / "a").write_bytes(data)
    monkeypatch.setattr(hashing, "BLOCK", 1000)
    assert file_hash(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_the_first_file_that_is_another_one_or_gone_is_named(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    files = {name: file_hash(tmp_path / name) for name in "cab"}
    assert first_changed(tmp_path, files) is None
    (tmp_path / "c").write_text("other")
    assert first_changed(tmp_path, files) == (tmp_path / "c", None)
    (tmp_path / "b").unlink()
    path, error = first_changed(tmp_path, files) or (None, None)
    assert path == tmp_path / "b"
    assert isinstance(error, FileNotFoundError)
