"""transformers' Trainer takes the model as it takes peft's, with and without peft installed."""

from __future__ import annotations

import copy
import inspect
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraloom import LoraConfig, PeftModel, get_peft_model

ROWS = [{"input_ids": [i, i + 1, i + 2, 7], "labels": [i, i + 1, i + 2, 7], "note": i} for i in range(8)]


@pytest.fixture(params=["with peft", "without peft"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    import transformers.trainer
    import transformers.trainer_utils

    there = request.param == "with peft"
    if there:
        import peft  # noqa: F401
    else:
        monkeypatch.setitem(sys.modules, "peft", None)
        monkeypatch.setattr(transformers.trainer_utils, "is_peft_available", lambda: False)
        monkeypatch.setattr(transformers.trainer, "is_peft_available", lambda: False)
    return there


def llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40, tie_word_embeddings=tied))


def wrapped(base: nn.Module, **fields: Any) -> PeftModel:
    return get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields}))


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = {"max_steps": 2, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True,
                "per_device_train_batch_size": 4, "learning_rate": 0.1, **options}  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS)


def state(model: PeftModel) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in model.adapter_parameters("default").items()}


def test_a_plain_trainer_keeps_the_columns_and_reports_the_loss_of_the_evaluation(
    installed: bool, tmp_path: Path
) -> None:
    model = wrapped(llama())
    before = state(model)
    task = trainer(model, tmp_path, save_strategy="no")
    assert task.label_names == ["labels"]
    assert task.train().training_loss > 0
    assert not any(torch.equal(p, before[key]) for key, p in state(model).items() if "lora_B" in key)
    with torch.no_grad():
        batch = {key: torch.tensor([row[key] for row in ROWS]) for key in ("input_ids", "labels")}
        wanted = model(**batch).loss
    assert task.evaluate()["eval_loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_label_smoothing_shifts_the_labels_of_a_causal_model(installed: bool, tmp_path: Path) -> None:
    plain, model = llama(), wrapped(llama())
    losses = [trainer(m, tmp_path, label_smoothing_factor=0.2).evaluate()["eval_loss"] for m in (plain, model)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_question_answering_finds_its_labels(installed: bool, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = wrapped(BertForQuestionAnswering(BertConfig(**sizes, vocab_size=40)), target_modules=["query"])
    task = trainer(model, tmp_path)
    assert task.label_names == ["start_positions", "end_positions"]
    assert (
        not task.model_accepts_loss_kwargs or "kwargs" in inspect.signature(BertForQuestionAnswering.forward).parameters
    )


@pytest.mark.parametrize("tied", [False, True])
def test_beside_peft_checkpoints_hold_the_adapter_alone_and_training_resumes_from_them(
    tied: bool, tmp_path: Path
) -> None:
    import peft  # noqa: F401

    model = wrapped(llama(tied))
    trainer(model, tmp_path / "whole").train()
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    again = wrapped(llama(tied))
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(p, state(model)[key]) for key, p in state(again).items())


def test_beside_peft_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    import peft  # noqa: F401
    from safetensors.torch import load_file

    model = wrapped(llama())
    task = trainer(
        model,
        tmp_path,
        learning_rate=50.0,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        max_steps=3,
    )
    task.train()
    best = Path(task.state.best_model_checkpoint)
    assert best.name != "checkpoint-3"
    best_state = load_file(best / "adapter_model.safetensors")
    assert all(torch.equal(p, best_state[key]) for key, p in state(model).items())


def test_a_gathered_state_dict_is_what_is_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = wrapped(llama(), modules_to_save=["lm_head"], bias="all")
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(tensor, found[key] - 1) or torch.allclose(tensor + 1, found[key])
               for key, tensor in state(model).items())  # fmt: skip
    assert found.keys() == state(model).keys()


def test_forward_shows_the_models_arguments_and_adapter_names() -> None:
    model = wrapped(llama())
    shown = inspect.signature(model.forward).parameters
    wanted = inspect.signature(model.get_base_model().forward).parameters
    assert set(shown) == {*wanted, "adapter_names"}


def test_isinstance_knows_both_classes() -> None:
    import peft

    model = wrapped(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"])
    assert isinstance(model, PeftModel)
    assert isinstance(model, peft.PeftModel)
    assert not isinstance(model, peft.PeftMixedModel)


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, "pickle"])
def test_a_model_is_copied_and_pickled_as_what_it_is(installed: bool, again: Any) -> None:
    model = wrapped(llama()).eval()
    if again == "pickle":
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    else:
        twin = again(model)
    assert type(twin) is type(model)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
        assert str(twin) == str(model)
    assert str(model).startswith("PeftModel(\n  (base_model): LoraModel(\n    (model): LlamaForCausalLM(")
