"""From a folder or name to a model and its tokenizer, and which of its modules came without weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraloom.config import TaskType
from loraloom.errors import ModelError


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    _check_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ModelError(f"{name}: its tokenizer cannot be loaded ({_first_line(error)})") from None
    if tokenizer.pad_token_id is None:
        # Padding is masked out, so any token does; the end token is there in every model that lacks a pad token.
        if tokenizer.eos_token is None:
            raise ModelError(f"{name}: its tokenizer has neither a pad nor an end-of-text token; set pad_token in it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(name: str, task: TaskType, dtype: str, labels: Sequence[str] = ()) -> tuple[nn.Module, list[str]]:
    """The model for ``task`` in ``dtype``, and the modules whose weights the folder lacks (a new head, say).

    Raises:
        ModelError: no such folder, no model in it, a damaged file, or no architecture for the task.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    _check_folder(name)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    if task is TaskType.SEQ_CLS:
        auto: Any = AutoModelForSequenceClassification
        options |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "single_label_classification",
            "ignore_mismatched_sizes": True,  # a head for other labels makes way for a new one
        }
    else:
        auto = AutoModelForCausalLM
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = auto.from_pretrained(name, **options)
    except Exception as error:
        raise ModelError(f"{name}: cannot be loaded as a model for {task.value} ({_first_line(error)})") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    new = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    if model.config.pad_token_id is None and task is TaskType.SEQ_CLS:
        model.config.pad_token_id = load_tokenizer(name).pad_token_id  # decoders find the last real token by it
    return model, sorted({key.rpartition(".")[0] for key in new})


def build_empty(name: str, task: TaskType, labels: int = 2) -> nn.Module:
    """The model without its weights (on the meta device), for planning: needs the folder's config alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    _check_folder(name)
    try:
        config = AutoConfig.from_pretrained(name)
        auto: Any = AutoModelForCausalLM
        if task is TaskType.SEQ_CLS:
            auto, config.num_labels = AutoModelForSequenceClassification, labels
        with torch.device("meta"):
            model: nn.Module = auto.from_config(config)
        return model
    except Exception as error:
        raise ModelError(f"{name}: its config gives no model for {task.value} ({_first_line(error)})") from None


def _check_folder(name: str) -> None:
    """Say what is wrong with a local path before a library takes it for a hub name."""
    path = Path(name)
    if path.is_file():
        raise ModelError(f"{name}: is a file; a model is a folder with config.json and model.safetensors")
    if path.is_dir():
        if not (path / "config.json").is_file():
            adapter = (path / "adapter_config.json").is_file()
            hint = "; it is an adapter: give the model that it was trained on" if adapter else ""
            raise ModelError(f"{name}: holds no config.json, so it is no model{hint}")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or os.environ.get("HF_HUB_OFFLINE") == "1":
        raise ModelError(f"{name}: no such folder")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
