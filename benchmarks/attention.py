"""Torch's fused attention beside the plain one on a CPU, forward and backward: where which is faster.

Usage: ``python benchmarks/attention.py [--repetitions 9]``. ``tasks.objective`` takes the plain one below a length.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import common

#: rows, heads, tokens, numbers a head
SHAPES = [(16, 12, 32, 32), (16, 12, 48, 32), (1, 8, 64, 64), (4, 8, 128, 64), (4, 16, 256, 64), (2, 16, 512, 64)]
BACKENDS = {"fused": SDPBackend.FLASH_ATTENTION, "plain": SDPBackend.MATH}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {}
    rows = []
    for dtype in ("bfloat16", "float32"):
        for shape in SHAPES:
            seconds = common.alternate({name: run(name, shape, dtype) for name in BACKENDS}, options.repetitions)
            times = common.ratio(seconds, "fused", "plain")
            key = f"{dtype}, {'×'.join(map(str, shape))}"
            figures[key] = {"seconds": seconds, "fused over plain": times}
            medians = [f"{1e3 * statistics.median(seconds[name]):.2f} ms" for name in BACKENDS]
            rows.append([key, *medians, f"{times['median']:.2f}"])
    common.print_table(rows, ["", *BACKENDS, "fused / plain"])
    print(f"\nwritten to {common.write('attention', {'figures': figures}, options.results)}")
    return figures


def run(name: str, shape: tuple[int, ...], dtype: str) -> Any:
    torch.manual_seed(0)
    query, key, value = (torch.randn(shape).to(getattr(torch, dtype)).requires_grad_() for _ in range(3))
    gradient = torch.randn(shape).to(query.dtype)

    def call() -> None:
        with sdpa_kernel(BACKENDS[name]):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (query, key, value), gradient)

    return lambda: call


if __name__ == "__main__":
    main()
