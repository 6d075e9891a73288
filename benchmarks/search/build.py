"""Build the tables of the search benchmark: CPU-hours, over as many sittings as it takes.

Usage: ``python benchmarks/search/build.py [NAME ...] [--configurations 24] [--seeds 4] [--work build/search]``. Each
pack of eight configurations with one seed is written when it is done; stopped, the same command continues. A table
that is complete is packed into ``benchmarks/search/tables/NAME.npz``.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_sets import DATA_SETS, HERE, DataSet
from tables import Table
from torch.nn import functional as F

import common
from loraloom.config.train import TrainConfig
from loraloom.engine.loop import advance
from loraloom.engine.pack import Pack, evaluating
from loraloom.engine.slot import Slot
from loraloom.lora.model import PeftModel
from loraloom.lora.targets import plan
from loraloom.training import setup as training
from loraloom.tuning.space import Space

SHARES = (0, 1 / 18, 1 / 9, 2 / 9, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1)
PACK = 8
#: A space needs two choices: a configuration and one that is never used.
OTHER = {
    "lora.r": 3,
    "lora.lora_alpha": "3r",
    "lora.target_modules": "q-v",
    "lora.lora_dropout": 0.5,
    "train.learning_rate": 1.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(DATA_SETS)}; by default all")
    parser.add_argument("--configurations", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--work", type=Path, default=Path("build/search"))
    given = parser.parse_args()
    for name in given.names or DATA_SETS:
        build(DATA_SETS[name], given.configurations, given.seeds, given.work / name)


def build(what: DataSet, count: int, seeds: int, work: Path) -> None:
    rows = work / "rows"
    if not (rows / "done").exists():
        shutil.rmtree(rows, ignore_errors=True)
        rows.mkdir(parents=True)
        what.make(rows)
        (rows / "done").touch()
    options = TrainConfig(
        model=str(rows / "model"), data=str(rows / "train.jsonl"), eval_split=str(rows / "pool.jsonl"), task=what.task,
        output=str(work / "unused"), eval_batch_size=64, **what.train,
    )  # fmt: skip
    setup = training.load(options)
    configurations = what.configurations(count)
    found = {}
    for seed in range(seeds):
        for first in range(0, count, PACK):
            path = work / f"seed{seed}-from{first}.npz"
            if not path.exists():
                measured = train(setup, options, configurations[first : first + PACK], seed)
                np.savez_compressed(work / "draft.npz", **measured)
                (work / "draft.npz").rename(path)
                print(
                    f"{what.name}: seed {seed}, configurations from {first}: {measured['seconds'].sum():.0f} s",
                    flush=True,
                )
            with np.load(path) as arrays:
                found[seed, first] = dict(arrays)
    starts = range(0, count, PACK)
    join = {
        key: np.stack([np.concatenate([found[seed, at][key] for at in starts]) for seed in range(seeds)], 1)
        for key in ("train_loss", "loss", "hit", "seconds")
    }
    meta = {
        "name": what.name,
        "task": what.task,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip(),
        "machine": common.machine(),
        "seeds": list(range(seeds)),
        "steps": int(join["train_loss"].shape[-1]),
        "points": points(int(join["train_loss"].shape[-1])),
        "labels": setup.data.names,
        "train_rows": len(setup.data.train.examples),
        "constant": constant(setup),
        "configurations": describe(setup, options, configurations, join["seconds"]),
    }
    classes = what.task == "seq-cls"
    hit = join["hit"] if classes else None
    label = np.array([example.labels for example in setup.data.validation.examples]) if classes else None
    table = Table(meta, join["train_loss"], join["loss"], hit, found[0, 0]["tokens"], label)
    table.write(HERE / "tables" / f"{what.name}.npz")
    print(f"{what.name}: {(HERE / 'tables' / what.name).with_suffix('.npz').stat().st_size / 1e6:.2f} MB", flush=True)


def points(steps: int) -> list[int]:
    return sorted({math.ceil(share * steps - 1e-9) for share in SHARES})


def trial_options(options: TrainConfig, values: dict[str, Any], setup: Any, seed: int) -> TrainConfig:
    space = Space.parse({key: sorted({value, OTHER[key]}, key=str) for key, value in values.items()}, options)
    return replace(space.to_options(values, options, setup.empty()), seed=seed)


def describe(
    setup: Any, options: TrainConfig, configurations: list[dict[str, Any]], seconds: np.ndarray
) -> list[dict[str, Any]]:
    found = []
    for values, spent in zip(configurations, seconds, strict=True):
        made = plan(setup.empty(), setup.config(trial_options(options, values, setup, 0)))
        found.append({"values": values, "parameters": made.parameters, "bytes": made.bytes, "seconds": spent.tolist()})
    return found


def constant(setup: Any) -> dict[str, float] | None:
    """The training loss of the best constant answer: the entropy of the classes' shares."""
    labels = [example.labels for example in setup.data.train.examples]
    if not all(isinstance(label, int) for label in labels):
        return None
    shares = np.bincount(labels) / len(labels)
    label = int(shares.argmax())
    held_out = [example.labels for example in setup.data.validation.examples]
    share = sum(one == label for one in held_out) / len(held_out)
    return {"loss": float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum()), "label": label, "share": share}


def train(setup: Any, options: TrainConfig, configurations: list[dict[str, Any]], seed: int) -> dict[str, np.ndarray]:
    """One pack to its end."""
    model = setup.model
    pack = Pack(model, task=setup.task, pad_id=setup.tokenizer.pad_token_id, pad_to_multiple_of=16)
    slots: list[Slot] = []
    for number, values in enumerate(configurations):
        mine = trial_options(options, values, setup, seed)
        pack.add(f"trial-{number}", setup.config(mine), seed=seed)
        slots.append(setup.slot(f"trial-{number}", mine, setup.steps_of(mine)[0]))
    looks, kept = points(slots[0].steps), [Measured() for _ in slots]
    seconds = 0.0
    for step in range(slots[0].steps + 1):
        if step in looks:
            for slot, one in zip(slots, kept, strict=True):
                one.add(setup, model, slot)
        if running := [slot for slot in slots if slot.running]:
            started = time.perf_counter()
            advance(pack, running)
            seconds += time.perf_counter() - started
    steps = slots[0].steps
    curves = [np.array([*slot.curve.loss, *[math.nan] * (steps - len(slot.curve.loss))]) for slot in slots]
    for slot in slots:
        pack.remove(slot.name)
    return {
        "train_loss": np.stack(curves),
        "loss": np.stack([np.stack(one.loss) for one in kept]),
        "hit": np.stack([np.stack(one.hit) for one in kept]),
        "tokens": kept[0].tokens,
        "seconds": np.full(len(slots), seconds / len(slots)),
    }


class Measured:
    """The held-out rows of one trial, by plain torch."""

    def __init__(self) -> None:
        self.loss: list[np.ndarray] = []
        self.hit: list[np.ndarray] = []
        self.tokens = np.ones(0)

    def add(self, setup: Any, model: PeftModel, slot: Slot) -> None:
        examples = setup.data.validation.examples
        order = sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids))
        loss, hit, tokens = (np.full(len(examples), math.nan) for _ in range(3))
        if not slot.failure:
            with evaluating(model, torch.inference_mode()):
                for at in range(0, len(order), 64):
                    rows = order[at : at + 64]
                    inputs = setup.task.collate([examples[row] for row in rows], setup.tokenizer.pad_token_id)
                    labels = inputs.pop("labels")
                    with model.base_model.lora_routed([slot.name] * len(rows)):
                        logits = model.base_model(**inputs).logits.float()
                    loss[rows], hit[rows], tokens[rows] = (one.numpy() for one in by_row(logits, labels))
        self.loss.append(loss)
        self.hit.append(np.nan_to_num(hit).astype(bool))
        self.tokens = tokens if np.isfinite(tokens).all() else self.tokens


def by_row(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, hit and tokens of each row. ``logits`` [rows, classes], or [rows, tokens, words] of a causal model."""
    if logits.dim() == 2:
        ones = torch.ones(len(labels))
        return F.cross_entropy(logits, labels, reduction="none"), (logits.argmax(-1) == labels).float(), ones
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    each = flat.view(len(labels), -1)
    count = (labels[:, 1:] != -100).sum(1).float()
    return each.sum(1) / count.clamp(min=1), torch.zeros(len(labels)), count


if __name__ == "__main__":
    main()
