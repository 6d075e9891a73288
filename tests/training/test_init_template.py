"""Promises of a run file to begin with: it can be read as it is, and says what was found in the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraloom.config import runfile
from loraloom.config.names import TASKS
from loraloom.errors import ConfigError, DataError
from loraloom.training.init_template import begin, guess

ROWS: dict[str, tuple[str, str, Any]] = {
    "messages": (
        "causal-lm",
        "messages",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ),
    "alpaca": ("causal-lm", "alpaca", {"instruction": "a", "input": "", "output": "b"}),
    "pairs": ("causal-lm", "prompt-completion", {"prompt": "a", "completion": "b"}),
    "texts": ("causal-lm", "text", {"text": "a"}),
    "labels": ("seq-cls", "text-label", {"text": "a", "label": "x"}),
    "tags": ("token-cls", "tokens-tags", {"tokens": ["a"], "tags": ["O"]}),
    "translations": ("seq2seq-lm", "source-target", {"source": "a", "target": "b"}),
    "answers": (
        "question-answering",
        "squad",
        {"question": "a?", "context": "b", "answers": {"text": ["b"], "answer_start": [0]}},
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_task_follows_from_the_rows(kind: str, tmp_path: Path) -> None:
    task, shape, row = ROWS[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    found, recognised = guess(str(path))
    assert (found, recognised.name) == (task, shape)
    assert guess(str(path), task)[0] in TASKS


def test_rows_that_fit_no_task_say_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "a", "stars": 3}\n')
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: the columns 'body', 'stars' fit no task"):
        guess(str(path))


def test_the_file_can_be_read_and_gives_what_was_found(decoder_folder: Path, chats: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.yaml"
    assert begin(str(decoder_folder), str(chats), path) == "causal-lm"
    options = runfile.read(path).options
    assert (options.model, options.data, options.task) == (str(decoder_folder), str(chats), "causal-lm")
    assert options.output == "runs/chats"
    assert options.lora.target_modules == "all-linear"
    text = path.read_text()
    assert "recognised as prompt-completion" in text
    # What is commented out can be taken in as it stands.
    opened = "\n".join(
        line.replace("# ", "", 1) if line.startswith("  # ") else line
        for line in text.splitlines()
        if "device:" not in line and "my_module" not in line and "columns:" not in line
    )
    path.write_text(opened)
    assert runfile.read(path).options.early_stopping_patience == 3


def test_a_file_that_is_there_stays(decoder_folder: Path, chats: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.yaml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        begin(str(decoder_folder), str(chats), path)
    assert path.read_text() == "mine"
    begin(str(decoder_folder), str(chats), path, overwrite=True)
    assert runfile.read(path).options.task == "causal-lm"


def test_bad_rows_are_passed_over_in_guessing_where_they_are_to_be_skipped(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a", "label": "b"}\nno JSON\n')
    with pytest.raises(DataError, match="line 2"):
        guess(str(data))
    assert guess(str(data), skip=True)[0] == "seq-cls"


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (("Message", "Intent"), """--task seq-cls --columns '{"text": "Message", "label": "Intent"}'"""),
        (("content", "category"), """--task seq-cls --columns '{"text": "content", "label": "category"}'"""),
        (("question", "answer"), """--task causal-lm --columns '{"prompt": "question", "completion": "answer"}'"""),
        (("instruction", "response"), """--columns '{"output": "response"}'"""),
    ],
)
def test_common_names_of_columns_are_proposed_with_the_line_to_type(
    columns: tuple[str, str], line: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(dict(zip(columns, ("what is it", "good"), strict=True))) + "\n")
    with pytest.raises(DataError) as raised:
        guess(str(path))
    assert line in str(raised.value)


def test_names_of_columns_match_without_regard_to_case(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("Text,LABEL\ngood film,a\nbad film,b\n")
    task, shape = guess(str(path))
    assert (task, shape.columns) == ("seq-cls", {"text": "Text", "label": "LABEL"})
    _, shape = guess(str(path), "seq-cls", columns={"text": "TEXT"})
    assert shape.columns == {"text": "Text", "label": "LABEL"}
