"""Promises about data that cannot be used: the message begins with file and line, or with the option at fault."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

Case = tuple[Callable[[Any], list[object]], list[str]]

GOOD = {"text": "good film", "label": "a"}
OTHER = {"text": "bad film", "label": "b"}
CHAT = [{"role": "user", "content": "say good"}, {"role": "assistant", "content": "good"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
TAGGED = [{"tokens": ["good", "film"], "tags": ["A", "O"]}] * 4
SQUAD = {"question": "who", "context": "the cat was good", "answers": {"text": ["cat"], "answer_start": [4]}}


def chat(w: Any, *messages: object, **more: object) -> list[object]:
    """Twelve conversations, and one of ``messages``."""
    rows = [{"messages": CHAT}] * 12
    return w.train(task="causal-lm", model=w.decoder, data=w.lines("a.jsonl", *rows, {"messages": messages, **more}))


def told(w: Any, *rows: object, more: tuple[object, ...] = ()) -> list[object]:
    """``rows`` behind twelve good ones, for a decoder."""
    good = [{"prompt": "say good :", "completion": " good"}] * 12
    return w.train(*more, task="causal-lm", model=w.decoder, data=w.lines("a.jsonl", *good, *rows))


def tagged(w: Any, *rows: object, more: tuple[object, ...] = ()) -> list[object]:
    return w.train(*more, task="token-cls", data=w.lines("a.jsonl", *TAGGED, *rows))


def asked(w: Any, more: tuple[object, ...] = (), **changes: object) -> list[object]:
    rows = [SQUAD] * 4
    return w.train(*more, task="question-answering", data=w.lines("a.jsonl", *rows, {**SQUAD, **changes}))


def score(w: Any, value: object) -> list[object]:
    """Labels that are numbers, and one that is something else."""
    rows = [{"text": "good film", "label": 0.5}, {"text": "bad film", "label": 1.5}] * 5
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"text": "film", "label": value}])
    return w.train(data=w.file("a.jsonl", text))


def listed(w: Any, sources: str) -> list[object]:
    """A run file with ``sources``."""
    file = w.file("run.yaml", f"data: {{train: {sources}}}\ntask: seq-cls\nmodel: {{name: {w.encoder}}}\n")
    return ["train", file, "--output", w.tmp / "out"]


def validated(w: Any, *rows: object, task: str = "seq-cls") -> list[object]:
    good = TAGGED if task == "token-cls" else [GOOD, OTHER] * 6
    return w.train("--eval-split", w.lines("v.jsonl", *rows), data=w.lines("a.jsonl", *good), task=task)


FILES: dict[str, Case] = {
    "a line that is no JSON": (
        lambda w: w.train(data=w.file("a.jsonl", json.dumps(GOOD) + '\n{"text": "x",\n')),
        ["a.jsonl, line 2: not JSON: ", "(character "],
    ),
    "a line that is cut off, behind a mark and CRLF": (
        lambda w: w.train(data=w.bytes("a.jsonl", b'\xef\xbb\xbf{"text": "x", "label": "a"}\r\n{"text": "y"\r\n')),
        ["a.jsonl, line 2: not JSON: Expecting ',' delimiter (character 13)"],
    ),
    "a missing column behind a mark and CRLF": (
        lambda w: w.train(data=w.bytes("a.csv", b"\xef\xbb\xbftext,lable\r\ngood,a\r\n")),
        ["a.csv, line 2: no column 'label'", "did you mean 'lable'?"],
    ),
    "not UTF-8 in JSON": (
        lambda w: w.train(data=w.bytes("a.jsonl", b'{"text": "caf\xe9", "label": "a"}\n')),
        ["a.jsonl, line 1: not UTF-8: byte 14 of the line is 0xe9", "save the file as UTF-8"],
    ),
    "UTF-16": (
        lambda w: w.train(data=w.bytes("a.jsonl", json.dumps(GOOD).encode("utf-16"))),
        ["a.jsonl: the file is UTF-16; save it as UTF-8"],
    ),
    "zero bytes": (
        lambda w: w.train(data=w.bytes("a.csv", b"text,label\ngood\0,a\n")),
        ["a.csv, line 2: a zero byte (character 5)"],
    ),
    "a file of blank lines": (lambda w: w.train(data=w.file("a.jsonl", "\n \n")), ["a.jsonl: the file is empty"]),
    "a mark and nothing else": (
        lambda w: w.train(data=w.bytes("a.jsonl", b"\xef\xbb\xbf")),
        ["a.jsonl: the file is empty"],
    ),
    "a JSON array that is cut off": (
        lambda w: w.train(data=w.file("a.json", f"[{json.dumps(GOOD)}, {json.dumps(OTHER)}")),
        ["a.json, "],
    ),
    "a JSON line that is no object": (
        lambda w: w.train(data=w.file("a.jsonl", json.dumps(GOOD) + "\n[1, 2]\n")),
        ["a.jsonl, line 2: a JSON object is needed on every line, found list [1, 2]"],
    ),
    "a key that is there twice": (
        lambda w: w.train(data=w.file("a.jsonl", '{"text": "x", "label": "a", "text": "y"}\n')),
        ["a.jsonl, line 1: the key 'text' is there twice in one object"],
    ),
    "a label that is NaN in JSON": (
        lambda w: w.train(data=w.file("a.jsonl", '{"text": "x", "label": NaN}\n')),
        ["a.jsonl, line 1: NaN is not JSON"],
    ),
    "a header with a column twice": (
        lambda w: w.train(data=w.file("a.csv", "text,text,label\na,b,c\n")),
        ["a.csv, line 1: the column 'text' is there twice"],
    ),
    "a table with semicolons": (
        lambda w: w.train(data=w.file("a.csv", "text;label\ngood;a\n")),
        ["a.csv, line 1: one column, 'text;label': its fields are parted by a semicolon"],
    ),
    "a quote that is not closed": (
        lambda w: w.train(data=w.file("a.csv", 'text,label\n"good,a\nbad,b\n')),
        ["a.csv, line 2: not CSV", "is a double quote not closed?"],
    ),
    "Parquet by name alone": (
        lambda w: w.train(data=w.file("a.parquet", "text,label\ngood,a\n")),
        ["a.parquet: not a Parquet file that can be read"],
    ),
    "JSON lines that are Parquet": (
        lambda w: w.train(data=w.bytes("a.jsonl", b"PAR1" + bytes(50))),
        ["a.jsonl: the file is not text; it is Parquet: name it .parquet"],
    ),
    "a gzip file that is cut short": (
        lambda w: w.train(data=w.bytes("a.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xab")),
        ["a.jsonl.gz: the gzip file is damaged or cut short"],
    ),
    "an archive": (lambda w: w.train(data=w.bytes("a.zip", b"PK")), ["a.zip: an archive; unpack it"]),
    "a file without a suffix": (lambda w: w.train(data=w.file("rows", "x")), ["rows: no suffix; a data file is"]),
    "a folder named like a file": (
        lambda w: ((w.tmp / "a.jsonl").mkdir(), w.train(data=w.tmp / "a.jsonl"))[1],
        ["a.jsonl: a directory without data files in it"],
    ),
    "a glob that fits nothing": (lambda w: w.train(data=w.tmp / "*.csv"), ["*.csv: no file fits"]),
    "a damaged saved dataset": (
        lambda w: ((w.tmp / "saved").mkdir(), w.file("saved/state.json", "{}"), w.train(data=w.tmp / "saved"))[2],
        ["saved: the saved dataset cannot be read"],
    ),
    "a row that is huge": (
        lambda w: w.train(data=w.file("a.jsonl", json.dumps({"text": "x" * 17 * 2**20, "label": "a"}) + "\n")),
        ["a.jsonl, line 1: a row of more than 16 MiB; cut it into several rows"],
    ),
    "one row of a regression": (lambda w: w.train(data=w.lines("a.jsonl", {"text": "x", "label": 0.5})), ["1 of 1"]),
    "one row for a decoder": (
        lambda w: w.train(task="causal-lm", model=w.decoder, data=w.file("a.txt", "good film\n")),
        ["1 of 1 rows cannot be held out; give more rows or hold out fewer"],
    ),
    "a source that is named twice": (
        lambda w: listed(w, f"[{w.reviews}, {w.reviews}]"),
        ["data: ", "is named twice; for its rows to count double give it the weight 2"],
    ),
    "a weight of 0": (
        lambda w: listed(w, f"[{{path: {w.reviews}, weight: 0}}]"),
        ["run.yaml:1: data.train: a weight must be a number above 0, found 0"],
    ),
    "a weight that is a slip": (
        lambda w: listed(w, f"[{{path: {w.reviews}, weight: 1e6}}]"),
        ["weight of ", "a number above 0 and at most 1000"],
    ),
    "a source with a key that is unknown": (
        lambda w: listed(w, f"[{{path: {w.reviews}, wieght: 2}}]"),
        ["run.yaml:1: data.train: a source has path, weight", "did you mean 'weight'?"],
    ),
    "a split of a file": (
        lambda w: listed(w, f"{{path: {w.reviews}, split: train}}"),
        ["data: ", "is a file, which has no 'split'"],
    ),
    "a hub name without a network": (
        lambda w: w.train(data="nobody/nothing-of-this-name"),
        ["nobody/nothing-of-this-name: no such file or folder here", "there is no network"],
    ),
}  # fmt: skip

ROWS: dict[str, Case] = {
    "a text of the wrong type": (
        lambda w: w.train(data=w.rows({"text": ["good"], "label": "a"})),
        ["rows.jsonl, line 11: 'text' must be a string, found list ['good']"],
    ),
    "half of a surrogate pair": (
        lambda w: w.train(data=w.rows({"text": "ab\ud800", "label": "a"})),
        ["rows.jsonl, line 11: 'text' holds half of a surrogate pair (character 3)"],
    ),
    "a label that is no class": (
        lambda w: w.train(data=w.rows({"text": "x", "label": None})),
        ["rows.jsonl, line 11: 'label' must be a string or a whole number, found null"],
    ),
    "a label that is infinite": (
        lambda w: score(w, 1e999),
        ["a.jsonl, line 11: Infinity is not JSON"],
    ),
    "a label of more digits than Python reads": (
        lambda w: w.train(
            data=w.file("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": ' + "1" * 5000 + "}\n")
        ),
        ["a.jsonl, line 2: 'label' must be a string or a whole number, found int of 5,000 digits"],
    ),
    "a number that is infinite in CSV": (
        lambda w: w.train(data=w.file("a.csv", "text,label\n" + "good,0.5\nbad,1.5\n" * 3 + "film,inf\n")),
        ["a.csv, line 8: 'label' must be a number that is finite (regression), found str 'inf'"],
    ),
    "a word among numbers": (
        lambda w: score(w, "high"),
        ["a.jsonl, line 1: 'label' must be a string or a whole number, found float 0.5", "problem_type: regression"],
    ),
    "a word among numbers that are said to be such": (
        lambda w: [*score(w, "high"), "--problem-type", "regression"],
        ["a.jsonl, line 11: 'label' must be a number that is finite (regression), found str 'high'"],
    ),
    "a class where the others are several": (
        lambda w: w.train(data=w.lines("a.jsonl", *[{"text": "x", "label": ["a"]}] * 9, {"text": "x", "label": "a a"})),
        ["a.jsonl, line 10: 'label' must be a list"],
    ),
    "columns that map to nothing": (
        lambda w: w.train("--columns", '{"text": "body"}'),
        [".*no column 'body', which columns maps to 'text'"],
    ),
    "columns that no shape has": (
        lambda w: w.train("--columns", '{"txet": "body"}'),
        ["columns: 'txet' is no column of seq-cls", "did you mean 'text'?"],
    ),
    "columns that are no JSON": (lambda w: w.train("--columns", "text=body"), ["columns: not JSON"]),
    "columns that are no names": (
        lambda w: w.train("--columns", '{"text": 3}'),
        ["columns: must give names for names"],
    ),
    "an unknown format": (
        lambda w: w.train("--format", "text-lable"),
        ["format: 'text-lable' is not a shape of seq-cls", "did you mean 'text-label'?"],
    ),
    "the format of another task": (
        lambda w: w.train("--format", "messages"),
        ["format: 'messages' is not a shape of seq-cls"],
    ),
    "a format that the rows do not have": (
        lambda w: told(w, more=("--format", "alpaca")),
        ["a.jsonl, line 1: no column 'instruction'"],
    ),
    "lines of what is no plain text": (
        lambda w: told(w, more=("--format", "text-lines")),
        ["format: 'text-lines' is for plain text (.txt)"],
    ),
    "a completion that is empty": (
        lambda w: told(w, {"prompt": "say :", "completion": " "}),
        ["a.jsonl, line 13: 'completion' is empty"],
    ),
    "rows of two shapes": (
        lambda w: told(w, {"text": "good"}),
        ["a.jsonl, line 13: no column 'prompt'; the columns are 'text'"],
    ),
    "rows of which all is masked": (
        lambda w: w.train("--max-length", 8, task="causal-lm", model=w.decoder, data=w.lines(
            "a.jsonl", *[{"prompt": "the film was a book with a cat in it", "completion": " good"}] * 9)),
        ["a.jsonl, line 1: nothing of 'completion' is left to train on within max_length=8", "rows like this: 9"],
    ),
    "rows of which all is masked, and allowed": (
        lambda w: w.train("--max-length", 8, "--allow-untrained", task="causal-lm", model=w.decoder, data=w.lines(
            "a.jsonl", *[{"prompt": "the film was a book with a cat in it", "completion": " good"}] * 9)),
        ["a.jsonl: no training row is left of 8", "nothing of 'completion' is left"],
    ),
    "a row over length": (
        lambda w: w.train("--max-length", 4, "--overlong", "error"),
        [".*line 1: ", "tokens, where max_length is 4", "(truncate or drop)"],
    ),
    "rows that all are over length": (
        lambda w: w.train("--max-length", 3, "--overlong", "drop", data=w.lines(
            "a.jsonl", *[{"text": "a good film", "label": "a"}, {"text": "a bad film", "label": "b"}] * 5)),
        ["a.jsonl: no training row is left of 9: 9 rows over max_length"],
    ),
    "a prompt that is too long to be split": (
        lambda w: told(
            w, {"prompt": "the film " * 20, "completion": " good"}, more=("--overlong", "split", "--max-length", 20)
        ),
        ["a.jsonl, line 13: the prompt alone has 41 tokens, where max_length is 20"],
    ),
    # conversations
    "a conversation that is empty": (lambda w: chat(w), ["a.jsonl, line 13: 'messages' is empty"]),
    "a role that nobody has": (
        lambda w: chat(w, CHAT[0], {"role": "assistent", "content": "x"}),
        ["a.jsonl, line 13: 'messages' item 2: the role 'assistent' is not one of", "did you mean 'assistant'?"],
    ),
    "a message without a role": (
        lambda w: chat(w, CHAT[0], {"rol": "assistant", "content": "x"}),
        ["a.jsonl, line 13: 'messages' item 2: no 'role'", "did you mean 'rol'?"],
    ),
    "an assistant that says nothing": (
        lambda w: chat(w, CHAT[0], {"role": "assistant", "content": None}),
        ["a.jsonl, line 13: 'messages' item 2: 'content' of assistant must be a string, found null"],
    ),
    "a conversation without an assistant": (
        lambda w: chat(w, CHAT[0]),
        ["a.jsonl, line 13: 'messages' has no message of the assistant to train on"],
    ),
    "a weight that is neither 0 nor 1": (
        lambda w: chat(w, CHAT[0], {**CHAT[1], "weight": 0.5}),
        ["a.jsonl, line 13: 'messages' item 2: the weight must be 0 (not trained on) or 1, found float 0.5"],
    ),
    "an image": (
        lambda w: chat(w, {"role": "user", "content": [{"type": "image_url"}]}, CHAT[1]),
        ["a.jsonl, line 13: 'messages' item 1: 'content' has a part that is no text", "image_url"],
    ),
    "a tool call without a name": (
        lambda w: chat(w, CHAT[0], {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}),
        ["a.jsonl, line 13: 'messages' item 2: a tool call needs a 'name' and 'arguments'"],
    ),
    "arguments of a tool that are no JSON": (
        lambda w: chat(w, CHAT[0], {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "look", "arguments": "{x"}}]}),
        ["a.jsonl, line 13: 'messages' item 2: the arguments of the call of 'look' are not JSON"],
    ),
    "a user that calls a tool": (
        lambda w: chat(w, {**CHAT[0], "tool_calls": [CALL]}, CHAT[1]),
        ["a.jsonl, line 13: 'messages' item 1: only the assistant calls tools, not 'user'"],
    ),
    "tools without a name": (
        lambda w: chat(w, *CHAT, tools=[{"nam": "look"}]),
        ["a.jsonl, line 13: 'tools' item 1: a tool is an object with a 'name'"],
    ),
    "ShareGPT with a speaker that nobody knows": (
        lambda w: w.train(task="causal-lm", model=w.decoder, data=w.lines(
            "a.jsonl", {"conversations": [{"from": "human", "value": "x"}, {"from": "gtp", "value": "y"}]})),
        ["a.jsonl, line 1: 'conversations' item 2: 'from' is 'gtp'", "did you mean 'gpt'?"],
    ),
    # tags, answers, targets
    "more words than tags": (
        lambda w: tagged(w, {"tokens": ["a", "b"], "tags": ["O"]}),
        ["a.jsonl, line 5: 'tags' has 1 items, where 'tokens' has 2"],
    ),
    "words that are no list": (
        lambda w: tagged(w, {"tokens": "a b", "tags": ["O", "O"]}),
        ["a.jsonl, line 5: 'tokens' must be a list"],
    ),
    "one tag only": (
        lambda w: w.train(task="token-cls", data=w.lines("a.jsonl", *[{"tokens": ["a"], "tags": ["O"]}] * 9)),
        ["a.jsonl: two tags or more are needed; all words are tagged 'O'"],
    ),
    "an answer at another place": (
        lambda w: asked(w, answers={"text": ["cat"], "answer_start": [0]}),
        ["a.jsonl, line 5: 'answers' 'cat' is not at character 0 of the context; it is at 4"],
    ),
    "an answer that is not in the context": (
        lambda w: asked(w, answers={"text": ["dog"], "answer_start": [4]}),
        ["a.jsonl, line 5: 'answers' 'dog' is not at character 4 of the context; it is nowhere in the context"],
    ),
    "answers without places": (
        lambda w: asked(w, answers={"text": ["cat"], "answer_start": []}),
        ["a.jsonl, line 5: 'answers' needs lists 'text' and 'answer_start' of one length"],
    ),
    "an empty target": (
        lambda w: w.train(task="seq2seq-lm", model=w.translator, data=w.lines(
            "a.jsonl", *[{"source": "good", "target": "bad"}] * 9, {"source": "good", "target": ""})),
        ["a.jsonl, line 10: 'target' is empty"],
    ),
    # validation
    "validation rows without a label": (
        lambda w: validated(w, GOOD, {"text": "x"}),
        ["v.jsonl, line 2: no column 'label'"],
    ),
    "validation rows with a tag that is new": (
        lambda w: validated(w, {"tokens": ["good"], "tags": ["B"]}, task="token-cls"),
        ["v.jsonl, line 1: the tag 'B' is never seen in training, which has 2 tags"],
    ),
    "validation that is empty": (lambda w: validated(w), ["v.jsonl: the file is empty"]),
    "validation that is of another shape": (
        lambda w: validated(w, {"prompt": "x", "completion": "y"}),
        ["v.jsonl, line 1: no column 'text'"],
    ),
}  # fmt: skip
CASES = {**FILES, **ROWS}


@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_one_message_that_says_where_and_nothing_is_written(
    case: str, world: Any, refused: Callable[..., None]
) -> None:
    make, (first, *parts) = CASES[case]
    # Files of the session lie elsewhere, and their path goes before the line.
    refused(make(world), first.removeprefix(".*"), *parts, begins=not first.startswith(".*"))


def test_a_file_whose_permissions_forbid_it_is_refused(world: Any, refused: Callable[..., None]) -> None:
    if os.geteuid() == 0:
        pytest.skip("needs a user whom permissions bind")
    folder = world.tmp / "locked"
    folder.mkdir()
    world.lines("locked/a.jsonl", GOOD, OTHER)
    arguments = world.train(data=folder / "a.jsonl")
    folder.chmod(0)
    try:
        refused(arguments, "locked/a.jsonl: cannot be read: Permission denied")
    finally:
        folder.chmod(0o700)


def test_a_file_that_the_system_does_not_open_is_refused_in_its_words(
    world: Any, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for a user whom permissions do not bind: the system's answer is given in its place."""
    data = world.lines("a.jsonl", GOOD, OTHER)

    def deny(path: Any, *arguments: Any) -> Any:
        if str(path) == str(data):
            raise PermissionError(13, os.strerror(13), str(path))
        return open(path, *arguments)

    monkeypatch.setattr("loraloom.data.read.readers.open", deny, raising=False)
    refused(world.train(data=data), "a.jsonl: cannot be read: Permission denied")


# Skipped ----------------------------------------------------------------------------------------------------

LABELLED = [{"text": f"good film {i}", "label": "a"} for i in range(6)]
LABELLED += [{"text": f"bad film {i}", "label": "b"} for i in range(6)]
#: What a bad row is like: task, the good rows, the bad line as text, the reason.
SKIPPED: dict[str, tuple[str, list[Any], str, str]] = {
    "no JSON": ("seq-cls", LABELLED, '{"text": "x",', "not JSON"),
    "no object": ("seq-cls", LABELLED, "[1]", "a JSON object is needed on every line"),
    "a key twice": ("seq-cls", LABELLED, '{"text": "x", "text": "y", "label": "a"}', "the key 'text' is there twice"),
    "a wrong type": ("seq-cls", LABELLED, '{"text": 3, "label": "a"}', "'text' must be a string"),
    "a missing column": ("seq-cls", LABELLED, '{"text": "x"}', "no column 'label'"),
    "NaN": ("seq-cls", LABELLED, '{"text": "x", "label": NaN}', "NaN is not JSON"),
    "a huge row": ("seq-cls", LABELLED, json.dumps({"text": "x" * 2**20, "label": "a"}), "a row of more than"),
    "a tag too few": ("token-cls", TAGGED, '{"tokens": ["a", "b"], "tags": ["O"]}', "'tags' has 1 items"),
    "an answer elsewhere": (
        "question-answering",
        [SQUAD] * 6,
        json.dumps({**SQUAD, "answers": {"text": ["dog"], "answer_start": [4]}}),
        "it is nowhere in the context",
    ),
    "a role that nobody has": (
        "causal-lm",
        [{"messages": CHAT}] * 6,
        '{"messages": [{"role": "me", "content": "x"}]}',
        "the role 'me' is not one of",
    ),
    "nothing to train on": (
        "causal-lm",
        [{"prompt": f"say {word} :", "completion": " good"} for word in ("the", "film", "was", "a", "book", "with")],
        json.dumps({"prompt": "the film " * 40, "completion": " good"}),
        "nothing of 'completion' is left to train on",
    ),
    "an empty target": (
        "seq2seq-lm",
        [{"source": "good", "target": "bad"}] * 6,
        '{"source": "x", "target": ""}',
        "'target' is empty",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "first"), [
    (case, first) for case in SKIPPED for first in (True, False)
    if case != "no object" or not first  # a file that begins with a bracket is one array
])  # fmt: skip
def test_a_bad_row_that_is_skipped_lands_in_a_file_with_its_place_and_the_reason(
    case: str, first: bool, world: Any, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraloom.data.read.readers.ROW_LIMIT", 2**19)
    task, good, bad, reason = SKIPPED[case]
    lines = [json.dumps(row) for row in good]
    lines.insert(0 if first else 3, bad)
    model = {"causal-lm": world.decoder, "seq2seq-lm": world.translator}.get(task, world.encoder)
    data = world.file("a.jsonl", "\n".join(lines) + "\n")
    arguments = world.train("--on-bad-row", "skip", "--report-to", "none", task=task, model=model, data=data)
    ended = call(*arguments)
    assert (ended.code, ended.err) == (0, "")
    (kept,) = map(json.loads, (world.tmp / "out" / "bad-rows.jsonl").read_text().splitlines())
    assert (kept["file"], kept["line"]) == (str(data), 1 if first else 4)
    assert reason in kept["reason"]
    assert kept["row"][:10] in bad or json.loads(kept["row"]) == json.loads(bad)
    assert "1 row cannot be used and is left out; see" in ended.out
    record = json.loads((world.tmp / "out" / "run.json").read_bytes())
    assert record["data"]["rows"] + record["data"]["evaluation_rows"] == len(good)


def test_a_label_that_is_new_in_validation_is_skipped_like_other_bad_rows(world: Any, call: Callable[..., Any]) -> None:
    held_out = world.lines("v.jsonl", GOOD, {"text": "film", "label": "c"}, OTHER)
    given = ["--on-bad-row", "skip", "--report-to", "none", "--eval-split", held_out]
    assert call(*world.train(*given, data=world.lines("a.jsonl", *LABELLED))).code == 0
    (kept,) = map(json.loads, (world.tmp / "out" / "bad-rows.jsonl").read_text().splitlines())
    assert (kept["file"], kept["line"]) == (str(held_out), 2)
    assert "the label 'c' is never seen in training" in kept["reason"]


def test_where_all_rows_are_bad_skipping_them_leaves_an_error(world: Any, refused: Callable[..., None]) -> None:
    data = world.file("a.jsonl", "{x\n[1]\n")
    refused(world.train("--on-bad-row", "skip", data=data), "a.jsonl: ", "all of the 2 rows are bad")
