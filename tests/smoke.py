"""What an installed loraloom can do, tried in a minute on a model made on the spot: ``python tests/smoke.py``.

For whoever has just installed it (``make check``) and for a wheel before it is published (``make wheel``). Needs no
test dependency, and calls the command line as a user would.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = {"good": ("good", "fine", "lovely", "great"), "bad": ("bad", "poor", "awful", "weak")}
OTHERS = ("the", "film", "was", "a", "book", "and", "it")
SPECIALS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def make_model(folder: Path) -> None:
    """A BERT of two layers with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = [*SPECIALS.values(), *WORDS["good"], *WORDS["bad"], *OTHERS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = [(word, words.index(word)) for word in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pair)
    PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIALS).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, initializer_range=0.1, **sizes)
    BertModel(config).save_pretrained(folder)


def make_rows(path: Path, count: int) -> None:
    """Sentences, each with one word that decides its class."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            label = "good" if number % 2 else "bad"
            text = " ".join([*draw.sample(OTHERS, 4), draw.choice(WORDS[label])])
            file.write(json.dumps({"text": text, "label": label}) + "\n")


def loraloom(*arguments: object) -> str:
    """Run one command and print what it took."""
    started = time.perf_counter()
    command = [sys.executable, "-c", "from loraloom.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    word, seconds = "FAILED" if done.returncode else "ok", time.perf_counter() - started
    print(f"{word}  loraloom {arguments[0]:<10} {seconds:5.1f} s")
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def reload(model: Path, adapter: Path) -> None:
    """The adapter trained above, on a fresh model: it says "good" of good rows, and merging changes no answer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from loraloom import PeftModel

    names = json.loads((adapter / "usage.json").read_text())["id2label"]
    id2label = {int(number): name for number, name in names.items()}
    base = AutoModelForSequenceClassification.from_pretrained(model, id2label=id2label)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    texts = ["it the film was good", "and the book was awful"]
    batch = AutoTokenizer.from_pretrained(model)(texts, return_tensors="pt")
    with torch.no_grad():
        before = adapted(**batch).logits
        after = adapted.merge_and_unload()(**batch).logits
    said = [id2label[int(i)] for i in before.argmax(-1)]
    if said != ["good", "bad"] or not torch.allclose(before, after, atol=1e-4):
        sys.exit(f"FAILED  the adapter, loaded again: said {said}, merged {after.tolist()}, before {before.tolist()}")
    print("ok  the adapter, loaded again and merged, answers as it was trained to")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, rows, output = folder / "model", folder / "rows.jsonl", folder / "run"
        make_model(model)
        make_rows(rows, 200)
        loraloom("--version")
        shared = ("--model", model, "--data", rows, "--task", "seq-cls")
        loraloom("data", rows, "--model", model, "--task", "seq-cls")
        learning = (*shared, "--target-modules", "all-linear", "--learning-rate", 0.01, "--seed", 0)
        loraloom("train", *learning, "--epochs", 4, "--output", output)
        accuracy = json.loads((output / "run.json").read_text())["result"]["accuracy"]
        if accuracy < 0.9:
            sys.exit(f"FAILED  train: accuracy {accuracy} on words that decide the class")
        loraloom("inspect", output)
        loraloom("tune", *shared, "--trials", 2, "--max-steps", 4, "--output", folder / "search")
        reload(model, output)
    print("loraloom works here")


if __name__ == "__main__":
    main()
