"""What half precision costs beside float32, a training step in each: it pays only where the processor multiplies it.

Usage: ``python benchmarks/half.py [--repetitions 5] [--device cuda]``. Each contender holds the frozen model in float32
and in bfloat16. A processor without instructions for bfloat16 multiplies it number by number, which takes tens of times
as long; loraloom multiplies in float32 there (``lora.products``). All in one process, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import common
from contenders import Shape, stepper
from loraloom.lora import matmul

SHAPES = [Shape("float32", 256, 6, 1, 64), Shape("float32", 256, 6, 4, 64)]
DTYPES = ("float32", "bfloat16")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="one small shape, to see that all of it runs")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    shapes = [Shape("float32", 64, 2, 2, 16, vocabulary=128)] if options.tiny else SHAPES
    native = matmul.native(options.device, torch.bfloat16)
    print(f"bfloat16 is {'' if native else 'not '}in hardware here")
    figures = [measure(shape, options) for shape in shapes]
    name = ("half" if options.device == "cpu" else "half-cuda") + ("" if native else "-without-instructions")
    print(f"\nwritten to {common.write(name, {'figures': figures}, options.results)}")
    return {"figures": figures}


def measure(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    steps = {
        f"{name}, {dtype}": stepper(name, replace(shape, dtype=dtype), options.device)
        for name in ("peft", "loraloom")
        for dtype in DTYPES
    }

    seconds = common.steps_in_turns(steps, options.repetitions, options.device)
    ratios = {name: common.ratio(seconds, f"{name}, bfloat16", f"{name}, float32") for name in ("peft", "loraloom")}
    print(f"\nwidth {shape.width}, {shape.layers} layers, {shape.rows}×{shape.tokens}")
    rows = []
    for name, times in ratios.items():
        medians = [f"{1e3 * statistics.median(seconds[f'{name}, {dtype}']):.1f} ms" for dtype in DTYPES]
        rows.append([name, *medians, f"{times['median']:.2f}", f"{times['min']:.2f} to {times['max']:.2f}"])
    common.print_table(rows, ["a step", *DTYPES, "times", "spread"])
    return {"shape": asdict(shape), "seconds": seconds, "bfloat16 over float32": ratios}


if __name__ == "__main__":
    main()
