"""What is promised of one adapter, on a GPU: it learns in every dtype, and is saved, loaded and resumed to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loops import train_pack
from loraloom import LoraConfig, PeftModel, TaskType, get_peft_model
from loraloom.data.example import Example
from loraloom.engine.loop import advance
from loraloom.engine.pack import Pack
from loraloom.engine.slot import Slot
from loraloom.lora.dropout import DropoutMask
from loraloom.training.checkpointing import folders, restore

pytestmark = pytest.mark.gpu
Make, Batch = Callable[..., nn.Module], Callable[..., dict[str, Tensor]]
CONFIG: dict[str, Any] = {"r": 8, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ROWS = [[3 + (7 * row + place) % 90 for place in range(9)] for row in range(12)]
EXAMPLES = [Example(ids, ids) for ids in ROWS]


def adapted(base: nn.Module, **changes: Any) -> PeftModel:
    return get_peft_model(base, LoraConfig(**{**CONFIG, **changes}), seed=1)


def slot_of(model: PeftModel, steps: int, **changes: Any) -> Slot:
    given = {"batch_size": 4, "learning_rate": 1e-2, "seed": 3, **changes}
    return Slot("default", model.adapter_parameters("default"), EXAMPLES, steps=steps, **given)


def trained(model: PeftModel, slot: Slot, until: int) -> list[float]:
    pack = Pack(model)
    while slot.step < until and slot.running:
        advance(pack, [slot])
    assert not slot.failure
    return slot.curve.loss


def numbers(model: PeftModel) -> dict[str, Tensor]:
    return {key: p.detach().cpu().clone() for key, p in model.adapter_parameters("default").items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_mask_of_dropout_has_the_same_bits_on_every_device(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.ones(5, 7, 33, dtype=dtype)
        dropped = DropoutMask(0.3, 2**40 + 17)
        assert torch.equal(dropped.mask(x.to(device)).cpu(), dropped.mask(x))


def test_losses_are_those_of_the_processor(llama: Make, device: str) -> None:
    here, there = (trained(model, slot_of(model, 8), 8) for model in (adapted(llama(on=on)) for on in (device, "cpu")))
    assert here == pytest.approx(there, rel=1e-3)
    assert here[-1] < here[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_of_any_dtype_learns_and_its_frozen_numbers_stay(llama: Make, dtype: torch.dtype) -> None:
    model = adapted(llama(dtype))
    mine = {id(p) for p in model.adapter_parameters("default").values()}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in mine}
    slot = slot_of(model, 20, scaled=dtype is torch.float16)
    losses = trained(model, slot, 20)
    assert len(losses) == 20
    assert losses[-1] < 0.95 * losses[0]
    assert all(p.dtype is torch.float32 for p in model.adapter_parameters("default").values())
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in frozen.items())


def test_a_loss_scale_that_overflows_is_halved_until_it_fits(llama: Make) -> None:
    model = adapted(llama(torch.float16))
    slot = slot_of(model, 3, scaled=True)
    slot.loss_scale = 2.0**40
    trained(model, slot, 3)
    assert slot.step == 3
    assert 1.0 <= slot.loss_scale < 2.0**40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_is_saved_and_loaded_gives_the_same_bits(
    llama: Make, batch: Batch, dtype: torch.dtype, device: str, tmp_path: Path
) -> None:
    model = adapted(llama(dtype))
    trained(model, slot_of(model, 3), 3)
    model.save_pretrained(tmp_path)
    setup = PeftModel.from_pretrained(llama(dtype), tmp_path)
    assert {p.device.type for p in setup.parameters()} == {torch.device(device).type}
    ids = batch(1)["input_ids"]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, setup.eval()(ids).logits)


@pytest.mark.parametrize("optim", ["adamw", "AdamW", "NAdam", "SGD"])
def test_a_slot_that_goes_on_from_a_checkpoint_comes_to_the_same_bits(llama: Make, optim: str, tmp_path: Path) -> None:
    def fresh(number: int) -> tuple[PeftModel, Slot]:
        model = adapted(llama())
        return model, slot_of(model, 6, optim=optim, learning_rate=1e-3)

    whole, slot = fresh(0)
    trained(whole, slot, 6)
    first, slot = fresh(1)
    trained(first, slot, 3)
    options = SimpleNamespace(output=str(tmp_path), metric_for_best_model=None)
    path = restore.write(slot, first, options, {})  # type: ignore[arg-type]
    second, slot = fresh(2)
    restore.restore(folders.read(path), slot, second)
    trained(second, slot, 6)
    assert same(numbers(second), numbers(whole))
    assert not same(numbers(first), numbers(whole))


def test_a_whole_run_is_stopped_and_resumed(encoder_folder: Path, reviews: Path, device: str, tmp_path: Path) -> None:
    from loraloom.config.train import TrainConfig
    from loraloom.training.failures import Interrupted
    from loraloom.training.run import prepare
    from loraloom.training.trainer import Trainer

    def options(output: str) -> TrainConfig:
        lora = LoraConfig(target_modules="all-linear", lora_dropout=0.1)
        return TrainConfig(model=encoder_folder, data=reviews, task="seq-cls", max_steps=6, output=tmp_path / output,
                            save_steps=2, learning_rate=1e-2, lora=lora, eval_split=20, device=device)  # fmt: skip

    def stop(progress: Any) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    whole = Trainer(prepare(options("whole"))).fit()
    with pytest.raises(Interrupted):
        Trainer(prepare(options("again")), stop).fit()
    again = Trainer(prepare(options("again"), resume=True)).fit(True)
    assert next(again.job.model.parameters()).device.type == torch.device(device).type
    for key, tensor in numbers(whole.job.model).items():  # fused attention adds up in any order there
        torch.testing.assert_close(numbers(again.job.model)[key], tensor, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_its_slot_alone(llama: Make) -> None:
    model = adapted(llama())
    model.add_adapter("wild", LoraConfig(**CONFIG), seed=2)
    slots = [slot_of(model, 4)]
    slots.append(Slot("wild", model.adapter_parameters("wild"), EXAMPLES, steps=4, batch_size=4, learning_rate=1e30))
    train_pack(model, slots, TaskType.CAUSAL_LM, 0)
    assert slots[1].failure
    assert slots[0].step == 4
    assert all(p.isfinite().all() for p in model.adapter_parameters("default").values())


def test_merged_and_unmerged_weights_are_the_frozen_ones_to_the_bit(llama: Make, batch: Batch) -> None:
    base = llama(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = adapted(base, init_lora_weights=False).eval()
    ids = batch(2)["input_ids"]
    with torch.no_grad():
        wanted = model(ids).logits
        model.merge_adapter()
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0.1, atol=0.1)
        model.unmerge_adapter()
        assert torch.equal(model(ids).logits, wanted)
    after = {name.replace(".base_layer", ""): p for name, p in base.named_parameters() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], p) for name, p in before.items())
