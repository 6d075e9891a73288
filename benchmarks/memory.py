"""What a training step adds to the memory of the loaded model: the peak of the process, or of the GPU, over that.

Usage: ``python benchmarks/memory.py [--repetitions 3] [--device cuda]``. Each contender in a fresh process of its own,
in turns; the figure is the peak within two steps, less what the process held once the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
from contenders import NAMES, Shape, stepper

#: shape → how much of what peft's step adds, at its defaults, loraloom's is to add
SHAPES: list[tuple[Shape, float | None]] = [
    (Shape("bfloat16", 1024, 6, 4, 256, dropout=0.1), 0.5),
    (Shape("bfloat16", 1024, 6, 4, 256), None),
    (Shape("float32", 512, 8, 4, 128), None),
]
TINY: list[tuple[Shape, float | None]] = [(Shape("float32", 64, 2, 2, 16, vocabulary=128), None)]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="one small shape, to see that all of it runs")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    shapes = TINY if options.tiny else SHAPES
    if options.alone:
        name, number = options.alone
        print(json.dumps(added(name, shapes[int(number)][0], options.device)))
        return {}

    figures = []
    for number, (shape, goal) in enumerate(shapes):
        bytes_: dict[str, list[int]] = {name: [] for name in NAMES}
        for _ in range(options.repetitions):
            for name in NAMES:
                bytes_[name].append(measure(name, number, options))
        share = statistics.median(bytes_["loraloom"]) / statistics.median(bytes_["peft"])
        figures.append({"shape": asdict(shape), "bytes": bytes_, "of peft": share, "goal": goal})
        print(f"\n{shape}: memory that a step adds")
        rows = [[name, f"{statistics.median(values) / 2**20:,.0f} MiB"] for name, values in bytes_.items()]
        common.print_table(rows, ["", "added"])
        met = f" (goal {goal}): {'yes' if share <= goal else 'NO'}" if goal else ""
        print(f"loraloom adds {share:.2f} of what peft adds{met}")
    name = "memory" if options.device == "cpu" else "memory-cuda"
    print(f"\nwritten to {common.write(name, {'figures': figures}, options.results)}")
    return {"figures": figures}


def measure(name: str, number: int, options: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--alone", name, str(number), "--device", options.device]
    command += ["--tiny"] * options.tiny
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.strip().splitlines()[-1]))


def added(name: str, shape: Shape, device: str) -> int:
    """Bytes at the peak of a step, over the loaded model with its adapter."""
    import torch

    step = stepper(name, shape, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = _resident()
    with Peak() as peak:
        step()
        step()
    return peak.bytes - before


class Peak:
    """The greatest resident size of this process while it is open, looked at every half millisecond."""

    def __enter__(self) -> Peak:
        self.bytes, self._open = _resident(), True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._open:
            self.bytes = max(self.bytes, _resident())
            time.sleep(0.0005)

    def __exit__(self, *what: object) -> None:
        self._open = False
        self._thread.join()


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


if __name__ == "__main__":
    main()
