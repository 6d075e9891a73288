"""How factors start: from a seed and a name alone, and distributed as PEFT's are."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from loraloom import LoraConfig, get_peft_model
from loraloom.lora.initialize import factors, seed_of

SHAPES = {"linear": ((8, 50), (70, 8)), "conv": ((8, 6, 3, 3), (70, 4, 1, 1))}


@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES.values(), ids=SHAPES)
def test_by_default_a_is_uniform_in_one_over_the_root_of_its_fan_in_and_b_zero(a_shape, b_shape) -> None:
    a, b = factors(a_shape, b_shape, init=True, seed=1)
    bound = 1 / math.sqrt(math.prod(a_shape[1:]))
    assert (a.shape, b.shape) == (a_shape, b_shape)
    assert a.abs().max() <= bound
    assert a.abs().max() > 0.9 * bound
    assert float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert abs(float(a.mean())) < 0.1 * bound
    assert not b.any()
    assert a.dtype == b.dtype == torch.float32


@pytest.mark.parametrize("r", [2, 8])
def test_gaussian_is_normal_with_deviation_one_over_the_rank_and_b_zero(r: int) -> None:
    a, b = factors((r, 4000), (5, r), init="gaussian", seed=1)
    assert float(a.std()) == pytest.approx(1 / r, rel=0.05)
    assert float((a.abs() < 1 / r).float().mean()) == pytest.approx(0.683, abs=0.02)
    assert not b.any()


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_an_embedding_starts_with_a_zero_and_b_normal(init) -> None:
    a, b = factors((4, 30), (2000, 4), init=init, seed=1, embedding=True)
    assert not a.any()
    assert float(b.std()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("embedding", [False, True])
def test_false_makes_an_update_that_is_not_zero(embedding: bool) -> None:
    a, b = factors((4, 30), (20, 4), init=False, seed=1, embedding=embedding)
    assert (b @ a).abs().min() > 0


@pytest.mark.parametrize("init", [True, "gaussian"])
@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_the_spread_is_that_of_peft(kind: str, init) -> None:
    import peft

    def make() -> nn.Module:
        net = nn.Sequential()
        net.layer = {
            "linear": lambda: nn.Linear(300, 200),
            "conv": lambda: nn.Conv2d(40, 60, 3),
            "embedding": lambda: nn.Embedding(300, 200),
        }[kind]()
        return net

    fields = {"r": 16, "target_modules": ["layer"], "init_lora_weights": init}
    ours = get_peft_model(make(), LoraConfig(**fields)).state_dict()
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**fields)).state_dict()
    for name in ours:
        if "lora_" in name:
            assert float(ours[name].std()) == pytest.approx(float(theirs[name].std()), rel=0.1)
            assert float(ours[name].abs().max()) == pytest.approx(float(theirs[name].abs().max()), rel=0.35)


def test_the_same_seed_gives_the_same_numbers_and_the_global_generator_stays() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = factors((4, 9), (7, 4), init=False, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = factors((4, 9), (7, 4), init=False, seed=5), factors((4, 9), (7, 4), init=False, seed=6)
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert not any(torch.equal(x, y) for x, y in zip(first, other))


def test_a_seed_follows_from_its_parts_in_every_process() -> None:
    code = "from loraloom.lora.initialize import seed_of; print(seed_of('default'), seed_of(7, 'model.q_proj'))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1")
    }
    assert found == {f"{seed_of('default')} {seed_of(7, 'model.q_proj')}\n"}


def test_seeds_of_different_parts_differ_and_fit_the_generator() -> None:
    parts = [(), ("a",), ("b",), ("ab",), ("a", "b"), ("b", "a"), (1, "a"), (11, "a"), (1, "1a")]
    seeds = {seed_of(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_modules_of_one_adapter_start_differently() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model = get_peft_model(net, LoraConfig(target_modules=["0", "1"], r=3))
    first, second = (layer.factors("default")[0] for layer in model.base_model.lora_layers.values())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_numbers_do_not_depend_on_the_bases_dtype(dtype: torch.dtype) -> None:
    made = []
    for kind in (torch.float32, dtype):
        model = get_peft_model(nn.Sequential(nn.Linear(6, 6)).to(kind), LoraConfig(target_modules=["0"], r=3), seed=4)
        made.append(model.base_model.lora_layers["0"].factors("default")[0].float())
    assert torch.equal(*made)
