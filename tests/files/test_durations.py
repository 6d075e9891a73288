"""Times with units are read as people write them."""

from __future__ import annotations

from loraloom.files.durations import read, short


def test_times_are_read_as_people_write_them() -> None:
    words = {"2h": 7200, "90m": 5400, "1h30m": 5400, "30 s": 30, "1.5 h": 5400, "45": 45, "10 min": 600, "20 sec": 20}
    assert {word: read(word) for word in words} == words
    assert [read(word) for word in ("", "soon", "2 weeks", "h", "-3m", "2h x")] == [None] * 6
    assert [short(seconds) for seconds in (0.4, 90, 180, 7200, 7500)] == ["0s", "90s", "3m", "2h", "2h5m"]
