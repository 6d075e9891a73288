"""Small models, made from local configs, saved and loaded again through the real ``from_pretrained``."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# Read when transformers is first imported: a name that is no folder must not make a test ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: with several workers none of them waits at the end for one that has just begun."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard() -> None:
    """A shell that starts something in the background lets it ignore Ctrl-C, and all that it starts in turn."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _the_same_numbers_every_time() -> None:
    """What a test draws without a seed of its own is the same in every run: a failure can be looked at again."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(llama_folder: Path) -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(llama_folder)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 100, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits() -> Callable[..., Tensor]:
    def call(model: nn.Module, ids: Tensor, **options: object) -> Tensor:
        with torch.no_grad():
            return model(ids, **options).logits

    return call


# -- folders with a tokenizer, and data that can be learnt: for the run and the command line -----------------------

GOOD, BAD = ("good", "fine", "lovely", "great"), ("bad", "poor", "awful", "weak")
OTHERS = ("the", "film", "was", "a", "book", "with", "cat", "in", "it", "and", "say", "now", ":")


def _words(folder: Path, *, template: str, specials: dict[str, str]) -> int:
    """A fast tokenizer of whole words in ``folder``; the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*specials.values(), *GOOD, *BAD, *OTHERS]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=specials["unk_token"]))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    second = " [SEP]:1" if "[SEP]" in template else ""
    raw.post_processor = processors.TemplateProcessing(
        single=template,
        pair=f"{template} $B:1{second}",
        special_tokens=[(word, words.index(word)) for word in specials.values() if word in template],
    )
    PreTrainedTokenizerFast(tokenizer_object=raw, **specials).save_pretrained(folder)
    return len(words)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT without a head, as encoders are published."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    size = _words(folder, template="[CLS] $A [SEP]", specials=specials)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,  # words differ enough for a few steps to tell them apart
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose tokenizer has no padding token, as decoders are published."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("decoder")
    specials = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    size = _words(folder, template="<s> $A", specials=specials)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def translator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small T5: an encoder and a decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("translator")
    specials = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    size = _words(folder, template="$A </s>", specials=specials)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=size,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def _sentence(source: random.Random, word: str) -> str:
    words = [source.choice(OTHERS[:-1]) for _ in range(source.randint(1, 8))]
    words.insert(source.randrange(len(words) + 1), word)
    return " ".join(words)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows of ``text`` and ``label``: which kind of word is in it?"""
    source = random.Random(0)
    path = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    rows = [
        {"text": _sentence(source, source.choice(words)), "label": label}
        for label, words in [("praise", GOOD), ("blame", BAD)] * 100
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 rows of ``prompt`` and ``completion``: say again the one word that counts."""
    source = random.Random(1)
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    words = [source.choice(GOOD + BAD) for _ in range(100)]
    rows = [{"prompt": _sentence(source, word) + " now say :", "completion": f" {word}"} for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- small adapters in float64 on real folders, and rows as the loop takes them

LABELS = ["blame", "praise"]

Maker = Callable[..., Any]


def _maker(folder: Path, task: str) -> Maker:
    from loraloom import LoraConfig, get_peft_model
    from loraloom.models.load import load_base
    from loraloom.tasks import TASKS

    def make(dtype: str = "float64", seed: int = 0, **fields: object) -> Any:
        torch.manual_seed(0)  # a new head's numbers
        base, _ = load_base(str(folder), TASKS[task], dtype, LABELS)
        fields = {"target_modules": "all-linear", "init_lora_weights": False, "r": 4, "lora_alpha": 4, **fields}
        return get_peft_model(base, LoraConfig(task_type=TASKS[task].task_type, **fields), seed=seed)

    return make


@pytest.fixture
def classifier(encoder_folder: Path) -> Maker:
    return _maker(encoder_folder, "seq-cls")


@pytest.fixture
def decoder(decoder_folder: Path) -> Maker:
    return _maker(decoder_folder, "causal-lm")


def _examples(task: str, folder: Path, path: Path) -> list[Any]:
    from loraloom.data.read.sources import resolve
    from loraloom.data.shape.shapes import recognise
    from loraloom.data.tokenize.encode import encoder
    from loraloom.models.load import load_tokenizer
    from loraloom.tasks import TASKS

    rows = list(resolve(path)[0])
    shape = recognise(rows, TASKS[task])
    made = encoder(TASKS[task], load_tokenizer(str(folder)), max_length=64, labels=LABELS)
    return [example for one in made.encode([(row, shape.read(row)) for row in rows]) for example in one.examples]


@pytest.fixture(scope="session")
def classes(encoder_folder: Path, reviews: Path) -> list[Any]:
    return _examples("seq-cls", encoder_folder, reviews)


@pytest.fixture(scope="session")
def completions(decoder_folder: Path, chats: Path) -> list[Any]:
    return _examples("causal-lm", decoder_folder, chats)
