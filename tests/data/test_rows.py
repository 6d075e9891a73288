"""Promises of the readers: nothing wrong with a file passes in silence, and each message says where."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.config import TaskType
from loraloom.data.rows import (
    Row,
    as_task,
    check_columns,
    check_labels,
    data_hash,
    label_ids,
    label_names,
    read_rows,
    split,
)
from loraloom.errors import ConfigError, DataError

CALM = settings(max_examples=60, deadline=None)  # two cores are shared: a slow example is no failure


def saved(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def read(path: Path) -> list[tuple[dict[str, object], int]]:
    rows = read_rows(path)
    assert {row.file for row in rows} == {str(path)}
    return [(row.fields, row.line) for row in rows]


def refused(path: Path, *words: str) -> None:
    with pytest.raises(DataError) as error:
        read_rows(path)
    for word in (str(path), *words):
        assert word in str(error.value)


def labelled(*labels: object) -> list[Row]:
    return [Row({"text": "x", "label": label}, line) for line, label in enumerate(labels, start=1)]


# Reading what is right ------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path, end: str, mark: bytes) -> None:
    json_lines = end.join(['{"text": "é", "label": 1}', "", '{"text": "b", "label": 2}'])
    csv_lines = end.join(["text,label", "é,1", "", "b,2"]) + end
    assert read(saved(tmp_path, "a.jsonl", mark + json_lines.encode())) == [
        ({"text": "é", "label": 1}, 1),
        ({"text": "b", "label": 2}, 3),
    ]
    assert read(saved(tmp_path, "a.CSV", mark + csv_lines.encode())) == [
        ({"text": "é", "label": "1"}, 2),
        ({"text": "b", "label": "2"}, 4),
    ]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@CALM
@given(st.lists(st.dictionaries(TEXTS, TEXTS | st.integers(-(10**20), 10**20) | st.none()), min_size=1))
def test_any_json_objects_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, objects: list[dict[str, object]]
) -> None:
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in objects)
    rows = read(saved(tmp_path_factory.mktemp("rows"), "a.jsonl", text))
    assert rows == [(value, line) for line, value in enumerate(objects, start=1)]


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@CALM
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1))
def test_any_csv_cells_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]
) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *cells])
    rows = read_rows(saved(tmp_path_factory.mktemp("rows"), "a.csv", file.getvalue()))
    assert [(row.fields["text"], row.fields["label"]) for row in rows] == cells


def test_a_csv_row_is_known_by_the_line_on_which_it_starts(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.csv", 'text,label\n"one\ntwo\nthree",a\nfour,b\n')
    assert [(row.fields["text"], row.line) for row in read_rows(path)] == [
        ("one\ntwo\nthree", 2),
        ("four", 5),
    ]


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.jsonl", '{"text": "one\u2028two\x85three"}\n{"text": "four"}\n')
    assert read(path) == [({"text": "one\u2028two\x85three"}, 1), ({"text": "four"}, 2)]


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.jsonl", b"\xef\xbb\xbf{}\r\n")
    assert data_hash(path) == hashlib.sha256(b"\xef\xbb\xbf{}\r\n").hexdigest()


# Reading what is wrong ------------------------------------------------------------------------------------


def test_a_missing_file_is_named_with_the_nearest_one_beside_it(tmp_path: Path) -> None:
    saved(tmp_path, "train.jsonl", "{}")
    refused(tmp_path / "trian.jsonl", "no such file", "did you mean 'train.jsonl'")
    refused(tmp_path / "no" / "folder.csv", "no such file")
    with pytest.raises(DataError, match="no such file"):
        data_hash(tmp_path / "trian.jsonl")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "a directory")


def test_what_the_system_says_of_a_file_it_cannot_open_is_passed_on(tmp_path: Path) -> None:
    refused(tmp_path / ("a" * 300 + ".jsonl"), "cannot be read: File name too long")
    refused(saved(tmp_path, "a.jsonl", "{}") / "b.jsonl", "cannot be read: Not a directory")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@pytest.mark.parametrize("content", ["", "\n \r\n\n", "\ufeff"])
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    refused(saved(tmp_path, name, content), "empty")


def test_a_csv_file_with_only_a_header_is_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path, "a.csv", "text,label\n"), "empty")


@pytest.mark.parametrize(("name", "found"), [("a.jsom", "'.jsom'"), ("a.docx", "'.docx'"), ("a", "no suffix")])
def test_an_unknown_suffix_is_named_with_what_is_read(tmp_path: Path, name: str, found: str) -> None:
    refused(saved(tmp_path, name, "{}"), found, ".jsonl", ".csv")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_bytes_that_are_not_utf8_are_named_by_line_and_byte(tmp_path: Path, name: str) -> None:
    refused(saved(tmp_path, name, b'{"a": 1}\n{"b": "caf\xe9"}\n'), "line 2", "byte 11", "0xe9")


def test_a_byte_order_mark_does_not_shift_the_byte_that_is_named(tmp_path: Path) -> None:
    refused(saved(tmp_path, "a.jsonl", b"\xef\xbb\xbfab\xff"), "line 1", "byte 3 ")


def test_a_utf16_file_is_called_that(tmp_path: Path) -> None:
    refused(saved(tmp_path, "a.csv", "text,label\n".encode("utf-16")), "UTF-16")


@pytest.mark.parametrize("line", ["{'text': 1}", '{"a": 1} {"b": 2}', '{"a": ', "text,label", '{"a": "\t"}'])
def test_a_line_that_is_not_json_is_named_with_file_and_line(tmp_path: Path, line: str) -> None:
    refused(saved(tmp_path, "a.jsonl", '{"a": 1}\n\n' + line + "\n"), "line 3", "not JSON")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_json_beyond_what_python_reads_is_refused_without_a_traceback(tmp_path: Path, line: str) -> None:
    refused(saved(tmp_path, "a.jsonl", '{"a": 1}\n' + line), "line 2")


@pytest.mark.parametrize(("line", "found"), [("[1, 2]", "list [1, 2]"), ("null", "null"), ("3", "int 3")])
def test_a_json_line_that_is_not_an_object_is_refused(tmp_path: Path, line: str, found: str) -> None:
    refused(saved(tmp_path, "a.jsonl", '{"a": 1}\n' + line), "line 2", found)


@pytest.mark.parametrize("row", ["a,b,c", "a"])
def test_a_csv_row_of_another_width_is_refused(tmp_path: Path, row: str) -> None:
    refused(saved(tmp_path, "a.csv", f'text,label\n"x\ny",b\n{row}\n'), "line 4", "the header has 2")


def test_a_quote_that_is_never_closed_is_named_by_the_line_of_its_row(tmp_path: Path) -> None:
    refused(saved(tmp_path, "a.csv", 'text,label\na,b\n"c,d\ne,f\n'), "line 3", "not CSV")


def test_text_after_a_closing_quote_is_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path, "a.csv", 'text,label\n"a" b,c\n'), "line 2", "not CSV")


def test_a_csv_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path, "a.csv", "text,label,text\na,b,c\n"), "line 1", "'text'")


@CALM
@given(st.binary(max_size=200))
def test_no_bytes_at_all_raise_anything_but_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("a.jsonl", "a.csv"):
        path = saved(folder, name, content)
        try:
            rows = read_rows(path)
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert rows


# Columns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seq-cls", "SEQ_CLS", TaskType.SEQ_CLS])
def test_a_task_goes_by_its_option_its_peft_name_and_its_enum(name: str) -> None:
    assert as_task(name) is TaskType.SEQ_CLS


def test_a_task_that_rows_are_not_read_for_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'seq_cl' is not one of seq-cls, causal-lm, .*; did you mean 'seq-cls'"):
        as_task("seq_cl")
    with pytest.raises(ConfigError, match="FEATURE_EXTRACTION"):
        as_task(TaskType.FEATURE_EXTRACTION)


def test_the_columns_of_each_task_are_recognised() -> None:
    assert check_columns([Row({"text": "a", "label": 1, "id": 7}, 1)], "seq-cls", "f") == ("text", "label")
    assert check_columns([Row({"text": "a"}, 1)], "causal-lm", "f") == ("text",)
    both = Row({"text": "a", "prompt": "", "completion": "c"}, 1)
    assert check_columns([both], "causal-lm", "f") == ("prompt", "completion")


def test_a_missing_column_is_named_with_those_found_the_nearest_file_and_line() -> None:
    rows = [Row({"text": "a", "label": 1}, 1), Row({"text": "b", "lable": 1}, 4)]
    with pytest.raises(DataError) as error:
        check_columns(rows, "seq-cls", "some.csv")
    for part in ("some.csv, line 4", "no column 'label'", "'text', 'lable'", "did you mean 'lable'"):
        assert part in str(error.value)


def test_half_of_a_prompt_and_completion_names_the_other_half() -> None:
    with pytest.raises(DataError, match="no column 'completion'.*did you mean 'completions'"):
        check_columns([Row({"prompt": "a", "completions": "b"}, 1)], "causal-lm", "f")


def test_rows_of_another_form_than_the_first_are_refused() -> None:
    rows = [Row({"prompt": "a", "completion": "b"}, 1), Row({"text": "c"}, 2)]
    with pytest.raises(DataError, match="line 2: no column 'prompt'"):
        check_columns(rows, "causal-lm", "f")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "null"),
        (3, "int 3"),
        (["a"], "list"),
        ("", "empty"),
        (" \n", "empty"),
        ("a\ud800", "surrogate"),
    ],
)
def test_a_text_that_is_no_text_is_refused(text: object, found: str) -> None:
    rows = [Row({"text": "a", "label": 1}, 1), Row({"text": text, "label": 1}, 2)]
    with pytest.raises(DataError, match=f"f, line 2: 'text'.*{found}"):
        check_columns(rows, "seq-cls", "f")


def test_an_empty_prompt_is_allowed_and_an_empty_completion_is_not() -> None:
    check_columns([Row({"prompt": "", "completion": "b"}, 1)], "causal-lm", "f")
    with pytest.raises(DataError, match="'completion' is empty"):
        check_columns([Row({"prompt": "a", "completion": ""}, 1)], "causal-lm", "f")


@pytest.mark.parametrize("label", [True, None, 0.5, float("nan"), float("inf"), [1], {}, "", " "])
def test_a_label_that_is_neither_a_string_nor_a_whole_number_is_refused(label: object) -> None:
    with pytest.raises(DataError, match="f, line 2: 'label'"):
        check_columns(labelled("a", label), "seq-cls", "f")


# Labels ---------------------------------------------------------------------------------------------------


def test_whole_numbers_are_ordered_by_value_and_other_labels_by_name() -> None:
    assert label_names(labelled(10, 9, -1, 9, 0), "f") == ["-1", "0", "9", "10"]
    assert label_names(labelled("10", "9", "b", "a"), "f") == ["10", "9", "a", "b"]


def test_a_number_is_the_same_label_in_csv_and_in_json() -> None:
    labels = label_names(labelled("2", "10"), "train.csv")
    assert label_ids(labelled(10, 2, 2.0, "10"), labels, "eval.jsonl") == [1, 0, 0, 1]


@CALM
@given(st.lists(st.integers() | TEXTS.filter(str.strip), min_size=2))
def test_label_ids_depend_on_the_set_of_labels_and_not_on_their_order(labels: list[object]) -> None:
    if len({str(label) for label in labels}) < 2:
        labels = [*labels, "one", "two"]
    names = label_names(labelled(*labels), "f")
    assert names == label_names(labelled(*reversed(labels)), "f")
    assert [names[i] for i in label_ids(labelled(*labels), names, "f")] == [str(label) for label in labels]


def test_fewer_than_two_classes_are_refused() -> None:
    with pytest.raises(DataError, match="f: .*two classes.*all 2 rows are labelled 'a'"):
        label_names(labelled("a", "a"), "f")


def test_a_label_never_seen_in_training_is_named_with_line_and_nearest() -> None:
    train = labelled("networking", "text")
    check_labels(train, labelled("text"), "eval.csv")
    with pytest.raises(DataError) as error:
        check_labels(train, labelled("text", "netwroking"), "eval.csv")
    for part in ("eval.csv, line 2", "'netwroking'", "2 labels", "did you mean 'networking'"):
        assert part in str(error.value)


# Split ----------------------------------------------------------------------------------------------------


@CALM
@given(st.integers(2, 200), st.floats(0.001, 0.999) | st.integers(1, 199), st.integers(0, 2**64))
def test_a_split_gives_every_row_once_in_the_order_of_the_file(n: int, amount: float, seed: int) -> None:
    rows = labelled(*range(n))
    wanted = amount if isinstance(amount, int) else max(1, round(n * amount))
    if wanted >= n:
        with pytest.raises(DataError):
            split(rows, amount, seed)
        return
    train, held = split(rows, amount, seed)
    assert (len(train), len(held)) == (n - wanted, wanted)
    assert sorted(train + held, key=lambda row: row.line) == rows
    assert train == sorted(train, key=lambda row: row.line)
    assert held == sorted(held, key=lambda row: row.line)


def test_a_split_depends_on_its_seed_alone_and_leaves_torch_alone() -> None:
    rows = labelled(*range(100))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = split(rows, 0.2, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert split(rows, 0.2, seed=7) == first
    assert split(rows, 0.2, seed=8) != first
    # The same rows on every Python: a resumed run must hold out what the first one did.
    assert [row.line for row in split(rows[:10], 3, seed=7)[1]] == [2, 4, 5]


@CALM
@given(st.lists(st.sampled_from("abcd"), min_size=12), st.integers(0, 99))
def test_a_split_can_keep_a_row_of_every_label_for_training(labels: list[str], seed: int) -> None:
    train, _ = split(labelled(*labels), len(labels) - len(set(labels)), seed, keep_labels=True)
    assert sorted(row.fields["label"] for row in train) == sorted(set(labels))


def test_a_split_that_would_take_the_last_row_of_a_label_is_refused() -> None:
    with pytest.raises(DataError, match="2 of 3 rows.*2 labels"):
        split(labelled("a", "a", "b"), 2, 0, keep_labels=True)


@pytest.mark.parametrize("amount", [0, -1, 0.0, 1.0, 2.5, -0.1, True, float("nan"), "0.1"])
def test_an_amount_to_hold_out_that_makes_no_sense_is_refused(amount: float) -> None:
    with pytest.raises(ConfigError, match="rows to hold out"):
        split(labelled(*range(10)), amount, 0)
