"""What ``inspect`` says of an adapter folder is what the full products say, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loraloom import LoraConfig, get_peft_model
from loraloom.errors import AdapterError, ConfigError
from loraloom.lora.inspection import ENERGY, inspect, singular_values

WEIGHTS = "adapter_model.safetensors"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(a: Tensor, b: Tensor) -> Tensor:
    """The update as one matrix [out, in · kernel], group by group."""
    rank = b.shape[1]
    groups = a.shape[0] // rank
    outs = b.shape[0] // groups
    parts = [b[g * outs : (g + 1) * outs].flatten(1) @ a[g * rank : (g + 1) * rank].flatten(1) for g in range(groups)]
    return torch.cat(parts)


@settings(max_examples=80, deadline=None)
@given(
    r=st.integers(1, 8),
    n_in=st.integers(1, 12),
    n_out=st.integers(1, 12),
    kernel=st.sampled_from([(), (3,), (2, 2)]),
    groups=st.sampled_from([1, 2]),
    seed=st.integers(0, 999),
)
def test_singular_values_are_those_of_the_real_product(
    r: int, n_in: int, n_out: int, kernel: tuple[int, ...], groups: int, seed: int
) -> None:
    a = normal(r * groups, n_in, *kernel, seed=seed)
    b = normal(n_out * groups, r, *(1,) * len(kernel), seed=seed + 1)
    wanted = torch.linalg.svdvals(full(a, b))
    found = singular_values(a, b)
    assert found.dtype == torch.float64
    assert len(found) <= r * groups
    assert (found[:-1] >= found[1:]).all()
    size = max(len(found), len(wanted))
    pad = [nn.functional.pad(values, (0, size - len(values))) for values in (found, wanted)]
    torch.testing.assert_close(*pad, rtol=1e-9, atol=1e-10 * float(wanted[0]))


def test_half_precision_factors_are_looked_at_in_float64() -> None:
    a, b = normal(3, 9).bfloat16(), normal(7, 3, seed=1).bfloat16()
    torch.testing.assert_close(
        singular_values(a, b), torch.linalg.svdvals(b.double() @ a.double())[:3], rtol=1e-10, atol=1e-10
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.turn = nn.Linear(6, 8)
        self.image = nn.Conv2d(4, 6, 3, groups=2)
        self.head = nn.Linear(8, 3)


def saved(folder: Path, **fields: object) -> dict[str, Tensor]:
    made = {"r": 4, "target_modules": ["words", "turn", "image"], "init_lora_weights": False, **fields}
    get_peft_model(Net(), LoraConfig(**made)).save_pretrained(folder)
    return load_file(folder / WEIGHTS)


def pair(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    kind = "lora_embedding_{}" if name == "words" else "lora_{}.weight"
    a, b = (tensors[f"base_model.model.{name}.{kind.format(x)}"].double() for x in "AB")
    return a, b


@pytest.mark.parametrize("rslora", [False, True])
def test_each_module_has_its_rank_scale_and_norm(tmp_path: Path, rslora: bool) -> None:
    tensors = saved(tmp_path, use_rslora=rslora, lora_alpha=-6, rank_pattern={"turn": 2}, alpha_pattern={"image": 10})
    found = {update.name: update for update in inspect(tmp_path).updates}
    assert sorted(found) == ["image", "turn", "words"]
    for name, r, alpha in (("words", 4, -6), ("turn", 2, -6), ("image", 4, 10)):
        update, scale = found[name], alpha / (r**0.5 if rslora else r)
        assert update.r == r
        assert update.scale == pytest.approx(scale)
        product = scale * full(*pair(tensors, name))
        assert update.norm == pytest.approx(float(torch.linalg.norm(product)), rel=1e-10)
        values = torch.linalg.svdvals(product)[: len(update.singular_values)]
        torch.testing.assert_close(
            torch.tensor(update.singular_values, dtype=torch.float64), values, rtol=1e-9, atol=1e-9
        )


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), zeros=st.integers(0, 3))
def test_the_rank_used_is_the_fewest_directions_with_the_energy(
    weights: list[float], zeros: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Factors with known singular values: an orthogonal A, and B its weights on the diagonal."""
    r = len(weights) + zeros
    folder = tmp_path_factory.mktemp("adapter")
    net = nn.Sequential(nn.Linear(12, 12))
    get_peft_model(net, LoraConfig(r=r, lora_alpha=r, target_modules=["0"])).save_pretrained(folder)
    a = torch.linalg.qr(normal(12, r)).Q.T.contiguous()
    b = torch.zeros(12, r, dtype=torch.float64)
    b[: len(weights), : len(weights)] = torch.diag(torch.tensor(weights, dtype=torch.float64))
    save_file({"base_model.model.0.lora_A.weight": a, "base_model.model.0.lora_B.weight": b}, folder / WEIGHTS)
    (update,) = inspect(folder).updates
    falling = sorted((w * w for w in weights), reverse=True)
    wanted = next(n for n in range(1, r + 1) if sum(falling[:n]) >= ENERGY * sum(falling) * (1 - 1e-12))
    assert update.used_rank in {wanted, next(n for n in range(1, r + 1) if sum(falling[:n]) >= ENERGY * sum(falling))}
    assert update.norm == pytest.approx(sum(falling) ** 0.5)


def test_an_adapter_that_never_trained_uses_no_rank(tmp_path: Path) -> None:
    saved(tmp_path, init_lora_weights=True)
    assert {(update.used_rank, update.norm) for update in inspect(tmp_path).updates} == {(0, 0.0)}


def test_sizes_dtypes_and_other_tensors_are_listed(tmp_path: Path) -> None:
    tensors = saved(tmp_path, modules_to_save=["head"], bias="lora_only")
    tensors["base_model.model.head.weight"] = tensors["base_model.model.head.weight"].half()
    save_file(tensors, tmp_path / WEIGHTS)
    found = inspect(tmp_path)
    assert found.others == {
        "head.weight": (3, 8),
        "head.bias": (3,),
        "turn.base_layer.bias": (8,),
        "image.base_layer.bias": (6,),
    }
    assert found.parameters == sum(t.numel() for t in tensors.values())
    assert found.bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert found.dtypes == ("float16", "float32")
    assert found.config.lora_alpha == 8


def test_a_factor_without_its_partner_is_listed_as_another_tensor(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    del tensors["base_model.model.turn.lora_B.weight"]
    save_file(tensors, tmp_path / WEIGHTS)
    found = inspect(tmp_path)
    assert "turn.lora_A.weight" in found.others
    assert "turn" not in [update.name for update in found.updates]


@pytest.mark.parametrize("name", ["turn.lora_A.weight", "words.lora_embedding_B", "image.lora_B.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_adapter_that_diverged_is_an_error_that_names_the_tensor(tmp_path: Path, name: str, value: float) -> None:
    tensors = saved(tmp_path)
    tensors[f"base_model.model.{name}"].view(-1)[0] = value
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=rf"{name.partition('.')[0]}: .*not finite"):
        inspect(tmp_path)


@pytest.mark.parametrize("shape", [(8, 3), (8,), (0, 2), (8, 0), ()])
def test_factors_that_do_not_fit_each_other_are_an_error_that_names_the_module(tmp_path: Path, shape: tuple) -> None:
    tensors = saved(tmp_path)
    tensors["base_model.model.turn.lora_B.weight"] = torch.ones(shape)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=r"turn: .*\(4, 6\).*do not fit"):
        inspect(tmp_path)


def test_a_folder_that_holds_no_adapter_or_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        inspect(tmp_path / "absent")
    with pytest.raises(AdapterError, match="holds no"):
        inspect(tmp_path)
    saved(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-3])
    with pytest.raises(AdapterError, match="cut off or damaged"):
        inspect(tmp_path)
    saved(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        inspect(tmp_path)
