"""A module that adapters train in full: each has its own copy, the base's own stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraloom import LoraConfig, PeftModel, get_base_model_state_dict, get_peft_model
from loraloom.errors import AdapterError, MergeError
from loraloom.lora.modules_to_save import ModulesToSaveWrapper, unwrap


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
        self.other = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).tanh()
        return self.head(x) + self.other(x)


def config(**fields: object) -> LoraConfig:
    return LoraConfig(
        **{"r": 2, "target_modules": ["body"], "modules_to_save": ["head"], "init_lora_weights": False, **fields}
    )


def made(dtype: torch.dtype = torch.float32, **fields: object) -> PeftModel:
    """Two adapters with heads of their own, and one without."""
    torch.manual_seed(0)
    model = get_peft_model(Net().to(dtype), config(**fields), adapter_name="a")
    model.add_adapter("b", config(**fields))
    model.add_adapter("plain", config(modules_to_save=None))
    for number, name in enumerate("ab"):
        with torch.no_grad():
            for key, parameter in model.adapter_parameters(name).items():
                if ".head." in key:
                    parameter.add_(0.3 * (number + 1))
    return model


def head(model: PeftModel) -> ModulesToSaveWrapper:
    found = model.get_base_model().head
    assert isinstance(found, ModulesToSaveWrapper)
    return found


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def answers(model: nn.Module, x: Tensor = X, **options: object) -> Any:
    with torch.no_grad():
        return model(**options) if "input_ids" in options else model(x, **options)


def by_hand(model: PeftModel, name: str, x: Tensor = X) -> Tensor:
    """What adapter ``name`` answers, worked out from its parts."""
    net, saved = model.get_base_model(), head(model)
    with torch.no_grad():
        layer = model.base_model.lora_layers["body"]
        a, b = layer.factors(name)
        hidden = (nn.functional.linear(x, layer.weight + layer.scaling[name] * b @ a, layer.bias)).tanh()
        copies = dict(saved.modules_to_save.items())
        top = copies.get(name, saved.original_module)
        return top(hidden) + net.other(hidden)


@pytest.mark.parametrize("name", ["a", "b", "plain"])
def test_the_active_adapters_copy_is_called(name: str) -> None:
    model = made()
    model.set_adapter(name)
    torch.testing.assert_close(answers(model), by_hand(model, name))
    assert head(model).current() is (
        head(model).original_module if name == "plain" else head(model).modules_to_save[name]
    )


def test_disabling_brings_the_base_back_and_enabling_the_copy() -> None:
    torch.manual_seed(0)
    base = answers(Net())
    model = made()
    wanted = answers(model)
    with model.disable_adapter():
        assert torch.equal(answers(model), base)
    assert torch.equal(answers(model), wanted)


def test_a_mixed_batch_calls_each_rows_own_copy() -> None:
    model = made()
    names = ["b", "a", "plain"]
    found = answers(model, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], by_hand(model, name)[row])
    base = answers(model, adapter_names=["b", "a", "__base__"])[2]
    with model.disable_adapter():
        torch.testing.assert_close(base, answers(model)[2])


def test_a_mixed_batch_of_adapters_without_a_copy_calls_the_base() -> None:
    model = made()
    found = answers(model, adapter_names=["plain", "__base__", "plain"])
    torch.testing.assert_close(found[0], by_hand(model, "plain")[0])


def test_training_moves_the_active_copy_alone() -> None:
    model = made()
    saved = head(model)
    before = {name: p.detach().clone() for name, p in saved.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.set_adapter("b")
    model(X).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in saved.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("modules_to_save.b.")}


def test_the_copy_starts_as_the_base_and_shares_nothing_with_it() -> None:
    model = get_peft_model(Net(), config())
    saved = head(model)
    mine, base = saved.modules_to_save["default"], saved.original_module
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), base.parameters(), strict=True))
    assert not {p.data_ptr() for p in mine.parameters()} & {p.data_ptr() for p in base.parameters()}
    assert all(p.requires_grad for p in mine.parameters())
    assert not any(p.requires_grad for p in base.parameters())


def test_a_copy_is_made_of_the_base_and_not_of_another_adapters_copy_or_factors() -> None:
    torch.manual_seed(0)
    net = Net()
    plain = {name: tensor.clone() for name, tensor in net.head.state_dict().items()}
    model = get_peft_model(net, config(target_modules=["head.0", "body"], modules_to_save=None), adapter_name="lora")
    model.add_adapter("first", config())
    with torch.no_grad():
        for parameter in model.adapter_parameters("first").values():
            parameter.fill_(7)
    model.set_adapter("first")
    model.add_adapter("second", config())
    copy = head(model).modules_to_save["second"].state_dict()
    assert copy.keys() == plain.keys()
    assert all(torch.equal(copy[name], plain[name]) for name in plain)


def test_a_copy_starts_from_the_bases_bias_even_while_another_adapter_trains_it() -> None:
    net = Net()
    base = net.other.bias.detach().clone()
    model = get_peft_model(net, config(modules_to_save=None, bias="all"), adapter_name="biased")
    with torch.no_grad():
        for key, parameter in model.adapter_parameters("biased").items():
            if key.endswith("other.bias"):
                parameter.fill_(7)
    model.add_adapter("b", config(modules_to_save=["other"]))
    copy = model.get_base_model().other.modules_to_save["b"]
    assert torch.equal(copy.bias, base)
    assert torch.equal(model.get_base_model().other.original_module.bias, torch.full_like(base, 7))


def test_an_adapter_on_a_layer_inside_works_where_the_copy_is_not_active() -> None:
    net = Net()
    model = get_peft_model(net, config(), adapter_name="whole")
    with model.disable_adapter():
        base = answers(model)
    model.add_adapter("inside", config(target_modules=["head.0"], modules_to_save=None))
    model.set_adapter("inside")
    inside = answers(model)
    assert not torch.allclose(inside, base)
    model.set_adapter("whole")
    assert not torch.allclose(answers(model), inside)
    mixed = answers(model, adapter_names=["inside", "whole", "__base__"])
    torch.testing.assert_close(mixed[0], inside[0])
    torch.testing.assert_close(mixed[2], base[2])


def test_deleting_adapters_takes_their_copies_and_then_the_wrapper_away() -> None:
    model = made()
    original = head(model).original_module
    model.delete_adapter("b")
    assert list(head(model).modules_to_save) == ["a"]
    model.set_adapter("plain")
    model.delete_adapter("a")
    assert model.get_base_model().head is original
    assert type(original) is nn.Sequential


def test_two_copies_of_one_module_cannot_be_active_together() -> None:
    model = made()
    wanted = answers(model)
    with pytest.raises(AdapterError, match="'a', 'b' each train their own head"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"]
    assert torch.equal(answers(model), wanted)
    model.set_adapter(["a", "plain"])
    assert head(model).current() is head(model).modules_to_save["a"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_module_is_trained_in_float32_and_answers_in_its_dtype(dtype: torch.dtype) -> None:
    model = made(dtype)
    assert {p.dtype for p in head(model).modules_to_save["a"].parameters()} == {torch.float32}
    assert {p.dtype for p in head(model).original_module.parameters()} == {dtype}
    out = model(X.to(dtype))
    assert out.dtype == dtype
    wanted = by_hand(made(), "a")
    torch.testing.assert_close(out.float(), wanted, rtol=0.1, atol=0.1)
    out.float().sum().backward()
    assert {p.grad.dtype for p in head(model).modules_to_save["a"].parameters()} == {torch.float32}
    mixed = answers(model, X.to(dtype), adapter_names=["a", "__base__", "b"])
    assert mixed.dtype == dtype


def test_the_wrapper_shows_the_attributes_of_the_module_in_use() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Net(), config(modules_to_save=["other"]))
    wrapper = model.get_base_model().other
    assert wrapper.weight is wrapper.modules_to_save["default"].weight
    assert wrapper.in_features == 6
    with model.disable_adapter():
        assert wrapper.weight is wrapper.original_module.weight
    with pytest.raises(AttributeError, match="no_such_thing"):
        wrapper.no_such_thing  # noqa: B018


def test_unwrap_looks_through_both_kinds_of_wrapper() -> None:
    net = Net()
    other, body = net.other, net.body
    model = get_peft_model(net, config(target_modules=["other"], modules_to_save=None), adapter_name="lora")
    model.add_adapter("full", config(modules_to_save=["other"]))
    outer = model.get_base_model().other
    assert isinstance(outer, ModulesToSaveWrapper)
    assert unwrap(outer) is other
    assert unwrap(body) is body


def test_a_module_called_by_keyword_is_routed_as_well() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(input=self.body(x))

    model = get_peft_model(Keyword(), config(), adapter_name="a")
    model.add_adapter("b", config(), seed=3)
    names = ["a", "b", "a"]
    found = answers(model, adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(found[row], answers(model)[row])


def test_copies_are_saved_and_loaded(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path / "a", "a")
    again.load_adapter(tmp_path / "b", "b")
    for name in ("a", "b"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(answers(again), answers(model))


class MixedHead(nn.Module):
    """A head that keeps its norm in float32, as some models do, and casts to what its weights have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x.to(self.norm.weight.dtype)).to(self.out.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("save", [["head"], ["head", "other"], ["out"]], ids=", ".join)
def test_a_merged_half_precision_model_has_the_dtypes_of_its_base(save: list[str], dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    net.head = MixedHead().to(dtype)
    net.head.norm.float()
    dtypes = {name: p.dtype for name, p in net.named_parameters()}
    model = get_peft_model(net, config(modules_to_save=save))
    with torch.no_grad():
        for parameter in model.adapter_parameters("default").values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    before = answers(model, X.to(dtype))
    merged = model.merge_and_unload()
    assert {name: p.dtype for name, p in merged.named_parameters()} == dtypes
    torch.testing.assert_close(answers(merged, X.to(dtype)), before, rtol=0.05, atol=0.05)


def test_a_copy_that_half_precision_cannot_hold_is_not_merged() -> None:
    model = get_peft_model(Net().half(), config(modules_to_save=["other"]))
    with torch.no_grad():
        model.adapter_parameters("default")["base_model.model.other.weight"][0, 0] = 1e6
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(MergeError, match="other: 'default' trained it in full.*not finite"):
        model.merge_and_unload()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("save", [["lm_head"], ["lm_head", "embed_tokens"], None])
def test_a_merged_bfloat16_language_model_or_classifier_answers(save: list[str] | None, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    shape = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                        num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=tied)  # fmt: skip
    base = (LlamaForCausalLM if save else LlamaForSequenceClassification)(shape).to(torch.bfloat16).eval()
    task = "CAUSAL_LM" if save else "SEQ_CLS"
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=save, task_type=task))
    with torch.no_grad():
        for parameter in model.adapter_parameters("default").values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.arange(1, 13).view(2, 6)
    before = answers(model, input_ids=ids).logits
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(answers(merged, input_ids=ids).logits, before, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]},
        {"target_parameters": ["up_proj.weight"]},
    ],
    ids=["head", "embedding", "parameter"],
)
def test_the_state_of_the_base_is_as_before_the_adapters(llama, fields: dict[str, Any]) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    model = get_peft_model(llama, LoraConfig(init_lora_weights=False, **fields))
    after = get_base_model_state_dict(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
