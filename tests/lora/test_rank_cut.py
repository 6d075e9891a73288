"""Promises of a cut rank: the nearest update of that rank, and nothing else of the adapter changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loraloom import LoraConfig, PeftModel, get_peft_model
from loraloom.errors import AdapterError
from loraloom.lora.rank_cut import Directions, RankCuts, cut_rank, rescale


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_it_is_the_truncated_singular_value_decomposition(out: int, width: int, rank: int, r: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=source) for shape in ((rank, width), (out, rank)))
    r = min(r, rank)
    new_a, new_b = Directions.of(a, b).cut(r)
    assert (new_a.shape, new_b.shape) == ((r, width), (out, r))
    u, values, v = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    assert torch.allclose(new_b @ new_a, u[:, :r] @ torch.diag(values[:r]) @ v[:r], atol=1e-9)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))


def trained(**changes: object) -> PeftModel:
    model = get_peft_model(net(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["0", "1", "3"], **changes}))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.adapter_parameters("default").values():
            parameter.copy_(torch.randn(parameter.shape, generator=source))
    return model


PATTERNS = {"rank_pattern": {"1": 3, "3": 1}, "alpha_pattern": {"1": 5}}


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, PATTERNS])
def test_each_update_is_the_nearest_of_its_rank_at_the_same_scale(changes: dict[str, object]) -> None:
    model = trained(**changes)
    config = cut_rank(model, "default", "small", 2)
    assert config.r == 2
    for layer in model.base_model.lora_layers.values():
        whole = layer.get_delta_weight("default").double()
        kept = layer.r["small"]
        assert kept == min(2, layer.r["default"])
        u, values, v = torch.linalg.svd(whole, full_matrices=False)
        nearest = u[:, :kept] @ torch.diag(values[:kept]) @ v[:kept]
        assert torch.allclose(layer.get_delta_weight("small").double(), nearest, atol=1e-4)


def test_an_update_that_uses_fewer_directions_loses_nothing(tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        for layer in model.base_model.lora_layers.values():
            layer.factors("default")[0][2:] = 0
    x = torch.arange(11)
    before = model(x)
    cut_rank(model, "default", "small", 2)
    model.set_adapter("small")
    assert torch.allclose(model(x), before, atol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["small"])
    again = PeftModel.from_pretrained(net(), tmp_path / "small")
    assert torch.equal(again(x), model(x))


def test_ranks_by_energy_keep_more_of_the_update_at_no_more_parameters_and_peft_reads_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained(alpha_pattern={"3": 5}, use_rslora=True)
    with torch.no_grad():  # the second needs all of its rank, the others hardly any
        for name in ("0", "3"):
            model.base_model.lora_layers[name].factors("default")[0][1:] *= 0.01
    cuts = RankCuts(model, "default")
    cuts.add("even", 2)
    config = cuts.add("each", 2, by_energy=True)
    layers = model.base_model.lora_layers
    assert {name: layer.r["each"] for name, layer in layers.items()} == {"0": 1, "1": 4, "3": 1}
    assert (config.r, config.rank_pattern) == (4, {"^0": 1, "^3": 1})
    size = {name: sum(one.numel() for one in model.adapter_parameters(name).values()) for name in ("even", "each")}
    assert size["each"] <= size["even"]

    def lost(name: str) -> float:
        return sum(
            float((one.get_delta_weight("default") - one.get_delta_weight(name)).norm() ** 2) for one in layers.values()
        )

    assert lost("each") < 0.5 * lost("even")
    assert all(layer.scaling["each"] == pytest.approx(layer.scaling["default"]) for layer in layers.values())
    model.set_adapter("each")
    x = torch.arange(11)
    model.save_pretrained(tmp_path, selected_adapters=["each"])
    for library in (PeftModel, peft.PeftModel):
        again = library.from_pretrained(net(), str(tmp_path / "each"))
        torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, PATTERNS])
def test_another_scale_is_another_alpha_of_the_same_tensors_and_peft_reads_it(
    changes: dict[str, object], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = trained(**changes)
    assert rescale(model, "default", "halved", 0.5).lora_alpha == 4
    own, old = model.adapter_parameters("halved"), model.adapter_parameters("default")
    assert all(torch.equal(own[key], old[key]) for key in old)
    for layer in model.base_model.lora_layers.values():
        assert layer.scaling["halved"] == 0.5 * layer.scaling["default"]
    model.set_adapter("halved")
    x = torch.arange(11)
    model.save_pretrained(tmp_path, selected_adapters=["halved"])
    again = peft.PeftModel.from_pretrained(net(), str(tmp_path / "halved"))
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


def test_heads_and_biases_are_copied() -> None:
    model = trained(target_modules=["1"], modules_to_save=["3"], bias="lora_only")
    cut_rank(model, "default", "small", 1)
    own, old = model.adapter_parameters("small"), model.adapter_parameters("default")
    same = [key for key in own if own[key].shape == old[key].shape]
    assert len(same) == 3  # the head's weight and bias, and the layer's bias
    assert all(torch.equal(own[key], old[key]) for key in same)


@pytest.mark.parametrize("r", [0, 4, 9])
def test_a_rank_that_is_not_smaller_is_refused(r: int) -> None:
    with pytest.raises(AdapterError, match=f"r: must be at least 1 and below the ranks of 'default', found {r}"):
        cut_rank(trained(), "default", "small", r)


def test_an_adapter_that_is_not_there_is_refused_before_anything_is_added() -> None:
    model = trained()
    with pytest.raises(AdapterError, match="there is no adapter 'mail'; there are default"):
        cut_rank(model, "mail", "small", 2)
    assert set(model.peft_config) == {"default"}


def test_grouped_convolutions_are_refused() -> None:
    model = get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), LoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(AdapterError, match="cannot be cut to a smaller rank: 0 is a grouped convolution"):
        cut_rank(model, "default", "small", 2)
