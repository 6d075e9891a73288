"""Promises of the look at data: what is trained on can be told also without colours, and every row is counted once."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from loraloom.config.train import TrainConfig
from loraloom.report.data import histogram
from loraloom.report.session import data_run


@pytest.mark.parametrize("colours", [True, False])
def test_what_is_trained_on_is_marked_where_there_are_no_colours_and_the_default_template_is_named(
    colours: bool, decoder_folder: Path, tmp_path: Path
) -> None:
    talk = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "the cat"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{json.dumps({'messages': talk})}\n" * 3)
    options = TrainConfig(model=str(decoder_folder), data=str(rows), task="causal-lm", output="-")
    out = io.StringIO()
    data_run(options, Console(file=out, force_terminal=colours, color_system="standard" if colours else None))
    assert ("⟦the cat" in out.getvalue()) is not colours
    assert "'loraloom-plain'" in out.getvalue()
    assert not Path("-").exists()


def test_bad_rows_that_are_skipped_are_shown_and_nothing_is_left_behind(decoder_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the cat"}\n{"text": "the film"}\n{"text": 7}\n')
    options = TrainConfig(model=str(decoder_folder), data=str(rows), task="causal-lm", output="-", on_bad_row="skip")
    out = io.StringIO()
    data_run(options, Console(file=out, width=200))
    assert "1 row cannot be used and is left out; see below" in out.getvalue()
    assert "must be a string, found int 7" in out.getvalue()


def test_every_word_that_is_trained_on_has_its_tag_the_first_class_too(decoder_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"tokens": ["the", "film", "was", "good"], "tags": ["A", "B", "A", "C"]}\n' * 2)
    options = TrainConfig(model=str(decoder_folder), data=str(rows), task="token-cls", output="-")
    out = io.StringIO()
    data_run(options, Console(file=out, width=200))
    assert "the[A] film[B] was[A] good[C]" in out.getvalue()


def test_every_row_is_in_one_bar_and_bars_do_not_overlap() -> None:
    lengths = [3, 3, 4, 9, 10, 11, 30, 31, 47]
    bars = [line.split() for line in histogram(lengths).plain.splitlines()[1:]]
    assert sum(int(bar[-1]) for bar in bars) == len(lengths)
    ends = [(int(bar[0]), int(bar[2] if bar[1] == "to" else bar[0])) for bar in bars]
    assert ends[0][0] == 3
    assert ends[-1][1] == 47
    assert all(high + 1 == low for (_, high), (low, _) in pairwise(ends))
    assert [line.split() for line in histogram([5, 5]).plain.splitlines()[1:]] == [["5", "█" * 40, "2"]]
