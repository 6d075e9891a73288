"""Promises of the products with a frozen weight: as exact as hardware's, and never a wide copy of the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loraloom.lora import matmul


@pytest.fixture
def without_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that has no instructions for half precision."""
    monkeypatch.setattr(matmul, "native", lambda device, dtype: dtype not in (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 100, 2**20])
def test_a_wide_product_with_a_narrow_weight_is_that_of_the_widened_weight(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_BLOCK", block)
    x, dy, onto = torch.randn(9, 24), torch.randn(9, 31), torch.randn(9, 24)
    weight, bias = torch.randn(31, 24).to(dtype), torch.randn(31).to(dtype)
    exact = weight.double()
    for b in (None, bias):
        wanted = x.double() @ exact.T + (0 if b is None else b.double())
        torch.testing.assert_close(matmul.linear(x, weight, b).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matmul.matmul_grad_input(dy, weight).double(), dy.double() @ exact, rtol=1e-5, atol=1e-5)
    wanted = onto.double() + dy.double() @ exact
    torch.testing.assert_close(matmul.matmul_grad_input(dy, weight, onto).double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_weight_without_rows_or_an_input_without_any_gives_an_empty_answer() -> None:
    for rows, out in ((0, 5), (3, 0)):
        x, weight = torch.randn(rows, 4), torch.randn(out, 4).bfloat16()
        assert matmul.linear(x, weight, None).shape == (rows, out)
        assert torch.equal(matmul.matmul_grad_input(torch.randn(rows, out), weight), torch.zeros(rows, 4))


class _Widened(TorchDispatchMode):
    """The sizes of all tensors that were made in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype is torch.float32:
            self.sizes.append(out.numel())
        return out


def test_no_wide_copy_of_a_weight_ever_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_BLOCK", 256)
    x, weight = torch.randn(2, 64), torch.randn(128, 64).bfloat16()
    with _Widened() as made:
        matmul.matmul_grad_input(matmul.linear(x, weight, None), weight)
    assert max(made.sizes) <= 256


@pytest.mark.usefixtures("without_half")
def test_products_are_taken_in_float32_where_half_precision_is_not_in_hardware() -> None:
    assert matmul.compute_dtype(torch.empty(8, 4, dtype=torch.bfloat16)) is torch.float32
    assert matmul.compute_dtype(torch.empty(8, 4, dtype=torch.float16), differentiated=False) is torch.float32
    for dtype in (torch.float32, torch.float64):
        assert matmul.compute_dtype(torch.empty(8, 4, dtype=dtype)) is dtype


@pytest.mark.usefixtures("without_half")
def test_a_few_rows_without_a_backward_keep_their_dtype() -> None:
    few = torch.empty(1, 7, 4, dtype=torch.bfloat16)
    assert matmul.compute_dtype(few, differentiated=False) is torch.bfloat16
    assert matmul.compute_dtype(few) is torch.float32


def test_another_device_than_a_cpu_multiplies_in_the_dtype_it_is_given() -> None:
    assert matmul.native("cuda", torch.bfloat16)
    assert matmul.native("mps", torch.float16)


@pytest.mark.parametrize(
    ("has", "native"),
    [({"avx512"}, False), ({"avx512", "avx512_bf16"}, True), ({"avx512", "amx_tile"}, True), (set(), True)],
)
def test_bfloat16_that_the_processor_only_imitates_is_taken_in_float32(
    monkeypatch: pytest.MonkeyPatch, has: set[str], native: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for name in ("avx512", "avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in has)
    assert matmul.native.__wrapped__("cpu", torch.bfloat16) is native
    assert matmul.native.__wrapped__("cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_memory_is_counted_as_on_the_device_that_trains(dtype: torch.dtype) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    assert matmul.native("meta", dtype) == matmul.native(device.type, dtype)
