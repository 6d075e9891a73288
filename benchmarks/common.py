"""What every benchmark shares: alternating the contenders, a table, and a JSON file that says where it was measured."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], Any]


def alternate(contenders: Mapping[str, Callable[[], Call]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each contender's call, taken in turns. ``contenders[name]()`` prepares one call, untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repetitions + 1):  # the first turn warms up and does not count
        order = list(contenders) if turn % 2 else list(contenders)[::-1]
        for name in order:
            call = contenders[name]()
            gc.collect()
            gc.disable()
            try:
                started = time.perf_counter()
                kept = call()
                spent = time.perf_counter() - started
            finally:
                gc.enable()
            del kept, call
            if turn:
                seconds[name].append(spent)
    return seconds


def steps_in_turns(steps: Mapping[str, Call], repetitions: int, device: str) -> dict[str, list[float]]:
    """``alternate`` for training steps: each runs twice before, so that layers learn and caches fill."""
    import torch

    def prepare(name: str) -> Callable[[], Call]:
        def call() -> None:
            steps[name]()
            if device == "cuda":
                torch.cuda.synchronize()

        return lambda: call

    for step in steps.values():
        for _ in range(2):
            step()
    return alternate({name: prepare(name) for name in steps}, repetitions)


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    """How many times longer ``slow`` takes: the median, least and greatest of the turns' own ratios."""
    ratios = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def machine() -> dict[str, Any]:
    import torch

    from loraloom.lora import matmul

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        name = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), name
        )
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16 in hardware": matmul.native("cpu", torch.bfloat16),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "peft")},
        "loraloom": _ours(),
    }


def _ours() -> str:
    """Of what is imported here, which need not be installed."""
    try:
        return version("loraloom")
    except PackageNotFoundError:
        import loraloom

        return loraloom.__version__


def write(name: str, record: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    command = " ".join(["python", *sys.argv])
    whole = {"machine": machine(), "date": date.today().isoformat(), "command": command, **record}
    path.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    return path


def print_table(rows: list[list[str]], heads: list[str]) -> None:
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, ["-" * width for width in widths], *rows]:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
