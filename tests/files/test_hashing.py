"""A file's hash is that of its bytes, and the first file that was changed is found."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from loraloom.files import hashing
from loraloom.files.hashing import file_hash, first_changed, known_hash


def test_a_file_is_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(10_000)
    (tmp_path / "a").write_bytes(data)
    monkeypatch.setattr(hashing, "BLOCK", 1000)
    assert file_hash(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    once = hashing.file_hash
    monkeypatch.setattr(hashing, "file_hash", lambda path: reads.append(str(path)) or once(path))
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert {known_hash(path) for _ in range(3)} == {once(path)}
    assert len(reads) == 3, "it has changed a moment ago"
    monkeypatch.setattr(hashing, "SETTLED", 0)
    assert {known_hash(path) for _ in range(3)} == {once(path)}
    assert len(reads) == 4
    path.write_bytes(b"other")
    assert known_hash(path) == once(path)


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
