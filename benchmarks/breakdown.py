"""Where a LoRA step's time goes beyond the frozen model's own, and how near to it a step could come at all.

Usage: ``python benchmarks/breakdown.py [--repetitions 15]``, for the shapes of ``benchmarks/step.py``. The parts are
measured each on its own, with the shapes and the number of calls of a step; what is left over is calls, casts,
autograd and Python. The limit is a step in which the thin products are all that is added to the frozen model.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import common
import step as steps
from contenders import Shape, stepper
from loraloom.engine.flat_adamw import FlatAdamW
from loraloom.lora.dropout import DropoutMask, masked


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="one small shape, to see that all of it runs")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    shapes = [(Shape("float32", 64, 2, 2, 16, vocabulary=128, dropout=0.1), 9.0)] if options.tiny else steps.CPU
    figures = []
    for shape, goal in shapes:
        figures.append({"shape": asdict(shape), "goal": goal, **measure(shape, options.repetitions)})
        show(shape, figures[-1])
    print(f"\nwritten to {common.write('profile', {'figures': figures}, options.results)}")
    return {"figures": figures}


def measure(shape: Shape, repetitions: int) -> dict[str, Any]:
    products, calls = thin_products(shape)
    contenders: dict[str, Callable[[], Any]] = {
        "floor": stepper("floor", shape, "cpu"),
        "step": stepper("loraloom", shape, "cpu"),
        "thin products": products,
        "optimizer": optimizer(shape),
    }
    if shape.dropout:
        contenders["dropout"] = dropout(shape)
    for contender in contenders.values():
        for _ in range(2):
            contender()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):  # in turns, so that what else the machine does falls on all
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - started)
    found = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    floor, whole = found.pop("floor"), found.pop("step")
    limits = [(f + p) / f for f, p in zip(seconds["floor"], seconds["thin products"], strict=True)]
    return {
        "floor": floor,
        "step": whole,
        "parts": {**found, "calls, casts, autograd, Python": whole - floor - sum(found.values())},
        "calls": {"thin products": calls},
        "times the floor": statistics.median(s / f for s, f in zip(seconds["step"], seconds["floor"], strict=True)),
        "limit": statistics.median(limits),
    }


def groups(shape: Shape) -> list[tuple[int, list[int]]]:
    """(width of the input, widths of the outputs) of the projections that read one input, in a layer."""
    width, inner = shape.width, shape.width * 11 // 4
    return [(width, [width] * 3), (width, [width]), (width, [inner] * 2), (inner, [width])]


def thin_products(shape: Shape) -> tuple[Callable[[], None], int]:
    """All products with A or B of a step: forward, and backward to factors and input."""
    dtype, rows = getattr(torch, shape.dtype), shape.rows * shape.tokens

    def numbers(*size: int) -> torch.Tensor:
        return torch.randn(size).to(dtype)

    made = []
    for inside, outs in groups(shape):
        layers = [(numbers(shape.r, inside), numbers(out, shape.r), numbers(rows, out)) for out in outs]
        ranks = shape.r * len(outs)
        made.append((numbers(rows, inside), layers, numbers(rows, ranks), numbers(ranks, inside)))

    def run() -> None:
        for _ in range(shape.layers):
            for x, layers, joined, all_a in made:
                for a, b, y in layers:
                    h = torch.mm(x, a.T)
                    y.addmm_(h, b.T, beta=1, alpha=1e-3)
                    torch.mm(y, b)
                    torch.mm(h.T, y)
                torch.mm(joined.T, x)
                x.addmm_(joined, all_a, alpha=1e-6)

    return run, shape.layers * sum(4 * len(outs) + 2 for _, outs in groups(shape))


def optimizer(shape: Shape) -> Callable[[], None]:
    sizes = [(shape.r, inside, out) for inside, outs in groups(shape) for out in outs] * shape.layers
    parameters = [nn.Parameter(torch.randn(size)) for r, inside, out in sizes for size in ((r, inside), (out, r))]
    flat = FlatAdamW([(parameter, 1.0) for parameter in parameters], 0.0)
    gradients = [torch.randn(parameter.shape) for parameter in parameters]

    def run() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        flat.step(1e-4, 1.0)

    return run


def dropout(shape: Shape) -> Callable[[], None]:
    """The masks of a step, made in the forward and again in the backward, and put on."""
    dtype = getattr(torch, shape.dtype)
    inputs = [torch.randn(shape.rows, shape.tokens, inside).to(dtype) for inside, _ in groups(shape)]

    def run() -> None:
        for layer in range(shape.layers):
            for x in inputs:
                dropped = DropoutMask(shape.dropout, layer)
                dropped.apply(x)
                mask = dropped.mask(x)
                masked(x, mask)
                x.add_(masked(x, mask), alpha=1e-6)

    return run


def show(shape: Shape, figure: dict[str, Any]) -> None:
    print(f"\n{shape}: floor {figure['floor']:.1f} ms, step {figure['step']:.1f} ms, "
          f"{figure['times the floor']:.3f} times; with the thin products alone {figure['limit']:.3f} "
          f"(goal {figure['goal']:.2f})")  # fmt: skip
    calls = figure["calls"]
    rows = [
        [name, str(calls.get(name, "")), f"{part:.1f} ms", f"{part / figure['floor']:.1%}"]
        for name, part in figure["parts"].items()
    ]
    common.print_table(rows, ["beyond the floor", "calls", "time", "of the floor"])


if __name__ == "__main__":
    main()
