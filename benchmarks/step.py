"""What a LoRA training step costs as a multiple of the frozen model's forward and backward (the floor).

Usage: ``python benchmarks/step.py [--repetitions 15] [--shape NUMBER ...] [--device cuda] [--compile]``. All contenders
in one process, in turns; the ratio is the median of the turns' own ratios.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import common
from contenders import NAMES, Shape, stepper

#: shape → the greatest multiple of the floor that loraloom is to cost
CPU = [
    (Shape("bfloat16", 1024, 6, 4, 256), 1.05),
    (Shape("bfloat16", 1024, 6, 4, 256, dropout=0.1), 1.10),
    (Shape("bfloat16", 512, 8, 4, 128), 1.10),
    (Shape("bfloat16", 512, 8, 1, 64), 1.20),
    (Shape("float32", 512, 8, 4, 128), 1.08),
]
GPU = [
    (Shape("bfloat16", 2048, 16, 8, 1024, vocabulary=32000), 1.05),
    (Shape("bfloat16", 2048, 16, 8, 1024, vocabulary=32000, dropout=0.1), 1.10),
]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--shape", type=int, nargs="*", help="numbers from 0 of the shapes to run; all by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile each contender's step too")
    parser.add_argument("--tiny", action="store_true", help="one small shape, to see that all of it runs")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")

    shapes = GPU if options.device == "cuda" else CPU
    shapes = [(Shape("float32", 64, 2, 2, 16, vocabulary=128), 9.0)] if options.tiny else shapes
    figures = []
    for number, (shape, goal) in enumerate(shapes):
        if options.shape and number not in options.shape:
            continue
        figures.append({"shape": asdict(shape), "goal": goal, **measure(shape, options)})
        show(shape, goal, figures[-1])
    name = "step" if options.device == "cpu" else "step-cuda"
    print(f"\nwritten to {common.write(name, {'figures': figures}, options.results)}")
    return {"figures": figures}


def measure(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    steps = {name: stepper(name, shape, options.device) for name in NAMES}
    if options.compile:
        steps |= {f"{name}, compiled": torch.compile(stepper(name, shape, options.device)) for name in NAMES}

    seconds = common.steps_in_turns(steps, options.repetitions, options.device)
    ratios = {name: common.ratio(seconds, name, "floor") for name in steps if name != "floor"}
    return {"seconds": seconds, "times the floor": ratios}


def show(shape: Shape, goal: float, figure: dict[str, Any]) -> None:
    print(f"\n{shape}: floor {1e3 * statistics.median(figure['seconds']['floor']):.1f} ms")
    rows = []
    for name, times in figure["times the floor"].items():
        mine = name == "loraloom"
        met = ("yes" if times["median"] <= goal else "NO") if mine else ""
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(figure['seconds'][name]):.1f} ms",
                f"{times['median']:.3f}",
                f"{times['min']:.2f} to {times['max']:.2f}",
                f"{goal:.2f}" if mine else "",
                met,
            ]
        )
    common.print_table(rows, ["", "step", "× floor", "spread", "goal", "met"])


if __name__ == "__main__":
    main()
