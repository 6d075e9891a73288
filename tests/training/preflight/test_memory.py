"""Promises of the forecast: what it says before a model is loaded is what training then really holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loops import train_pack
from loraloom import LoraConfig, PeftModel, get_peft_model
from loraloom.data.example import Example
from loraloom.engine.slot import Slot
from loraloom.errors import ConfigError, ModelError
from loraloom.models.load import load_base
from loraloom.tasks import TASKS
from loraloom.training.preflight.memory import Memory, forecast

ROWS, LENGTH = 4, 16

KNOBS: dict[str, dict[str, Any]] = {
    "by default": {},
    "all-linear": {"target_modules": "all-linear", "r": 3},
    "biases": {"target_modules": "all-linear", "bias": "all"},
    "a table": {"target_modules": ["embed_tokens", "word_embeddings"]},
}


def config(folder: Path, knobs: str) -> LoraConfig:
    fields = {"lora_dropout": 0.1, "target_modules": "all-linear"} if knobs == "dropout" else dict(KNOBS[knobs])
    if isinstance(fields.get("target_modules"), list):
        fields["target_modules"] = [fields["target_modules"]["decoder" not in str(folder)]]
    return LoraConfig(**fields)


def setup(folder: Path, task: str, dtype: str, settings: LoraConfig) -> PeftModel:
    base, _ = load_base(str(folder), TASKS[task], dtype, ["a", "b"])
    return get_peft_model(base, settings.copy(task_type=TASKS[task].task_type))


def told(folder: Path, task: str, dtype: str, settings: LoraConfig) -> Memory:
    return forecast(str(folder), task, settings, batch_size=ROWS, max_length=LENGTH, dtype=dtype)[1]


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.fixture(params=["encoder, seq-cls", "decoder, seq-cls", "decoder, causal-lm"])
def case(request: pytest.FixtureRequest) -> tuple[Path, str]:
    name, task = request.param.split(", ")
    return request.getfixturevalue(f"{name}_folder"), task


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_base_adapter_gradients_and_optimizer_are_what_a_step_allocates(
    case: tuple[Path, str], dtype: str, knobs: str
) -> None:
    folder, task = case
    settings = config(folder, knobs)
    said = told(folder, task, dtype, settings)
    model = setup(folder, task, dtype, settings)
    trained = model.adapter_parameters("default")
    assert said.adapter == sum(size(p) for p in trained.values())
    plain, _ = load_base(str(folder), TASKS[task], dtype, ["a", "b"])
    assert said.base == sum(size(p) for p in plain.parameters())
    gradients: list[int] = []

    class Watched(Slot):
        def update(self, loss: float) -> None:
            gradients.extend(size(p.grad) for p in trained.values() if p.grad is not None)
            super().update(loss)

    rows = [Example([3] * LENGTH, i % 2 if task == "seq-cls" else [3] * LENGTH) for i in range(ROWS)]
    slot = Watched("default", trained, rows, steps=1, batch_size=ROWS, learning_rate=1e-9)
    train_pack(model, [slot], TASKS[task], 0)
    assert said.gradients == sum(gradients)
    assert said.optimizer == sum(size(value) for key, value in slot.optimizer.state_dict().items() if "exp_avg" in key)


def kept_by_a_forward(model: nn.Module) -> tuple[int, int]:
    """Bytes that autograd holds after a real forward, weights left out; and numbers in the logits."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.full((ROWS, LENGTH), 3)
    model.train()
    model(input_ids=ids, attention_mask=torch.ones_like(ids))  # the layers learn what they share
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), logits.numel()


@pytest.mark.parametrize("knobs", [*KNOBS, "dropout"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps_in_a_real_forward(case: tuple[Path, str], dtype: str, knobs: str) -> None:
    folder, task = case
    settings = config(folder, knobs)
    said = told(folder, task, dtype, settings)
    real, numbers = kept_by_a_forward(setup(folder, task, dtype, settings))
    assert said.activations is not None
    element = getattr(torch, dtype).itemsize
    # The loss, which the forward above leaves out: a float32 copy of the logits and its gradient; for a language
    # model logits and their float32 copy while they are there, and the gradient of the hidden states.
    loss = 2 * 4 * numbers if task == "seq-cls" else (element + 4) * numbers + ROWS * LENGTH * 32 * element
    assert said.activations == pytest.approx(real + loss, rel=0.02)
    assert said.total == said.base + said.adapter + said.gradients + said.optimizer + said.activations


def test_logits_of_a_great_vocabulary_are_counted_a_few_at_a_time(decoder_folder: Path, tmp_path: Path) -> None:
    values = json.loads((decoder_folder / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(values | {"vocab_size": 2**18}))
    said = forecast(str(tmp_path), "causal-lm", LoraConfig(), batch_size=64, max_length=64)[1]
    assert said.activations is not None
    assert said.activations < 64 * 64 * 2**18  # whole logits would be eight times that


def test_activations_grow_with_rows_and_tokens(decoder_folder: Path) -> None:
    def kept(rows: int, length: int) -> int:
        memory = forecast(str(decoder_folder), "causal-lm", LoraConfig(), batch_size=rows, max_length=length)[1]
        assert memory.activations is not None
        return memory.activations

    assert kept(8, 16) == pytest.approx(2 * kept(4, 16), rel=0.05)
    assert kept(4, 32) == pytest.approx(2 * kept(4, 16), rel=0.05)


def test_the_plan_is_that_of_the_loaded_model(decoder_folder: Path) -> None:
    settings = LoraConfig(target_modules="all-linear", r=3)
    made, _, length = forecast(str(decoder_folder), "causal-lm", settings)
    model = setup(decoder_folder, "causal-lm", "float32", settings)
    assert made.parameters == sum(p.numel() for p in model.adapter_parameters("default").values())
    assert length == 64  # what the model reads, since that is less than 512
    assert settings.task_type is None


def test_layers_that_compute_again_keep_less(case: tuple[Path, str]) -> None:
    folder, task = case
    given = {"batch_size": ROWS, "max_length": LENGTH}
    whole, again = (forecast(str(folder), task, LoraConfig(), gradient_checkpointing=g, **given)[1] for g in (0, 1))  # type: ignore[arg-type]
    assert whole.activations
    assert again.activations
    inputs = 2 * ROWS * LENGTH * 32 * 4  # two layers of width 32
    assert inputs < again.activations < whole.activations
    assert again.total - again.activations == whole.total - whole.activations


def test_options_that_make_no_sense_and_models_that_are_none_are_refused(decoder_folder: Path, tmp_path: Path) -> None:
    name = str(decoder_folder)
    for said, call in {
        "task: must be one of seq-cls, causal-lm, .*found 'lm'": lambda: forecast(name, "lm", LoraConfig()),
        "dtype: must be": lambda: forecast(name, "seq-cls", LoraConfig(), dtype="int4"),
        "labels: must be": lambda: forecast(name, "seq-cls", LoraConfig(), labels=0),
        "reads at most 64 tokens, found 65": lambda: forecast(name, "seq-cls", LoraConfig(), max_length=65),
    }.items():
        with pytest.raises(ConfigError, match=said):
            call()
    with pytest.raises(ModelError, match="holds no config.json"):
        forecast(str(tmp_path), "seq-cls", LoraConfig())


def test_a_forward_that_looks_at_numbers_leaves_the_activations_open(
    decoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def looks(self: Any, input_ids: Tensor, **options: Any) -> Any:
        assert int(input_ids.sum()) >= 0
        return plain(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", looks)
    memory = told(decoder_folder, "causal-lm", "float32", LoraConfig())
    assert memory.activations is None
    assert memory.total == memory.base + memory.adapter + memory.gradients + memory.optimizer


@pytest.mark.parametrize("case", ["encoder, token-cls", "encoder, question-answering"], indirect=True)
def test_tags_and_answers_are_counted_too(case: tuple[Path, str]) -> None:
    memory = told(*case, "float32", config(case[0], "by default"))
    assert memory.activations
    assert memory.activations < 2 * (
        told(case[0], "seq-cls", "float32", config(case[0], "by default")).activations or 0
    )


def test_an_encoder_with_a_decoder_is_counted_too(translator_folder: Path) -> None:
    memory = told(translator_folder, "seq2seq-lm", "float32", LoraConfig(target_modules=["q", "v"]))
    assert memory.activations
