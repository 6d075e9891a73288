"""Promises of sentence embeddings: the losses by hand, slots that never meet, figures that no batch size changes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loops import train_pack
from loraloom import LoraConfig, Pack, PeftModel, get_peft_model, tasks
from loraloom.config.train import TrainConfig
from loraloom.data.dataset import read_rows
from loraloom.data.example import Example, Settings
from loraloom.data.records import Related
from loraloom.data.rows import Row
from loraloom.data.shape.shapes import recognise
from loraloom.engine.slot import Slot
from loraloom.errors import DataError, ModelError
from loraloom.inference.evaluation import Evaluator, HeldOut
from loraloom.inference.session import Session
from loraloom.models.load import load_base, load_tokenizer
from loraloom.tasks.feature_extraction import TEMPERATURE
from loraloom.training.init_template import guess
from loraloom.training.setup import Setup, load

TASK = tasks.get("feature-extraction")
WORDS = ["good", "fine", "lovely", "great", "bad", "poor", "awful", "weak", "the", "film", "was", "a", "book"]


def pair(number: int) -> Related:
    return Related((" ".join(WORDS[number % 8 : number % 8 + 3]), WORDS[(number * 3 + 1) % 13]))


def triplet(number: int) -> Related:
    return Related((*pair(number).texts, f"{WORDS[(number * 5 + 2) % 13]} it"))


def scored(number: int) -> Related:
    return Related(pair(number).texts, (number % 5) / 2 - 1)


KINDS = {"pair": pair, "triplet": triplet, "score": scored}


def examples_of(folder: Path, records: list[Related]) -> list[Example]:
    encoder = TASK.encoder(load_tokenizer(str(folder)), Settings(32))
    return [one for row in encoder.encode([(Row({}, 1), record) for record in records]) for one in row.examples]


def adapted(folder: Path, dtype: str = "float64", **more: Any) -> PeftModel:
    torch.manual_seed(0)
    base, new = load_base(str(folder), TASK, dtype)
    assert new == []  # no module is trained in full, a pooler that the folder lacks least of all
    fields: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False, "r": 4, **more}
    return get_peft_model(base, TASK.adapted(base, LoraConfig(task_type=TASK.task_type, **fields)), seed=1)


def embeddings(model: PeftModel, folder: Path, records: list[Related], how: str) -> Tensor:
    """[rows, texts, dim], one text at a time and without padding."""
    tokenizer, found = load_tokenizer(str(folder)), []
    for record in records:
        for text in record.texts:
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            found.append(F.normalize(hidden.mean(0) if how == "mean" else hidden[-1], dim=-1))
    return torch.stack(found).view(len(records), -1, len(found[0]))


def by_hand(found: Tensor, records: list[Related]) -> Tensor:
    """[rows]"""
    if records[0].score is not None:
        right = torch.tensor([record.score for record in records], dtype=found.dtype)
        return ((found[:, 0] * found[:, 1]).sum(-1) - right) ** 2
    losses = []
    for row in range(len(found)):
        others = [found[other, place] for place in range(1, found.shape[1]) for other in range(len(found))]
        logits = torch.stack([found[row, 0] @ other for other in others]) / TEMPERATURE
        losses.append(torch.logsumexp(logits, 0) - logits[row])
    return torch.stack(losses)


def step(model: PeftModel, examples: list[Example], **more: Any) -> tuple[float, list[Tensor]]:
    """The loss that one step notes down, and what it adds to the parameters by plain gradient descent."""
    parameters = model.adapter_parameters("default")
    before = {name: p.detach().clone() for name, p in parameters.items()}
    options = {"batch_size": len(examples), "learning_rate": 1.0, "optim": "SGD", "max_grad_norm": 1e9, **more}
    slot = Slot("default", parameters, examples, steps=1, task=TASK, lr_scheduler_type="constant", **options)
    train_pack(model, [slot], TASK, 0)
    return slot.curve.loss[0], [before[name] - p.detach() for name, p in parameters.items()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("folder", "how"), [("encoder_folder", "mean"), ("decoder_folder", "last")])
def test_the_loss_and_its_gradients_are_those_by_hand(
    kind: str, folder: str, how: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(folder)
    records = [KINDS[kind](number) for number in range(5)]
    model = adapted(path).eval()
    wanted = by_hand(embeddings(model, path, records, how), records).mean()
    parameters = list(model.adapter_parameters("default").values())
    gradients = torch.autograd.grad(wanted, parameters)
    loss, moved = step(model, examples_of(path, records))
    tolerance = 1e-10 if folder == "encoder_folder" else 1e-5  # Llama's norm casts to float32
    assert loss == pytest.approx(wanted.item(), rel=tolerance)
    for found, gradient in zip(moved, gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_each_of_a_pack_equals_itself_alone_and_nan_of_one_stays_there(kind: str, encoder_folder: Path) -> None:
    """Rows of several adapters never meet: not in the softmax, and not as 0 · NaN."""

    def gradients(names: str, spoilt: str = "") -> tuple[dict[str, float], dict[str, list[Tensor]]]:
        model = adapted(encoder_folder)
        for seed, name in enumerate("bc", 2):
            model.add_adapter(name, LoraConfig(
                r=seed, target_modules=["query", "value"], init_lora_weights=False, task_type=TASK.task_type
            ), seed=seed)  # fmt: skip
        if spoilt:
            next(iter(model.adapter_parameters(spoilt).values())).data.fill_(math.nan)
        rows = {"default": range(4), "b": range(3, 9), "c": range(7, 9)}
        batches = {n: TASK.collate(examples_of(encoder_folder, [*map(KINDS[kind], rows[n])]), 0) for n in rows}
        losses = Pack(model).backward({name: batches[name] for name in rows if name[0] in names})
        grads = {n: [p.grad for p in model.adapter_parameters(n).values() if p.grad is not None] for n in rows}
        return losses, {name: found for name, found in grads.items() if name[0] in names}

    losses, together = gradients("dbc")
    for name in together:
        alone, found = gradients(name[0])
        assert losses[name] == pytest.approx(alone[name], rel=1e-10)
        for a, b in zip(together[name], found[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    bad, rest = gradients("dbc", spoilt="b")
    assert math.isnan(bad["b"])
    for name in ("default", "c"):
        assert bad[name] == losses[name]
        assert all(map(torch.equal, rest[name], together[name]))


def test_the_negatives_of_an_accumulated_step_are_those_of_one_forward(encoder_folder: Path) -> None:
    records = [pair(number) for number in range(8)]
    model = adapted(encoder_folder).eval()
    found = embeddings(model, encoder_folder, records, "mean").detach()
    texts = [tuple(example.input_ids) for example in examples_of(encoder_folder, records)]
    taken: list[list[int]] = []
    collate = TASK.collate
    noted = type("Noted", (type(TASK),), {"collate": lambda self, examples, pad: (
        taken.append([texts.index(tuple(example.input_ids)) for example in examples]) or collate(examples, pad)
    )})()  # fmt: skip
    slot = Slot("default", model.adapter_parameters("default"), examples_of(encoder_folder, records), steps=1,
                batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-9, task=noted)  # fmt: skip
    train_pack(model, [slot], noted, 0)
    assert [len(rows) for rows in taken] == [4, 4]
    wanted = [by_hand(found[rows], [records[row] for row in rows]).mean() for rows in taken]
    assert slot.curve.loss[0] == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_figures_of_held_out_rows_are_those_by_hand_whatever_the_batches(kind: str, encoder_folder: Path) -> None:
    records = [KINDS[kind](number) for number in range(11)]
    model = adapted(encoder_folder, "float32").eval()
    examples = examples_of(encoder_folder, records)
    found = embeddings(model, encoder_folder, records, "mean").detach()
    rows = HeldOut(records=[(Row({}, 1), record) for record in records], block=11)
    session = Session(model=model, task=TASK)
    figures = [Evaluator(session, examples, rows, size).metrics(["default"])[0] for size in (1, 4, 64)]
    wanted: dict[str, float] = {"loss": float(by_hand(found, records).mean())}
    if kind == "score":
        cosines = (found[:, 0] * found[:, 1]).sum(-1).tolist()
        from scipy.stats import pearsonr, spearmanr

        right = [record.score for record in records]
        wanted |= {"spearman": spearmanr(cosines, right)[0], "pearson": pearsonr(cosines, right)[0]}
    else:
        others = torch.cat([found[:, place] for place in range(1, found.shape[1])])
        names = [record.texts[place] for place in range(1, found.shape[1]) for record in records]
        near = [names[int((others @ one).argmax())] for one in found[:, 0]]
        wanted["recall_at_1"] = sum(a == b.texts[1] for a, b in zip(near, records, strict=True)) / len(records)
    for one in figures:
        assert one == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    blocks = float(Evaluator(session, examples, HeldOut(block=4)).losses(["default"]).mean())
    assert (blocks < 0.99 * wanted["loss"]) == (kind != "score")  # fewer texts to take for the right one
    parts = [[0, 3, 4], [1, 2], [5, 6, 7, 8, 9, 10]]
    (found,) = Evaluator(session, examples, rows).figures(["default"], parts)
    assert found["loss"][0] == pytest.approx(wanted["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "shape", "renamed"),
    [
        ({"text1": "a", "text2": "b"}, "pair", {}),
        ({"anchor": "a", "positive": "b"}, "pair", {"text1": "anchor", "text2": "positive"}),
        ({"query": "a", "positive": "b", "negative": "c"}, "triplet", {"text1": "query", "text2": "positive"}),
        ({"text1": "a", "text2": "b", "negative": "c"}, "triplet", {}),
        ({"sentence1": "a", "sentence2": "b", "score": 0.5}, "pair-score",
         {"text1": "sentence1", "text2": "sentence2"}),
        ({"text1": "a", "text2": "b", "score": "0.5"}, "pair-score", {}),  # as CSV has it
    ],
)  # fmt: skip
def test_pairs_are_recognised_also_by_the_names_that_datasets_use(
    fields: dict[str, Any], shape: str, renamed: dict[str, str], tmp_path: Path
) -> None:
    found = recognise(Row(fields, 1), TASK)
    assert (found.name, found.columns) == (shape, renamed)
    record = found.read(Row(fields, 1))
    assert isinstance(record, Related)
    assert record.texts == tuple(value for value in fields.values() if str(value).isalpha())
    assert record.score == (0.5 if "score" in fields else None)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(fields) + "\n")
    assert guess(str(path))[0] == TASK.name


def test_pairs_with_a_label_are_for_a_classifier(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text1": "a", "text2": "b", "label": "same"}) + "\n")
    assert guess(str(path))[0] == "seq-cls"


def options(folder: Path, rows: list[dict[str, Any]], model: Any = "m", **more: Any) -> TrainConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"data": str(path), "eval_split": 20, "report_to": [], **more}
    return TrainConfig(model=str(model), task=TASK.name, output=str(folder / "out"), **given)


def test_scores_that_are_no_cosines_and_rows_of_two_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: 'score' must be a number from -1 to 1, .* 0 to 5 by 5"):
        read_rows(options(tmp_path, [{"text1": "a", "text2": "b", "score": 3.8}] * 40), TASK)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text1": "a", "text2": "b", "negative": "c"}) + "\n")
    with pytest.raises(DataError, match=r"other.jsonl: its rows are of the shape triplet, and those of .* of pair;"):
        read_rows(options(tmp_path, [{"text1": "a", "text2": "b"}] * 40, eval_split=str(other)), TASK)


def setup_of(folder: Path, model: Path, record: Any, **more: Any) -> Setup:
    rows = [dict(zip(("text1", "text2", "negative"), record(n).texts)) for n in range(80)]
    rows = [row | ({} if record(n).score is None else {"score": record(n).score}) for n, row in enumerate(rows)]
    return load(options(folder, rows, model, **more))


def test_a_pooler_gets_no_adapter_and_a_model_with_a_decoder_beside_its_encoder_is_refused(
    encoder_folder: Path, translator_folder: Path, tmp_path: Path
) -> None:
    setup = setup_of(tmp_path, encoder_folder, pair)
    config = setup.config(setup.options)
    assert "pooler.dense" in dict(setup.base.named_modules())
    assert not any("pooler" in name for name in get_peft_model(setup.base, config).base_model.lora_layers)
    with pytest.raises(ModelError, match="has an encoder and a decoder; for feature-extraction choose an encoder"):
        setup_of(tmp_path, translator_folder, pair)


def test_the_bar_is_chance_or_the_mean_score_and_the_frozen_model(encoder_folder: Path, tmp_path: Path) -> None:
    from loraloom.tuning.bar import set_bar

    for record, metric, base in ((pair, "recall_at_1", math.log(16)), (triplet, "recall_at_1", math.log(32)),
                                 (scored, "spearman", 0.5)):  # fmt: skip
        setup = setup_of(tmp_path, encoder_folder, record)
        setup.model.add_adapter("span", setup.config(setup.options))
        bar = set_bar(setup)
        assert bar.base == pytest.approx(base, rel=0.05)
        assert bar.answers.keys() >= {"the frozen model"}
        (constant,) = [figures for words, figures in bar.answers.items() if words != "the frozen model"]
        if record is scored:  # an answer that does not look at the row goes along with nothing
            assert math.isnan(constant[metric][0])
        else:
            assert constant[metric][0] <= 0.4  # the one text that is always found, as often as it is asked for
            assert constant["loss"][0] == pytest.approx(base)


def test_a_text_by_itself_is_answered_with_its_embedding(encoder_folder: Path) -> None:
    from loraloom.inference.answers import answers

    model = adapted(encoder_folder, "float32").eval()
    session = Session(model=model, task=TASK, tokenizer=load_tokenizer(str(encoder_folder)))
    found = answers(session, "default", ["good film", {"anchor": "bad"}], Settings(32))
    texts = [Related(("good film",)), Related(("bad",))]
    wanted = embeddings(model, encoder_folder, texts, "mean")[:, 0]
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-4, atol=1e-5)
