"""What preparing many rows costs: the peak of memory, rows in a second, and the time once the cache has them.

Usage: ``python benchmarks/data.py [--rows 1000000] [--workers N]``. A JSONL file of chats is generated. Each
measurement is a fresh process, whose memory is counted with that of its workers: the sum of what all have resident,
looked at every 50 ms (pages that they share count for each). While examples are then read at random, pages of the
mapped arrays are resident as well, which the system takes back when it needs them: that second figure leaves them out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common

#: Bytes that preparing a million rows may take.
GOAL = 1_500_000_000
WORDS = 5000


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, help="processes that tokenise; by default as many as there are cores")
    parser.add_argument("--task", default="causal-lm", choices=["causal-lm", "seq-cls"])
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone:
        print(json.dumps(job(Path(options.alone[0]), Path(options.alone[1]), options)))
        return {}

    with tempfile.TemporaryDirectory(prefix="loraloom-benchmark-") as name:
        folder = Path(name)
        model, rows = folder / "model", folder / "rows.jsonl"
        make_model(model)
        make_rows(rows, options.rows, options.task)
        environment = {**os.environ, "LORALOOM_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        figures: dict[str, Any] = {"rows": options.rows, "task": options.task, "file bytes": rows.stat().st_size}
        for turn in ("first", "cached"):
            figures[turn] = measured(model, rows, options, environment)
        figures["cache bytes"] = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    figures["rows per second"] = options.rows / figures["first"]["seconds"]
    figures["goal bytes"] = GOAL
    table = [
        [
            turn,
            f"{figures[turn]['seconds']:,.1f} s",
            f"{figures[turn]['peak bytes'] / 1e6:,.0f} MB",
            f"{figures[turn]['main bytes'] / 1e6:,.0f} MB",
            f"{options.rows / figures[turn]['seconds']:,.0f}",
        ]
        for turn in ("first", "cached")
    ]
    common.print_table(table, ["", "time", "peak of all", "of it the main", "rows a second"])
    met = "yes" if figures["first"]["peak bytes"] <= GOAL else "NO"
    print(f"peak under {GOAL / 1e9:.1f} GB: {met}; {figures['first']['tokens']:,} tokens")
    print(f"\nwritten to {common.write('data', {'figures': figures}, options.results)}")
    return figures


def make_rows(path: Path, count: int, task: str) -> None:
    """Rows of some 20 to 120 words: chats of one or two exchanges, or texts of one of four classes."""
    source = random.Random(0)
    words = [f"w{i}" for i in range(WORDS)]

    def text(least: int, most: int) -> str:
        return " ".join(source.choices(words, k=source.randint(least, most)))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            if task == "seq-cls":
                row: dict[str, Any] = {"text": text(20, 120), "label": source.choice("abcd")}
            else:
                turns = [
                    {"role": role, "content": text(*span)}
                    for _ in range(source.randint(1, 2))
                    for role, span in (("user", (5, 20)), ("assistant", (10, 40)))
                ]
                row = {"messages": turns}
            file.write(json.dumps(row) + "\n")


def make_model(folder: Path) -> None:
    """A config, and a byte-level tokenizer with a chat template, as decoders have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    specials = ["<|end|>", "<|start|>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator((f" w{i}" for i in range(WORDS)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(folder)


def measured(model: Path, rows: Path, options: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """One preparation in a fresh process, with the peak of its memory and of its workers'."""
    command = [sys.executable, __file__, "--alone", str(model), str(rows), "--task", options.task]
    command += ["--workers", str(options.workers)] if options.workers else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        peak, own, private = 0, 0, 0
        ready, done = threading.Event(), threading.Event()
        out: list[str] = []

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                out.append(line)
                ready.set()
            done.set()

        threading.Thread(target=read, daemon=True).start()
        while not done.wait(0.05):
            pages = resident(process.pid)
            if ready.is_set():
                private = max(private, pages[0][1])
            else:
                peak, own = max(peak, sum(size for size, _ in pages)), max(own, pages[0][0])
    if process.returncode:
        raise SystemExit(process.returncode)
    return {**json.loads(out[-1]), "peak bytes": peak, "main bytes": own, "bytes while reading": private}


def resident(pid: int) -> list[tuple[int, int]]:
    """Bytes that a process and those that it started have in memory: all, and without mapped files."""
    found: list[tuple[int, int]] = [(0, 0)]
    unit = os.sysconf("SC_PAGE_SIZE")
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            _, pages, shared, *_ = map(int, (path / "statm").read_text().split())
        except OSError:  # it ended meanwhile
            continue
        if int(path.name) == pid:
            found[0] = pages * unit, (pages - shared) * unit
        elif parent == pid:
            found.append((pages * unit, (pages - shared) * unit))
    return found


def job(model: Path, rows: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What training does before the model is loaded, and the first batches of an epoch."""
    from loraloom import tasks
    from loraloom.config.train import TrainConfig
    from loraloom.data.batches import bucketed
    from loraloom.data.dataset import read_rows, tokenise
    from loraloom.models.load import load_tokenizer

    settings = TrainConfig(
        model=str(model), data=str(rows), task=options.task, output="unused", eval_split=1000, max_length=512,
        data_workers=options.workers,
    )  # fmt: skip
    started = time.perf_counter()
    task = tasks.get(settings.task)
    found = read_rows(settings, task)
    read = time.perf_counter()
    data = tokenise(found, settings, task, load_tokenizer(settings.model))
    encoded = time.perf_counter()
    print("prepared", flush=True)
    order = bucketed(data.train.lengths, 16, 0, 1)
    shuffled = time.perf_counter()
    some = order[:1000]
    for batch in some:
        for row in batch:
            data.train.examples[row]
    return {
        "seconds": encoded - started,
        "reading": read - started,
        "encoding": encoded - read,
        "an epoch's order": shuffled - encoded,
        "seconds per 1000 examples": (time.perf_counter() - shuffled) / sum(map(len, some)) * 1000,
        "tokens": data.train.tokens + data.validation.tokens,
        "warnings": data.warnings,
    }


if __name__ == "__main__":
    main()
