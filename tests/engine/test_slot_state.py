"""Promises of a slot's state: saved at any point and loaded into a fresh slot, it ends at the same bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraloom.data.example import Example
from loraloom.engine.slot import Slot
from loraloom.engine.slot_state import SlotState, values_of_format_1
from loraloom.errors import AdapterError

ROWS = [Example([1] * (1 + i % 5), i % 3) for i in range(10)]
SHAPES = {"q.lora_A.weight": (2, 3), "q.lora_B.weight": (3, 2), "k.lora_A.weight": (2, 3), "bias": (4,), "rare": (2,)}
OPTIM: dict[str, dict[str, Any]] = {
    "adamw": {},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adafactor": {},
    "AdamW": {"amsgrad": True},
    "Adagrad": {},
    "Rprop": {},
}
#: Forward at which the gradients overflow, in float16.
OVERFLOW = 5


def fresh(optim: str, scaled: bool = True) -> tuple[Slot, dict[str, nn.Parameter]]:
    source = torch.Generator().manual_seed(1)
    made = {f"m.{name}": nn.Parameter(torch.randn(shape, generator=source)) for name, shape in SHAPES.items()}
    slot = Slot(
        "s", made, ROWS, steps=5, batch_size=3, learning_rate=1e-2, gradient_accumulation_steps=3,
        loraplus_lr_ratio=4.0, optim=optim, optim_args=OPTIM[optim], scaled=scaled,
        lr_scheduler_type="cosine", task="seq-cls",
    )  # fmt: skip
    return slot, made


def forward(slot: Slot, made: dict[str, nn.Parameter], number: int) -> None:
    """A loss that depends on the parameters, the rows, the weight and the dropout seed. ``rare`` is used late."""
    examples, weight = slot.next_examples()
    source = torch.Generator().manual_seed(slot.dropout_seed + sum(example.labels for example in examples))
    loss = torch.zeros(())
    for name, parameter in made.items():
        if name != "m.rare" or slot.step >= 2:
            loss = loss + (parameter * torch.randn(parameter.shape, generator=source)).square().mean()
    (loss * weight * (float("inf") if number == OVERFLOW else 1.0)).backward()
    slot.update(float(loss.detach()))


def train(slot: Slot, made: dict[str, nn.Parameter], start: int = 0, stop: int = 99) -> int:
    for number in range(start, stop):
        if not slot.running:
            return number
        forward(slot, made, number)
    return stop


def end(slot: Slot, made: dict[str, nn.Parameter]) -> tuple[list[bytes], str]:
    return [p.detach().numpy().tobytes() for p in made.values()], f"{slot.curve} {slot.state_dict().values}"


@pytest.mark.parametrize("optim", OPTIM)
def test_saved_after_any_forward_and_loaded_into_a_fresh_slot_it_ends_at_the_same_bytes(optim: str) -> None:
    """Between steps, within an accumulation step, after an overflow; several times over, through a file's bytes."""
    whole, made = fresh(optim)
    count = train(whole, made)
    assert (whole.step, whole.loss_scale, count) == (5, 2.0**15, 18), "an overflow repeats its step"
    for every in (1, 2, 7):
        slot, mine = fresh(optim)
        for start in range(0, count, every):
            train(slot, mine, start, start + every)
            saved = slot.state_dict().to_bytes()
            slot, mine = fresh(optim)
            slot.load_state_dict(SlotState.from_bytes(saved))
        assert end(slot, mine) == end(whole, made)


def test_a_state_is_loaded_twice_without_a_share_in_what_follows() -> None:
    slot, made = fresh("adamw")
    train(slot, made, stop=4)
    saved = SlotState.from_bytes(slot.state_dict().to_bytes())
    ends = []
    for _ in range(2):
        slot, made = fresh("adamw")
        slot.load_state_dict(saved)
        train(slot, made, 4)
        ends.append(end(slot, made))
    assert ends[0] == ends[1]


def test_what_stopped_a_slot_is_part_of_its_state() -> None:
    slot, made = fresh("adamw", scaled=False)
    train(slot, made)
    assert slot.failure == "step 2: the norm of the gradients is inf"
    other, _ = fresh("adamw", scaled=False)
    other.load_state_dict(SlotState.from_bytes(slot.state_dict().to_bytes()))
    assert (other.failure, other.failed_examples) == (slot.failure, slot.failed_examples)
    other.stop_reason = "no better"
    again, _ = fresh("adamw", scaled=False)
    again.load_state_dict(other.state_dict())
    assert again.done


@pytest.mark.parametrize("optim", OPTIM)
def test_state_in_another_order_loads_by_name(optim: str) -> None:
    slot, made = fresh(optim)
    train(slot, made, stop=8)
    state = slot.state_dict()
    tensors = {key: tensor.clone() for key, tensor in state.tensors.items()}
    other, mine = fresh(optim)
    other.load_state_dict(SlotState(dict(sorted(tensors.items(), key=lambda item: item[0][::-1])), state.values))
    assert train(slot, made, 8) == train(other, mine, 8)
    assert end(other, mine) == end(slot, made)


def lack(name: str) -> Any:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.endswith(name)}


def more(name: str) -> Any:
    return lambda tensors: tensors | {name: torch.zeros(2)}


def turn(name: str) -> Any:
    return lambda tensors: tensors | {name: tensors[name].T}


@pytest.mark.parametrize(
    ("optim", "damage", "said"),
    [
        ("adamw", lack("adapter/m.bias"), "adapter tensor m.bias is missing in the saved state"),
        ("adamw", more("adapter/m.v"), "adapter tensor m.v of the saved state is unknown here"),
        ("adamw", turn("adapter/m.q.lora_A.weight"), "adapter tensor m.q.lora_A.weight has shape (3, 2) in the saved"),
        ("adamw", turn("gradient/m.q.lora_A.weight"), "gradient of m.q.lora_A.weight has shape (3, 2) in the saved"),
        ("adamw", more("gradient/m.v"), "gradient of m.v of the saved state is unknown here"),
    ]
    + [
        (optim, damage, said)
        for optim, kind in (("adamw", "exp_avg"), ("SGD", "momentum_buffer"), ("AdamW", "max_exp_avg_sq"))
        for damage, said in [
            (more(f"optimizer/{kind}/m.v"), "optimizer state of m.v: there is no such parameter here"),
            (
                turn(f"optimizer/{kind}/m.q.lora_A.weight"),
                f"optimizer state of m.q.lora_A.weight: {kind} has shape (3, 2) in the saved state, and needs (2, 3)",
            ),
            (
                more("optimizer/velocity/m.bias"),
                "optimizer state of m.bias: velocity of the saved state is unknown here",
            ),
        ]
    ]
    + [
        (
            "adamw",
            lambda tensors: {k: v for k, v in tensors.items() if not (k.startswith("opt") and k.endswith("m.bias"))},
            "optimizer state of m.bias is missing in the saved state",
        ),
        ("adamw", lack("exp_avg_sq/m.bias"), "optimizer state of m.bias: exp_avg_sq is missing in the saved state"),
        ("Adafactor", lack("row_var/m.k.lora_A.weight"), "optimizer state of m.k.lora_A.weight: row_var is missing in"),
    ],
)
def test_a_tensor_that_is_missing_unknown_or_of_another_shape_is_refused_by_name(
    optim: str, damage: Any, said: str
) -> None:
    slot, made = fresh(optim)
    train(slot, made, stop=4)
    state = slot.state_dict()
    with pytest.raises(AdapterError) as error:
        fresh(optim)[0].load_state_dict(SlotState(damage(state.tensors), state.values))
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("optim", ["adamw", "SGD"])
def test_positions_of_loraloom_0_1_are_parameters_in_their_order(optim: str) -> None:
    whole, made = fresh(optim)
    train(whole, made, stop=13)  # within a step; each kind of parameter has had its first gradient
    state, names = whole.state_dict(), list(made)
    optimizer = state.below("optimizer")
    old: dict[str, Tensor] = {}
    if optim == "SGD":
        old = {f"{i}.momentum_buffer": optimizer[f"momentum_buffer/{name}"] for i, name in enumerate(names)}
    else:
        for number, members in enumerate([[0, 2, 3], [1], [4]]):  # rates of A and of B, and the late one
            old[f"{number}.members"] = torch.tensor(members)
            old[f"{number}.step"] = optimizer[f"step/{names[members[0]]}"]
            for kind in ("exp_avg", "exp_avg_sq"):
                old[f"{number}.{kind}"] = torch.cat([optimizer[f"{kind}/{names[i]}"].reshape(-1) for i in members])
    tensors = {key: tensor for key, tensor in state.tensors.items() if not key.startswith("optimizer/")}
    tensors |= {f"optimizer/{key}": tensor for key, tensor in old.items()}
    values = values_of_format_1(
        whole.step, state.values["curve"], (whole.micro_step, whole.step_loss), (whole.loss_scale, whole.good_steps)
    )
    other, mine = fresh(optim)
    other.load_state_dict(SlotState({key: tensor.clone() for key, tensor in tensors.items()}, values))
    train(whole, made, 13), train(other, mine, 13)
    assert end(other, mine) == end(whole, made)
    key = next(key for key in old if "exp_avg" in key or "momentum" in key)
    for wrong, said in (
        ({f"optimizer/{key}": torch.zeros(5, 5)}, "optimizer state "),
        ({"optimizer/9.exp_avg": torch.zeros(2)}, "optimizer state 9.exp_avg is of parameter 9, and there are 5"),
    ):
        with pytest.raises(AdapterError) as error:
            fresh(optim)[0].load_state_dict(SlotState(tensors | wrong, values))
        assert str(error.value).startswith(said)
