"""LoRA around each kind of layer equals the same thing worked out in float64 from the factors alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loraloom import LoraConfig, PeftModel, get_peft_model
from loraloom.errors import TargetError
from loraloom.lora.layer import LoraLayer

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(layer: nn.Module, **fields: object) -> tuple[PeftModel, LoraLayer]:
    """``layer`` with one adapter, both factors random."""
    made = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], "init_lora_weights": False, **fields}
    model = get_peft_model(Holder(layer), LoraConfig(**made))
    return model, model.base_model.lora_layers["layer"]


def conv1d(n_in: int, n_out: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(n_out, n_in)
    nn.init.normal_(layer.bias)
    return layer


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def doubles(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Copies of the factors that collect their own gradients."""
    a, b = (factor.detach().double().clone().requires_grad_() for factor in layer.factors("default"))
    return a, b


# -- linear -----------------------------------------------------------------------------------------------------------


LINEAR = {"Linear": lambda: nn.Linear(5, 7), "no bias": lambda: nn.Linear(5, 7, bias=False),
          "Conv1D": lambda: conv1d(5, 7)}  # fmt: skip
INPUTS = {"a row": (5,), "rows": (3, 5), "batch": (2, 3, 5), "deep": (2, 1, 3, 5), "no rows": (0, 5)}


def linear(base: nn.Module, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``W x + bias + scale · B A x``, number by number as the paper writes it."""
    weight = base.weight.detach().double()
    weight = weight if isinstance(base, nn.Linear) else weight.T
    y = torch.einsum("oi,...i->...o", weight, x) + scale * torch.einsum("or,ri,...i->...o", b, a, x)
    return y if base.bias is None else y + base.bias.detach().double()


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("shape", INPUTS.values(), ids=INPUTS)
def test_a_linear_layer_and_its_gradients_equal_the_formula(make: Callable[[], nn.Module], shape: Any) -> None:
    torch.manual_seed(0)
    base = make().double()
    model, layer = adapted(base)
    x, mine = numbers(*shape).requires_grad_(), numbers(*shape).requires_grad_()
    a, b = doubles(layer)
    found, wanted = model(mine), linear(base, x, a, b, 6 / 4)
    torch.testing.assert_close(found, wanted, **EXACT)
    push = numbers(*wanted.shape, seed=1)
    (found * push).sum().backward()
    (wanted * push).sum().backward()
    for got, right in zip((mine, *layer.factors("default")), (x, a, b)):
        torch.testing.assert_close(got.grad, right.grad, **EXACT)
    assert layer.weight.grad is None


def test_an_input_without_gradient_and_one_that_is_not_contiguous_give_the_same() -> None:
    model, layer = adapted(nn.Linear(5, 7).double())
    x = numbers(5, 3).T
    assert not x.is_contiguous()
    a, b = doubles(layer)
    found, wanted = model(x), linear(layer.base_layer, x, a, b, 6 / 4)
    torch.testing.assert_close(found, wanted, **EXACT)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for got, right in zip(layer.factors("default"), (a, b)):
        torch.testing.assert_close(got.grad, right.grad, **EXACT)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_factor_that_is_frozen_gets_no_gradient_and_the_other_its_own(frozen: int) -> None:
    model, layer = adapted(nn.Linear(5, 7).double())
    factors, copies = layer.factors("default"), doubles(layer)
    factors[frozen].requires_grad_(False)
    x = numbers(3, 5)
    model(x).square().sum().backward()
    linear(layer.base_layer, x, *copies, 6 / 4).square().sum().backward()
    assert factors[frozen].grad is None
    torch.testing.assert_close(factors[1 - frozen].grad, copies[1 - frozen].grad, **EXACT)


@settings(max_examples=60, deadline=None)
@given(
    r=st.integers(1, 12),
    alpha=st.floats(-100, 100).filter(lambda alpha: abs(alpha) > 1e-3),
    rslora=st.booleans(),
    n_in=st.integers(1, 9),
    n_out=st.integers(1, 9),
    stored=st.booleans(),
)
def test_any_rank_and_alpha_on_any_shape(
    r: int, alpha: float, rslora: bool, n_in: int, n_out: int, stored: bool
) -> None:
    torch.manual_seed(0)
    base = (conv1d if stored else nn.Linear)(n_in, n_out).double()
    model, layer = adapted(base, r=r, lora_alpha=alpha, use_rslora=rslora)
    x = numbers(3, n_in)
    wanted = linear(base, x, *doubles(layer), alpha / (r**0.5 if rslora else r))
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10 * max(1, abs(alpha)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_a_half_precision_layer_keeps_its_dtype_and_float32_factors(make: Callable[[], nn.Module], dtype) -> None:
    torch.manual_seed(0)
    base = make().to(dtype)
    model, layer = adapted(base)
    assert {factor.dtype for factor in layer.factors("default")} == {torch.float32}
    x = numbers(4, 5).to(dtype).requires_grad_()
    y = model(x)
    assert y.dtype == dtype
    copies = doubles(layer)
    wanted = linear(base, x.detach().double(), *copies, 6 / 4)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), wanted, rtol=8 * eps, atol=16 * eps)
    y.float().square().sum().backward()
    wanted.square().sum().backward()
    assert x.grad.dtype == dtype
    for got, right in zip(layer.factors("default"), copies):
        assert got.grad.dtype == torch.float32
        torch.testing.assert_close(got.grad.double(), right.grad, rtol=0.05, atol=0.05 * right.grad.abs().max())


def test_autocast_computes_in_half_precision_and_gives_float32_gradients() -> None:
    torch.manual_seed(0)
    model, layer = adapted(nn.Linear(5, 7))
    x = numbers(4, 5, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    copies = doubles(layer)
    wanted = linear(layer.base_layer, x.detach().double(), *copies, 6 / 4)
    torch.testing.assert_close(y.double(), wanted, rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    wanted.square().sum().backward()
    for got, right in zip(layer.factors("default"), copies):
        assert got.grad.dtype == torch.float32
        torch.testing.assert_close(got.grad.double(), right.grad, rtol=0.05, atol=0.05 * right.grad.abs().max())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model, layer = adapted(nn.Linear(5, 7).double(), lora_dropout=0.5)
    grads = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        torch.manual_seed(3)
        call(numbers(6, 5).requires_grad_()).square().sum().backward()
        grads.append([factor.grad.clone() for factor in layer.factors("default")])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert grads[0][0].abs().max() > 0


@pytest.mark.parametrize("off", ["p", "eval", "identity"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 7), lambda: conv1d(5, 7), lambda: nn.Conv1d(5, 7, 1)],
                         ids=["Linear", "Conv1D", "Conv1d"])  # fmt: skip
def test_dropout_can_be_switched_off_on_its_module_as_on_any_other(make: Callable[[], nn.Module], off: str) -> None:
    model, layer = adapted(make(), lora_dropout=0.5)
    model.train()
    x = numbers(5, 5, 1) if isinstance(layer.base_layer, nn.Conv1d) else numbers(5, 5)
    x = x.float()
    assert not torch.equal(model(x), model(x))
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert [(drop.p, drop.training) for drop in drops] == [(0.5, True)]
    assert layer.lora_dropout["default"] is drops[0]
    if off == "identity":
        layer.lora_dropout["default"] = nn.Identity()
    elif off == "eval":
        drops[0].eval()
    else:
        drops[0].p = 0
    found = model(x)
    if off != "identity":  # a compiled model knows the module that was there when the adapter was set
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), found)
    assert torch.equal(found, model.eval()(x))


def test_a_layers_weight_may_be_a_view_of_another_tensor() -> None:
    model, layer = adapted(nn.Linear(5, 7))  # as FSDP leaves it for the length of a forward
    x = torch.ones(3, 5)
    before, weight = model(x), layer.base_layer.weight.detach()
    del layer.base_layer.weight
    layer.base_layer.weight = weight
    assert layer.weight is weight
    torch.testing.assert_close(model(x), before)


# -- convolutions -----------------------------------------------------------------------------------------------------


CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ["zeros", "reflect", "replicate", "circular"]
#: kernel, stride, padding, dilation
WINDOWS = {
    "plain": (3, 1, 0, 1),
    "padded": (3, 1, 2, 1),
    "stride": (3, 2, 1, 1),
    "dilation": (2, 1, 2, 2),
    "all": (3, 2, 2, 2),
    "same": (3, 1, "same", 1),
    "same, even kernel, dilation": (2, 1, "same", 3),
    "valid": (2, 2, "valid", 2),
    "width one": (1, 1, 0, 1),
}


def product(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """One full weight [out, in, *kernel]: each group of outputs reads its own share of the rank."""
    rank, outs = a.shape[0] // groups, b.shape[0] // groups
    parts = []
    for group in range(groups):
        mine = a[group * rank : (group + 1) * rank]
        parts.append(torch.einsum("or,r...->o...", b[group * outs : (group + 1) * outs].flatten(1), mine))
    return torch.cat(parts)


def convolution(base: Any, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The base's own layer, and a second one of its window whose weight is the product of the factors."""
    delta = type(base)(
        base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding, base.dilation,
        bias=False, padding_mode=base.padding_mode, dtype=torch.float64,
    )  # fmt: skip
    del delta.weight
    delta.weight = scale * product(a, b, base.groups)
    plain = type(base)(
        base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding, base.dilation,
        groups=base.groups, padding_mode=base.padding_mode, dtype=torch.float64,
    ).requires_grad_(False)  # fmt: skip
    plain.load_state_dict(base.state_dict())
    return plain(x) + delta(x)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("space", CONVS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_convolution_and_its_gradients_equal_one_with_the_product_as_weight(
    space: int, mode: str, window: tuple[Any, ...]
) -> None:
    kernel, stride, padding, dilation = window
    for groups in (1, 2):
        torch.manual_seed(0)
        base = CONVS[space](4, 6, kernel, stride, padding, dilation, groups, padding_mode=mode, dtype=torch.float64)
        model, layer = adapted(base)
        assert layer.factors("default")[0].shape == (4, 4, *[kernel] * space)
        assert layer.factors("default")[1].shape == (6, 4 // groups, *[1] * space)
        size = (2, 4, *(7, 6, 5)[:space])
        x, mine = numbers(*size).requires_grad_(), numbers(*size).requires_grad_()
        copies = doubles(layer)
        found, wanted = model(mine), convolution(base, x, *copies, 6 / 4)
        torch.testing.assert_close(found, wanted, **EXACT)
        push = numbers(*wanted.shape, seed=1)
        (found * push).sum().backward()
        (wanted * push).sum().backward()
        for got, right in zip((mine, *layer.factors("default")), (x, *copies)):
            torch.testing.assert_close(got.grad, right.grad, **EXACT)
        if groups == 1:
            model.merge_adapter()
            torch.testing.assert_close(model(mine), wanted, **EXACT)


def test_a_convolutions_axes_may_differ() -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(3, 4, (3, 1), (1, 2), (2, 0), (2, 1), padding_mode="circular", dtype=torch.float64)
    model, layer = adapted(base)
    x = numbers(2, 3, 6, 5)
    torch.testing.assert_close(model(x), convolution(base, x, *doubles(layer), 6 / 4), **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_convolution_keeps_its_dtype(dtype) -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(3, 4, 3, padding=1).to(dtype)
    model, layer = adapted(base)
    x = numbers(2, 3, 6, 5).to(dtype)
    y = model(x)
    assert y.dtype == dtype
    wanted = convolution(base.double(), x.double(), *doubles(layer), 6 / 4)
    torch.testing.assert_close(y.double(), wanted, rtol=0.05, atol=0.1)


def test_a_rank_that_the_groups_do_not_divide_is_refused_by_name() -> None:
    with pytest.raises(TargetError, match=r"layer is a convolution with groups=2, .*multiple of that, found 3"):
        adapted(nn.Conv1d(4, 4, 1, groups=2), r=3)


# -- embeddings -------------------------------------------------------------------------------------------------------


IDS = torch.tensor([[1, 2, 0, 8], [2, 2, 5, 0]])


def lookup(table: Tensor, ids: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    chosen = torch.nn.functional.one_hot(ids, table.shape[0]).double()
    return chosen @ (table.detach().double() + scale * (b @ a).T)


def test_an_embedding_and_its_gradients_equal_the_formula() -> None:
    model, layer = adapted(nn.Embedding(9, 5, dtype=torch.float64))
    a, b = doubles(layer)
    assert (a.shape, b.shape) == ((4, 9), (5, 4))
    found, wanted = model(IDS), lookup(layer.weight, IDS, a, b, 6 / 4)
    torch.testing.assert_close(found, wanted, **EXACT)
    push = numbers(*wanted.shape, seed=1)
    (found * push).sum().backward()
    (wanted * push).sum().backward()
    for got, right in zip(layer.factors("default"), (a, b)):
        torch.testing.assert_close(got.grad, right.grad, **EXACT)


def test_the_padding_index_gets_no_gradient() -> None:
    model, layer = adapted(nn.Embedding(9, 5, padding_idx=0, dtype=torch.float64))
    a, b = doubles(layer)
    model(IDS).square().sum().backward()
    lookup(layer.weight, IDS, a, b, 6 / 4).square().sum().backward()
    found = layer.factors("default")[0].grad
    assert a.grad[:, 0].abs().min() > 0
    assert not found[:, 0].any()
    torch.testing.assert_close(found[:, 1:], a.grad[:, 1:], **EXACT)


def test_scale_grad_by_freq_divides_by_how_often_a_word_occurs() -> None:
    model, layer = adapted(nn.Embedding(9, 5, scale_grad_by_freq=True, dtype=torch.float64))
    a, b = doubles(layer)
    model(IDS).square().sum().backward()
    lookup(layer.weight, IDS, a, b, 6 / 4).square().sum().backward()
    times = IDS.flatten().bincount(minlength=9).clamp(min=1)
    assert times.max() == 3
    torch.testing.assert_close(layer.factors("default")[0].grad, a.grad / times, **EXACT)


@pytest.mark.parametrize("norm", [1.0, 2.0, 3.0, 0.5, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_max_norm_clips_the_frozen_row_and_not_the_sum(norm: float, dtype: torch.dtype) -> None:
    """The row that a frozen lookup gives plus the update, merged or not; unmerging brings the clip back."""
    torch.manual_seed(0)
    base = nn.Embedding(9, 5, max_norm=1.0, norm_type=norm, dtype=dtype)
    with torch.no_grad():
        base.weight[3:] *= 0.01  # some rows are short enough as they are
    alone = nn.Embedding.from_pretrained(base.weight.detach().clone(), max_norm=1.0, norm_type=norm)
    every = torch.arange(9)
    clipped = alone(every).double()
    assert (clipped != base.weight).any(1).tolist() == [True] * 3 + [False] * 6
    model, layer = adapted(base)
    a, b = doubles(layer)
    wanted = clipped + 6 / 4 * (b @ a).T
    tolerance = {"rtol": 1e-6, "atol": 1e-12 if dtype == torch.float64 else 1e-6}
    model.merge_adapter()  # before any lookup, so that the rows are not clipped in place yet
    torch.testing.assert_close(model(every).double(), wanted, **tolerance)
    assert layer.base_layer.max_norm is None
    model.unmerge_adapter()
    assert layer.base_layer.max_norm == 1.0
    torch.testing.assert_close(model(every).double(), wanted, **tolerance)
    before = layer.weight.detach().clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)
    with model.disable_adapter():
        torch.testing.assert_close(model(every).double(), clipped, **tolerance)


class Louder(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize("norm", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("cls", [nn.Embedding, Louder])
def test_a_lookup_that_clips_leaves_the_bytes_of_the_frozen_table(cls: type[nn.Embedding], norm: float) -> None:
    torch.manual_seed(0)
    base = cls(9, 5, max_norm=1.0, norm_type=norm, padding_idx=8)
    with torch.no_grad():
        base.weight[3:] *= 0.01
    before, alone = base.weight.detach().clone(), copy.deepcopy(base)
    model, layer = adapted(base)
    ids = torch.tensor([[8, 1, 1], [0, 5, 2]])
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(ids), alone(ids))
    model(ids).sum().backward()
    assert torch.equal(layer.weight, before)
    assert not torch.equal(alone.weight, before)


KEYWORDS = {
    "Embedding": (lambda: nn.Embedding(9, 4), torch.tensor([[1, 2]])),
    "Conv1d": (lambda: nn.Conv1d(4, 4, 1), torch.randn(2, 4, 3)),
    "Conv2d": (lambda: nn.Conv2d(4, 4, 1), torch.randn(2, 4, 3, 3)),
}


@pytest.mark.parametrize("kind", KEYWORDS)
def test_a_layer_takes_its_input_by_torchs_keyword(kind: str) -> None:
    make, x = KEYWORDS[kind]
    _, layer = adapted(make())
    assert torch.equal(layer(input=x), layer(x))


def scaled(kind: str) -> nn.Embedding:
    if kind == "Gemma":
        from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

        return Gemma3TextScaledWordEmbedding(9, 5, padding_idx=0, embed_scale=5**0.5)
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100ScaledWordEmbedding

    return M2M100ScaledWordEmbedding(9, 5, padding_idx=0, embed_scale=5**0.5)


@pytest.mark.parametrize("kind", ["Gemma", "M2M100"])
def test_an_embedding_that_scales_its_rows_scales_the_update(kind: str) -> None:
    torch.manual_seed(0)
    base = scaled(kind).double()
    scale = float((base(torch.tensor([3]))[0, 0] / base.weight[3, 0]).detach())
    assert scale == pytest.approx(5**0.5, rel=1e-6)
    model, layer = adapted(base)
    a, b = doubles(layer)
    found, wanted = model(IDS), scale * lookup(layer.weight, IDS, a, b, 6 / 4)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(layer.factors("default")[0].grad[:, 1:], a.grad[:, 1:], rtol=1e-6, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["Gemma", "M2M100"])
def test_a_half_precision_embedding_that_scales_keeps_its_dtype(kind: str) -> None:
    torch.manual_seed(0)
    model, layer = adapted(scaled(kind).bfloat16())
    y = model(IDS)
    assert y.dtype == torch.bfloat16
    wanted = 5**0.5 * lookup(layer.weight, IDS, *doubles(layer), 6 / 4)
    torch.testing.assert_close(y.double(), wanted, rtol=0.03, atol=0.03)


# -- scale and dropout ------------------------------------------------------------------------------------------------


EVERY_KIND: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None]] = {
    "Linear": (lambda: nn.Linear(4, 6), (3, 4)),
    "Conv1D": (lambda: conv1d(4, 6), (3, 4)),
    "Embedding": (lambda: nn.Embedding(9, 5), None),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 6)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 7, 6, 5)),
}
kinds = pytest.mark.parametrize("kind", EVERY_KIND)


def both(kind: str, **fields: object) -> tuple[PeftModel, Tensor]:
    torch.manual_seed(0)
    make, shape = EVERY_KIND[kind]
    model, _ = adapted(make().double(), **fields)
    return model, IDS if shape is None else numbers(*shape)


@kinds
def test_rslora_divides_alpha_by_the_root_of_the_rank(kind: str) -> None:
    plain, x = both(kind, r=4, lora_alpha=6)
    rooted, _ = both(kind, r=4, lora_alpha=6, use_rslora=True)
    assert rooted.base_model.lora_layers["layer"].scaling == {"default": 3.0}
    with plain.disable_adapter():
        frozen = plain(x)
    torch.testing.assert_close(rooted(x) - frozen, 2 * (plain(x) - frozen), **EXACT)


@kinds
def test_dropout_acts_while_training_alone(kind: str) -> None:
    dropping, x = both(kind, lora_dropout=0.5)
    plain, _ = both(kind)
    dropping.eval()
    torch.testing.assert_close(dropping(x), plain(x), **EXACT)
    dropping.train()
    if kind == "Embedding":  # whole numbers have nothing to drop
        assert torch.equal(dropping(x), plain(x))
    else:
        assert not torch.allclose(dropping(x), plain(x))
    with dropping.disable_adapter(), plain.disable_adapter():
        assert torch.equal(dropping(x), plain(x))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dropout_drops_inputs_of_the_update_and_scales_the_rest(p: float, dtype: torch.dtype) -> None:
    width = 128
    model, layer = adapted(nn.Linear(width, width).to(dtype), r=width, lora_alpha=width, lora_dropout=p)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        for factor in layer.factors("default"):
            factor.copy_(torch.eye(width))  # so that the update is the dropped input itself
    torch.manual_seed(0)
    x = torch.ones(100, width, dtype=dtype, requires_grad=True)
    y = model.train()(x)
    kept = y != 0
    torch.testing.assert_close(y[kept].double(), torch.full_like(y[kept].double(), 1 / (1 - p)), rtol=0.01, atol=0)
    share = 1 - kept.double().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach(), rtol=0.01, atol=0)  # the backward drops the same ones
    assert not torch.equal(model(x) != 0, kept)


# -- the face of the layer --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_names_in_memory_are_pefts() -> None:
    import peft

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for kind, (make, _) in EVERY_KIND.items():
                self.add_module(kind.replace("Conv1D", "stored"), make())

    fields: dict[str, Any] = {"r": 2, "target_modules": ["Linear", "stored", "Embedding", "Conv1d", "Conv2d"],
                              "modules_to_save": ["Conv3d"]}  # fmt: skip
    ours = get_peft_model(Net(), LoraConfig(**fields), adapter_name="mine")
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(**fields), adapter_name="mine")
    shapes = [{name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert trained[0] == trained[1]


@kinds
def test_a_models_own_state_dict_loads_again(kind: str) -> None:
    first, x = both(kind)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    wanted = first(x)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    first.load_state_dict(state)
    assert torch.equal(first(x), wanted)


@kinds
def test_the_layer_shows_the_attributes_of_the_one_that_it_wraps(kind: str) -> None:
    base = EVERY_KIND[kind][0]()
    model, layer = adapted(base)
    shown = model.get_base_model().layer
    assert shown is layer
    assert shown.weight is base.weight
    assert getattr(shown, "bias", None) is getattr(base, "bias", None)
    assert shown.get_base_layer() is base
    for name in ("in_features", "nf", "padding_idx", "stride"):
        if hasattr(base, name):
            assert getattr(shown, name) == getattr(base, name)
    with pytest.raises(AttributeError, match="no_such_thing"):
        shown.no_such_thing  # noqa: B018


@kinds
@pytest.mark.parametrize("merged", [False, True])
def test_a_cast_model_carries_the_weights_that_wait_aside(kind: str, merged: bool) -> None:
    model, _ = both(kind)
    layer = model.base_model.lora_layers["layer"]
    frozen = layer.weight
    before = frozen.detach().clone()
    if merged:
        model.merge_adapter()
    model.to(torch.float32)
    model.unmerge_adapter()
    assert layer.weight is frozen
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, before.float())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@kinds
def test_train_and_eval_reach_the_wrapped_layer(kind: str) -> None:
    model, _ = both(kind)
    for mode in (False, True):
        assert {module.training for module in model.train(mode).modules()} == {mode}


# -- what can be wrapped ----------------------------------------------------------------------------------------------


def test_the_projection_of_multihead_attention_is_refused_because_it_is_never_called() -> None:
    net = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(TargetError, match=r"0\.out_proj is a NonDynamicallyQuantizableLinear, which LoRA cannot wrap"):
        get_peft_model(net, LoraConfig(target_modules=["out_proj"]))


@pytest.mark.parametrize("layer", [nn.LayerNorm(4), nn.ConvTranspose1d(4, 4, 1), nn.Bilinear(4, 4, 4)])
def test_a_layer_of_another_kind_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(TargetError, match=rf"layer is a {type(layer).__name__}, which LoRA cannot wrap"):
        adapted(layer)
    assert all(p.requires_grad for p in layer.parameters())


def test_a_layer_that_hangs_in_two_places_is_wrapped_once_and_counts_in_both() -> None:
    shared = nn.Linear(4, 4, dtype=torch.float64)
    net = nn.Sequential(shared, nn.Tanh(), shared)
    model = get_peft_model(net, LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    assert net[0] is net[2]
    assert len(model.base_model.lora_layers) == 1
    a, b = doubles(net[0])
    x = numbers(3, 4)
    wanted = linear(shared, linear(shared, x, a, b, 4).tanh(), a, b, 4)
    torch.testing.assert_close(model(x), wanted, **EXACT)


HOLDERS = {
    "Sequential": lambda layer: nn.Sequential(layer),
    "ModuleList": lambda layer: nn.ModuleList([layer]),
    "ModuleDict": lambda layer: nn.ModuleDict({"inner": layer}),
    "ModuleDict below": lambda layer: nn.Sequential(nn.ModuleDict({"inner": layer})),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_layer_is_found_wherever_it_hangs(hold: Callable[[nn.Module], nn.Module]) -> None:
    model = get_peft_model(hold(nn.Linear(4, 4)), LoraConfig(target_modules="all-linear", r=2))
    assert len(model.base_model.lora_layers) == 1
    assert sum(isinstance(m, LoraLayer) for m in model.modules()) == 1


def test_dropout_before_a_convolution_over_places_ignores_what_follows_a_rows_end() -> None:
    base = nn.Sequential(nn.Conv1d(4, 4, 1))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False))
    x = torch.randn(2, 4, 6)
    longer = torch.cat([x, torch.randn(2, 4, 3)], -1)
    with model.base_model.routed(["default"] * 2, {"default": 7}):
        assert torch.equal(model(longer)[..., :6], model(x))
