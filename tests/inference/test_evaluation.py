"""Promises of the losses and metrics, seen from outside: what one step notes down and what an evaluation says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loops import train_pack
from loraloom import LoraConfig, PeftModel, get_peft_model, tasks
from loraloom.data.example import IGNORE, Example
from loraloom.data.records import Asked, Labelled, Pair, Record, Tagged, Translated
from loraloom.data.rows import Row
from loraloom.data.tokenize.answers import Window
from loraloom.data.tokenize.encode import encoder
from loraloom.engine.slot import Slot
from loraloom.inference.evaluation import Evaluator, HeldOut
from loraloom.inference.session import Session
from loraloom.models.load import load_base, load_tokenizer
from loraloom.tasks.base import Task
from loraloom.tasks.metrics.registry import Metrics, OwnMetric, choose
from loraloom.tasks.question_answering import best_answer

CLASSES, LM = tasks.get("seq-cls"), tasks.get("causal-lm")
Maker = Callable[..., PeftModel]


def evaluate(
    model: PeftModel, name: str, task: Task, examples: Sequence[Example], size: int, rows: Any = None
) -> dict[str, float]:
    held_out = rows or HeldOut()
    session = Session(model=model, task=task, tokenizer=held_out.tokenizer)
    return Evaluator(session, examples, held_out, size).metrics([name])[0]


def first_loss(model: PeftModel, task: Task, examples: list[Example]) -> tuple[float, list[Tensor]]:
    """The loss that one step over all ``examples`` notes down, and the gradients that it takes."""
    parameters = model.adapter_parameters("default")
    slot = Slot("default", parameters, examples, steps=1, batch_size=len(examples), learning_rate=1e-30)
    gradients: list[Tensor] = []
    update = slot.update

    def keep(loss: Tensor) -> None:
        gradients.extend(p.grad.clone() for p in parameters.values() if p.grad is not None)
        update(loss)

    slot.update = keep  # type: ignore[method-assign]
    train_pack(model, [slot], task, 0)
    return slot.curve.loss[0], gradients


def by_hand(model: PeftModel, examples: list[Example]) -> Tensor:
    """Each completion token's loss, one row at a time and without padding."""
    losses = []
    for example in examples:
        assert isinstance(example.labels, list)
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        losses += [
            F.cross_entropy(logits[i - 1], torch.tensor(label))
            for i, label in enumerate(example.labels)
            if label != IGNORE and i
        ]
    return torch.stack(losses)


def test_the_loss_of_causal_lm_is_the_mean_over_completion_tokens_only(
    decoder: Maker, completions: list[Example]
) -> None:
    model, examples = decoder(), completions[:5]
    found, gradients = first_loss(model, LM, examples)
    per_token = by_hand(model, examples)
    assert len(per_token) == 10  # one word and the end, five times
    assert found == pytest.approx(per_token.mean().item(), rel=1e-6)
    model.zero_grad()
    per_token.mean().backward()
    wanted = [p.grad for p in model.adapter_parameters("default").values() if p.grad is not None]
    assert len(gradients) == len(wanted) > 0
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_what_the_prompts_tokens_are_told_to_be_changes_nothing(decoder: Maker, completions: list[Example]) -> None:
    model, example = decoder(), completions[0]
    assert isinstance(example.labels, list)
    all_tokens = Example(example.input_ids, list(example.input_ids))
    alone, _ = first_loss(model, LM, [example])
    whole, _ = first_loss(model, LM, [all_tokens])
    assert alone != pytest.approx(whole, rel=1e-3)
    assert alone == pytest.approx(by_hand(model, [example]).mean().item(), rel=1e-6)


def test_the_loss_of_a_classifier_is_the_mean_over_rows(classifier: Maker, classes: list[Example]) -> None:
    model, examples = classifier(), classes[:6]
    found, _ = first_loss(model, CLASSES, examples)
    losses = [
        F.cross_entropy(model(input_ids=torch.tensor([e.input_ids])).logits[0], torch.tensor(e.labels))
        for e in examples
    ]
    assert found == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_an_evaluation_is_the_exact_mean_whatever_the_batches(
    decoder: Maker, completions: list[Example], size: int
) -> None:
    # Completions of different lengths: a mean of the batches' means would be another number.
    examples = [Example(e.input_ids + [3 + i] * i, e.labels + [3 + i] * i) for i, e in enumerate(completions[:7])]  # type: ignore[operator]
    model = decoder()
    with torch.no_grad():
        mean = float(by_hand(model, examples).mean())
    found = evaluate(model, "default", LM, examples, size)
    assert found == {"loss": pytest.approx(mean, rel=1e-6), "perplexity": pytest.approx(math.exp(mean), rel=1e-6)}


@pytest.mark.parametrize("size", [1, 4, 64])
def test_accuracy_counts_rows(classifier: Maker, classes: list[Example], size: int) -> None:
    model, examples = classifier(), classes[:9]
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([e.input_ids])).logits for e in examples])
    labels = torch.tensor([e.labels for e in examples])
    found = evaluate(model, "default", CLASSES, examples, size)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)


def test_a_perplexity_beyond_all_numbers_is_infinite_and_no_error(decoder: Maker, completions: list[Example]) -> None:
    model = decoder(target_modules=["lm_head"])
    for p in model.adapter_parameters("default").values():
        p.data.mul_(1e4)
    found = evaluate(model, "default", LM, completions[:3], 8)
    assert found["loss"] > 700
    assert found["perplexity"] == math.inf


def test_padding_is_not_seen(classifier: Maker, classes: list[Example]) -> None:
    model = classifier().eval()
    rows = sorted(classes[:12], key=lambda e: len(e.input_ids))
    short, long = rows[0], rows[-1]
    assert len(short.input_ids) < len(long.input_ids)
    inputs = CLASSES.collate([short, long], 0)
    inputs.pop("labels")
    with torch.no_grad():
        together = model(**inputs).logits[0]
        alone = model(input_ids=torch.tensor([short.input_ids])).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


# Every task ------------------------------------------------------------------------------------------------

TAGS = ["B-X", "I-X", "O"]
ENCODER_WORDS = ["the", "good", "film", "was", "a", "bad", "book", "with", "the", "cat", "in", "it"]


def adapted(folder: Path, task: Task, labels: Sequence[str] = (), problem: str | None = None) -> PeftModel:
    torch.manual_seed(0)
    base, _ = load_base(str(folder), task, "float64", labels, problem)
    config = LoraConfig(
        task_type=task.task_type, target_modules="all-linear", init_lora_weights=False, r=4, lora_alpha=16
    )
    return get_peft_model(base, config, seed=1)


def encoded(
    tokenizer: Any, task: Task, records: Sequence[Record], max_length: int = 64, **settings: Any
) -> tuple[list[Example], list[tuple[Row, Record]], list[int]]:
    """Examples, the records with their rows, and the row of each example."""
    named = [(Row({}, i), record) for i, record in enumerate(records, start=1)]
    results = encoder(task, tokenizer, max_length=max_length, **settings).encode(named)
    assert not any(result.error or result.problem for result in results)
    rows = [row for row, result in enumerate(results) for _ in result.examples]
    return [example for result in results for example in result.examples], named, rows


def seen(task: Task, problem: str | None = None) -> tuple[Metrics, list[tuple[Any, Any]]]:
    """Metrics that note down what they are given."""
    notes: list[tuple[Any, Any]] = []

    def note(predictions: Any, references: Any) -> float:
        notes.append((list(predictions), list(references)))
        return 0.0

    return dataclasses.replace(choose(task, problem), own=(OwnMetric("test:note", note),)), notes


def outputs_by_hand(model: PeftModel, example: Example) -> Any:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([example.input_ids]))


def test_numbers_and_several_classes_are_measured_row_by_row(encoder_folder: Path) -> None:
    tokenizer = load_tokenizer(str(encoder_folder))
    texts = [" ".join(ENCODER_WORDS[: 1 + i]) for i in range(7)]
    records = [Labelled(text, None, i / 2) for i, text in enumerate(texts)]
    examples, _, _ = encoded(tokenizer, CLASSES, records, problem_type="regression")
    model = adapted(encoder_folder, CLASSES, problem="regression")
    metrics, notes = seen(CLASSES, "regression")
    found = evaluate(model, "default", CLASSES, examples, 3, HeldOut(metrics=metrics))
    said = [float(outputs_by_hand(model, example).logits) for example in examples]
    assert notes[0] == (pytest.approx(said, rel=1e-6), [i / 2 for i in range(7)])
    assert list(found) == ["loss", "mse", "mae", "pearson", "spearman", "r2", "note"]
    assert found["mse"] == pytest.approx(found["loss"], rel=1e-6)

    several = [Labelled(text, None, [["a"], ["b", "c"], []][i % 3]) for i, text in enumerate(texts)]
    kind, names = "multi_label_classification", ["a", "b", "c"]
    examples, _, _ = encoded(tokenizer, CLASSES, several, problem_type=kind, labels=names)
    model = adapted(encoder_folder, CLASSES, names, kind)
    metrics, notes = seen(CLASSES, kind)
    found = evaluate(model, "default", CLASSES, examples, 3, HeldOut(metrics=metrics, labels=names))
    logits = [outputs_by_hand(model, example).logits[0] for example in examples]
    assert notes[0][0] == [[n for n, logit in zip(names, row.tolist(), strict=True) if logit > 0] for row in logits]
    assert notes[0][1] == [record.label for record in several]
    assert list(found) == ["loss", "f1_micro", "f1_macro", "subset_accuracy", "note"]
    plain = evaluate(model, "default", CLASSES, examples, 3)  # what the labels are is seen from them
    assert plain == {key: value for key, value in found.items() if key != "note"}


def test_tags_are_those_of_words_and_parts_of_a_row_are_joined(encoder_folder: Path) -> None:
    tokenizer = load_tokenizer(str(encoder_folder))
    task = tasks.get("token-cls")
    model = adapted(encoder_folder, task, TAGS)
    records = [Tagged(ENCODER_WORDS[:n], [TAGS[i % 3] for i in range(n)]) for n in (12, 3, 7)]
    whole, _, _ = encoded(tokenizer, task, records, labels=TAGS)
    metrics, notes = seen(task)
    found = evaluate(model, "default", task, whole, 2, HeldOut(metrics=metrics, labels=TAGS))
    for said, right, example, record in zip(*notes[0], whole, records, strict=True):
        best = outputs_by_hand(model, example).logits[0].argmax(-1).tolist()
        assert said == [TAGS[best[i]] for i, label in enumerate(example.labels) if label != IGNORE]  # type: ignore[arg-type]
        assert right == record.tags
    assert list(found) == ["loss", "f1", "precision", "recall", "accuracy", "note"]

    parts, _, rows = encoded(tokenizer, task, records, 6, labels=TAGS, overlong="split")
    assert rows == [0, 0, 0, 1, 2, 2]
    evaluate(model, "default", task, parts, 2, HeldOut(metrics=metrics, labels=TAGS, rows=rows))
    assert notes[1][1] == [record.tags for record in records]
    assert list(evaluate(model, "default", task, whole, 2)) == ["loss"]  # what the numbers stand for is not known


QUESTIONS = [
    Asked("was it", " ".join(ENCODER_WORDS), [("the cat", " ".join(ENCODER_WORDS).index("the cat"))]),
    Asked("was the film good now", "the film was a bad film", []),
    Asked("say", " ".join(ENCODER_WORDS * 2), [("good film", 4), ("film", 9)]),
]


def test_answers_are_the_best_span_of_all_windows(encoder_folder: Path) -> None:
    tokenizer = load_tokenizer(str(encoder_folder))
    task = tasks.get("question-answering")
    model = adapted(encoder_folder, task)
    examples, named, rows = encoded(tokenizer, task, QUESTIONS, 14, stride=4)
    assert len(set(rows)) == 3 < len(rows)
    metrics, notes = seen(task)
    held = HeldOut(metrics=metrics, records=named, rows=rows, tokenizer=tokenizer, max_length=14, stride=4)
    found = evaluate(model, "default", task, examples, 2, held)
    assert list(found) == ["loss", "f1", "exact_match", "note"]
    said, right = notes[0]
    assert right == [["the cat"], [], ["good film", "film"]]
    for row, record in enumerate(QUESTIONS):
        spans, null = [], math.inf
        for example in (e for e, r in zip(examples, rows, strict=True) if r == row):
            out = outputs_by_hand(model, example)
            starts, ends = out.start_logits[0].tolist(), out.end_logits[0].tolist()
            null = min(null, starts[0] + ends[0])
            first = example.input_ids.index(3) + 1
            for i in range(first, len(starts) - 1):
                for j in range(i, len(starts) - 1):
                    spans.append((starts[i] + ends[j], tokenizer.decode(example.input_ids[i : j + 1])))
        best = max(spans)
        assert said[row] == ("" if best[0] <= null else best[1]), record.question
    assert list(evaluate(model, "default", task, examples, 2)) == ["loss"]


@given(st.integers(1, 40), st.integers(0, 10_000), st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_span_is_at_most_thirty_tokens_and_ends_behind_its_start(size: int, seed: int, empty: bool) -> None:
    both = torch.randn(size + 4, 2, generator=torch.Generator().manual_seed(seed))
    context = "".join(f"{i:02d} " for i in range(size))
    window = Window(list(range(size + 4)), None, 3, 0, [(3 * i, 3 * i + 2) for i in range(size)])
    text = best_answer(context, [window], [both], empty)
    score, i, j = max(
        (float(both[3 + i, 0] + both[3 + j, 1]), i, j) for i in range(size) for j in range(i, min(i + 30, size))
    )
    null = float(both[0].sum())
    assert text == ("" if empty and score <= null else context[3 * i : 3 * j + 2])


def test_a_context_without_unanswerable_questions_has_always_an_answer() -> None:
    both = torch.zeros(5, 2)
    both[0] = 9
    window = Window(list(range(5)), None, 2, 0, [(0, 3), (4, 7)])
    assert best_answer("cat sat", [window], [both], False) == "cat"
    assert best_answer("cat sat", [window], [both], True) == ""


def test_an_empty_answer_wins_only_where_every_window_prefers_it() -> None:
    window = Window(list(range(5)), None, 2, 0, [(0, 3), (4, 7)])
    sure, unsure = torch.zeros(5, 2), torch.zeros(5, 2)
    sure[0], unsure[0] = 9, -1
    assert best_answer("cat sat", [window, window], [sure, unsure], True) == "cat"
    assert best_answer("cat sat", [window, window], [sure, sure], True) == ""


def test_texts_are_generated_from_prompts_and_compared_with_the_whole_completion(
    decoder_folder: Path, chats: Path
) -> None:
    tokenizer = load_tokenizer(str(decoder_folder))
    model = adapted(decoder_folder, LM)
    records = [Pair("the film was", " good and great"), Pair("a book with the cat in it now say :", " bad")]
    examples, named, _ = encoded(tokenizer, LM, records, 12)
    metrics, notes = seen(LM)
    found = evaluate(
        model,
        "default",
        LM,
        examples,
        8,
        HeldOut(metrics=metrics, records=named, tokenizer=tokenizer, max_new_tokens=5),
    )
    assert notes[0][1] == [" good and great", " bad"]
    for said, record in zip(notes[0][0], records, strict=True):
        ids = tokenizer(record.prompt, return_tensors="pt").input_ids
        out = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        assert said == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert list(found) == ["loss", "perplexity", "note"]
    asked = choose(LM, None, ["rougeL", "exact_match"])
    found = evaluate(model, "default", LM, examples, 8, HeldOut(metrics=asked, records=named, tokenizer=tokenizer))
    assert list(found) == ["loss", "rougeL", "exact_match"]


def test_a_translators_texts_are_generated_from_sources(translator_folder: Path) -> None:
    task = tasks.get("seq2seq-lm")
    tokenizer = load_tokenizer(str(translator_folder))
    model = adapted(translator_folder, task)
    records = [Translated("the good film", "a bad book in it"), Translated("cat", "now")]
    examples, named, _ = encoded(tokenizer, task, records)
    metrics, notes = seen(task)
    held = HeldOut(metrics=metrics, records=named, tokenizer=tokenizer, max_new_tokens=6)
    found = evaluate(model, "default", task, examples, 8, held)
    assert notes[0][1] == ["a bad book in it", "now"]
    for said, record in zip(notes[0][0], records, strict=True):
        ids = tokenizer(record.source, return_tensors="pt").input_ids
        out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert said == tokenizer.decode(out[0], skip_special_tokens=True)
    with torch.no_grad():
        losses = []
        for example in examples:
            labels = torch.tensor([example.labels])
            logits = model(input_ids=torch.tensor([example.input_ids]), labels=labels).logits[0]
            losses += F.cross_entropy(logits, labels[0], reduction="none").tolist()
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_of_a_conversation_the_last_thing_said_is_asked_for() -> None:
    chat = Example([9, 8, 7, 6, 5, 4, 3, 2], [IGNORE, IGNORE, 7, 6, IGNORE, IGNORE, 3, 2])
    assert LM.prompt_and_target(chat) == ([9, 8, 7, 6, 5, 4], [3, 2])
    closed = Example([9, 9, 8, 7, 6], [IGNORE, IGNORE, 8, 7, IGNORE])
    assert LM.prompt_and_target(closed) == ([9, 9], [8, 7])
    text = Example(list(range(20)), list(range(20)))
    assert LM.prompt_and_target(text) == (list(range(8)), list(range(8, 20)))
    assert LM.prompt_and_target(Example([1, 2], [1, 2])) == ([1], [2])


def test_an_evaluation_leaves_the_mode_of_every_module(decoder: Maker, completions: list[Example]) -> None:
    model = decoder()
    model.train()
    modes = [module.training for module in model.modules()]
    evaluate(model, "default", LM, completions[:2], 2)
    assert [module.training for module in model.modules()] == modes


def test_some_of_the_examples_in_any_order_are_measured_too(encoder_folder: Path) -> None:
    tokenizer = load_tokenizer(str(encoder_folder))
    task = tasks.get("question-answering")
    model = adapted(encoder_folder, task)
    examples, named, rows = encoded(tokenizer, task, QUESTIONS, 14, stride=4)
    metrics, notes = seen(task)
    given: dict[str, Any] = {"records": named, "tokenizer": tokenizer, "max_length": 14, "stride": 4}
    some = list(range(len(examples)))[::-2]
    chosen = [examples[i] for i in some]
    evaluate(model, "default", task, chosen, 2, HeldOut(metrics=metrics, rows=[rows[i] for i in some], **given))
    asked = dict.fromkeys(rows[i] for i in some)
    assert notes[0][1] == [[text for text, _ in QUESTIONS[row].answers] for row in asked]
    forwards = sorted(range(len(examples)), key=lambda i: (-rows[i], i))
    for order in (range(len(examples)), forwards):
        evaluate(
            model, "default", task, [examples[i] for i in order], 2,
            HeldOut(metrics=metrics, rows=[rows[i] for i in order], **given),
        )  # fmt: skip
    assert notes[1][0] == notes[2][0][::-1]


# A metric never says more than the predictions do -----------------------------------------------------------------


def test_tags_that_mark_no_entities_are_measured_by_word(encoder_folder: Path) -> None:
    tags = ["DET", "NOUN", "VERB"]
    tokenizer, task = load_tokenizer(str(encoder_folder)), tasks.get("token-cls")
    model = adapted(encoder_folder, task, tags)
    records = [Tagged(ENCODER_WORDS[:n], [tags[i % 3] for i in range(n)]) for n in (12, 3, 7)]
    examples, _, _ = encoded(tokenizer, task, records, labels=tags)
    metrics, notes = seen(task)
    for either in (None, metrics):
        found = evaluate(model, "default", task, examples, 2, HeldOut(metrics=either, labels=tags))
        assert list(found)[:4] == ["loss", "accuracy", "f1_macro", "f1_micro"]
    said, right = ([tag for row in side for tag in row] for side in notes[0])
    assert found["accuracy"] == sum(map(str.__eq__, said, right)) / len(right) < 1


@pytest.mark.parametrize("task", [CLASSES, tasks.get("token-cls"), tasks.get("question-answering")])
def test_a_model_whose_numbers_are_none_is_right_nowhere(task: Task, encoder_folder: Path) -> None:
    tokenizer = load_tokenizer(str(encoder_folder))
    records: dict[Task, list[Record]] = {
        CLASSES: [Labelled("the good film", None, "O"), Labelled("a bad book", None, "B-X")],
        tasks.get("token-cls"): [Tagged(["the", "film"], ["O", "B-X"])],
        tasks.get("question-answering"): [Asked("was it", "the film was a bad film", [])],
    }
    labels = () if task is tasks.get("question-answering") else ("B-X", "O")
    model = adapted(encoder_folder, task, labels)
    for parameter in model.adapter_parameters("default").values():
        parameter.data.fill_(math.nan)
    examples, named, _ = encoded(tokenizer, task, records[task], labels=labels)
    held = HeldOut(records=named, labels=labels, tokenizer=tokenizer, max_length=64)
    found = evaluate(model, "default", task, examples, 2, held)
    assert math.isnan(found.pop("loss"))
    assert len(found) > 1
    assert not any(found.values())
