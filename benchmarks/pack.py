"""Eight adapters in one pack against PEFT training them one after another: rows a second.

Usage: ``python benchmarks/pack.py [--repetitions 7] [--shape NUMBER ...] [--sizes 1 2 4 8 16] [--device cuda]``.
Llama shapes, r=16 on all seven projections. PEFT takes a step of each adapter in turn, each a forward and backward of
its own; loraloom takes a step of all in one forward and backward. Both with AdamW (fused) and clipped gradients, in
turns in one process; the ratio is the median of the turns' own.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft
import torch

import common
import loraloom
from contenders import TARGETS, Shape
from loraloom.engine.flat_adamw import FlatAdamW
from loraloom.engine.pack import Pack

#: a trial's shape → how many times PEFT's throughput a pack is to have
CPU = [
    (Shape("bfloat16", 256, 6, 1, 64), 3.0),
    (Shape("bfloat16", 512, 8, 1, 64), 3.0),
    (Shape("bfloat16", 512, 8, 4, 64), 2.0),
]
GPU = [(Shape("bfloat16", 2048, 16, 1, 512, vocabulary=32000), 8.0)]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--shape", type=int, nargs="*", help="numbers from 0 of the shapes to run; all by default")
    parser.add_argument("--sizes", type=int, nargs="*", help="slots in a pack; by default 8, on a GPU 1 to 64")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="one small shape, to see that all of it runs")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    shapes = GPU if options.device == "cuda" else CPU
    shapes = [(Shape("float32", 64, 2, 1, 16, vocabulary=128), 0.1)] if options.tiny else shapes
    sizes = options.sizes or ([8] if options.device == "cpu" else [1, 2, 4, 8, 16, 32, 64])
    figures = []
    for number, (shape, goal) in enumerate(shapes):
        if options.shape and number not in options.shape:
            continue
        figures.append({"shape": asdict(shape), "goal": goal, **measure(shape, sizes, options)})
        show(shape, goal, figures[-1])
    name = "pack" if options.device == "cpu" else "pack-cuda"
    print(f"\nwritten to {common.write(name, {'figures': figures}, options.results)}")
    return {"figures": figures}


def measure(shape: Shape, sizes: list[int], options: argparse.Namespace) -> dict[str, Any]:
    steps: dict[str, Callable[[], Any]] = {"peft": sequential(shape, options.device)}
    steps |= {f"pack of {size}": packed(shape, size, options.device) for size in sizes}
    steps["floor of 8 rows"] = floor(shape, 8, options.device)

    seconds = common.steps_in_turns(steps, options.repetitions, options.device)
    times = {}
    for size in sizes:
        ratios = [size * p / q for p, q in zip(seconds["peft"], seconds[f"pack of {size}"], strict=True)]
        times[str(size)] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {"seconds": seconds, "throughput over peft": times}


def sequential(shape: Shape, device: str) -> Callable[[], Any]:
    """A step of one adapter: how long each of many takes, one after another."""
    base = shape.base(device).train()
    model = peft.get_peft_model(base, peft.LoraConfig(**fields(shape)))
    ids = shape.batch(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def packed(shape: Shape, size: int, device: str) -> Callable[[], Any]:
    names = [f"adapter-{i}" for i in range(size)]
    pack = Pack(shape.base(device), {name: loraloom.LoraConfig(**fields(shape)) for name in names})
    optimizers = [FlatAdamW([(p, 1.0) for p in pack.parameters_of(name).values()], 0.01) for name in names]
    ids = shape.batch(device)

    def step() -> None:
        pack.backward({name: {"input_ids": ids, "labels": ids} for name in names})
        for optimizer in optimizers:
            optimizer.step(1e-4, 1.0)

    return step


def floor(shape: Shape, times: int, device: str) -> Callable[[], Any]:
    """The frozen model's own forward and backward on the rows of a whole pack."""
    model = shape.base(device).train().requires_grad_(False)
    ids = replace(shape, rows=times * shape.rows).batch(device)
    embed = model.get_input_embeddings()

    def step() -> None:
        inputs = embed(ids).detach().requires_grad_()
        model(inputs_embeds=inputs, labels=ids).loss.backward()

    return step


def fields(shape: Shape) -> dict[str, Any]:
    found = {"r": shape.r, "lora_alpha": 2 * shape.r, "lora_dropout": shape.dropout}
    return found | {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}


def show(shape: Shape, goal: float, figure: dict[str, Any]) -> None:
    seconds = {name: 1e3 * statistics.median(values) for name, values in figure["seconds"].items()}
    print(f"\n{shape} for each adapter: peft {seconds['peft']:.1f} ms a step of one; "
          f"the frozen model on 8 such {seconds['floor of 8 rows']:.1f} ms")  # fmt: skip
    rows = []
    best = max(times["median"] for times in figure["throughput over peft"].values())
    for size, times in figure["throughput over peft"].items():
        at_best = times["median"] == best
        met = ("yes" if best >= goal else "NO") if at_best else ""
        spread = f"{times['min']:.2f} to {times['max']:.2f}"
        aim = f"{goal:.1f}" if at_best else ""
        rows.append([size, f"{seconds[f'pack of {size}']:.1f} ms", f"{times['median']:.2f}", spread, aim, met])
    common.print_table(rows, ["slots", "step of all", "× peft", "spread", "goal", "met"])


if __name__ == "__main__":
    main()
