"""Searches over a late starter, and over what is smooth or cannot be learned: what they end with, and what they cost.

Usage: ``python benchmarks/late.py [--searches 6]``. A 2-layer BERT shape with random weights, 600 rows of a sentence
and one of three labels, learning rates 0.001 and 0.005, r of 2 to 32, 102 steps a trial: at 0.001 nothing is learned,
at 0.005 the training loss stays at chance for a third to a half of the steps. Each search is compared with training all
its proposals to their end. ``smooth`` is a causal model on rows whose texts are all different; ``shuffled`` has the
labels of the first at random, ``slow`` rates that are far too low. The cost is in steps, over those of training all.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common
from loraloom.config.train import TrainConfig
from loraloom.tuning.conclusion import SearchResult
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.search import search
from loraloom.tuning.space import Space

FILL = [f"w{i}" for i in range(12)]
KEYS = {label: [f"{label}{i}" for i in range(2)] for label in "abc"}
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
RANKS = [2, 4, 8, 32]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--searches", type=int, default=6, help="differently seeded searches over the late starter")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(options.searches):
            folder = Path(scratch) / f"late-{seed}"
            wanted = late(folder, seed, {"train.learning_rate": [0.001, 0.005]})
            record[f"late {seed}"] = compare(wanted)
        record["shuffled"] = compare(late(Path(scratch) / "shuffled", 0, {"train.learning_rate": [0.001, 0.005]}, True))
        record["slow"] = compare(late(Path(scratch) / "slow", 0, {"train.learning_rate": [1e-6, 1e-5]}))
        record["smooth"] = compare(smooth(Path(scratch) / "smooth", 0))
    print(f"written to {common.write('late', record, options.results)}")
    return record


def compare(wanted: TuneConfig) -> dict[str, Any]:
    started = time.perf_counter()
    result = search(wanted)
    seconds = time.perf_counter() - started
    whole = replace(wanted, train=replace(wanted.train, output=f"{wanted.train.output}-all"), min_share=1.0, seeds=0)
    all_in_full = search(whole)
    firsts = [trial for trial in result.verdict.trials if trial.repeats is None]
    best = result.verdict.best
    found = {
        "learned": result.verdict.learned,
        "chosen": best.values,
        "figure": best.latest(wanted.metric),
        "metric": wanted.metric,
        "to beat": result.verdict.gain.bar if result.verdict.gain else None,
        "advice": [advice.kind for advice in result.verdict.advice],
        "all in full": top(all_in_full, wanted.metric),
        "steps": sum(trial.step for trial in firsts),
        "cost": sum(trial.step for trial in firsts) / sum(trial.steps for trial in firsts),
        "steps of further seeds": sum(t.step for t in result.verdict.trials if t.repeats is not None),
        "seconds": seconds,
    }
    print(f"{Path(wanted.train.output).parent.name}: {json.dumps(found)}", flush=True)
    return found


def top(result: SearchResult, metric: str) -> float | None:
    found = [trial.latest(metric) for trial in result.verdict.trials]
    known = [value for value in found if value is not None]
    return (max if metric == "accuracy" else min)(known, default=None)


def tokenizer(folder: Path, words: Sequence[str], template: str) -> int:
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIALS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    return len(vocabulary)


def tuning(folder: Path, seed: int, task: str, space: dict[str, Any]) -> TuneConfig:
    train = TrainConfig(
        model=str(folder / "model"),
        data=str(folder / "rows.jsonl"),
        task=task,
        output=str(folder / "search"),
        seed=seed,
    )
    return TuneConfig(train=train, space=Space.parse({"lora.r": RANKS, **space}, train), trials=8, slots=8)


def late(folder: Path, seed: int, space: dict[str, Any], shuffle: bool = False) -> TuneConfig:
    size = tokenizer(folder / "model", [*FILL, *(key for keys in KEYS.values() for key in keys)], "[CLS] $A [SEP]")
    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=size, max_position_embeddings=64, **shape)).save_pretrained(folder / "model")
    source, rows = random.Random(seed), []
    for number in range(600):
        label = "abc"[number % 3]
        words = [source.choice(FILL) for _ in range(source.randint(4, 12))]
        words.insert(source.randrange(len(words) + 1), source.choice(KEYS[label]))
        rows.append({"text": " ".join(words), "label": label})
    if shuffle:
        labels = [row["label"] for row in rows]
        source.shuffle(labels)
        rows = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
    source.shuffle(rows)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tuning(folder, seed, "seq-cls", space)


def smooth(folder: Path, seed: int) -> TuneConfig:
    size = tokenizer(folder / "model", FILL, "[CLS] $A")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    source, rows = random.Random(seed), []
    for _ in range(600):
        at, words = source.randrange(12), []
        for _ in range(source.randint(6, 14)):
            words.append(FILL[at])
            at = (at + source.choice([1, 1, 1, 5])) % 12
        rows.append({"text": " ".join(words)})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tuning(folder, seed, "causal-lm", {"train.learning_rate": [0.001, 0.005]})


if __name__ == "__main__":
    main()
