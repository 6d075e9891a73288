"""What is promised of adapters beside each other, on a GPU: each equals itself alone, whatever befalls the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraloom import LoraConfig, get_peft_model
from loraloom.engine.flat_adamw import FlatAdamW
from loraloom.engine.pack import Pack
from loraloom.models import activation_checkpointing

pytestmark = pytest.mark.gpu
Make, Batch = Callable[..., nn.Module], Callable[..., dict[str, Tensor]]
TASK = {"task_type": "CAUSAL_LM"}
#: Unlike in rank, dropout and targets
CONFIGS = {
    "a": LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", **TASK),
    "b": LoraConfig(r=20, lora_alpha=40, target_modules=["q_proj", "v_proj"], **TASK),
    "c": LoraConfig(r=16, lora_dropout=0.3, target_modules=["q_proj", "k_proj", "down_proj"], **TASK),
    "d": LoraConfig(r=16, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "down_proj"], **TASK),
}
SEEDS = {name: number for number, name in enumerate(CONFIGS)}
Run = tuple[dict[str, list[float]], dict[str, dict[str, Tensor]]]


def train(base: nn.Module, batch: Batch, names: str, steps: int, spoilt: str = "", tokens: Any = len) -> Run:
    """Losses and final numbers of each adapter. ``spoilt`` has no numbers from the third step on."""
    pack = Pack(base, {name: CONFIGS[name] for name in names}, seeds={name: SEEDS[name] for name in names})
    optimizers = {name: FlatAdamW([(p, 1.0) for p in pack.parameters_of(name).values()], 0.01) for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    for step in range(steps):
        if spoilt and step == 2:
            for p in pack.parameters_of(spoilt).values():
                p.data.fill_(torch.nan)
        given = {name: batch(10 * SEEDS[name] + step, tokens=16 + (SEEDS[name] if tokens is len else 0))
                 for name in names}  # fmt: skip
        found = pack.backward(given, dropout_seeds={name: 7 * SEEDS[name] + step for name in names})
        for name in names:
            losses[name].append(found[name])
            if name != spoilt or step < 2:
                optimizers[name].step(3e-3, 1.0)
    return losses, {
        name: {key: p.detach().cpu().clone() for key, p in pack.parameters_of(name).items()} for name in names
    }


def test_each_of_a_pack_equals_itself_alone_in_float64(llama: Make, batch: Batch) -> None:
    # Llama's norms compute in float32, whose rounding follows the shape of the whole batch.
    losses, together = train(llama(torch.float64), batch, "abcd", 4)
    for name in CONFIGS:
        alone_losses, alone = train(llama(torch.float64), batch, name, 4)
        assert losses[name] == pytest.approx(alone_losses[name], rel=1e-5)
        for key, tensor in together[name].items():
            wanted = alone[name][key]
            assert (tensor - wanted).norm() <= 1e-4 * wanted.norm().clamp_min(1e-3), (name, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_without_numbers_leaves_the_others_bit_identical(llama: Make, batch: Batch, dtype: torch.dtype) -> None:
    calm_losses, calm = train(llama(dtype), batch, "abcd", 5, tokens=None)
    wild_losses, wild = train(llama(dtype), batch, "abcd", 5, spoilt="c", tokens=None)
    assert not torch.tensor(wild_losses["c"]).isfinite().all()
    for name in "abd":
        assert wild_losses[name] == calm_losses[name]
        assert all(torch.equal(wild[name][key], tensor) for key, tensor in calm[name].items())


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "loraloom's own"])
def test_gradients_with_checkpointing_are_those_without(llama: Make, batch: Batch, kind: str) -> None:
    """The forward is run again on autograd's thread for the device, which is not the one of the first forward."""

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = llama(torch.float64)
        pack = Pack(model, CONFIGS, seeds=SEEDS)
        if checkpointing and kind == "loraloom's own":
            activation_checkpointing.enable(pack.model)
        elif checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
            model.enable_input_require_grads()
            for layer in model.model.layers:  # transformers checkpoints in training mode alone
                layer.training = True
        found = {}
        for turn in range(2):  # the second meets what the first left behind
            pack.model.zero_grad()
            pack.backward({name: batch(SEEDS[name]) for name in CONFIGS}, dropout_seeds=SEEDS)
            found |= {f"{turn} {key}": p.grad.clone() for key, p in pack.model.named_parameters() if p.grad is not None}
        return found

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_users_own_loop_has_the_same_gradients_with_checkpointing(llama: Make, batch: Batch, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        base = llama(torch.float64, attention_dropout=0.0)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            base.enable_input_require_grads()
        model = get_peft_model(base, CONFIGS["b"], seed=1).train()
        found = {}
        for turn in range(2):
            model.zero_grad()
            model(**batch(turn)).loss.backward()
            found |= {f"{turn} {key}": p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        return found

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-6, atol=1e-10)


def test_rows_of_several_adapters_in_any_order_answer_as_alone(llama: Make, batch: Batch) -> None:
    model = get_peft_model(llama(torch.float64), CONFIGS["a"], adapter_name="a", seed=1)
    for name in "bcd":
        model.add_adapter(name, CONFIGS[name], seed=SEEDS[name])
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p) / 10
    model.eval()
    ids = batch(5, rows=6)["input_ids"]
    names = ["c", "a", "__base__", "b", "a", "d"]
    with torch.no_grad():
        together = model(ids, adapter_names=names).logits
        for row, name in enumerate(names):
            alone = model(ids[row : row + 1], adapter_names=[name]).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-6)
        assert (together[1] - model(ids[1:2], adapter_names=["__base__"]).logits[0]).abs().max() > 1e-3


def test_generation_with_a_cache_of_several_adapters_is_that_of_each_alone(llama: Make, batch: Batch) -> None:
    first, second = (LoraConfig(r=r, target_modules="all-linear", init_lora_weights=False, **TASK) for r in (4, 8))
    model = get_peft_model(llama(torch.float64), first, adapter_name="a", seed=1)
    model.add_adapter("b", second, seed=2)
    model.eval()
    ids = batch(6, rows=3, tokens=5)["input_ids"]
    names = ["b", "a", "b"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        alone = model.generate(input_ids=ids[row : row + 1], adapter_names=[name], **options)
        assert together[row].tolist()[: alone.shape[1]] == alone[0].tolist()
