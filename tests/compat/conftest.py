"""Eleven small model families and the settings of an adapter, for the comparison with ``peft`` itself.

Knows how to build each family from a local config, feed it, and what the settings are called on it. Every model is
saved once and loaded again through the real ``from_pretrained``. Knows nothing of either library beyond its name.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT asks the hub when it saves

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 64, "max_position_embeddings": 32, "initializer_range": 0.2, "bos_token_id": 2, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LABELS = 3
#: task_type → the transformers class that makes its model; None is image classification, for which there is no task.
AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
    None: "AutoModelForImageClassification",
}


@dataclass
class Family:
    """One architecture: its config, its usual task and the names of its parts."""

    config: str
    fields: dict[str, Any]
    task: str | None
    targets: list[str]
    layers: str
    saved: list[str]
    embedding: str | None = None
    preset: bool = True
    tied: bool = False
    root: Path = Path()
    folders: dict[str | None, Path] = field(default_factory=dict)

    def load(self, task: str | None = "", dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh model for ``task`` (the usual one by default) with random weights, always the same, in eval mode."""
        import transformers

        task = self.task if task == "" else task
        auto = getattr(transformers, AUTO[task])
        if task not in self.folders:
            torch.manual_seed(0)
            labels = 2 if task == "QUESTION_ANS" else LABELS  # a start and an end
            config = getattr(transformers, self.config)(**self.fields, num_labels=labels)
            model = auto.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():  # biases and norms start at 0 and 1, where mistakes would hide
                    parameter.add_(0.05 * torch.randn_like(parameter))
            self.folders[task] = self.root / str(task)
            model.save_pretrained(self.folders[task])
        return auto.from_pretrained(self.folders[task], dtype=dtype).eval()

    def batch(self, seed: int, task: str | None = "", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Inputs and labels of one batch. Text is padded on the right, with padding tokens under the mask."""
        task = self.task if task == "" else task
        make = torch.Generator().manual_seed(seed)
        classes = torch.randint(0, LABELS, (3,), generator=make)
        if task is None:
            pixels = torch.randn(3, 3, 16, 16, generator=make, dtype=torch.float64)
            return {"pixel_values": pixels.to(dtype), "labels": classes}
        padding = self.fields.get("pad_token_id", 0)
        ids = torch.randint(4, 64, (3, 7), generator=make)
        mask = torch.ones_like(ids)
        mask[1, 5:], ids[1, 5:] = 0, padding
        batch = {"input_ids": ids, "attention_mask": mask}
        if task == "CAUSAL_LM":
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        elif task == "SEQ_CLS":
            batch["labels"] = classes
        elif task == "TOKEN_CLS":
            batch["labels"] = torch.randint(0, LABELS, (3, 7), generator=make)
        elif task == "QUESTION_ANS":
            batch["start_positions"], batch["end_positions"] = classes, classes + 1
        elif task == "SEQ_2_SEQ_LM":
            batch["labels"] = torch.randint(4, 64, (3, 5), generator=make)
        elif self.config == "T5Config":
            batch["decoder_input_ids"] = torch.randint(4, 64, (3, 5), generator=make)
        return batch


def _text(config: str, task: str, targets: str, layers: str, saved: list[str], embedding: str, **more: Any) -> Family:
    own = {key: more.pop(key) for key in ("preset", "tied") if key in more}
    fields = {**TINY, **TEXT, "pad_token_id": 0, **more}
    return Family(config, fields, task, targets.split(), layers, saved, embedding, **own)


def _families() -> dict[str, Family]:
    causal, classes = "CAUSAL_LM", "SEQ_CLS"
    qv, norm, words = "q_proj v_proj", "LayerNorm", "word_embeddings"
    gpt2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    opt = {"ffn_dim": 64, "word_embed_proj_dim": 16, "dropout": 0.0, "init_std": 0.2, "pad_token_id": 1}
    distil = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
    t5 = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }
    vit = {**TINY, **NO_DROPOUT, "image_size": 16, "patch_size": 4, "initializer_range": 0.2}
    resnet = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    return {
        "llama": _text("LlamaConfig", causal, qv, "layers", ["lm_head"], "embed_tokens", num_key_value_heads=2),
        "qwen2": _text("Qwen2Config", causal, qv, "layers", ["model.norm"], "embed_tokens", num_key_value_heads=2,
                       tie_word_embeddings=True, tied=True),
        "gpt2": _text("GPT2Config", causal, "c_attn c_proj", "h", ["ln_f"], "wte", tied=True, **gpt2),
        "opt": _text("OPTConfig", causal, qv, "layers", ["decoder.final_layer_norm"], "embed_tokens", tied=True, **opt),
        "gpt_neox": _text("GPTNeoXConfig", causal, "query_key_value dense", "layers", ["lm_head"], "embed_in"),
        "bert": _text("BertConfig", classes, "query value", "layer", [norm], words, **NO_DROPOUT),
        "roberta": _text("RobertaConfig", classes, "query value", "layer", [norm], words,
                         **NO_DROPOUT, pad_token_id=1),
        "distilbert": _text("DistilBertConfig", classes, "q_lin v_lin", "layer", ["pre_classifier"], words,
                            preset=False, seq_classif_dropout=0.0, **distil),
        "t5": _text("T5Config", "SEQ_2_SEQ_LM", "q v", "block", ["final_layer_norm"], "embed_tokens", tied=True, **t5),
        "vit": Family("ViTConfig", vit, None, qv.split(), "layers", ["classifier", "layernorm"], "projection",
                      preset=False),
        "resnet": Family("ResNetConfig", resnet, None, ["convolution"], "stages",
                         ["classifier", "embedder.normalization"], preset=False),
    }  # fmt: skip


FAMILIES = _families()


def _knobs(family: Family) -> dict[str, dict[str, Any]]:
    """Name → the fields that differ from a plain adapter on this family's usual targets."""
    first, last, at = family.targets[0], family.targets[-1], family.layers
    either = "|".join(family.targets)
    knobs: dict[str, dict[str, Any]] = {
        "plain": {},
        "rslora": {"use_rslora": True, "lora_alpha": 3},
        "patterns": {
            "rank_pattern": {rf"{at}\.0\..*": 2, rf"{at}\.1\..*{first}": 6},
            "alpha_pattern": {rf"{at}\.1\..*{last}": 5},
        },
        "all-linear": {"target_modules": "all-linear"},
        "regular expression": {"target_modules": rf".*\.{at}\.1\..*({either})"},
        "biases all": {"bias": "all"},
        "biases of targets": {"bias": "lora_only"},
        "module to save": {"modules_to_save": family.saved},
        "one layer": {"layers_to_transform": 1},
        "layers by name": {"layers_to_transform": [0], "layers_pattern": at},
        "excluded names": {"target_modules": "all-linear", "exclude_modules": [last]},
        "excluded by expression": {"exclude_modules": rf".*\.{at}\.0\..*"},
        "gaussian": {"init_lora_weights": "gaussian"},
        "random": {"init_lora_weights": False},
        "dropout": {"lora_dropout": 0.5},
    }
    if family.embedding:  # ViT's is a convolution
        knobs["embedding"] = {"target_modules": [*family.targets, family.embedding]}
    if family.preset:
        knobs["preset"] = {"target_modules": None}
    if first == "convolution":
        knobs["all-linear"]["modules_to_save"] = []  # the only linear layer is the head
        knobs["excluded names"] = {"exclude_modules": ["shortcut.convolution"]}
    if family.task is None:
        for fields in knobs.values():
            fields.setdefault("modules_to_save", ["classifier"])
    return knobs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every family, and with ``fields`` every knob on it; a module narrows the knobs with ``KNOBS``."""
    wanted = getattr(metafunc.module, "KNOBS", None)
    if "fields" in metafunc.fixturenames:
        pairs = [(f, k) for f in FAMILIES for k in _knobs(FAMILIES[f]) if wanted is None or k in wanted]
        metafunc.parametrize(("family", "fields"), pairs, indirect=True, ids=[f"{f}-{k}" for f, k in pairs])
    elif "family" in metafunc.fixturenames and not any(
        "family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    ):
        metafunc.parametrize("family", list(FAMILIES), indirect=True)


@pytest.fixture(scope="session")
def _models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def family(request: pytest.FixtureRequest, _models: Path) -> Family:
    found = FAMILIES[request.param]
    found.root = _models / request.param
    return found


@pytest.fixture
def fields(request: pytest.FixtureRequest, family: Family) -> dict[str, Any]:
    """The keyword arguments of a ``LoraConfig``, the same for both libraries."""
    plain = {"r": 4, "lora_alpha": 8, "target_modules": family.targets, "task_type": family.task}
    return copy.deepcopy({**plain, **_knobs(family)[request.param]})


@dataclass
class Library:
    """``loraloom`` or ``peft``, through the names that they share."""

    module: ModuleType

    def __str__(self) -> str:
        return self.module.__name__

    def create(self, base: nn.Module, fields: dict[str, Any]) -> Any:
        """A model with a new adapter, every trainable tensor of which is random and not zero."""
        model = self.module.get_peft_model(base, self.module.LoraConfig(**copy.deepcopy(fields))).eval()
        mine = {tensor.data_ptr() for tensor in self.tensors(model).values()}
        make = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad and parameter.data_ptr() in mine:
                    noise = torch.randn(parameter.shape, generator=make, dtype=torch.float64)
                    parameter.add_((0.1 * noise).to(parameter.dtype))
        return model

    def open(self, base: nn.Module, folder: Path, is_trainable: bool = False) -> Any:
        return self.module.PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable).eval()

    def tensors(self, model: Any) -> dict[str, Tensor]:
        """The adapter's tensors under their keys in the file, without copies of the base's embeddings."""
        options = {"save_embedding_layers": False} if str(self) == "peft" else {}
        found: dict[str, Tensor] = self.module.get_peft_model_state_dict(model, **options)
        return found


LIBRARIES = ("loraloom", "peft")


@pytest.fixture(params=LIBRARIES, ids=lambda name: f"{name} writes")
def writer(request: pytest.FixtureRequest) -> Library:
    return Library(importlib.import_module(request.param))


@pytest.fixture
def reader(writer: Library) -> Library:
    """The library that did not write."""
    (other,) = set(LIBRARIES) - {str(writer)}
    return Library(importlib.import_module(other))


@pytest.fixture
def libraries() -> tuple[Library, Library]:
    ours, theirs = (Library(importlib.import_module(name)) for name in LIBRARIES)
    return ours, theirs


@pytest.fixture(scope="session")
def outputs() -> Callable[..., Tensor]:
    """What a model answers, as one tensor."""

    def call(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            out = model(**batch)
        if isinstance(out, Tensor):
            return out
        names = ("logits",) if "logits" in out else ("start_logits", "end_logits", "last_hidden_state")
        return torch.cat([out[name].flatten() for name in names if name in out])

    return call
