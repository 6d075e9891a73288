"""Biases that adapters train: a copy for each, the base's own untouched, and switching switches them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from loraloom import LoraConfig, PeftModel, get_peft_model
from loraloom.errors import AdapterError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, 3)
        self.none = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.none(self.second(self.norm(self.first(x)).tanh()))


ALL = ["first.bias", "norm.bias", "second.bias"]
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def config(bias: str, **fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["first"], "init_lora_weights": False, "bias": bias, **fields})


def fresh(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def biases(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    return {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for key, p in model.adapter_parameters(name).items()
        if key.endswith(".bias")
    }


def made(dtype: torch.dtype = torch.float32) -> PeftModel:
    """Adapter a trains every bias, b that of its target, plain none; all differ."""
    model = get_peft_model(fresh(dtype), config("all"), adapter_name="a")
    model.add_adapter("b", config("lora_only"))
    model.add_adapter("plain", config("none"))
    for number, name in enumerate("ab"):
        with torch.no_grad():
            for parameter in biases(model, name).values():
                parameter.add_(number + 1)
    return model


def held(model: PeftModel) -> dict[str, Tensor]:
    """The biases that the model computes with now."""
    net = model.get_base_model()
    return {name: net.get_submodule(name.removesuffix(".bias")).bias.detach().clone() for name in ALL}


def answers(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


BASE = {name: fresh().get_parameter(name).detach() for name in ALL}


@pytest.mark.parametrize(
    ("bias", "wanted"), [("none", []), ("lora_only", ["first.bias"]), ("all", ALL)], ids=["none", "lora_only", "all"]
)
def test_each_setting_trains_its_biases_and_no_others(bias: str, wanted: list[str]) -> None:
    model = get_peft_model(fresh(), config(bias))
    assert sorted(biases(model, "default")) == sorted(wanted)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")]
    assert len(trained) == len(wanted)
    assert torch.equal(answers(model), answers(get_peft_model(fresh(), config("none"))))


def test_switching_switches_the_biases() -> None:
    model = made()
    plus = {
        "a": {name: BASE[name] + 1 for name in ALL},
        "b": {**BASE, "first.bias": BASE["first.bias"] + 2},
        "plain": BASE,
    }
    for name in ("a", "b", "plain", "b", "a"):
        model.set_adapter(name)
        found = held(model)
        assert all(torch.equal(found[key], plus[name][key]) for key in ALL)


def test_disabling_brings_the_bases_biases_back_and_enabling_the_adapters() -> None:
    model = made()
    wanted = answers(model)
    base = answers(fresh())
    with pytest.raises(KeyError), model.disable_adapter():
        assert torch.equal(answers(model), base)
        raise KeyError
    assert torch.equal(answers(model), wanted)
    model.disable_adapter_layers()
    assert torch.equal(answers(model), base)
    model.set_adapter("b")
    assert torch.equal(answers(model), base)
    model.set_adapter("a")
    model.enable_adapter_layers()
    assert torch.equal(answers(model), wanted)


def test_training_moves_the_active_adapters_biases_alone_and_never_the_bases() -> None:
    model = made()
    optimizer = torch.optim.SGD([p for name in "ab" for p in model.adapter_parameters(name).values()], lr=0.1)
    before = {name: {key: p.detach().clone() for key, p in biases(model, name).items()} for name in "ab"}
    model(X).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, before["a"][key]) for key, p in biases(model, "a").items())
    assert all(torch.equal(p, before["b"][key]) for key, p in biases(model, "b").items())
    with model.disable_adapter():
        assert all(torch.equal(tensor, BASE[key]) for key, tensor in held(model).items())


def test_an_adapter_starts_from_the_bases_biases_whatever_is_active() -> None:
    model = made()
    model.add_adapter("late", config("all"))
    assert all(torch.equal(p, BASE[key]) for key, p in biases(model, "late").items())


def test_each_adapter_has_its_own_copies() -> None:
    model = made()
    model.add_adapter("c", config("all"))
    ids = [id(p) for name in "abc" for p in biases(model, name).values()]
    places = {p.data_ptr() for name in "abc" for p in biases(model, name).values()}
    assert len(set(ids)) == len(places) == 7


@pytest.mark.parametrize("active", ["a", "b", "plain"])
def test_deleting_an_adapter_takes_its_biases_away(active: str) -> None:
    model = made()
    model.set_adapter(active)
    if active != "a":
        before = held(model)
    else:
        before = BASE
        model.set_adapter("plain")
    model.delete_adapter("a")
    assert all(torch.equal(tensor, before[key]) for key, tensor in held(model).items())


def test_unload_gives_the_very_biases_of_the_base_back() -> None:
    net = fresh()
    own = {name: net.get_parameter(name) for name in ALL}
    model = get_peft_model(net, config("all"))
    with torch.no_grad():
        for parameter in biases(model, "default").values():
            parameter.add_(1)
    plain = model.unload()
    assert all(plain.get_parameter(name) is own[name] for name in ALL)
    assert all(torch.equal(own[name], BASE[name]) for name in ALL)
    assert all(p.requires_grad for p in own.values())


def test_merge_and_unload_keeps_the_adapters_biases() -> None:
    model = made(torch.float64)
    wanted, trained = answers(model, X.double()), held(model)
    plain = model.merge_and_unload()
    torch.testing.assert_close(answers(plain, X.double()), wanted, rtol=0, atol=1e-12)
    assert all(torch.equal(plain.get_parameter(name), trained[name]) for name in ALL)


def test_two_adapters_with_biases_cannot_be_active_together() -> None:
    model = made()
    with pytest.raises(AdapterError, match="'a', 'b' each train their own biases"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"]
    model.set_adapter(["plain", "b"])
    assert torch.equal(held(model)["first.bias"], BASE["first.bias"] + 2)


def test_each_row_of_a_mixed_batch_has_the_biases_of_its_adapter() -> None:
    model = made()
    wanted = {}
    for name in ("plain", "a", "b"):
        model.set_adapter(name)
        wanted[name] = answers(model)
    with model.disable_adapter():
        wanted["__base__"] = answers(model)
    model.set_adapter("a")
    names = ["plain", "b", "__base__"]
    with torch.no_grad():
        mixed = model(X, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], wanted[name][row], rtol=1e-6, atol=1e-6)
    assert torch.equal(answers(model), wanted["a"])  # and the route leaves no trace


@pytest.mark.parametrize("name", ["a", "b", "plain", "__base__"])
def test_a_batch_of_one_adapter_uses_its_biases_and_the_active_ones_return(name: str) -> None:
    model = made()
    before = held(model)
    with torch.no_grad():
        found = model(X, adapter_names=[name] * 3)
    assert all(torch.equal(tensor, before[key]) for key, tensor in held(model).items())
    if name == "__base__":
        assert torch.equal(found, answers(fresh()))
    else:
        model.set_adapter(name)
        assert torch.equal(found, answers(model))


@pytest.mark.parametrize("active", ["a", "b", "plain"])
@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.half().double()])
def test_a_cast_model_carries_the_biases_that_wait(active: str, move: Callable[[nn.Module], nn.Module]) -> None:
    model = made()
    model.set_adapter(active)
    wanted = move(nn.ParameterDict({k.replace(".", "_"): nn.Parameter(v.clone()) for k, v in BASE.items()}))
    move(model)
    dtype = wanted["norm_bias"].dtype
    for name in "ab":
        assert {p.dtype for p in biases(model, name).values()} == {dtype}
    with model.disable_adapter():
        assert all(torch.equal(held(model)[key], wanted[key.replace(".", "_")]) for key in ALL)
    assert answers(model, X.to(dtype)).dtype == dtype


def test_a_cast_model_carries_the_gradients_of_biases_that_wait() -> None:
    model = made()
    model(X).square().sum().backward()
    before = {key: p.grad.clone() for key, p in biases(model, "a").items()}
    model.set_adapter("b")
    model.double()
    assert all(torch.equal(p.grad, before[key].double()) for key, p in biases(model, "a").items())
    assert {p.grad.dtype for p in model.adapter_parameters("a").values()} == {torch.float64}


def test_biases_are_saved_and_loaded(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh(), tmp_path / "a", "a")
    again.load_adapter(tmp_path / "b", "b")
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(answers(again), answers(model))


# -- biases that wait are parameters like all others ------------------------------------------------------------------
@pytest.mark.parametrize("active", ["a", "b", "plain"])
def test_every_bias_is_among_the_parameters_once_whichever_adapter_is_active(active: str) -> None:
    net = fresh()
    own = {id(p) for p in net.parameters()}
    model = get_peft_model(net, config("all"), adapter_name="a")
    model.add_adapter("b", config("lora_only"))
    model.add_adapter("plain", config("none"))
    model.set_adapter(active)
    found = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    wanted = own | {id(p) for name in ("a", "b", "plain") for p in model.adapter_parameters(name).values()}
    assert sorted(found) == sorted(wanted)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for name in ("a", "b", "plain") for p in model.adapter_parameters(name).values())
    assert total == trainable + sum(p.numel() for p in fresh().parameters())


def test_an_optimizer_made_of_all_parameters_trains_the_biases_of_whichever_adapter_is_active() -> None:
    model = made()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for name, other in (("b", "a"), ("a", "b")):
        model.set_adapter(name)
        before = {n: {key: p.detach().clone() for key, p in biases(model, n).items()} for n in "ab"}
        model(X).square().sum().backward()
        optimizer.step()
        model.zero_grad()
        assert not any(torch.equal(p, before[name][key]) for key, p in biases(model, name).items())
        assert all(torch.equal(p, before[other][key]) for key, p in biases(model, other).items())
        assert all(p.grad is None for n in "ab" for p in biases(model, n).values())


def test_zero_grad_reaches_biases_that_wait() -> None:
    model = made()
    model(X).square().sum().backward()
    model.set_adapter("b")
    model.zero_grad()
    assert all(p.grad is None for p in model.adapter_parameters("a").values())


def test_a_copy_of_the_model_has_biases_of_its_own_and_switches_them() -> None:
    model = made()
    twin = copy.deepcopy(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    with torch.no_grad():
        for name in "ab":
            for parameter in biases(twin, name).values():
                parameter.zero_()
    for name in ("b", "plain", "a"):
        model.set_adapter(name)
        twin.set_adapter(name)
        assert held(model)["first.bias"].abs().min() > 0
        zero = {"a": ALL, "b": ["first.bias"], "plain": []}[name]
        assert all(
            torch.equal(held(twin)[key], torch.zeros_like(BASE[key]) if key in zero else BASE[key]) for key in ALL
        )


@pytest.mark.parametrize("active", ["a", "b", "plain"])
def test_a_state_dict_holds_every_bias_and_gives_it_back(active: str) -> None:
    model, again = made(), made()
    for one in (model, again):
        one.set_adapter(active)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.fill_(5)
    again.load_state_dict(model.state_dict())
    for name in ("a", "b", "plain"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(answers(again), answers(model))


def test_a_model_whose_last_adapter_with_biases_goes_holds_none() -> None:
    model = made()
    model.set_adapter("plain")
    model.delete_adapter("a")
    model.delete_adapter("b")
    assert sum("bias" in name for name, _ in model.named_parameters()) == len(ALL)
    assert "Biases" not in str(model)
