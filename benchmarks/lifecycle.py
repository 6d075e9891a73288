"""What an adapter's life costs beside ``peft``: inject, load, switch, save, and the import itself.

Usage: ``python benchmarks/lifecycle.py [--layers 24 --width 512 --repetitions 9]``. Both libraries in one process, in
turns, at their defaults, on a Llama shape with random float32 weights and r=16 on all seven projections.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT would ask the hub when it saves, which is no work of its own

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft

import common
import loraloom
from contenders import TARGETS, Shape

#: operation → how many times faster than peft it is to be
GOALS = {"inject": 5.0, "load": 10.0, "switch": 20.0, "save": 2.0}
IMPORT_GOAL = 1.25
#: As a user writes it; the bare import loads nothing at all.
NAMES = "from loraloom import LoraConfig, PeftModel, get_peft_model"
LIBRARIES: dict[str, ModuleType] = {"peft": peft, "loraloom": loraloom}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for operation, contenders in operations(options, Path(scratch)).items():
            seconds = common.alternate(contenders, options.repetitions)
            figures[operation] = {
                "seconds": seconds,
                "times faster": common.ratio(seconds, "peft", "loraloom"),
                "goal": GOALS[operation],
            }
    seconds = imports(options.repetitions)
    figures["import"] = {
        "seconds": seconds,
        "times torch": common.ratio(seconds, NAMES, "import torch"),
        "goal": IMPORT_GOAL,
    }
    show(figures)
    shape = {key: value for key, value in vars(options).items() if key != "results"}
    path = common.write("lifecycle", {"shape": shape, "figures": figures}, options.results)
    print(f"\nwritten to {path}")
    return figures


def operations(options: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Callable[[], common.Call]]]:
    """Operation → library → a function that prepares one call."""

    def base() -> Any:
        return Shape("float32", options.width, options.layers, 1, 1, vocabulary=options.vocabulary).base("cpu")

    def config(library: ModuleType) -> Any:
        return library.LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
        )

    models: dict[str, Any] = {}
    for name, library in LIBRARIES.items():
        models[name] = library.get_peft_model(base(), config(library))
        models[name].save_pretrained(str(scratch / name))
        models[name].add_adapter("second", config(library))

    def inject(library: ModuleType) -> Callable[[], common.Call]:
        def prepare() -> common.Call:
            model, settings = base(), config(library)
            return lambda: library.get_peft_model(model, settings)

        return prepare

    def load(name: str) -> Callable[[], common.Call]:
        def prepare() -> common.Call:
            model = models[name]
            if "loaded" in model.peft_config:
                model.delete_adapter("loaded")
            return lambda: model.load_adapter(str(scratch / name), "loaded")

        return prepare

    def switch(name: str) -> Callable[[], common.Call]:
        def prepare() -> common.Call:
            model, other = models[name], "second" if models[name].active_adapter == "default" else "default"
            return lambda: model.set_adapter(other)

        return prepare

    def save(name: str) -> Callable[[], common.Call]:
        def prepare() -> common.Call:
            folder = scratch / f"{name}-saved"
            # Where nothing was freed, both wait for the system to find memory for the file, which hides their own work.
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()  # one's own bytes alone wait for the disk: loraloom syncs what it writes, peft does not
            return lambda: models[name].save_pretrained(str(folder), selected_adapters=["default"])

        return prepare

    return {
        "inject": {name: inject(library) for name, library in LIBRARIES.items()},
        "load": {name: load(name) for name in LIBRARIES},
        "switch": {name: switch(name) for name in LIBRARIES},
        "save": {name: save(name) for name in LIBRARIES},
    }


def imports(repetitions: int) -> dict[str, list[float]]:
    """Seconds of an import in a fresh process, measured inside it."""

    def inside(statement: str) -> float:
        code = f"import time; s = time.perf_counter(); {statement}; print(time.perf_counter() - s)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return float(done.stdout)

    statements = ("import torch", NAMES)
    seconds: dict[str, list[float]] = {statement: [] for statement in statements}
    for turn in range(repetitions + 1):
        for statement in statements if turn % 2 else statements[::-1]:
            spent = inside(statement)
            if turn:  # the first turn fills the disk cache
                seconds[statement].append(spent)
    return seconds


def show(figures: dict[str, Any]) -> None:
    rows = []
    for operation in GOALS:
        figure = figures[operation]
        times = figure["times faster"]
        medians = [f"{1e3 * statistics.median(figure['seconds'][name]):.2f} ms" for name in LIBRARIES]
        met = "yes" if times["median"] >= figure["goal"] else "NO"
        spread = f"{times['min']:.1f} to {times['max']:.1f}"
        rows.append([operation, *medians, f"{times['median']:.1f}x", spread, f"{figure['goal']:g}x", met])
    common.print_table(rows, ["", "peft", "loraloom", "faster", "spread", "goal", "met"])
    figure = figures["import"]
    torch, ours = (1e3 * statistics.median(values) for values in figure["seconds"].values())
    times = figure["times torch"]["median"]
    met = "yes" if times <= figure["goal"] else "NO"
    print(
        f"\nimport: torch {torch:.0f} ms, loraloom {ours:.0f} ms: {times:.2f} of torch (goal {figure['goal']}): {met}"
    )


if __name__ == "__main__":
    main()
