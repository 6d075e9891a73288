"""Promises of the readers: nothing wrong with a file passes in silence, and each message says where."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.data.read.sources import resolve
from loraloom.data.rows import Row, ordered_labels
from loraloom.data.split import held_out
from loraloom.errors import ConfigError, DataError

CALM = settings(max_examples=60, deadline=None)  # two cores are shared: a slow example is no failure


def read_all(path: Path) -> list[Row]:
    return list(resolve(path)[0])


def saved(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def read(path: Path) -> list[tuple[dict[str, object], int]]:
    rows = read_all(path)
    assert {row.file for row in rows} == {str(path)}
    return [(row.fields, row.line) for row in rows]


def refused(path: Path, *words: str) -> None:
    with pytest.raises(DataError) as error:
        read_all(path)
    for word in (str(path), *words):
        assert word in str(error.value)


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
    rows = read_all(saved(tmp_path_factory.mktemp("rows"), "a.csv", file.getvalue()))
    assert [(row.fields["text"], row.fields["label"]) for row in rows] == cells


def test_a_csv_row_is_known_by_the_line_on_which_it_starts(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.csv", 'text,label\n"one\ntwo\nthree",a\nfour,b\n')
    assert [(row.fields["text"], row.line) for row in read_all(path)] == [
        ("one\ntwo\nthree", 2),
        ("four", 5),
    ]


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.jsonl", '{"text": "one\u2028two\x85three"}\n{"text": "four"}\n')
    assert read(path) == [({"text": "one\u2028two\x85three"}, 1), ({"text": "four"}, 2)]


# Reading what is wrong ------------------------------------------------------------------------------------


def test_a_missing_file_is_named_with_the_nearest_one_beside_it(tmp_path: Path) -> None:
    saved(tmp_path, "train.jsonl", "{}")
    refused(tmp_path / "trian.jsonl", "no such file", "did you mean 'train.jsonl'")
    refused(tmp_path / "no" / "folder.csv", "no such file")


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


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a": ' + "[" * 100_000])
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
            rows = read_all(path)
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert rows


# Labels ---------------------------------------------------------------------------------------------------


def test_whole_numbers_are_ordered_by_value_and_other_labels_by_name() -> None:
    assert ordered_labels(["10", "9", "-1", "9", "0"]) == ["-1", "0", "9", "10"]
    assert ordered_labels(["10", "9", "b", "a"]) == ["10", "9", "a", "b"]


@CALM
@given(st.lists(st.integers().map(str) | TEXTS))
def test_the_numbers_of_labels_depend_on_the_set_of_labels_and_not_on_their_order(labels: list[str]) -> None:
    assert ordered_labels(labels) == ordered_labels(reversed(labels))
    assert sorted(ordered_labels(labels)) == sorted(set(labels))


# Which rows are held out ------------------------------------------------------------------------------------


@CALM
@given(st.integers(2, 200), st.floats(0.001, 0.999) | st.integers(1, 199), st.integers(0, 2**64))
def test_as_many_rows_are_held_out_as_was_asked_or_it_is_an_error(n: int, amount: float, seed: int) -> None:
    wanted = amount if isinstance(amount, int) else max(1, round(n * amount))
    if wanted >= n:
        with pytest.raises(DataError):
            held_out(n, amount, seed)
        return
    held = held_out(n, amount, seed)
    assert len(held) == wanted
    assert held == sorted(set(held))


def test_what_is_held_out_depends_on_the_seed_alone_and_leaves_torch_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = held_out(100, 0.2, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert held_out(100, 0.2, seed=7) == first
    assert held_out(100, 0.2, seed=8) != first
    # The same rows on every Python: a resumed run must hold out what the first one did.
    assert held_out(10, 3, seed=7) == [1, 3, 4]


@CALM
@given(st.lists(st.sampled_from("abcd"), min_size=12), st.integers(0, 99))
def test_a_row_of_every_label_can_be_kept_for_training(labels: list[str], seed: int) -> None:
    held = held_out(len(labels), len(labels) - len(set(labels)), seed, labels)
    assert sorted(label for i, label in enumerate(labels) if i not in held) == sorted(set(labels))


def test_what_would_take_the_last_row_of_a_label_is_refused() -> None:
    with pytest.raises(DataError, match="2 of 3 rows.*2 labels"):
        held_out(3, 2, 0, ["a", "a", "b"])


@pytest.mark.parametrize("amount", [0, -1, 0.0, 1.0, 2.5, -0.1, True, float("nan"), "0.1"])
def test_an_amount_to_hold_out_that_makes_no_sense_is_refused(amount: float) -> None:
    with pytest.raises(ConfigError, match="rows to hold out"):
        held_out(10, amount, 0)
