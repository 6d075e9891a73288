"""The language-model loss: memory over what it is given, and time, beside the plain loss and torch's own chunked one.

Usage: ``python benchmarks/loss.py [--tokens 2048 --vocabulary 131072 --width 512]``. Extra memory is the peak over the
loaded head and hidden states, of forward and backward, each contender in a fresh process; time is taken in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from loraloom.tasks.linear_cross_entropy import linear_cross_entropy
from memory import Peak, _resident

#: Of the logits of all tokens in float32.
GOAL = 1 / 8
DTYPES = ("bfloat16", "float32")
NAMES = ("plain", "loraloom")


def contender(name: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        hidden.grad = None
        if name == "plain":  # as transformers computes it
            loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
        elif name == "torch, chunked":
            loss = F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())
        else:
            loss = linear_cross_entropy(hidden, weight, None, targets).mean()
        loss.backward()
        return loss.detach()

    return run


def tensors(options: argparse.Namespace, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = (torch.randn(options.vocabulary, options.width) / options.width**0.5).to(getattr(torch, dtype))
    hidden = torch.randn(options.tokens, options.width).to(weight.dtype).requires_grad_()
    return hidden, weight, torch.randint(0, options.vocabulary, (options.tokens,))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=2**17)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--torch-chunked", action="store_true", help="torch's own too, which takes minutes on a CPU")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if options.alone:
        name, dtype = options.alone
        run = contender(name, *tensors(options, dtype))
        before = _resident()
        with Peak() as peak:
            run()
        print(json.dumps(peak.bytes - before))
        return {}

    names = (*NAMES, "torch, chunked") if options.torch_chunked else NAMES
    figures = {}
    whole = 4 * options.tokens * options.vocabulary
    for dtype in DTYPES:
        extra = {name: measure(name, dtype, options) for name in names}
        runs = {name: contender(name, *tensors(options, dtype)) for name in names}
        values = {name: float(run()) for name, run in runs.items()}
        seconds = common.alternate({name: lambda run=run: run for name, run in runs.items()}, options.repetitions)
        figures[dtype] = {"extra bytes": extra, "seconds": seconds, "value": values, "logits in float32": whole}
        print(f"\n{dtype}, {options.tokens:,} tokens, vocabulary {options.vocabulary:,}")
        rows = [
            [name, f"{extra[name] / 2**20:,.0f} MiB", f"{extra[name] / whole:.3f}",
             f"{statistics.median(seconds[name]):.2f} s", f"{values[name]:.5f}"]
            for name in names
        ]  # fmt: skip
        common.print_table(rows, ["", "extra", "of the logits", "time", "value"])
        share = extra["loraloom"] / whole
        print(f"goal {GOAL:.3f} of the logits: {'yes' if share <= GOAL else 'NO'}")
    shape = {key: getattr(options, key) for key in ("tokens", "vocabulary", "width")}
    print(f"\nwritten to {common.write('loss', {'shape': shape, 'figures': figures}, options.results)}")
    return figures


def measure(name: str, dtype: str, options: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--alone", name, dtype]
    for key in ("tokens", "vocabulary", "width"):
        command += [f"--{key}", str(getattr(options, key))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
