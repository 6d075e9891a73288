"""Promises of what a run shares: new modules of any name train with every adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loraloom import LoraConfig, get_peft_model
from loraloom.config.train import TrainConfig
from loraloom.training.setup import load


@pytest.fixture(scope="module")
def modern_folder(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Path:
    """A ModernBERT, whose head for answers has the name that others' heads for classes have."""
    import shutil

    from transformers import AutoTokenizer, ModernBertConfig, ModernBertForMaskedLM

    folder = tmp_path_factory.mktemp("modern")
    size = len(AutoTokenizer.from_pretrained(encoder_folder))
    config = ModernBertConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    ModernBertForMaskedLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(encoder_folder / name, folder)
    return folder


@pytest.mark.parametrize(("model", "head"), [("modern_folder", "classifier"), ("encoder_folder", "qa_outputs")])
def test_a_new_head_trains_whatever_it_is_called(
    model: str, head: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"question": "was it", "context": "the good film", "answers": {"text": ["good"], "answer_start": [4]}}
    path.write_text(f"{json.dumps(row)}\n" * 8)
    options = TrainConfig(
        model=str(request.getfixturevalue(model)), data=str(path), task="question-answering",
        output=str(tmp_path / "out"), lora=LoraConfig(target_modules="all-linear"),
    )  # fmt: skip
    setup = load(options)
    assert setup.new_modules == [head]
    adapted = get_peft_model(setup.base, setup.config(setup.options))
    assert any(f".{head}." in f".{name}." for name in adapted.adapter_parameters("default"))


NLI = ["entailment", "neutral", "contradiction"]


@pytest.mark.parametrize(("known", "kept"), [(NLI, True), (["ENTAILMENT", "Neutral", "contradiction"], True),
                                             (["yes", "maybe", "no"], False)])  # fmt: skip
def test_a_ready_head_is_kept_under_its_own_numbers_or_replaced(
    encoder_folder: Path, tmp_path: Path, known: list[str], kept: bool
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    names = {"id2label": dict(enumerate(known)), "label2id": {name: i for i, name in enumerate(known)}}
    ready = AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=3, **names)
    ready.classifier.weight.data.fill_(0.5)
    ready.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(encoder_folder).save_pretrained(tmp_path / "model")
    rows = [{"text1": "the cat was bad", "text2": "it was a film", "label": label} for label in NLI * 10]
    (tmp_path / "nli.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load(TrainConfig(model=tmp_path / "model", data=tmp_path / "nli.jsonl", task="seq-cls", output=tmp_path))
    weight = found.base.get_parameter("classifier.weight")
    assert found.data.names == (NLI if kept else sorted(NLI))
    assert torch.equal(weight, ready.classifier.weight) is kept
    assert found.new_modules == ([] if kept else ["classifier"])
    said = " ".join(found.data.notes)
    assert ("classes are numbered as" in said) is kept
    assert ("has a head for other classes (yes, maybe, no): a new one is trained" in said) is not kept
