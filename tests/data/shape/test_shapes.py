"""Promises of the shapes: recognised, said aloud, made one record each, or refused with place and nearest name."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.data.records import Asked, Chat, Labelled, Pair, Record, Related, Tagged, Text, Translated
from loraloom.data.rows import Row, RowError
from loraloom.data.shape.shapes import Shape, recognise
from loraloom.errors import ConfigError, DataError
from loraloom.tasks import TASKS

CALM = settings(max_examples=60, deadline=None)  # two cores are shared: a slow example is no failure

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


def row(fields: dict[str, Any], line: int = 1) -> Row:
    return Row(fields, line, "f.jsonl")


def read(task: str, fields: dict[str, Any], **options: Any) -> tuple[str, Record]:
    shape = recognise(row(fields), TASKS[task], **options)
    return shape.name, shape.read(row(fields))


def refused(task: str, fields: dict[str, Any], *words: str, **options: Any) -> RowError:
    with pytest.raises(RowError) as caught:
        read(task, fields, **options)
    for word in ("f.jsonl, line 1", *words):
        assert word in str(caught.value)
    assert json.loads(caught.value.bad.raw) is not None
    return caught.value


# Recognised -----------------------------------------------------------------------------------------------

SQUAD = {"question": "q", "context": "a cat", "answers": {"text": ["cat"], "answer_start": [2]}}

GOOD: list[tuple[str, str, dict[str, Any], Record]] = [
    ("causal-lm", "text", {"text": "t", "id": 7}, Text("t")),
    ("causal-lm", "prompt-completion", {"prompt": "p", "completion": "c", "text": "t"}, Pair("p", "c")),
    ("causal-lm", "prompt-completion", {"prompt": "", "completion": "c"}, Pair("", "c")),
    ("causal-lm", "prompt-completion", {"prompt": [USER], "completion": [ASSISTANT]}, Chat([USER, ASSISTANT])),
    ("causal-lm", "prompt-completion", {"prompt": [USER], "completion": "a"}, Chat([USER, ASSISTANT])),
    ("causal-lm", "prompt-completion", {"prompt": "q", "completion": [ASSISTANT]}, Chat([USER, ASSISTANT])),
    ("causal-lm", "alpaca", {"instruction": "q", "input": "", "output": "a"}, Chat([USER, ASSISTANT])),
    ("causal-lm", "alpaca", {"instruction": "", "input": "q", "output": "a"}, Chat([USER, ASSISTANT])),
    ("causal-lm", "alpaca", {"instruction": "q", "output": "a", "history": None}, Chat([USER, ASSISTANT])),
    (
        "causal-lm",
        "alpaca",
        {"instruction": "q", "input": "i", "output": "a", "system": "s"},
        Chat([{"role": "system", "content": "s"}, {"role": "user", "content": "q\n\ni"}, ASSISTANT]),
    ),
    (
        "causal-lm",
        "alpaca",
        {"instruction": "q", "input": None, "output": "a", "history": [["q", "a"]]},
        Chat([USER, ASSISTANT, USER, ASSISTANT]),
    ),
    ("causal-lm", "sharegpt", {"conversations": [HUMAN, GPT]}, Chat([USER, ASSISTANT])),
    ("causal-lm", "sharegpt", {"messages": [HUMAN, GPT]}, Chat([USER, ASSISTANT])),
    ("causal-lm", "sharegpt", {"conversations": json.dumps([HUMAN, GPT])}, Chat([USER, ASSISTANT])),
    (
        "causal-lm",
        "sharegpt",
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "a", "weight": 0},
            ],
            "system": "s",
            "tools": '[{"name": "add", "parameters": {}}]',
        },
        Chat(
            [
                {"role": "system", "content": "s"},
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "2"},
                {**ASSISTANT, "weight": 0},
            ],
            [{"type": "function", "function": {"name": "add", "parameters": {}}}],
        ),
    ),
    ("causal-lm", "messages", {"messages": [USER, ASSISTANT], "text": "t"}, Chat([USER, ASSISTANT])),
    ("causal-lm", "messages", {"conversations": [USER, ASSISTANT]}, Chat([USER, ASSISTANT])),
    (
        "causal-lm",
        "messages",
        {
            "messages": [
                {**USER, "name": None, "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "7"}], "reasoning_content": "r"},
                {"role": "tool", "content": [{"type": "text", "text": "1"}, {"text": "2"}], "tool_call_id": "7"},
                {**ASSISTANT, "weight": 1},
            ],
            "tools": [CALL],
        },
        Chat(
            [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [{"id": "7", **CALL}], "reasoning_content": "r"},
                {"role": "tool", "content": "12", "tool_call_id": "7"},
                {**ASSISTANT, "weight": 1},
            ],
            [CALL],
        ),
    ),
    (
        "causal-lm",
        "messages",
        {
            "messages": [
                {"role": "assistant", "function_call": {"name": "add", "arguments": '{"x": 1}'}},
                {"role": "function", "name": "add", "content": "1"},
            ],
            "tools": [],
        },
        Chat(
            [
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "name": "add", "content": "1"},
            ]
        ),
    ),
    ("seq-cls", "text-label", {"text": "t", "label": "x"}, Labelled("t", None, "x")),
    ("seq-cls", "text-label", {"text": "t", "label": 2.0}, Labelled("t", None, 2)),
    ("seq-cls", "text-label", {"text": "t", "label": "[x"}, Labelled("t", None, "[x")),
    ("seq-cls", "text-label", {"text": "t", "label": ["x", 1]}, Labelled("t", None, ["x", 1])),
    ("seq-cls", "text-label", {"text": "t", "label": []}, Labelled("t", None, [])),
    ("seq-cls", "text-label", {"text": "t", "label": '["x"]'}, Labelled("t", None, ["x"])),
    ("seq-cls", "text-label", {"text": "t", "label": 0.5}, Labelled("t", None, 0.5)),
    ("seq-cls", "text-label", {"text": "t", "label": "-5e-1"}, Labelled("t", None, -0.5)),
    ("seq-cls", "pair-label", {"text1": "t", "text2": "u", "label": 1}, Labelled("t", "u", 1)),
    ("feature-extraction", "pair", {"text1": "t", "text2": "u", "label": 1}, Related(("t", "u"))),
    ("feature-extraction", "triplet", {"text1": "t", "text2": "u", "negative": "v"}, Related(("t", "u", "v"))),
    ("feature-extraction", "pair-score", {"text1": "t", "text2": "u", "score": 1}, Related(("t", "u"), 1.0)),
    ("token-cls", "tokens-tags", {"tokens": ["a", "b"], "tags": ["O", 1]}, Tagged(["a", "b"], ["O", 1])),
    ("token-cls", "tokens-tags", {"tokens": '["a"]', "tags": "[0]"}, Tagged(["a"], [0])),
    ("seq2seq-lm", "source-target", {"source": "s", "target": "t"}, Translated("s", "t")),
    ("question-answering", "squad", SQUAD, Asked("q", "a cat", [("cat", 2)])),
    (
        "question-answering",
        "squad",
        {**SQUAD, "answers": [{"text": "cat", "answer_start": 2}, {"text": "a", "answer_start": 0}]},
        Asked("q", "a cat", [("cat", 2), ("a", 0)]),
    ),
    ("question-answering", "squad", {**SQUAD, "answers": {"text": [], "answer_start": []}}, Asked("q", "a cat", [])),
]


@pytest.mark.parametrize(("task", "name", "fields", "record"), GOOD)
def test_each_shape_is_recognised_and_made_its_record(
    task: str, name: str, fields: dict[str, Any], record: Record
) -> None:
    assert read(task, fields) == (name, record)
    assert read(task, fields, format=name) == (name, record)


def test_every_shape_has_a_row_above() -> None:
    names = {form.name for task in TASKS.values() for form in task.forms}
    assert {name for _, name, _, _ in GOOD} == names


def test_a_row_is_left_as_it_was() -> None:
    fields = {"prompt": [dict(USER), dict(ASSISTANT)], "completion": [dict(ASSISTANT)]}
    before = json.dumps(fields)
    _, record = read("causal-lm", fields)
    assert json.dumps(fields) == before
    assert isinstance(record, Chat)
    assert record.messages[1]["weight"] == 0
    assert "weight" not in record.messages[2]


def test_a_shape_goes_to_another_process() -> None:
    shape = recognise(row({"body": "t", "label": 1}), TASKS["seq-cls"], columns={"text": "body"})
    copy = pickle.loads(pickle.dumps(shape))
    assert copy.read(row({"body": "t", "label": 1})) == Labelled("t", None, 1)


def test_what_was_recognised_is_said_with_what_is_not_read_and_what_would_fit_as_well() -> None:
    fields = {"question": "p", "completion": "c", "text": "t", "id": 1}
    said = recognise(row(fields), TASKS["causal-lm"], columns={"prompt": "question"}).describe()
    assert said == "prompt-completion (prompt from 'question'); not read: 'text', 'id'"
    said = recognise(row({"prompt": "p", "completion": "c", "text": "t"}), TASKS["causal-lm"]).describe()
    assert "would also fit: text (choose with format)" in said
    assert "regression" in recognise(row({"text": "t", "label": 0.5}), TASKS["seq-cls"]).describe()


# Named and mapped -----------------------------------------------------------------------------------------


def test_format_chooses_where_several_shapes_fit() -> None:
    fields = {"messages": [USER, ASSISTANT], "prompt": "p", "completion": "c", "text": "t"}
    for name, record in (("text", Text("t")), ("prompt-completion", Pair("p", "c"))):
        assert read("causal-lm", fields, format=name) == (name, record)
    assert read("causal-lm", fields, format="text-lines") == ("text", Text("t"))


def test_columns_are_mapped_also_into_objects() -> None:
    fields = {"q": "p", "reply": {"best": "c"}, "prompt": 3, "messages": [USER, ASSISTANT]}
    assert read("causal-lm", fields, columns={"prompt": "q", "completion": "reply.best"}) == (
        "prompt-completion",
        Pair("p", "c"),
    )
    assert read("causal-lm", {"chat": [USER, ASSISTANT]}, columns={"messages": "chat"})[0] == "messages"
    assert read("causal-lm", {"chat": [HUMAN, GPT]}, columns={"conversations": "chat"})[0] == "sharegpt"
    translation = {"translation": {"en": "s", "fr": "t"}}
    columns = {"source": "translation.en", "target": "translation.fr"}
    assert read("seq2seq-lm", translation, columns=columns) == ("source-target", Translated("s", "t"))


def test_a_column_with_a_dot_in_its_name_goes_before_an_object() -> None:
    fields = {"a.b": "dot", "a": {"b": "object"}}
    assert read("causal-lm", fields, columns={"text": "a.b"}) == ("text", Text("dot"))


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("causal-lm", {"format": "alpca"}, "did you mean 'alpaca'"),
        ("seq-cls", {"format": "messages"}, "not a shape of seq-cls, which are text-label, pair-label"),
        ("causal-lm", {"columns": {"promt": "text"}}, "did you mean 'prompt'"),
        ("causal-lm", {"columns": {"prompt": "text", "instruction": "text"}}, "no shape of causal-lm has all of"),
        ("causal-lm", {"format": "text", "columns": {"prompt": "text"}}, "no column of text"),
    ],
)
def test_a_format_or_a_column_that_the_task_does_not_know_is_refused(
    task: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(task, {"text": "t", "label": 1}, **options)
    assert words in str(caught.value)


def test_a_mapped_column_that_is_not_there_is_refused_with_the_nearest() -> None:
    options = {"columns": {"prompt": "question", "completion": "answr"}}
    error = refused("causal-lm", {"question": "p", "answer": "c"}, "'answr'", "did you mean 'answer'", **options)
    assert error.bad.field == "answr"


def test_an_optional_column_may_be_missing_from_the_first_row() -> None:
    rows = [row({"instruction": "q", "output": "a"}), row({"instruction": "q", "output": "a", "sys": "s"}, 2)]
    shape = recognise(rows, TASKS["causal-lm"], columns={"system": "sys"})
    assert [len(shape.read(one).messages) for one in rows] == [2, 3]  # type: ignore[union-attr]


# Labels ---------------------------------------------------------------------------------------------------


def labelled(*labels: object) -> Shape:
    return recognise([row({"text": "t", "label": label}, n) for n, label in enumerate(labels, 1)], TASKS["seq-cls"])


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ((1, 0), "single_label_classification"),
        ((1.0, 2.0), "single_label_classification"),
        (("1.0", "b"), "single_label_classification"),
        (("0.5", "b"), "single_label_classification"),
        (("1", "2"), "single_label_classification"),
        ((4, 3.5), "regression"),
        (("4", "3.5"), "regression"),
        ((float("nan"), 1.5), "regression"),
        (([], ["a"]), "multi_label_classification"),
        (("1_000", "2.5"), "single_label_classification"),
        ((True, False), "single_label_classification"),
    ],
)
def test_what_labels_are_follows_from_the_first_rows(labels: tuple[object, ...], problem: str) -> None:
    assert labelled(*labels).problem_type == problem


@pytest.mark.parametrize(
    ("problem", "label", "words"),
    [
        ("regression", "good", "must be a number"),
        ("regression", float("nan"), "finite"),
        ("regression", "inf", "finite"),
        ("regression", None, "found null"),
        ("regression", True, "found bool"),
        ("regression", "1_000", "must be a number"),
        ("regression", 10**400, "must be a number"),
        ("single_label_classification", 0.5, "set problem_type: regression"),
        ("single_label_classification", ["a"], "set problem_type: multi_label_classification"),
        ("single_label_classification", " ", "'label' is empty"),
        ("single_label_classification", float("inf"), "string or a whole number"),
        ("multi_label_classification", "a", "must be a list"),
        ("multi_label_classification", ["a", 0.5], "found float 0.5"),
        ("multi_label_classification", ["a", "a"], "twice"),
        ("multi_label_classification", ["a", ""], "found str ''"),
        ("multi_label_classification", {"a": 1}, "must be a list"),
    ],
)
def test_a_label_that_does_not_fit_the_others_is_refused(problem: str, label: object, words: str) -> None:
    refused("seq-cls", {"text": "t", "label": label}, "'label'", words, problem_type=problem)


def labels_read(*labels: object) -> list[object]:
    shape = labelled(*labels)
    found = [shape.read(row({"text": "t", "label": label}, n)) for n, label in enumerate(labels, 1)]
    return [record.label for record in found]  # type: ignore[union-attr]


def test_true_and_false_are_classes_as_json_writes_them() -> None:
    assert labels_read(True, False) == ["true", "false"]
    _, record = read("token-cls", {"tokens": ["a", "b"], "tags": [True, False]})
    assert record.tags == ["true", "false"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (([0, 1], [1, 0], [0, 0]), [[1], [0], []]),
        (("[0, 1, 1]", "[1, 0, 0]"), [[1, 2], [0]]),
        (([0.0, 1.0], [1.0, 1.0]), [[1], [0, 1]]),
        (([True, False], [False, False]), [[0], []]),
        (([0], [1]), [[0], [1]]),  # of one place, they name a class
        (([0, 1], [1]), [[0, 1], [1]]),
        (([0, 2], [1, 0]), [[0, 2], [1, 0]]),
    ],
)
def test_lists_of_one_length_of_0_and_1_are_multi_hot(labels: tuple[object, ...], classes: list[list[int]]) -> None:
    assert labels_read(*labels) == classes


def test_a_multi_hot_label_is_of_the_length_and_the_kind_of_the_others() -> None:
    shape = labelled([0, 1], [1, 0])
    assert "multi-hot lists of 2 classes" in shape.describe()
    for label in ([1], [0, 1, 0], [0, 2], ["a", "b"]):
        with pytest.raises(DataError, match="must be multi-hot, 2 times 0 or 1"):
            shape.read(row({"text": "t", "label": label}))


def test_in_a_table_of_whole_numbers_a_fraction_is_no_class() -> None:
    assert list(map(str, labels_read("1", "1.0", "0", "2e0", "01"))) == ["1", "1", "0", "2", "01"]
    shape = labelled("1", "0", "1.0")
    for label, words in (
        ("0.14", "found 0.14; where labels are numbers"),
        (" 1.5 ", "found 1.5"),
        ("nan", "found nan$"),
    ):
        with pytest.raises(DataError, match=f"'label' must be a whole number as in the rows before, {words}"):
            shape.read(row({"text": "t", "label": label}))
    assert shape.read(row({"text": "t", "label": "none"})).label == "none"  # type: ignore[union-attr]
    chosen = recognise(row({"text": "t", "label": "1"}), TASKS["seq-cls"], problem_type="single_label_classification")
    assert chosen.read(row({"text": "t", "label": "1.5"})).label == "1.5"  # type: ignore[union-attr]


def test_a_number_is_a_float_where_labels_are_numbers() -> None:
    for label in (3, "3", 3.0):
        _, record = read("seq-cls", {"text": "t", "label": label}, problem_type="regression")
        assert isinstance(record, Labelled)
        assert isinstance(record.label, float)


# Conversations of other forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [False, True])
def test_an_object_of_lists_is_a_conversation(text: bool) -> None:
    for fields in (
        {"conversations": {"from": ["human", "gpt"], "value": ["hi", "hello"]}},
        {"messages": {"role": ["user", "assistant"], "content": ["hi", "hello"]}},
        {"messages": {"from": ["human", "gpt"], "value": ["hi", "hello"], "weight": [None, 1]}},
    ):
        given = {name: json.dumps(value) for name, value in fields.items()} if text else fields
        if text and "from" in fields.get("messages", {}):
            continue  # what is in a text is not looked at to choose a shape
        _, record = read("causal-lm", given)
        assert [message["content"] for message in record.messages] == ["hi", "hello"]  # type: ignore[union-attr]
    refused("causal-lm", {"messages": {"role": ["user"], "content": []}}, "an object of lists of one length")


def test_what_is_not_trained_on_may_be_empty() -> None:
    asked, empty, said = {"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}, {
        "role": "assistant", "content": "yes"}  # fmt: skip
    for untrained in ({**empty, "weight": 0}, {"role": "assistant", "content": None, "weight": 0}):
        _, record = read("causal-lm", {"messages": [asked, untrained, asked, said]})
        assert [message["content"] for message in record.messages] == ["hi", "", "hi", "yes"]  # type: ignore[union-attr]
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "", "weight": 0},
        {"from": "gpt", "value": "yes"},
    ]
    _, record = read("causal-lm", {"conversations": turns})
    assert record.messages[1] == {"role": "assistant", "content": "", "weight": 0}  # type: ignore[union-attr]
    _, record = read("causal-lm", {"prompt": [asked, empty, asked], "completion": [said]})
    assert record.messages[1] == {**empty, "weight": 0}  # type: ignore[union-attr]
    refused("causal-lm", {"messages": [asked, {**empty, "weight": 1}, said]}, "'content' of assistant is empty")


# Refused --------------------------------------------------------------------------------------------------


def chat(*messages: object, **more: object) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def shared(*turns: object) -> dict[str, Any]:
    return {"conversations": list(turns)}


def asked(**answers: object) -> dict[str, Any]:
    return {**SQUAD, "answers": answers}


WRONG: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("causal-lm", {"txt": "t"}, ("no column", "'txt'")),
    ("causal-lm", {}, ("no column", "the columns are none")),
    ("causal-lm", {"prompt": "p", "completions": "c"}, ("no column 'completion'", "completion: completions")),
    ("causal-lm", {"question": "q", "answer": "a"}, ("set columns: {prompt: question, completion: answer}",)),
    ("causal-lm", {"instruction": "q", "response": "a"}, ("set columns: {output: response}",)),
    ("seq-cls", {"sentence1": "a", "sentence2": "b", "label": 1}, ("{text1: sentence1, text2: sentence2}",)),
    ("seq-cls", {"text": "t", "lable": 1}, ("no column 'label'", "did you mean 'lable'")),
    ("token-cls", {"tokens": ["a"], "ner_tags": [0]}, ("set columns: {tags: ner_tags}",)),
    ("causal-lm", {"text": None}, ("'text' must be a string, found null",)),
    ("causal-lm", {"text": 3}, ("found int 3",)),
    ("causal-lm", {"text": " "}, ("'text' is empty",)),
    ("causal-lm", {"text": "é\ud800"}, ("half of a surrogate pair (character 2)",)),
    ("causal-lm", {"prompt": None, "completion": "c"}, ("'prompt' must be a string",)),
    ("causal-lm", {"prompt": "p", "completion": ""}, ("'completion' is empty",)),
    ("causal-lm", {"prompt": [USER], "completion": []}, ("'completion' is empty",)),
    ("causal-lm", {"prompt": [USER], "completion": [USER]}, ("no message of the assistant",)),
    ("causal-lm", {"prompt": [{"role": "usr"}], "completion": "c"}, ("'prompt' item 1", "did you mean 'user'")),
    ("causal-lm", {"instruction": "", "input": "", "output": "a"}, ("'instruction' is empty",)),
    ("causal-lm", {"instruction": "q", "output": None}, ("'output' must be a string",)),
    ("causal-lm", {"instruction": "q", "output": "a", "input": 3}, ("'input' must be a string, found int 3",)),
    ("causal-lm", {"instruction": "q", "output": "a", "history": [["q"]]}, ("'history' item 1",)),
    ("causal-lm", chat(), ("'messages' is empty",)),
    ("causal-lm", {"messages": "hello"}, ("'messages' must be a list", "JSON")),
    ("causal-lm", {"messages": {"role": "user"}}, ("'messages' must be a list",)),
    ("causal-lm", chat("hello"), ("item 1", "found str 'hello'")),
    ("causal-lm", chat(USER), ("no message of the assistant to train on",)),
    ("causal-lm", chat(USER, {**ASSISTANT, "weight": 0}), ("no message of the assistant to train on",)),
    ("causal-lm", chat(USER, {**ASSISTANT, "weight": 2}), ("item 2", "weight", "found int 2")),
    ("causal-lm", chat(USER, {"role": "assistent", "content": "a"}), ("item 2", "did you mean 'assistant'")),
    ("causal-lm", chat(USER, {"rol": "assistant", "content": "a"}), ("item 2", "no 'role'", "did you mean 'rol'")),
    ("causal-lm", chat(USER, {"role": "assistant", "content": None}), ("item 2", "found null")),
    ("causal-lm", chat(USER, {"role": "assistant", "content": ""}), ("item 2", "is empty")),
    ("causal-lm", chat({"role": "user"}, ASSISTANT), ("item 1", "'content' of user", "found null")),
    ("causal-lm", chat({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT), ("no text", "image_url")),
    ("causal-lm", chat({"role": "user", "content": "\udc00"}, ASSISTANT), ("surrogate",)),
    ("causal-lm", chat({**USER, "tool_calls": [CALL]}, ASSISTANT), ("only the assistant calls tools",)),
    ("causal-lm", chat({**ASSISTANT, "tool_calls": [{"name": ""}]}), ("tool call needs a 'name'",)),
    ("causal-lm", chat({**ASSISTANT, "tool_calls": {"name": "f"}}), ("'tool_calls' must be a list",)),
    ("causal-lm", chat({**ASSISTANT, "tool_calls": [{"name": "f", "arguments": "{"}]}), ("'f' are not JSON",)),
    ("causal-lm", chat({**ASSISTANT, "tool_calls": [{"name": "f", "arguments": 3}]}), ("must be an object",)),
    ("causal-lm", chat(USER, ASSISTANT, tools=[{"nam": "f"}]), ("'tools' item 1", "'name'")),
    ("causal-lm", chat(USER, ASSISTANT, tools="{"), ("'tools' must be a list",)),
    ("causal-lm", shared(HUMAN), ("no message of the assistant",)),
    ("causal-lm", shared(HUMAN, {"from": "gtp", "value": "a"}), ("item 2", "did you mean 'gpt'")),
    ("causal-lm", shared(HUMAN, {"from": "gpt", "valu": "a"}), ("item 2", "'from' and 'value' are needed")),
    ("causal-lm", shared(HUMAN, {"from": "gpt", "value": None}), ("item 2", "found null")),
    ("causal-lm", shared(HUMAN, {"from": ["gpt"], "value": "a"}), ("item 2", "'from' is ['gpt']")),
    ("causal-lm", shared(HUMAN, {"from": "function_call", "value": "add(1)"}), ("item 2", "not JSON")),
    ("causal-lm", shared(HUMAN, {"from": "function_call", "value": "[]"}), ("item 2", "calls nothing")),
    ("seq-cls", {"text": "", "label": 1}, ("'text' is empty",)),
    ("seq-cls", {"text1": "a", "text2": None, "label": 1}, ("'text2' must be a string",)),
    ("token-cls", {"tokens": [], "tags": []}, ("'tokens' is empty",)),
    ("token-cls", {"tokens": "a b", "tags": [0, 1]}, ("'tokens' must be a list",)),
    ("token-cls", {"tokens": ["a", "b"], "tags": [0]}, ("'tags' has 1 items, where 'tokens' has 2",)),
    ("token-cls", {"tokens": ["a", ""], "tags": [0, 0]}, ("'tokens' item 2 is empty",)),
    ("token-cls", {"tokens": ["a", "b"], "tags": [0, None]}, ("'tags' item 2", "found null")),
    ("seq2seq-lm", {"source": "s", "target": ""}, ("'target' is empty",)),
    ("question-answering", asked(text=["cat"], answer_start=[0]), ("not at character 0", "it is at 2")),
    ("question-answering", asked(text=["dog"], answer_start=[0]), ("nowhere in the context",)),
    ("question-answering", asked(text=["cat"], answer_start=[]), ("lists 'text' and 'answer_start' of one length",)),
    ("question-answering", asked(text="cat", answer_start=2), ("lists 'text' and 'answer_start'",)),
    ("question-answering", asked(text=["cat"], answer_start=[-1]), ("whole number from 0", "found int -1")),
    ("question-answering", asked(text=[""], answer_start=[2]), ("'text' is empty",)),
    ("question-answering", {**SQUAD, "answers": None}, ("'answers' must be an object", "found null")),
    ("question-answering", {**SQUAD, "answers": ["cat"]}, ("must hold objects",)),
]


@pytest.mark.parametrize(("task", "fields", "words"), WRONG)
def test_a_row_that_is_wrong_is_refused_with_its_place_and_column(
    task: str, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    refused(task, fields, *words)


def test_a_later_row_of_another_shape_is_refused() -> None:
    shape = recognise(row({"prompt": "p", "completion": "c"}), TASKS["causal-lm"])
    with pytest.raises(RowError, match=r"f\.jsonl, line 9: no column 'prompt'; the columns are 'text'"):
        shape.read(row({"text": "t"}, 9))


def test_bad_rows_in_front_are_passed_over_where_they_are_skipped() -> None:
    rows = [row({"txt": "t"}, 1), row({}, 2), row({"prompt": "p", "completion": "c"}, 3), row({"text": "t"}, 4)]
    assert recognise(rows, TASKS["causal-lm"], skip=True).name == "prompt-completion"
    for some, skip in ((rows, False), (rows[:2], True)):
        with pytest.raises(RowError, match=r"f\.jsonl, line 1: no column"):
            recognise(some, TASKS["causal-lm"], skip=skip)


def test_openai_and_sharegpt_are_told_apart_by_what_is_in_them() -> None:
    refused("causal-lm", chat(HUMAN, GPT), "this is ShareGPT's form", format="messages")
    refused("causal-lm", shared(USER, ASSISTANT), "OpenAI's messages", format="sharegpt")


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "text"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
COLUMNS = sorted({name for task in TASKS.values() for form in task.forms for name in (*form.needs, *form.may)})


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(COLUMNS), JSONS, max_size=6), st.sampled_from(list(TASKS)))
def test_no_row_at_all_raises_anything_but_a_data_error(fields: dict[str, Any], task: str) -> None:
    for format in (None, *(form.name for form in TASKS[task].forms)):
        try:
            record = recognise(row(fields), TASKS[task], format=format).read(row(fields))
        except DataError as error:
            assert "f.jsonl, line 1" in str(error)
        else:
            assert isinstance(record, Text | Pair | Chat | Labelled | Tagged | Translated | Asked)


@CALM
@given(st.lists(st.tuples(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip)), min_size=1))
def test_any_conversation_is_the_same_from_openai_and_from_sharegpt(turns: list[tuple[str, str]]) -> None:
    if any(not text.isprintable() for pair in turns for text in pair):
        turns = [(repr(one), repr(two)) for one, two in turns]
    openai = [{"role": who, "content": text} for pair in turns for who, text in zip(("user", "assistant"), pair)]
    sharegpt = [{"from": who, "value": text} for pair in turns for who, text in zip(("human", "gpt"), pair)]
    assert read("causal-lm", {"messages": openai})[1] == read("causal-lm", {"conversations": sharegpt})[1]
