"""Promises of a run's rows: held out at random and never trained on, checked before any tokenizer is asked, counted."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import loraloom
from loraloom import tasks
from loraloom.config.train import TrainConfig
from loraloom.data.dataset import Data, Rows, read_rows, tokenise
from loraloom.data.example import IGNORE
from loraloom.data.records import Pair
from loraloom.data.table import cache, scan, tokenize
from loraloom.data.table.scan import OnProgress, silent
from loraloom.errors import ConfigError, DataError
from loraloom.files.hashing import file_hash
from loraloom.models.load import load_tokenizer


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is small is treated as what is large: rows are read again, and lie in the cache."""
    monkeypatch.setattr(scan, "SMALL_ROWS", 10)
    monkeypatch.setattr(tokenize, "CHUNK", 16)


def options(model: Path, data: Any, task: str = "causal-lm", **changes: object) -> TrainConfig:
    return TrainConfig(**{"model": model, "data": data, "task": task, "output": "unused", **changes})


def rows_of(given: TrainConfig, on_progress: OnProgress = silent) -> Rows:
    return read_rows(given, tasks.get(given.task), on_progress)


def load(given: TrainConfig, on_progress: OnProgress = silent) -> Data:
    rows = rows_of(given, on_progress)
    return tokenise(rows, given, tasks.get(given.task), load_tokenizer(given.model), on_progress)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def all_of(data: Data) -> list[Any]:
    return [
        *[(e.input_ids, e.labels) for part in (data.train, data.validation) for e in part.examples],
        [(row.line, row.fields) for row, _ in data.validation_rows],
        (data.names, data.padding, data.hashes, data.notes, data.warnings),
        [(part.rows, part.tokens, part.truncated, part.merged) for part in (data.train, data.validation)],
    ]


def test_rows_held_out_are_never_trained_on_and_follow_from_the_seed(decoder_folder: Path, chats: Path) -> None:
    given = options(decoder_folder, chats, eval_split=0.3, seed=5)
    rows = rows_of(given)
    assert sorted([*rows.numbers["train"], *rows.numbers["validation"]]) == list(range(100))
    assert len(rows.numbers["validation"]) == 30
    data = load(given)
    assert (len(data.train.examples), len(data.validation.examples)) == (70, 30)
    assert [row.line - 1 for row, _ in data.validation_rows] == rows.numbers["validation"].tolist()
    assert data.validation.examples.rows.tolist() == rows.numbers["validation"].tolist()
    assert data.validation_rows.of.tolist() == list(range(30))
    other = rows_of(options(decoder_folder, chats, eval_split=0.3, seed=6))
    assert other.numbers["validation"].tolist() != rows.numbers["validation"].tolist()


def test_a_held_out_row_and_its_record_are_those_of_its_example(decoder_folder: Path, chats: Path) -> None:
    data = load(options(decoder_folder, chats, eval_split=7))
    tokenizer = load_tokenizer(str(decoder_folder))
    for number, example in enumerate(data.validation.examples):
        row, record = data.validation_rows[number]
        assert record == Pair(row.fields["prompt"], row.fields["completion"])
        said = tokenizer.decode([t for t, label in zip(example.input_ids, example.labels) if label != IGNORE][:-1])
        assert said.strip() == row.fields["completion"].strip()
        assert data.validation.examples.where(number) == row.where
    assert data.validation_rows[-2:] == [data.validation_rows[i] for i in (5, 6)]
    with pytest.raises(IndexError, match="row 7 of 7"):
        data.validation_rows[7]


def test_every_label_stays_in_training_however_many_rows_are_held_out(encoder_folder: Path, reviews: Path) -> None:
    rows = rows_of(options(encoder_folder, reviews, "seq-cls", eval_split=198))
    classes = rows.scans["train"].classes()
    assert classes is not None
    assert (
        {name for number in rows.numbers["train"] for name in classes[number]} == set(rows.names) == {"blame", "praise"}
    )


def test_the_model_is_not_asked_before_the_rows_are_right(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\ngood,a\nbad,a\n")
    with pytest.raises(DataError, match="two classes or more; all 2 rows are labelled 'a'"):
        rows_of(options(tmp_path / "no-model", tmp_path / "a.csv", "seq-cls"))
    write(tmp_path / "b.jsonl", [{"text": "good"}] * 30 + ["{\n"])
    with pytest.raises(DataError, match="b.jsonl, line 31"):
        rows_of(options(tmp_path / "no-model", tmp_path / "b.jsonl"))


@pytest.mark.parametrize(("task", "workers"), [("causal-lm", 1), ("causal-lm", 2), ("seq-cls", 1), ("seq-cls", 3)])
def test_what_comes_out_is_the_same_from_memory_from_disk_and_from_the_cache(
    task: str, workers: int, request: pytest.FixtureRequest, own_cache: Path
) -> None:
    model = request.getfixturevalue("decoder_folder" if task == "causal-lm" else "encoder_folder")
    rows = request.getfixturevalue("chats" if task == "causal-lm" else "reviews")
    given = options(
        model,
        rows,
        task,
        max_length=12 if task == "causal-lm" else 6,
        allow_untrained=True,
        data_workers=workers,
        seed=3,
    )
    small = load(given)
    assert not own_cache.exists()
    request.getfixturevalue("large")
    cold, warm = load(given), load(given)
    assert all_of(small) == all_of(cold) == all_of(warm)
    assert {path.parent.name for path in own_cache.glob("*/*")} == {"rows", "surveys"}
    assert small.train.truncated > 0


@pytest.mark.usefixtures("large")
def test_the_second_time_nothing_is_tokenised(
    decoder_folder: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(decoder_folder, chats)
    first = load(given)
    monkeypatch.setattr(tokenize, "_build", lambda *_, **__: pytest.fail("tokenised again"))
    monkeypatch.setattr(scan, "_read", lambda *_: pytest.fail("read again"))
    assert all_of(load(given)) == all_of(first)
    # Another split and other weights are other views of the same rows.
    assert load(options(decoder_folder, chats, eval_split=0.5, seed=9)).train.rows == 50


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    "change",
    [{"max_length": 16}, {"overlong": "drop", "max_length": 30}, {"on_bad_row": "skip"}, {"allow_untrained": True}],
)
def test_another_setting_is_another_entry(
    change: dict[str, Any], decoder_folder: Path, chats: Path, own_cache: Path
) -> None:
    load(options(decoder_folder, chats))
    before = len(list(own_cache.glob("rows/*")))
    load(options(decoder_folder, chats, **change))
    assert len(list(own_cache.glob("rows/*"))) == before + 1


@pytest.mark.usefixtures("large")
def test_changed_data_is_read_again(decoder_folder: Path, chats: Path, tmp_path: Path) -> None:
    lines = chats.read_text().splitlines(keepends=True)
    own = write(tmp_path / "own.jsonl", lines)
    first = load(options(decoder_folder, own, eval_split=1))
    write(own, [*lines[:-1], lines[0].replace("now", "cat")])
    second = load(options(decoder_folder, own, eval_split=1))
    assert first.hashes != second.hashes
    assert [e.input_ids for e in first.train.examples] != [e.input_ids for e in second.train.examples]


@pytest.mark.usefixtures("large")
def test_a_file_that_changes_while_it_is_read_is_said_and_nothing_is_kept(
    decoder_folder: Path, chats: Path, tmp_path: Path, own_cache: Path
) -> None:
    own = write(tmp_path / "own.jsonl", chats.read_text().splitlines(keepends=True))
    given = options(decoder_folder, own)
    rows = rows_of(given)
    with pytest.raises(DataError, match="own.jsonl: changed while it was read"):
        change = lambda *what: own.write_bytes(chats.read_bytes())  # noqa: E731
        tokenise(rows, given, tasks.get(given.task), load_tokenizer(given.model), change)
    assert list(own_cache.glob("rows/*")) == []


@pytest.mark.usefixtures("large")
def test_a_damaged_entry_is_made_again_and_said(decoder_folder: Path, chats: Path, own_cache: Path) -> None:
    given = options(decoder_folder, chats)
    data = load(given)
    first, notes = all_of(data), data.notes
    for path in own_cache.glob("*/*/*.bin"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    second = load(given)
    assert sum("damaged, so it is made again" in note for note in second.notes) == 2
    second.notes = notes
    assert all_of(second) == first


@pytest.mark.usefixtures("large")
def test_a_cache_that_cannot_be_written_is_said_and_ends_nothing(
    decoder_folder: Path, chats: Path, own_cache: Path
) -> None:
    own_cache.write_text("")
    data = load(options(decoder_folder, chats))
    assert len(data.train.examples) == 90
    assert sum("cannot be written" in note for note in data.notes) == 2


@pytest.mark.parametrize("size", ["small", "large"])
def test_bad_rows_are_skipped_and_written_down_with_reasons(
    size: str, decoder_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if size == "large":
        request.getfixturevalue("large")
    good = [{"prompt": f"say the cat {word} now :", "completion": f" {word}"} for word in ("good", "bad", "fine")] * 8
    rows: list[Any] = [*good[:5], "{not json\n", *good[5:], {"prompt": "a", "completion": 3}]
    rows.append({"prompt": "the cat " * 9, "completion": "good"})  # nothing of it is left
    path = write(tmp_path / "rows.jsonl", rows)
    common: dict[str, Any] = {"max_length": 12, "output": tmp_path / "out", "eval_split": 5}
    with pytest.raises(DataError, match="rows.jsonl, line 6"):
        load(options(decoder_folder, path, **common))
    assert not (tmp_path / "out").exists()
    for workers in (1, 2):
        data = load(options(decoder_folder, path, on_bad_row="skip", data_workers=workers, **common))
        assert data.train.rows + data.validation.rows in (24, 25)
        assert len(data.train.examples) + len(data.validation.examples) == 24
        found = [json.loads(line) for line in (tmp_path / "out" / "bad-rows.jsonl").read_text().splitlines()]
        assert [row["line"] for row in found] == [6, 26, 27]
        assert "JSON" in found[0]["reason"]
        assert found[0]["row"].strip() == "{not json"
        assert "completion" in found[1]["reason"]
        assert json.loads(found[2]["row"]) == rows[-1]
        assert all(row["file"] == str(path) for row in found)
        assert any("3 rows cannot be used and are left out" in text for text in data.warnings)
        for number, (row, _) in enumerate(data.validation_rows):  # bad rows do not shift the numbers of good ones
            assert data.validation.examples.where(data.validation_rows.of.tolist().index(number)) == row.where


def test_rows_with_nothing_to_train_on_are_an_error_unless_allowed(decoder_folder: Path, tmp_path: Path) -> None:
    good = [{"prompt": "say the cat now :", "completion": f" {word}"} for word in ("good", "bad", "fine")] * 8
    masked = [{"prompt": f"the {word} " * 9, "completion": "good"} for word in ("book", "film")]
    path = write(tmp_path / "rows.jsonl", [*good, *masked])
    common: dict[str, Any] = {"max_length": 12, "eval_split": write(tmp_path / "held.jsonl", good[:1])}
    with pytest.raises(DataError, match=r"rows.jsonl, line 25: .* \(rows like this: 2\).*allow_untrained"):
        load(options(decoder_folder, path, **common))
    data = load(options(decoder_folder, path, allow_untrained=True, **common))
    assert len(data.train.examples) == 24
    assert any("2 training rows are left out, because nothing in them is trained on" in w for w in data.warnings)
    with pytest.raises(DataError, match=r"no training row is left of 2: .*the first is .*line 1"):
        load(options(decoder_folder, write(tmp_path / "none.jsonl", masked), allow_untrained=True, **common))


def test_rows_over_length_are_counted_and_what_was_done_is_said(decoder_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "the cat and the film"}] * 9 + [{"text": "the cat " * 20}] * 3
    path, held = write(tmp_path / "rows.jsonl", rows), write(tmp_path / "held.jsonl", [{"text": "was a book"}])
    common: dict[str, Any] = {"max_length": 16, "eval_split": held}
    cut = load(options(decoder_folder, path, **common))
    assert (cut.train.truncated, cut.train.rows, max(cut.train.lengths)) == (3, 12, 16)
    assert "3 training rows are over max_length=16 tokens and cut" in cut.warnings
    dropped = load(options(decoder_folder, path, overlong="drop", **common))
    assert len(dropped.train.examples) == 9
    assert "3 training rows are over max_length=16 tokens and left out" in dropped.warnings
    several = load(options(decoder_folder, path, overlong="split", **common))
    assert len(several.train.examples) > 12
    assert several.train.rows == 12
    assert "3 training rows are over max_length=16 tokens and split into several" in several.warnings
    with pytest.raises(DataError, match=r"rows.jsonl, line 10: .*max_length"):
        load(options(decoder_folder, path, overlong="error", **common))


def test_a_row_that_was_split_is_held_out_as_a_whole(decoder_folder: Path, tmp_path: Path) -> None:
    source = random.Random(0)
    rows = [{"text": " ".join(source.choices(("the", "cat", "film", "book"), k=40))} for _ in range(20)]
    data = load(
        options(decoder_folder, write(tmp_path / "a.jsonl", rows), overlong="split", max_length=16, eval_split=6)
    )
    assert not set(data.train.examples.rows) & set(data.validation.examples.rows)
    assert len(data.validation.examples) > len(data.validation_rows) == 6
    for number, at in enumerate(data.validation_rows.of):
        assert data.validation.examples.where(number) == data.validation_rows[at][0].where


@pytest.mark.parametrize("size", ["small", "large"])
def test_sources_with_weights_come_as_often_as_they_weigh(
    size: str, decoder_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if size == "large":
        request.getfixturevalue("large")
    one = write(tmp_path / "one.jsonl", [{"text": "the cat"}] * 10)
    two = write(tmp_path / "two.jsonl", [{"prompt": "the film", "completion": " was good"}] * 20)
    held = write(tmp_path / "held.jsonl", [{"text": "a book"}])
    spec = [{"path": str(one), "weight": 3}, {"path": str(two), "weight": 0.5}]
    data = load(options(decoder_folder, spec, eval_split=held))
    from_one = sum(data.train.examples.where(i).startswith(str(one)) for i in range(len(data.train.examples)))
    assert (from_one, len(data.train.examples)) == (30, 40)
    assert data.train.rows == 20
    split = load(options(decoder_folder, spec, eval_split=6))
    assert not set(split.train.examples.rows) & set(split.validation.examples.rows)
    assert len(split.validation.examples) == 6
    text = "\n".join(data.notes)
    assert "weight 3" in text
    assert "prompt-completion" in text


def test_rows_that_are_there_twice_or_on_both_sides_are_warned_of(decoder_folder: Path, tmp_path: Path) -> None:
    texts = ["the cat", "a film", "was good", "in it", "the cat"]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    held = write(tmp_path / "b.jsonl", [{"text": text} for text in ("a film", "say now")])
    data = load(options(decoder_folder, path, eval_split=held))
    assert "1 training row is the same as another one" in data.warnings
    assert any("1 held-out row (50.0%) is among the training rows as well" in text for text in data.warnings)


def test_labels_that_training_never_sees_are_found_before_the_model_is_asked(
    encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    held = write(tmp_path / "held.jsonl", [{"text": "good", "label": "praise"}, {"text": "bad", "label": "prais"}])
    with pytest.raises(DataError, match=r"held.jsonl, line 2: the label 'prais' .*did you mean 'praise'"):
        rows_of(options(tmp_path / "no-model", reviews, "seq-cls", eval_split=held))
    out = tmp_path / "out"
    data = load(options(encoder_folder, reviews, "seq-cls", eval_split=held, on_bad_row="skip", output=out))
    assert len(data.validation.examples) == len(data.validation_rows) == 1
    assert "'prais' is never seen" in (out / "bad-rows.jsonl").read_text()


@pytest.mark.parametrize("size", ["small", "large"])
def test_several_labels_and_numbers_are_known_for_what_they_are(
    size: str, encoder_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if size == "large":
        request.getfixturevalue("large")
    several = [{"text": "the cat", "label": names} for names in (["b"], ["a", "b"], [], ["c"])] * 5
    data = load(options(encoder_folder, write(tmp_path / "s.jsonl", several), "seq-cls", eval_split=4))
    assert (data.problem, data.names) == ("multi_label_classification", ["a", "b", "c"])
    assert {tuple(e.labels) for e in data.train.examples} == {(0, 1, 0), (1, 1, 0), (0, 0, 0), (0, 0, 1)}
    numbers = [{"text": "the cat", "label": value / 4} for value in range(20)]
    data = load(options(encoder_folder, write(tmp_path / "n.jsonl", numbers), "seq-cls", eval_split=4))
    assert (data.problem, data.names) == ("regression", [])
    assert {type(e.labels) for e in data.train.examples} == {float}
    whole = [{"text": "the cat", "label": value} for value in (10, 9, 2)] * 5
    data = load(options(encoder_folder, write(tmp_path / "w.jsonl", whole), "seq-cls", eval_split=4))
    assert (data.problem, data.names) == ("single_label_classification", ["2", "9", "10"])


def test_tags_are_numbered_and_all_stay_in_training(encoder_folder: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["the", "cat"], "tags": ["O", tag]} for tag in ("B-X", "O", "B-Y")] * 4
    data = load(options(encoder_folder, write(tmp_path / "t.jsonl", rows), "token-cls", eval_split=9))
    assert data.names == ["B-X", "B-Y", "O"]
    assert {label for e in data.train.examples for label in e.labels} == {0, 1, 2, IGNORE}
    with pytest.raises(DataError, match="two tags or more"):
        rows_of(options(encoder_folder, write(tmp_path / "o.jsonl", rows[1::3]), "token-cls", eval_split=1))


def test_too_many_rows_to_hold_out_is_an_error(decoder_folder: Path, chats: Path) -> None:
    with pytest.raises(DataError, match="100 of 100 rows cannot be held out"):
        rows_of(options(decoder_folder, chats, eval_split=100))


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_names_its_file_and_line_whoever_finds_it(workers: int, decoder_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "the cat"}] * 77 + [{"text": "the cat " * 20}] + [{"text": "a film"}] * 30
    given = options(
        decoder_folder, write(tmp_path / "a.jsonl", rows), overlong="error", max_length=16, data_workers=workers
    )
    with pytest.raises(DataError, match="^.*a.jsonl, line 78: "):
        load(given)


def test_a_setting_that_does_not_fit_is_said_before_any_row_is_tokenised(decoder_folder: Path, chats: Path) -> None:
    with pytest.raises(ConfigError, match="max_length: 1 leaves no room"):
        load(options(decoder_folder, chats, max_length=1))


@pytest.mark.usefixtures("large")
def test_progress_is_told_with_rows_done_and_in_all(
    decoder_folder: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "STEP", 30)
    told: list[tuple[str, int, int | None]] = []
    load(options(decoder_folder, chats), lambda *what: told.append(what))
    assert [one for one in told if one[0] == "rows read"] == [("rows read", n, None) for n in (30, 60, 90)]
    assert told[-1] == ("rows tokenised", 100, 100)


def test_a_tokenizer_is_the_same_before_and_after_it_was_used(decoder_folder: Path) -> None:
    tokenizer = load_tokenizer(str(decoder_folder))
    before = tokenize.tokenizer_hash(tokenizer)
    tokenizer(["the cat", "a"], truncation=True, max_length=3, padding=True)
    assert tokenize.tokenizer_hash(tokenizer) == before
    tokenizer.add_tokens(["dog"])
    assert tokenize.tokenizer_hash(tokenizer) != before
    assert cache.code_hash() == cache.code_hash()


@pytest.mark.parametrize("size", ["small", "large"])
def test_windows_of_a_long_context_and_targets_of_their_own_length_come_through(
    size: str, encoder_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if size == "large":
        request.getfixturevalue("large")
    context = "the film was a book with the cat " * 4 + "in it and good"
    asked = [
        {"question": "was it ?", "context": context, "answers": {"text": ["good"], "answer_start": [len(context) - 4]}}
    ] * 12
    given = options(
        encoder_folder, write(tmp_path / "q.jsonl", asked), "question-answering", max_length=24, stride=4, eval_split=2
    )
    data = load(given)
    assert len(data.validation_rows) == 2
    assert len(data.validation.examples) > 2
    assert "2 held-out rows are over max_length=24 tokens and read in windows" in data.warnings
    assert len(data.validation_rows.of) == len(data.validation.examples)
    for example in data.validation.examples:
        assert len(example.labels) == 2
        assert len(example.token_type_ids or []) in (0, len(example.input_ids))
    assert any(example.labels != [0, 0] for example in data.validation.examples)
    pairs = [{"source": "the cat was good", "target": "the " * n + "cat"} for n in range(1, 13)]
    data = load(options(encoder_folder, write(tmp_path / "s.jsonl", pairs), "seq2seq-lm", eval_split=2))
    assert len({len(example.labels) for example in data.train.examples}) == 10


# Parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", [0.2, 20, "file"])
def test_rows_of_a_test_are_read_hashed_and_in_no_other_part(
    test: Any, encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    if test == "file":
        rows = [{"text": f"a book {word}", "label": "praise"} for word in ("good", "fine")]
        test = write(tmp_path / "test.jsonl", rows)
    given = options(encoder_folder, reviews, "seq-cls", eval_split=10, test_split=test)
    data, without = load(given), load(options(encoder_folder, reviews, "seq-cls", eval_split=10))
    assert data.test is not None
    assert without.test is None
    assert [e.input_ids for e in data.validation.examples] == [e.input_ids for e in without.validation.examples]
    assert data.train.rows + data.validation.rows + (data.test.rows if isinstance(test, float | int) else 0) == 200
    if isinstance(test, Path):
        assert data.test.rows == 2
        assert data.hashes == without.hashes | {str(test): file_hash(test)}
    else:
        parts = [set(part.examples.rows.tolist()) for part in (data.train, data.validation, data.test)]
        assert data.test.rows == (40 if test == 0.2 else 20)
        assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_a_test_file_is_checked_like_the_others(encoder_folder: Path, reviews: Path, tmp_path: Path) -> None:
    held = write(tmp_path / "t.jsonl", [{"text": "good", "label": "prais"}])
    with pytest.raises(DataError, match=r"t.jsonl, line 1: the label 'prais' .*did you mean 'praise'"):
        rows_of(options(tmp_path / "no-model", reviews, "seq-cls", test_split=held))
    same = write(tmp_path / "s.jsonl", reviews.read_text().splitlines(keepends=True)[:4])
    data = load(options(encoder_folder, reviews, "seq-cls", eval_split=2, test_split=same))
    assert any(text.startswith("4 test rows (100.0%) are among the training rows") for text in data.warnings)


@pytest.mark.parametrize("size", ["small", "large"])
def test_rows_that_are_the_same_or_of_one_group_are_held_out_together(
    size: str, encoder_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if size == "large":
        request.getfixturevalue("large")
    words = ("the", "film", "was", "a", "book", "with", "cat", "in", "it", "and")
    rows = [
        {"text": f"{one} {two}", "label": "ab"[i % 2], "customer": f"c{i % 20}"}
        for i, (one, two) in enumerate((one, two) for one in words for two in words)
    ]
    path = write(tmp_path / "rows.jsonl", [*rows, *rows[:30]])  # some of them twice
    common: dict[str, Any] = {"eval_split": 0.25, "test_split": 0.25}
    data = load(options(encoder_folder, path, "seq-cls", **common))
    assert data.test is not None
    parts = [{tuple(e.input_ids) for e in part.examples} for part in (data.train, data.validation, data.test)]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert data.validation.rows == 32
    data = load(options(encoder_folder, path, "seq-cls", columns={"group": "customer"}, **common))
    assert "group from 'customer'" in data.notes[0]
    assert data.test is not None
    customers = [
        {rows[row % 100]["customer"] for row in part.examples.rows.tolist()}
        for part in (data.train, data.validation, data.test)
    ]
    assert not customers[0] & customers[1] | customers[0] & customers[2] | customers[1] & customers[2]
    assert all(customers)


def test_a_group_column_must_be_there_and_is_offered_where_it_is_not_read(encoder_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", [{"text": f"{w} cat", "label": w, "group": 1} for w in ("a", "the")] * 10)
    with pytest.raises(DataError, match="no column 'custmer', which columns maps to 'group'"):
        rows_of(options(encoder_folder, path, "seq-cls", columns={"group": "custmer"}))
    with pytest.raises(DataError, match="2 of 20 rows cannot be held out .* and 1 groups of rows kept together"):
        rows_of(options(encoder_folder, path, "seq-cls", columns={"group": "group"}))
    assert any("columns: {group: group} keeps rows of one group together" in note
               for note in rows_of(options(encoder_folder, path, "seq-cls")).notes)  # fmt: skip


@pytest.mark.parametrize("file", ["data/tokenize/causal.py", "tasks/causal_lm.py", "data/tokenize/plain.jinja"])
def test_another_code_in_a_package_that_decides_tokens_is_another_key(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "loraloom"
    shutil.copytree(Path(loraloom.__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "SOURCE", source)
    hashes = [cache.code_hash.__wrapped__()]
    assert hashes[0] == cache.code_hash()
    for path in (source / file, source / "report" / "plot.py"):
        path.write_text(path.read_text() + "\n")
        hashes.append(cache.code_hash.__wrapped__())
    assert hashes[0] != hashes[1] == hashes[2]
