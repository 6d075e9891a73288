"""Promises of the sources: every format gives back what was written, in bounded memory; what is wrong has a place."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from loraloom.data.read import jsonfiles, readers, tables
from loraloom.data.read.jsonfiles import other_form
from loraloom.data.read.source import Source
from loraloom.data.read.sources import resolve
from loraloom.data.rows import BadRow, RowError, shown
from loraloom.data.split import held_out, weighted
from loraloom.errors import ConfigError, DataError

CALM = settings(max_examples=40, deadline=None)  # two cores are shared: a slow example is no failure

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), min_size=1, max_size=6)


def saved(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def one(spec: Any, **options: Any) -> Source:
    (source,) = resolve(spec if not isinstance(spec, Path) else str(spec), **options)
    return source


def fields(spec: Any, **options: Any) -> list[dict[str, Any]]:
    return [row.fields for row in one(spec, **options)]


def skipping(path: Path, **options: Any) -> tuple[list[Any], list[BadRow]]:
    bad: list[BadRow] = []
    return [row.fields for row in one(path, **options).read(bad.append)], bad


def refused(spec: Any, *words: str, error: type[Exception] = DataError) -> None:
    with pytest.raises(error) as caught:
        for source in resolve(spec if not isinstance(spec, Path) else str(spec)):
            list(source)
    for word in words:
        assert word in str(caught.value)


# Round trips ----------------------------------------------------------------------------------------------


@CALM
@given(OBJECTS, st.sampled_from([None, 1]), st.booleans(), st.sampled_from(["a.json", "a.jsonl"]))
def test_a_json_array_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, objects: list[dict[str, Any]], indent: int | None, ascii: bool, name: str
) -> None:
    text = json.dumps(objects, indent=indent, ensure_ascii=ascii)
    path = saved(tmp_path_factory.mktemp("rows"), name, text)
    rows = list(one(path))
    assert [row.fields for row in rows] == objects
    assert [row.where for row in rows] == [f"{path}, row {number}" for number in range(1, len(objects) + 1)]


@CALM
@given(OBJECTS, st.integers(1, 9))
def test_an_array_is_the_same_wherever_its_pieces_are_cut(
    tmp_path_factory: pytest.TempPathFactory, objects: list[dict[str, Any]], step: int
) -> None:
    path = saved(
        tmp_path_factory.mktemp("rows"), "a.json", "\ufeff \n" + json.dumps(objects, ensure_ascii=False) + "\n "
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonfiles, "STEP", step)
        assert fields(path) == objects


@CALM
@given(OBJECTS)
def test_json_lines_in_a_json_file_come_back(
    tmp_path_factory: pytest.TempPathFactory, objects: list[dict[str, Any]]
) -> None:
    assume(not objects or not other_form(objects[0]))  # a whole table, which is refused
    text = "".join(json.dumps(value) + "\r\n" for value in objects)
    rows = list(one(saved(tmp_path_factory.mktemp("rows"), "a.json", text)))
    assert [(row.fields, row.line, row.unit) for row in rows] == [
        (value, line, "line") for line, value in enumerate(objects, start=1)
    ]


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@CALM
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1), st.sampled_from([(",", ".csv"), ("\t", ".tsv")]))
def test_a_table_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], kind: tuple[str, str]
) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=kind[0], quoting=csv.QUOTE_ALL).writerows([("a", "b"), *cells])
    path = saved(tmp_path_factory.mktemp("rows"), "t" + kind[1], file.getvalue())
    assert [(row["a"], row["b"]) for row in fields(path)] == cells


@CALM
@given(st.lists(st.tuples(TEXTS, st.none() | st.integers(-(2**60), 2**60), st.lists(TEXTS)), min_size=1))
def test_parquet_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[str, int | None, list[str]]]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [dict(zip("abc", value, strict=True)) for value in values]
    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    schema = pa.schema([("a", pa.string()), ("b", pa.int64()), ("c", pa.list_(pa.string()))])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    read = list(one(path))
    assert [row.fields for row in read] == rows
    assert read[-1].where == f"{path}, row {len(rows)}"


def test_structs_of_parquet_lose_the_keys_that_only_other_rows_have(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"messages": [{"role": "user", "content": "a"}], "n": None},
        {"messages": [{"role": "tool", "content": "b", "name": "f"}], "n": 1},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert fields(tmp_path / "a.parquet") == rows


def test_a_null_that_every_row_has_is_the_same_from_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    call = {"name": "order", "arguments": {"what": "tea", "milk": None, "with": {"sugar": None}}}
    other = {"name": "find", "arguments": {"q": "x"}}
    meant = [{"tool_calls": [{"function": call}]}] * 2
    mixed = [{"tool_calls": [{"function": call}]}, {"tool_calls": [{"function": other}]}]
    for name, rows in (("meant", meant), ("mixed", mixed)):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    assert fields(tmp_path / "meant.parquet") == meant
    # Here nulls also stand for what a call does not have, and nothing tells them apart.
    assert fields(tmp_path / "mixed.parquet")[1] == mixed[1]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_lines_that_end_in_carriage_returns_are_lines(tmp_path: Path, suffix: str) -> None:
    for name, text in (
        ("a.csv", 'a,b\r1,"x, y"\r2,z\r'), ("a.jsonl", '{"a": "1", "b": "x, y"}\r{"a": "2", "b": "z"}'),
    ):  # fmt: skip
        content = text.encode()
        path = saved(tmp_path, name + suffix, gzip.compress(content) if suffix else content)
        assert fields(path) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": "z"}]
    rows = list(one(saved(tmp_path, "b.txt", "one\rtwo\r\r" + "x" * 200_000 + "\r")))
    assert [(row.fields["text"], row.line) for row in rows] == [("one\ntwo", 1), ("x" * 200_000, 4)]


@pytest.mark.parametrize(("name", "form"), [("a.json", "[{}]"), ("a.jsonl", "{}")])
def test_a_number_beyond_python_is_no_error_where_nobody_reads_it(tmp_path: Path, name: str, form: str) -> None:
    row = '{"text": "a", "id": -' + "1" * 5000 + ', "n": 3}'
    (found,) = fields(saved(tmp_path, name, form.replace("{}", row)))
    assert (found["text"], found["n"]) == ("a", 3)
    assert shown(found["id"]) == "int of 5,000 digits"


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)


@CALM
@given(st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_plain_text_is_its_paragraphs_or_its_lines_or_one_row(
    tmp_path_factory: pytest.TempPathFactory, paragraphs: list[list[str]], end: str
) -> None:
    text = f"{end} {end}{end}".join(end.join(part) for part in paragraphs)
    path = saved(tmp_path_factory.mktemp("rows"), "a.txt", text + end)
    assert fields(path) == [{"text": "\n".join(part)} for part in paragraphs]
    assert fields(path, format="text") == fields(path)
    assert fields(path, format="text-lines") == [{"text": line} for part in paragraphs for line in part]
    assert fields(path, format="text-file") == [{"text": text.replace(end, "\n")}]


def test_a_paragraph_is_known_by_its_first_line(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.txt", "\n\none\ntwo\n\n\n\n  three\n")
    assert [(row.fields["text"], row.line) for row in one(path)] == [("one\ntwo", 3), ("  three", 8)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", '{"text": "a"}\n'),
        ("a.json.GZ", '[{"text": "a"}]'),
        ("a.csv.gz", "text\na\n"),
        ("a.tsv.gz", "text\na\n"),
        ("a.txt.gz", "a\n"),
    ],
)
def test_gzip_is_read_as_it_is(tmp_path: Path, name: str, content: str) -> None:
    assert fields(saved(tmp_path, name, gzip.compress(content.encode()))) == [{"text": "a"}]


@CALM
@given(st.binary(max_size=120) | st.binary(max_size=60).map(lambda tail: b'[{"a": 1}, ' + tail))
def test_no_bytes_at_all_raise_anything_but_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("a.json", "a.jsonl", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.jsonl.gz"):
        path = saved(folder, name, content)
        for bad in (None, lambda row: None):
            try:
                rows = list(one(path).read(bad))
            except DataError as error:
                assert str(path) in str(error)
            else:
                assert rows


# What is wrong, and where ---------------------------------------------------------------------------------

BAD: list[tuple[str, str, str | bytes, tuple[str, ...]]] = [
    ("a key twice", "a.jsonl", '{"a": 1}\n{"b": {"a": 1, "a": 2}}\n', ("line 2", "'a' is there twice")),
    ("a key twice in an array", "a.json", '[{"a": 1},\n{"a": 1, "a": 2}]', ("row 2", "'a' is there twice")),
    ("NaN", "a.jsonl", '{"a": NaN}\n', ("line 1", "NaN is not JSON")),
    ("Infinity", "a.json", '[{"a": -Infinity}]', ("row 1", "-Infinity is not JSON")),
    ("a line that is no JSON", "a.jsonl", '{"a": 1}\n{"a" 1}\n', ("line 2", "not JSON", "character 6")),
    ("a single quote", "a.json", "[{'a': 1}]", ("line 1", "not JSON", "character 3")),
    ("an array not closed", "a.json", '[{"a": 1}\n', ("line 2", "not closed")),
    ("a string not closed", "a.json", '[{"a": "b}]', ("line 1", "Unterminated string", "character 8")),
    ("a comma too many", "a.json", '[{"a": 1},\n]', ("line 2", "not JSON", "character 1")),
    ("a comma missing", "a.json", '[{"a": 1}\n {"a": 2}]', ("line 2", "Expecting ','", "character 2")),
    ("more behind an array", "a.json", '[{"a": 1}]\n\n [2]', ("line 3", "behind the array", "character 2")),
    ("an array of numbers", "a.json", "[1, 2]", ("row 1", "found int 1")),
    ("an empty array", "a.json", "[]", ("no rows",)),
    ("an object over lines", "a.json", '{\n "data": []\n}', ("line 1", "over several lines")),
    ("deep nesting", "a.json", "[" * 100_000, ("line 1", "cannot be read")),
    (
        "columns of pandas",
        "a.json",
        '{"text": {"0": "a"}, "label": {"0": "b"}}',
        ("a column under each key", "records"),
    ),
    ("rows of pandas", "a.json", '{"0": {"text": "a"}, "1": {"text": "b"}}', ("a row under each number",)),
    (
        "a table of pandas",
        "a.json",
        '{"columns": ["a"], "index": [0], "data": [["b"]]}',
        ("pandas", "orient='records'"),
    ),
    ("columns, indented", "a.json", '{\n "text": {\n "0": "a"}}', ("line 1", "a column under each key")),
    ("SQuAD", "a.json", '{"data": [{"paragraphs": []}], "version": "1"}', ("SQuAD's own form", "'answer_start'")),
    ("SQuAD, indented", "a.json", '{\n"data": [{"paragraphs": []}]}', ("line 1", "SQuAD's own form")),
    ("SQuAD, larger than a row", "a.json", '{"data": [{"paragraphs": ["' + "x" * (17 << 20), ("SQuAD's own form",)),
    ("line ends of two kinds", "a.csv", "a,b\n1,2\r3,4\n", ("line 2", "a carriage return (CR)", "of one kind")),
    ("not UTF-8", "a.json", b'[{"a": "b"},\n{"a": "caf\xe9"}]', ("line 2", "not UTF-8", "0xe9")),
    ("not UTF-8 in text", "a.txt", b"one\n\ntwo\nca\xe9\n", ("line 4", "byte 3", "0xe9")),
    ("a tail that is not UTF-8", "a.jsonl", b'{"a": 1}\n{"a": "\xc3', ("line 2", "not UTF-8")),
    ("UTF-16", "a.json", "[]".encode("utf-16"), ("UTF-16",)),
    ("UTF-16 without a mark", "a.jsonl", '{"a": 1}\n'.encode("utf-16-le"), ("UTF-16",)),
    ("a zero byte", "a.jsonl", b'{"a": 1}\n{"a": "b\0c"}\n', ("line 2", "zero byte", "character 9")),
    ("a zero byte in a table", "a.csv", b"a,b\n1,2\nx\0,y\n", ("line 3", "zero byte", "character 2")),
    ("a zero byte in text", "a.txt", b"a\n\nb\0\n", ("line 3", "zero byte")),
    ("Parquet by another name", "a.jsonl", b"PAR1....", ("it is Parquet", ".parquet")),
    ("gzip by another name", "a.csv", gzip.compress(b"a"), ("gzip", ".gz")),
    ("a spreadsheet", "a.csv", b"PK\x03\x04....", ("spreadsheet",)),
    ("gzip cut short", "a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], ("damaged or cut short",)),
    ("not gzip", "a.jsonl.gz", b'{"a": 1}\n', ("damaged or cut short",)),
    ("Parquet that is not", "a.parquet", b"a", ("not a Parquet file",)),
    ("packed Parquet", "a.parquet.gz", b"", ("unpack it",)),
    ("an archive", "a.jsonl.zip", b"", ("unpack it",)),
    ("a part of a saved dataset", "data-00000.arrow", b"", ("name its folder",)),
    ("semicolons", "a.csv", "text;label\na;b\n", ("line 1", "semicolon")),
    ("tabs in CSV", "a.csv", "text\tlabel\na\tb\n", ("line 1", "tab")),
    ("commas in TSV", "a.tsv", "text,label\na,b\n", ("line 1", "comma")),
    ("too few fields", "a.tsv", "a\tb\n1\t2\n1\n", ("line 3", "1 fields", "tab")),
    ("a quote not closed", "a.csv", 'a,b\n1,"2\n3,4\n', ("line 2", "double quote")),
    ("an empty text", "a.txt", "\n \n", ("empty",)),
    ("an empty gzip file", "a.csv.gz", gzip.compress(b""), ("empty",)),
]


@pytest.mark.parametrize(("name", "content", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_is_wrong_with_a_file_is_said_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, words: tuple[str, ...]
) -> None:
    path = saved(tmp_path, name, content)
    refused(path, str(path), *words)


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:  # a superuser may read everything
        raise PermissionError(13, "Permission denied", str(path))

    path = saved(tmp_path, "a.jsonl", "{}")
    monkeypatch.setattr(readers, "open", refuse, raising=False)
    refused(path, f"{path}: cannot be read: Permission denied")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_huge_row_is_refused_and_the_rows_beside_it_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in (readers, tables, jsonfiles):
        monkeypatch.setattr(module, "ROW_LIMIT", 1000)
    monkeypatch.setattr(jsonfiles, "STEP", 100)
    rows = [json.dumps({"text": text}) for text in ("a", "b" * 2000, "c")]
    content = {
        "a.jsonl": "\n".join(rows),
        "a.json": f"[{','.join(rows)}]",
        "a.csv": 'text\na\n"' + "b\n" * 1000 + '"\nc\n',
        "a.txt": "a\n\n" + "b\n" * 1000 + "\nc\n",
    }[name]
    path = saved(tmp_path, name, content)
    refused(path, "a row of more than")
    if name in ("a.jsonl", "a.txt"):
        good, bad = skipping(path)
        assert good == [{"text": "a"}, {"text": "c"}]
        assert [row.line for row in bad] == [2 if name == "a.jsonl" else 3]
        assert len(bad[0].raw) < 1100


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    import tracemalloc

    line = json.dumps({"text": "word " * 200}) + "\n"
    lines = saved(tmp_path, "a.jsonl", line * 20_000)
    array = saved(tmp_path, "b.json", "[" + ",".join([line] * 20_000) + "]")
    table = saved(tmp_path, "c.csv", "text\n" + ("word " * 200 + "\n") * 20_000)
    text = saved(tmp_path, "d.txt", ("word " * 200 + "\n\n") * 20_000)
    for path in (lines, array, table, text):
        tracemalloc.start()
        assert sum(1 for _ in one(path)) == 20_000
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * 2**20 < path.stat().st_size


# Bad rows skipped -----------------------------------------------------------------------------------------


def test_bad_json_lines_are_told_with_place_reason_and_text_and_the_others_read(tmp_path: Path) -> None:
    lines = [b'{"a": 1}', b"{", b'{"a": "\xff"}', b"[1]", b'{"a": NaN}', b'{"a": 1, "a": 1}', b'{"a": 2}']
    good, bad = skipping(saved(tmp_path, "a.jsonl", b"\n".join(lines)))
    assert good == [{"a": 1}, {"a": 2}]
    assert [(row.line, row.column) for row in bad] == [(2, 2), (3, 8), (4, None), (5, None), (6, None)]
    assert [row.raw for row in bad] == ["{", '{"a": "\\xff"}', "[1]", '{"a": NaN}', '{"a": 1, "a": 1}']
    assert all(row.file.endswith("a.jsonl") and row.reason for row in bad)


def test_a_fault_of_one_row_is_not_put_on_the_next(tmp_path: Path) -> None:
    good, bad = skipping(saved(tmp_path, "a.jsonl", '{"a": NaN, "b"\n{"a": 1}\n'))
    assert good == [{"a": 1}]
    assert "not JSON" in bad[0].reason


def test_bad_items_of_an_array_are_skipped_and_a_broken_array_is_not(tmp_path: Path) -> None:
    good, bad = skipping(saved(tmp_path, "a.json", '[{"a": 1}, 3, {"a": NaN},\n {"a": 2}]'))
    assert good == [{"a": 1}, {"a": 2}]
    assert [(row.line, row.raw, row.unit) for row in bad] == [(2, "3", "row"), (3, '{"a": NaN}', "row")]
    with pytest.raises(DataError, match="not JSON"):
        skipping(saved(tmp_path, "b.json", '[{"a": 1}, {"a"}, {"a": 2}]'))


def test_a_quote_that_is_never_closed_costs_one_line_of_a_table(tmp_path: Path) -> None:
    good, bad = skipping(saved(tmp_path, "a.csv", 'a,b\n1,2\n3,"4\n5,6\n7,"8\n9"\n'))
    assert good == [{"a": "1", "b": "2"}, {"a": "5", "b": "6"}, {"a": "7", "b": "8\n9"}]
    assert [(row.line, row.raw) for row in bad] == [(3, '3,"4\n5,6\n7,"8\n')]


def test_a_record_with_a_bad_byte_is_skipped_as_a_whole(tmp_path: Path) -> None:
    good, bad = skipping(saved(tmp_path, "a.csv", b'a,b\n1,2\n"x\xff\ny","z\nw"\n3,4\n5\n6,7\n'))
    assert good == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}, {"a": "6", "b": "7"}]
    assert [row.line for row in bad] == [3, 7]


def test_a_paragraph_with_a_bad_line_is_skipped_as_a_whole(tmp_path: Path) -> None:
    good, bad = skipping(saved(tmp_path, "a.txt", b"a\n\nb\nc\xff\nd\n\ne\n"))
    assert good == [{"text": "a"}, {"text": "e"}]
    assert [(row.line, row.raw) for row in bad] == [(4, "b\nc\\xff\nd")]


def test_when_all_rows_are_bad_that_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all of the 2 rows are bad"):
        skipping(saved(tmp_path, "a.jsonl", "1\n2\n"))


def test_what_goes_wrong_while_bad_rows_are_written_is_not_called_a_bad_file(tmp_path: Path) -> None:
    def full(row: BadRow) -> None:
        raise OSError(28, "No space left on device")

    for name, content in (("a.jsonl", "1\n"), ("a.json", "[1]"), ("a.csv", "a,b\n1\n"), ("a.txt", b"\xff\n")):
        with pytest.raises(OSError, match="No space left"):
            list(one(saved(tmp_path, name, content)).read(full))


def test_an_error_of_a_row_survives_the_way_between_processes() -> None:
    error = RowError(BadRow("f.csv", 3, "wrong", 7, "text", "raw"))
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.bad) == ("f.csv, line 3: wrong", error.bad)


# Folders, globs, lists ------------------------------------------------------------------------------------


def test_a_folder_is_its_data_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    saved(tmp_path, "b.jsonl", '{"text": "2"}\n')
    saved(tmp_path, "a.csv", "text\n1\n")
    saved(tmp_path, "more/c.txt", "3\n")
    saved(tmp_path, "README.md", "not data")
    saved(tmp_path, ".hidden/d.jsonl", "not data")
    saved(tmp_path, "_SUCCESS.txt", "not data")
    source = one(tmp_path)
    assert [row.fields["text"] for row in source] == ["1", "2", "3"]
    assert {row.file for row in source} == {str(tmp_path / name) for name in ("a.csv", "b.jsonl", "more/c.txt")}
    assert "README.md" in source.describe()
    assert "3 files" in source.describe()


def test_one_empty_file_among_others_is_no_error(tmp_path: Path) -> None:
    saved(tmp_path, "a.jsonl", "")
    saved(tmp_path, "b.jsonl", '{"text": "2"}\n')
    assert fields(tmp_path) == [{"text": "2"}]


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "a directory without data files")
    saved(tmp_path, "a.docx", "")
    refused(tmp_path, "there is a.docx")


def test_a_glob_is_the_files_that_fit_it(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        saved(tmp_path, f"part-{number:02}.jsonl", json.dumps({"n": number}))
    saved(tmp_path, "other.md", "")
    assert [row["n"] for row in fields(str(tmp_path / "part-*.jsonl"))] == [1, 2, 10]
    refused(str(tmp_path / "prat-*.jsonl"), "no file fits")
    refused(str(tmp_path / "*"), "'.md'")
    saved(tmp_path, "what?.jsonl", '{"n": 0}')
    assert fields(str(tmp_path / "what?.jsonl")) == [{"n": 0}]


def test_several_sources_keep_their_weights(tmp_path: Path) -> None:
    a, b = saved(tmp_path, "a.jsonl", "{}"), saved(tmp_path, "b.jsonl", "{}")
    sources = resolve([str(a), {"path": b, "weight": 0.5}])
    assert [source.weight for source in sources] == [1.0, 0.5]
    assert "weight 0.5" in sources[1].describe()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ([], "empty list"),
        (3, "a path"),
        ({"weight": 1}, "'path'"),
        ({"path": ""}, "'path'"),
        ({"path": "a.jsonl", "wieght": 2}, "did you mean 'weight'"),
        ({"path": "a.jsonl", "weight": 0}, "above 0"),
        ({"path": "a.jsonl", "weight": "2"}, "above 0"),
        ({"path": "a.jsonl", "weight": True}, "above 0"),
        ({"path": "a.jsonl", "weight": float("nan")}, "above 0"),
        ({"path": "a.jsonl", "weight": 1e9}, "at most 1000"),
        ({"path": "a.jsonl", "split": "train"}, "no 'split'"),
        (["a.jsonl", "a.jsonl"], "named twice"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: Any, words: str
) -> None:
    monkeypatch.chdir(saved(tmp_path, "a.jsonl", "{}").parent)
    refused(spec, words, error=ConfigError)


def test_lines_and_files_are_for_plain_text_alone(tmp_path: Path) -> None:
    saved(tmp_path, "a.txt", "a")
    saved(tmp_path, "b.jsonl", "{}")
    with pytest.raises(ConfigError, match=r"plain text.*b\.jsonl"):
        resolve(str(tmp_path), format="text-lines")
    resolve(str(tmp_path), format="messages")


def test_hashes_are_those_of_the_files_bytes(tmp_path: Path) -> None:
    a = saved(tmp_path, "a/x.jsonl", '{"a": 1}\n')
    assert one(a).hashes() == {str(a): hashlib.sha256(b'{"a": 1}\n').hexdigest()}
    source = one(a)
    a.unlink()
    with pytest.raises(DataError, match="x.jsonl: cannot be read: No such file"):
        source.hashes()


def test_the_first_rows_are_had_without_reading_the_rest(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 2}\nbroken\n')
    assert [row.fields["a"] for row in one(path).first(2)] == [1, 2]


def test_reading_rows_does_not_import_what_it_does_not_need(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.csv", "text\na\n")
    code = (
        "import sys; from loraloom.data.read.sources import resolve;"
        f"list(resolve({str(path)!r})[0]);"
        "print([name for name in ('pyarrow', 'datasets', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Which rows -----------------------------------------------------------------------------------------------


@CALM
@given(st.integers(2, 60), st.integers(1, 59), st.integers(0, 2**40))
def test_rows_are_held_out_by_number_alone(rows: int, amount: int, seed: int) -> None:
    if amount >= rows:
        with pytest.raises(DataError):
            held_out(rows, amount, seed)
        return
    held = held_out(rows, amount, seed)
    assert held == sorted(set(held))
    assert len(held) == amount
    assert held == held_out(rows, amount, seed)
    assert all(0 <= row < rows for row in held)


@CALM
@given(st.lists(st.sets(st.sampled_from("abcd")), min_size=8, max_size=40), st.integers(0, 99))
def test_of_rows_with_several_labels_training_keeps_every_label(labels: list[set[str]], seed: int) -> None:
    names = [sorted(some) for some in labels]
    held = held_out(len(names), 1, seed, names) if len(names) > 5 else []
    left = set().union(*(set(some) for row, some in enumerate(names) if row not in held))
    assert left == set().union(*names)


@CALM
@given(
    st.lists(st.tuples(st.integers(0, 40), st.floats(0.01, 4)), min_size=1, max_size=4),
    st.integers(0, 2**40),
)
def test_a_row_comes_as_often_as_its_weight_says(sources: list[tuple[int, float]], seed: int) -> None:
    counts, weights = [count for count, _ in sources], [weight for _, weight in sources]
    chosen = weighted(counts, weights, seed)
    assert chosen == sorted(chosen) == weighted(counts, weights, seed)
    times = Counter(chosen)
    start = 0
    for count, weight in sources:
        mine = [times[row] for row in range(start, start + count)]
        assert all(int(weight) <= some <= int(weight) + 1 for some in mine)
        assert not count or sum(mine) >= 1
        assert abs(sum(mine) - count * weight) <= max(0.5001, 1 - count * weight)
        start += count
    assert set(times) <= set(range(start))


def test_without_weights_an_epoch_is_all_rows() -> None:
    assert weighted([3, 2], [1, 1.0], 0) == [0, 1, 2, 3, 4]


def test_which_rows_a_fraction_takes_depends_on_the_seed_and_not_on_other_sources() -> None:
    assert weighted([100, 9], [0.5, 1], 1)[:50] == weighted([100, 3], [0.5, 2], 1)[:50]
    assert weighted([100], [0.5], 1) != weighted([100], [0.5], 2)
    assert weighted([100], [0.5], "1/0") != weighted([100], [0.5], "1/1")
    state = random.getstate()
    weighted([100], [0.5], 1)
    assert random.getstate() == state


# Datasets -------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset() -> Any:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["blame", "praise"]),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B"])),
        }
    )
    rows = [{"text": f"t{n}", "label": n % 2, "tags": [n % 2, 0]} for n in range(600)]
    return datasets.Dataset.from_list(rows, features=features)


def test_a_saved_dataset_gives_its_rows_with_the_names_of_its_classes(tmp_path: Path, dataset: Any) -> None:
    dataset.save_to_disk(tmp_path / "d")
    source = one(tmp_path / "d")
    rows = list(source)
    assert len(rows) == 600
    assert rows[1].fields == {"text": "t1", "label": "praise", "tags": ["B", "O"]}
    assert rows[599].where == f"{tmp_path / 'd'}, row 600"
    assert source.hashes() == one(tmp_path / "d").hashes()
    assert pickle.loads(pickle.dumps(source)).hashes() == source.hashes()
    assert "saved dataset" in source.describe()


def test_a_parquet_file_of_datasets_gives_the_names_of_its_classes(tmp_path: Path, dataset: Any) -> None:
    import datasets

    dataset.select(range(3)).to_parquet(tmp_path / "a.parquet")
    assert fields(tmp_path / "a.parquet")[1] == {"text": "t1", "label": "praise", "tags": ["B", "O"]}
    inner = datasets.Features({"o": {"label": datasets.ClassLabel(names=["no", "yes"])}})
    datasets.Dataset.from_list([{"o": {"label": 1}}, {"o": {"label": -1}}], features=inner).to_parquet(
        tmp_path / "b.parquet"
    )
    assert fields(tmp_path / "b.parquet") == [{"o": {"label": "yes"}}, {"o": {"label": None}}]


def test_a_split_of_a_saved_dataset_is_named(tmp_path: Path, dataset: Any) -> None:
    from datasets import DatasetDict

    parts = DatasetDict({"train": dataset.select(range(5)), "test": dataset.select([7])})
    parts.save_to_disk(tmp_path / "d")
    assert len(fields(tmp_path / "d")) == 5
    assert [row["text"] for row in fields(f"{tmp_path / 'd'}:test")] == ["t7"]
    assert [row["text"] for row in fields({"path": tmp_path / "d", "split": "test"})] == ["t7"]
    refused(f"{tmp_path / 'd'}:tset", "no split 'tset'", "did you mean 'test'")
    values = [[*one(name).hashes().values()] for name in (f"{tmp_path / 'd'}:test", tmp_path / "d")]
    assert values[0] != values[1]


def test_a_damaged_saved_dataset_is_refused(tmp_path: Path, dataset: Any) -> None:
    dataset.save_to_disk(tmp_path / "d")
    next((tmp_path / "d").glob("*.arrow")).write_bytes(b"nothing")
    refused(tmp_path / "d", "cannot be read")
    (tmp_path / "d" / "state.json").write_text("{")
    refused(tmp_path / "d", "cannot be read")


def test_a_dataset_of_the_hub_goes_by_name_configuration_and_split(
    dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[Any] = []

    def load(path: str, name: str | None, revision: str | None) -> Any:
        asked.append((path, name, revision))
        return datasets.DatasetDict({"train": dataset, "test": dataset.select([3])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(fields("some/reviews")) == 600
    assert len(fields("some/reviews:test")) == 1
    assert len(fields({"path": "some/reviews:small:test", "revision": "abc"})) == 1
    assert asked == [("some/reviews", None, None)] * 2 + [("some/reviews", "small", "abc")]
    refused({"path": "some/reviews:test", "split": "train"}, "name two", error=ConfigError)
    (row,) = one("some/reviews:test")
    assert row.where == "some/reviews:test, row 1"


def test_without_a_network_that_is_said_with_the_nearest_name_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'reviws' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(saved(tmp_path, "reviews/a.jsonl", "{}").parents[1])
    refused("reviws", "no such file or folder here; did you mean 'reviews'", "no network")
    refused("./reviws", "no such file", "did you mean 'reviews'")
    refused("reviws.jsonl", "no such file")


@pytest.mark.slow
def test_offline_the_real_library_says_the_same(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = (
        "from loraloom.data.read.sources import resolve\nfrom loraloom.errors import DataError\n"
        "try: list(resolve('nobody/nothing-of-this-name')[0])\nexcept DataError as error: print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "no network" in done.stdout
    assert "Traceback" not in done.stderr
