"""A weight in a form of its own is one class and one line: nothing from plan to merge asks what it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from loraloom import LoraConfig, PeftModel, get_peft_model, plan
from loraloom.engine.pack import Pack
from loraloom.errors import MergeError
from loraloom.lora import frozen
from loraloom.lora.frozen import DenseLinear, OpaqueLinear, frozen_linear


class Int8Linear(nn.Module):
    """A weight of whole numbers and a factor for each row, as a quantisation library would hold it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("quantised", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.quantised.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Int8:
    merge_obstacle = "quantised to int8; load the base in bfloat16 to merge"

    def __init__(self, module: Int8Linear) -> None:
        self.quantised, self.scale, self.bias = module.quantised, module.scale, module.bias
        self.shape, self.device, self.dtype = tuple(self.quantised.shape), self.scale.device, self.scale.dtype
        self.nbytes = self.quantised.nbytes + self.scale.nbytes

    def supports(self, x: Tensor) -> bool:
        return x.dtype is self.dtype

    def matmul(self, x: Tensor) -> Tensor:
        y = x @ self.dequantize().T
        return y if self.bias is None else y + self.bias

    def matmul_grad_input(self, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        dx = dy @ self.dequantize()
        return dx if onto is None else onto + dx

    def dequantize(self) -> Tensor:
        return self.quantised.to(self.scale.dtype) * self.scale


@pytest.fixture(autouse=True)
def _int8_is_known() -> Iterator[None]:
    frozen.register(Int8Linear, Int8)
    yield
    del frozen._MODULES[Int8Linear]
    frozen.registered.cache_clear()


def bases() -> tuple[nn.Module, nn.Module]:
    """A small BERT with int8 layers, and a dense one of the same numbers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)
    small = transformers.BertForSequenceClassification(config).double().eval()
    dense = copy.deepcopy(small)
    for name, module in list(small.named_modules()):
        if isinstance(module, nn.Linear) and "encoder" in name:
            small.set_submodule(name, made := Int8Linear(module))
            dense.get_submodule(name).weight.data = Int8(made).dequantize()
    return small, dense


def config(**fields: object) -> LoraConfig:
    return LoraConfig(
        **{"r": 3, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "SEQ_CLS", **fields}
    )


def rows(seed: int) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(50, (2, 5), generator=make), "labels": torch.tensor([0, 1])}


def test_a_registered_weight_is_planned_with_its_numbers_and_its_bytes() -> None:
    small, dense = bases()
    plans = [plan(model, config()) for model in (small, dense)]
    assert [target.name for target in plans[0].targets if "encoder" in target.name]
    assert plans[0].targets == plans[1].targets
    assert plans[0].base_parameters == plans[1].base_parameters
    layers = [module for module in small.modules() if isinstance(module, Int8Linear)]
    saved = sum(8 * m.quantised.numel() - Int8(m).nbytes for m in layers)
    assert plans[1].base_bytes - plans[0].base_bytes == saved > 0


def test_a_pack_on_it_has_the_losses_and_gradients_of_adapters_alone_on_its_dense_twin() -> None:
    small, dense = bases()
    configs = {
        "plain": config(bias="lora_only"),
        "dropped": config(r=5, lora_dropout=0.3),
        "other": config(target_modules=["query", "intermediate.dense"]),
    }
    batches, seeds = ({name: make(i) for i, name in enumerate(configs)} for make in (rows, int))
    pack = Pack(small, configs)
    losses = pack.backward(batches, dropout_seeds=seeds)
    layer = next(layer for layer in pack.model.lora_layers.values() if isinstance(layer.base_layer, Int8Linear))
    assert isinstance(layer.fusable(torch.zeros(2, 16).double(), layer.dispatcher.frame), Int8)
    for name in configs:
        alone = Pack(copy.deepcopy(dense), {name: configs[name]})
        (loss,) = alone.backward({name: batches[name]}, dropout_seeds=seeds).values()
        assert loss == pytest.approx(losses[name], abs=1e-10)
        for key, p in alone.parameters_of(name).items():
            torch.testing.assert_close(pack.parameters_of(name)[key].grad, p.grad, rtol=1e-10, atol=1e-10)


def test_an_adapter_on_it_is_saved_and_loaded_and_its_merge_is_refused_in_words(tmp_path: Path) -> None:
    small, dense = bases()
    model, ids = get_peft_model(small, config()), rows(0)["input_ids"]
    wanted = model(ids).logits
    model.save_pretrained(tmp_path)
    with pytest.raises(MergeError, match=r"query: cannot be merged, because it is quantised to int8; load the base"):
        model.merge_adapter()
    assert torch.equal(model(ids).logits, wanted)
    for base in (model.unload(), dense):
        found = PeftModel.from_pretrained(base, tmp_path)(ids).logits
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


class Strange(nn.Parameter):
    """What a library makes of a weight that it keeps in a form of its own."""


def test_a_weight_that_nobody_registered_is_left_to_its_module() -> None:
    linear = nn.Linear(4, 6)
    assert isinstance(frozen_linear(linear), DenseLinear)
    weight = linear.weight.detach()
    linear._parameters["weight"] = Strange(weight.clone(), requires_grad=False)
    found = frozen_linear(linear)
    assert isinstance(found, OpaqueLinear)
    assert (found.shape, found.dtype, found.nbytes) == ((6, 4), torch.float32, 96)
    torch.testing.assert_close(found.dequantize(), weight)
    dy = torch.randn(3, 6)
    torch.testing.assert_close(found.matmul_grad_input(dy, torch.ones(3, 4)), dy @ weight + 1)
    model = get_peft_model(nn.Sequential(linear), LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(2, 4)
    delta = model.lora_layers["0"].get_delta_weight("default")
    torch.testing.assert_close(model(x), x @ (weight + delta).T + linear.bias)


def test_a_packed_weight_is_called_quantised_and_never_merged() -> None:
    linear = nn.Linear(4, 6)
    linear.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.int8), requires_grad=False)
    linear.forward = lambda x: x @ torch.ones(4, 6)  # type: ignore[method-assign]
    model = get_peft_model(nn.Sequential(linear), LoraConfig(target_modules=["0"]))
    assert {p.dtype for p in model.adapter_parameters("default").values()} == {torch.float32}
    with pytest.raises(MergeError, match="a Linear, whose weight is quantised"):
        model.merge_adapter()
