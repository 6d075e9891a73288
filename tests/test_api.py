"""Promises of ``loraloom.train`` and ``loraloom.tune``: what the commands do, from a program, with its own objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loraloom.api import train, tune
from loraloom.errors import ConfigError, DataError, ModelError

SHORT: dict[str, Any] = {"task": "seq-cls", "max_steps": 2, "quiet": True}


@pytest.fixture
def rows(reviews: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in reviews.read_text().splitlines()]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}


def test_rows_of_every_kind_train_to_the_bytes_that_their_file_trains_to(
    encoder_folder: Path, reviews: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    kinds = {
        "file": reviews,
        "dicts": rows,
        "pandas": pandas.DataFrame(rows),
        "datasets": datasets.Dataset.from_list(rows),
    }
    found = {kind: train(encoder_folder, data, output=tmp_path / kind, **SHORT) for kind, data in kinds.items()}
    assert len({tuple(sorted(weights(run.adapter).items())) for run in found.values()}) == 1
    run = found["dicts"]
    assert run.metrics.keys() >= {"loss", "accuracy"}
    assert len(run.curve["loss"]) == 2
    assert run.record == json.loads((run.adapter / "run.json").read_text()) | {"files": run.record["files"]}


def test_a_run_from_objects_can_be_repeated_from_its_run_file(
    encoder_folder: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    first = train(encoder_folder, rows, output=tmp_path / "first", **SHORT)
    again = train(config=first.adapter / "run.yaml", output=tmp_path / "again", quiet=True)
    assert weights(first.adapter) == weights(again.adapter)


def test_a_loaded_model_trains_as_its_folder_does_and_keeps_its_own_dtype(
    encoder_folder: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    run = train(model, rows, tokenizer=tokenizer, output=tmp_path / "run", **SHORT)
    assert run.model.get_base_model() is model
    assert "dtype: float32" in (run.adapter / "run.yaml").read_text()
    assert run.record["options"]["model"].startswith("given:BertForSequenceClassification-")
    with pytest.raises(ModelError, match="passed as an object by a program, and only that program can use it"):
        train(config=run.adapter / "run.yaml", output=tmp_path / "again", quiet=True)


def share(predictions: list[Any], references: list[Any]) -> float:
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


def test_functions_are_metrics_by_name_or_by_their_source(
    encoder_folder: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    def right(predictions: list[Any], references: list[Any]) -> float:
        return share(predictions, references)

    run = train(encoder_folder, rows, output=tmp_path / "run", metrics=["accuracy", right], **SHORT)
    assert run.metrics["right"] == run.metrics["accuracy"]
    finished = train(encoder_folder, rows, output=tmp_path / "run", metrics=["accuracy", right], resume=True, **SHORT)
    assert finished.metrics == run.metrics


def test_every_step_is_told(encoder_folder: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    steps: list[int] = []
    train(
        encoder_folder,
        rows,
        output=tmp_path / "run",
        on_step=lambda event: steps.append(event.step),
        **SHORT,
    )
    assert steps == [1, 2]


def test_a_search_gives_its_table_and_what_to_use(
    encoder_folder: Path, rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"lora.r": [2, 4], "train.learning_rate": [0.02]}
    given = {"trials": 2, "space": space, "finalists": 1, "seeds": 0, "target_modules": "all-linear", "epochs": 3}
    found = tune(encoder_folder, rows, task="seq-cls", output=tmp_path / "search", quiet=True, **given)
    assert capsys.readouterr().out == ""
    assert [row["lora.r"] for row in found.table] in ([2, 4], [4, 2])
    assert all(row.keys() >= {"metric", "steps", "parameters", "state"} for row in found.table)
    assert found.best is not None
    assert found.best["lora.r"] in (2, 4)
    assert found.adapter == tmp_path / "search" / "best"
    assert f"r={found.best['lora.r']}" in found.recommendation
    again = tune(encoder_folder, rows, task="seq-cls", output=tmp_path / "search", quiet=True, **given)
    assert again.record["trials"] == found.record["trials"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lora_rank": 3}, ConfigError, "lora_rank: there is no such option; did you mean 'r'"),
        ({"learning_rates": 3}, ConfigError, "did you mean 'learning_rate'"),
        ({"data": [{"text": object(), "label": "a"}]}, DataError, r"data\[0\]\['text'\]: holds what JSON does not"),
        ({"data": [{"text": "a", "label": "b"}, 3]}, DataError, r"data\[1\]: a row is a dict of columns, found int"),
        ({"data": datasets.DatasetDict()}, ConfigError, "give one of its splits"),
        ({"model": 3}, ConfigError, "model: a folder, a hub name or a model of transformers, found int"),
        ({"tokenizer": object()}, ConfigError, "tokenizer: belongs to a loaded model"),
        ({"output": None}, ConfigError, "output: "),
        ({"epochs": -1}, ConfigError, "epochs: "),
        ({"revision": " "}, ConfigError, "revision: must be text"),  # the model's, not the note in the adapter's config
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    encoder_folder: Path, rows: list[dict[str, Any]], tmp_path: Path, change: Any, error: type[Exception], words: str
) -> None:
    given = {"model": encoder_folder, "data": rows, "output": tmp_path / "run", **SHORT, **change}
    with pytest.raises(error, match=words):
        train(**given)
    assert not (tmp_path / "run").exists()


def test_a_model_without_the_head_that_the_rows_need_is_refused(
    encoder_folder: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=5)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    with pytest.raises(ModelError, match=r"a head for 5 outputs, and the rows need 2; load it with .*num_labels=2"):
        train(model, rows, tokenizer=tokenizer, output=tmp_path / "run", **SHORT)


def smoothed(outputs: Any, batch: Any, by: float = 0.1) -> torch.Tensor:
    """Cross-entropy with smoothed labels, one loss for each row."""
    return F.cross_entropy(outputs.logits, batch["labels"], reduction="none", label_smoothing=by)


def test_a_loss_of_ones_own_trains_alone_and_in_a_search(
    encoder_folder: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    def plain(outputs: Any, batch: Any) -> torch.Tensor:
        return smoothed(outputs, batch, 0.0)

    usual, same, other = (
        train(encoder_folder, rows, output=tmp_path / str(number), loss=loss, **SHORT)
        for number, loss in enumerate((None, plain, smoothed))
    )
    tensors = [load_file(run.adapter / "adapter_model.safetensors") for run in (usual, same, other)]
    assert all(torch.allclose(tensors[1][key], tensor, rtol=1e-4, atol=1e-6) for key, tensor in tensors[0].items())
    assert not all(torch.allclose(tensors[2][key], tensor, rtol=1e-4, atol=1e-6) for key, tensor in tensors[0].items())
    assert other.metrics["loss"] != pytest.approx(usual.metrics["loss"], rel=1e-3)
    search = {"trials": 2, "space": {"lora.r": [2, 4]}, "finalists": 1, "seeds": 0}
    found = tune(encoder_folder, rows, output=tmp_path / "search", loss=smoothed, **SHORT, **search)
    assert [trial["state"] for trial in found.table] == ["finished", "finished"]


def test_a_loss_sees_the_rows_of_one_slot_alone_and_gives_what_the_task_gives(decoder: Any) -> None:
    """In float64 a pack of three with the usual loss written as one's own has the usual gradients."""
    from loraloom.engine.pack import Pack
    from loraloom.tasks import get

    seen: list[int] = []

    def usual(outputs: Any, batch: Any) -> torch.Tensor:
        seen.append(len(batch["labels"]))
        logits, labels = outputs.logits[:, :-1], batch["labels"][:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)

    torch.manual_seed(0)
    ids = {
        "default": torch.randint(3, 20, (2, 6)),
        "b": torch.randint(3, 20, (3, 6)),
        "c": torch.randint(3, 20, (1, 6)),
    }
    batches = {name: {"input_ids": rows, "labels": rows} for name, rows in ids.items()}
    found: list[dict[str, torch.Tensor]] = []
    for task in (get("causal-lm"), get("causal-lm").with_loss(usual)):
        pack = Pack(decoder(), task=task)
        for number, name in enumerate("bc"):
            pack.add(name, pack.model.peft_config["default"], seed=number)
        losses = pack.backward(batches)
        parameters = {f"{name}.{key}": p for name in ids for key, p in pack.parameters_of(name).items()}
        found.append({key: p.grad for key, p in parameters.items() if p.grad is not None})
        assert losses.keys() == ids.keys()
    assert set(seen) >= {1, 2, 3}
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_not_one_value_for_each_row_is_refused(
    encoder_folder: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    def mean(outputs: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.logits, batch["labels"])

    with pytest.raises(ConfigError, match=r"loss: must return one value for each row, a tensor of shape \(\d+,\)"):
        train(encoder_folder, rows, output=tmp_path / "run", loss=mean, **SHORT)
    with pytest.raises(ConfigError, match="loss: .* was given as a function by a program, and is known there alone"):
        train(encoder_folder, rows, output=tmp_path / "run", loss="given:mean-0123", **SHORT)


def test_a_classifier_answers_texts_as_it_answered_held_out_rows(
    encoder_folder: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    renamed = [{"body": row["text"], "label": row["label"]} for row in rows]
    given = {"target_modules": "all-linear", "learning_rate": 0.01, "columns": {"text": "body"}, **SHORT}
    run = train(encoder_folder, renamed, output=tmp_path / "run", **{**given, "max_steps": 8})
    shown = run.job.shown(5, "default")
    found = run.predict([row["input"] for row in shown])
    assert [f"{label} (" in row["predicted"] for label, row in zip(found, shown, strict=True)] == [True] * len(shown)
    assert run.predict([{"body": row["input"]} for row in shown]) == found
    assert run.predict([]) == []
    with pytest.raises(DataError, match=r"row 1: a text or a dict of columns, found int"):
        run.predict(["fine", 3])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"no column 'text'"):
        run.predict([{"bodies": "fine"}])


def test_a_decoder_writes_after_prompts_and_conversations_as_after_held_out_ones(
    decoder_folder: Path, tmp_path: Path
) -> None:
    pairs = [{"prompt": f"say {word} : ", "completion": f"{word} now"} for word in ("good", "bad", "fine", "poor")] * 4
    more: dict[str, Any] = {"target_modules": "all-linear", "learning_rate": 0.01, "quiet": True, "max_new_tokens": 4}
    more |= {"task": "causal-lm", "max_steps": 6}
    run = train(decoder_folder, pairs, validation=pairs[:4], output=tmp_path / "pairs", **more)
    shown = run.job.shown(4, "default")
    assert [text.strip() for text in run.predict([row["prompt"] for row in pairs[:4]])] == [
        r["predicted"] for r in shown
    ]
    talks = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in pairs
    ]
    run = train(decoder_folder, talks, validation=talks[:4], output=tmp_path / "talks", **more)
    shown = run.job.shown(4, "default")
    asked = [{"messages": talk["messages"][:1]} for talk in talks[:4]]
    assert [text.strip() for text in run.predict(asked)] == [row["predicted"] for row in shown]


def test_taggers_and_readers_answer_rows_without_an_answer(encoder_folder: Path, tmp_path: Path) -> None:
    tagged = [{"tokens": ["the", "cat", "was", word], "tags": ["O", "N", "O", "A"]} for word in ("good", "bad")] * 8
    run = train(encoder_folder, tagged, output=tmp_path / "tags", **{**SHORT, "task": "token-cls"})
    tags = run.predict(["the cat was fine", {"tokens": ["good", "film"]}])
    assert [len(row) for row in tags] == [4, 2]
    assert {tag for row in tags for tag in row} <= {"O", "N", "A"}
    text = "the film was good and the book was bad"
    asked = [
        {"question": f"was it {word}", "context": text, "answers": {"text": [word], "answer_start": [text.index(word)]}}
        for word in ("good", "bad")
    ] * 8
    run = train(encoder_folder, asked, output=tmp_path / "answers", **{**SHORT, "task": "question-answering"})
    answers = run.predict([{"question": "was it good", "context": text}])
    assert answers[0] in text
    with pytest.raises(DataError, match="question-answering needs 'question' and 'context'; give a dict"):
        run.predict(["was it good"])
