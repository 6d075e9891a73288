"""Promises of layers that read one input: found as the model runs, and never to be seen in what it answers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from loraloom import LoraConfig, PeftModel, get_peft_model
from loraloom.lora import functional, shared_inputs
from loraloom.lora.frozen import FrozenLinear
from loraloom.lora.functional import SlotGroup

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(**fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ALL, "init_lora_weights": False, **fields})


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many projections each call of the maths computed."""
    counts: list[int] = []

    def counted(x: Tensor, frozen: list[FrozenLinear], slot_groups: list[SlotGroup]) -> tuple[Tensor, ...]:
        counts.append(len(frozen))
        return functional.lora_projections(x, frozen, slot_groups)

    monkeypatch.setattr(shared_inputs, "lora_projections", counted)
    return counts


def backward(model: PeftModel, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {key: p.grad.clone() for key, p in model.adapter_parameters("default").items() if p.grad is not None}


def test_query_key_value_and_gate_up_are_computed_together_from_the_second_step_on(llama, tokens, together) -> None:
    model = get_peft_model(llama.double(), config())
    first = backward(model, tokens)
    assert together == [1] * 14
    together.clear()
    second = backward(model, tokens)
    assert together == [3, 1, 2, 1] * 2
    assert first.keys() == second.keys()
    for key, gradient in first.items():
        torch.testing.assert_close(second[key], gradient, rtol=1e-10, atol=1e-14)


def test_an_answer_has_the_same_bits_before_and_after_learning(llama, tokens, logits, together) -> None:
    model = get_peft_model(llama, config())
    before = logits(model, tokens)
    backward(model, tokens)
    together.clear()
    assert torch.equal(model(tokens).logits, before)
    assert max(together) == 3


class Odd(nn.Module):
    """``b`` reads what ``a`` reads, or a changed one, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.how = "same"

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "same":
            return y + self.b(x)
        if self.how == "changed in place":
            x.data.mul_(1)  # torch does not count this one
            x.detach().add_(1)
            return y + self.b(x)
        return y + self.b(x.clone()) if self.how == "a copy" else y


@pytest.mark.parametrize("how", ["changed in place", "a copy", "not at all"])
def test_a_layer_that_reads_something_else_after_all_is_computed_from_that(how: str, together) -> None:
    plain = Odd()
    model = get_peft_model(copy.deepcopy(plain), config(target_modules=["a", "b"]))
    x = torch.randn(3, 4)
    for _ in range(2):
        model(x.clone()).sum().backward()
    assert together[-1] == 2
    odd = model.get_base_model()
    odd.how = plain.how = how
    update = {
        name: functional.product(*(f.detach() for f in model.base_model.lora_layers[name].factors("default"))) * 2
        for name in ("a", "b")
    }
    with torch.no_grad():
        for name in ("a", "b"):
            getattr(plain, name).weight += update[name]
        for layer in model.base_model.lora_layers.values():
            layer.scaling["default"] = 2.0
    wanted = plain(x.clone()).detach()
    together.clear()
    for _ in range(3):
        torch.testing.assert_close(model(x.clone()), wanted, rtol=1e-5, atol=1e-5)
    assert together[-1] == 1  # updated that it was in vain


def test_what_is_computed_together_does_not_depend_on_which_adapters_are_in_use(llama, tokens, together) -> None:
    model = get_peft_model(llama, config())
    model.add_adapter("narrow", config(target_modules=["q_proj", "v_proj"]))
    for name in ("default", "narrow"):
        model.set_adapter(name)
        for _ in range(2):
            together.clear()
            model(tokens, labels=tokens).loss.backward()
        assert together == [3, 1, 2, 1] * 2


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_gives_the_gradients_of_the_first_forward(
    llama, tokens, reentrant: bool, dropout: float, together
) -> None:
    model = get_peft_model(llama.double(), config(lora_dropout=dropout)).train()

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        x = model.get_input_embeddings()(tokens).detach().requires_grad_()
        model(inputs_embeds=x, labels=tokens).loss.backward()
        return {key: p.grad.clone() for key, p in model.adapter_parameters("default").items()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.get_base_model().is_gradient_checkpointing
    for _ in range(3):  # before, while and after the layers learn
        for key, gradient in gradients().items():
            torch.testing.assert_close(gradient, plain[key], rtol=1e-9, atol=1e-13)
    assert max(together) == 3


def test_nothing_is_learned_while_a_graph_waits_that_checkpointing_will_run_again(llama, tokens) -> None:
    """Two forwards before one backward, as preference losses do, from the very first step."""
    model = get_peft_model(llama, config()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    first = model(tokens, labels=tokens).loss
    with torch.no_grad():
        model(tokens)
    (first + model(tokens, labels=tokens).loss).backward()
    assert all(p.grad is not None for p in model.adapter_parameters("default").values())


def test_the_mask_of_a_slot_follows_its_seed_and_step_whether_or_not_layers_are_computed_together(
    llama, tokens
) -> None:
    model = get_peft_model(llama.double(), config(lora_dropout=0.5)).train()
    losses = []
    for _ in range(3):
        with model.base_model.lora_routed(["default"] * len(tokens), {"default": 99}):
            loss = model.get_base_model()(tokens, labels=tokens).loss
            loss.backward()
            losses.append(float(loss))
    assert losses[0] == losses[1] == losses[2]
    with model.base_model.lora_routed(["default"] * len(tokens), {"default": 98}):
        assert float(model.get_base_model()(tokens, labels=tokens).loss) != losses[0]


def test_a_row_has_the_same_mask_alone_and_in_a_mixed_batch(llama, tokens) -> None:
    model = get_peft_model(llama.double(), config(lora_dropout=0.5), adapter_name="a").train()
    model.add_adapter("b", config(target_modules=["k_proj", "v_proj", "up_proj"], lora_dropout=0.2))
    seeds = {"a": 3, "b": 4}

    def answer(names: list[str], rows: Tensor) -> Tensor:
        with model.base_model.lora_routed(names, seeds):
            return model.get_base_model()(rows).logits

    mixed = answer(["a", "a", "b"], tokens)
    # Norms compute in float32, whose rounding follows the shape of the batch.
    torch.testing.assert_close(mixed[:2], answer(["a", "a"], tokens[:2]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed[2:], answer(["b"], tokens[2:]), rtol=1e-5, atol=1e-6)


def test_a_layer_whose_output_the_loss_does_not_need_gets_no_gradient_and_not_one_of_zeros(together) -> None:
    """Else an optimizer's weight decay would move what PEFT leaves where it is."""
    odd = Odd()
    model = get_peft_model(odd, config(target_modules=["a", "b"]))
    odd.forward = lambda x: odd.a(x) + odd.b(x).detach()
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
    assert together[-1] == 2
    assert {key.split(".")[2] for key, p in model.adapter_parameters("default").items() if p.grad is not None} == {"a"}


def test_a_copy_of_the_model_and_a_pickled_one_learn_for_themselves(llama, tokens, logits) -> None:
    model = get_peft_model(llama, config())
    for _ in range(2):
        backward(model, tokens)
    wanted = logits(model, tokens)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for _ in range(2):
            backward(other, tokens)
        assert torch.equal(logits(other, tokens), wanted)
        for p in other.adapter_parameters("default").values():
            p.data.zero_()
        assert torch.equal(logits(model, tokens), wanted)


def test_autocast_computes_in_its_dtype(llama, tokens, together) -> None:
    model = get_peft_model(llama, config())
    wanted = model(tokens).logits
    together.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(tokens, labels=tokens)
        found.loss.backward()
    assert together == []
    torch.testing.assert_close(found.logits.float(), wanted, rtol=0.1, atol=0.1)
    assert all(p.grad.dtype is torch.float32 for p in model.adapter_parameters("default").values())


def test_a_hook_on_the_frozen_layer_is_called(llama, tokens, together) -> None:
    model = get_peft_model(llama, config())
    seen: list[str] = []
    layer = model.base_model.lora_layers["model.layers.0.self_attn.k_proj"]
    layer.base_layer.register_forward_hook(lambda module, args, out: seen.append("k"))
    for _ in range(2):
        backward(model, tokens)
    assert seen == ["k", "k"]
    assert together[-8:] == [2, 1, 2, 1, 3, 1, 2, 1]


def test_a_weight_that_trains_gets_its_gradient(llama, tokens) -> None:
    model = get_peft_model(llama, config())
    weight = model.base_model.lora_layers["model.layers.0.self_attn.k_proj"].weight
    weight.requires_grad_(True)
    for _ in range(2):
        backward(model, tokens)
    assert weight.grad is not None


@pytest.mark.parametrize("make", [lambda m: m, lambda m: m.get_base_model()], ids=["PeftModel", "base"])
def test_it_compiles_without_a_graph_break(llama, tokens, logits, make: Callable[[PeftModel], nn.Module]) -> None:
    model = get_peft_model(llama, config(lora_dropout=0.1)).eval()
    wanted = logits(model, tokens)
    compiled = torch.compile(make(model), backend="aot_eager", fullgraph=make(model) is not model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, wanted, rtol=1e-5, atol=1e-5)


def test_another_adapter_takes_its_place_in_a_compiled_model_without_compiling_anew(llama, tokens, logits) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = get_peft_model(llama, config(), adapter_name="a")
    for name, alpha in (("b", 8), ("c", 2), ("d", 5)):
        model.add_adapter(name, config(lora_alpha=alpha))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    frames = []
    with torch.no_grad():
        for name in "abcdabcd":
            model.set_adapter(name)
            found = compiled(tokens, use_cache=False).logits
            torch.testing.assert_close(found, logits(model, tokens), rtol=1e-4, atol=1e-4)
            frames.append(counter.frame_count)
    # Once more for the first switch and for the first other scale, from which on the scale is an input.
    assert frames[0] == 1
    assert frames[2] <= 3
    assert len(set(frames[2:])) == 1


def test_calls_that_go_past_the_peft_model_teach_it_too(llama, tokens, together) -> None:
    model = get_peft_model(llama, config())
    for _ in range(3):
        model.get_base_model()(tokens, labels=tokens).loss.backward()
    assert max(together) == 1  # nobody says where one of these forwards ends and the next begins
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
    assert max(together) == 3


def test_a_switch_after_dynamo_forgot_what_it_compiled_is_seen_by_the_next_compilation(llama, tokens, logits) -> None:
    model = get_peft_model(llama, config(), adapter_name="a")
    model.add_adapter("b", config(lora_alpha=5))
    with torch.no_grad():
        torch.compile(model, backend="aot_eager")(tokens, use_cache=False)
        model.set_adapter("a")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model.set_adapter("b")
        found = torch.compile(model, backend="aot_eager")(tokens, use_cache=False).logits
    torch.testing.assert_close(found, logits(model, tokens), rtol=1e-4, atol=1e-4)
