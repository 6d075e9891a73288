"""From a folder or name to a model and its tokenizer, and which of its modules came without weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from loraloom.config import TaskType
from loraloom.errors import ConfigError, ModelError


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or name, with a padding token.

    Raises:
        ModelError: no such folder, no tokenizer in it, or one that cannot be used.
    """
    from transformers import AutoTokenizer

    _check_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ModelError(f"{_where(name)}: its tokenizer cannot be loaded ({_first_line(error)})") from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # What transformers makes up for a folder without a tokenizer: every text would be unknown tokens.
        raise ModelError(f"{name}: holds no tokenizer, only special tokens; copy tokenizer.json into it")
    if tokenizer.pad_token_id is None:
        # Padding is masked out, so any token does; the end token is there in every model that lacks a pad token.
        if tokenizer.eos_token is None:
            raise ModelError(f"{name}: its tokenizer has neither a pad nor an end-of-text token; set pad_token in it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokens_at_most(config: Any) -> int | None:
    """How many tokens a model reads at once, by its config; None where that sets no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    # RoBERTa's family counts positions from the padding token's number on.
    shifted = ("roberta", "camembert", "mpnet", "longformer", "xlm-roberta", "data2vec-text", "xmod", "ernie_m", "luke")
    offset = (getattr(config, "pad_token_id", None) or 0) + 1
    return limit - offset if any(word in config.model_type for word in shifted) else limit


def load_limit(name: str) -> int | None:
    """``tokens_at_most`` of a folder or name, from its config alone."""
    from transformers import AutoConfig

    _check_folder(name)
    try:
        return tokens_at_most(AutoConfig.from_pretrained(name))
    except Exception as error:
        raise ModelError(f"{_where(name)}: its config cannot be read ({_first_line(error)})") from None


def length_within(limit: int | None, wanted: int | None, name: str) -> int:
    """``max_length`` for a model that reads ``limit`` tokens: ``wanted``, or by default at most 512.

    Raises:
        ConfigError: more are wanted than the model reads.
    """
    if wanted is None:
        return min(512, limit or 512)
    if limit is not None and wanted > limit:
        raise ConfigError(f"max_length: {name} reads at most {limit} tokens, found {wanted}")
    return wanted


def load_base(name: str, task: TaskType, dtype: str, labels: Sequence[str] = ()) -> tuple[nn.Module, list[str]]:
    """The model for ``task`` in ``dtype``, and the modules whose weights the folder lacks (a new head, say).

    Raises:
        ModelError: no such folder, no model in it, a damaged file, or no architecture for the task.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    _check_folder(name)
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # a head for other labels makes way for a new one; see _check_new
    }
    if task is TaskType.SEQ_CLS:
        auto: Any = AutoModelForSequenceClassification
        options |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }
    else:
        auto = AutoModelForCausalLM
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = auto.from_pretrained(name, **options)
    except Exception as error:
        raise _unloadable(name, task, error) from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    new = {*info["missing_keys"], *mismatched}
    _check_new(name, model, task, new, mismatched)
    if model.config.pad_token_id is None and task is TaskType.SEQ_CLS:
        model.config.pad_token_id = load_tokenizer(name).pad_token_id  # decoders find the last real token by it
    return model, sorted({key.rpartition(".")[0] for key in new})


def _check_new(name: str, model: Any, task: TaskType, new: set[str], mismatched: set[str]) -> None:
    """A new head is what fine-tuning is for. Anything else without weights is a folder that is not whole."""
    _check_direction(name, model.config, task)
    inside = f"{model.base_model_prefix}."
    head = {key for key in new if task is TaskType.SEQ_CLS and not key.startswith(inside)}
    # Many encoders are published without their pooler, which only a classifier reads.
    head |= {key for key in new - mismatched if task is TaskType.SEQ_CLS and ".pooler." in key}
    lost = sorted(new - head)
    if lost:
        what = "are of another size in its file" if lost[0] in mismatched else "are not in its file"
        raise ModelError(
            f"{name}: {len(lost)} weights {what}, such as {lost[0]}; is the folder copied whole, and does its "
            "config.json belong to its weights?"
        )


def _check_direction(name: str, config: Any, task: TaskType) -> None:
    # An encoder's language head would see the tokens that it is to predict.
    if task is TaskType.CAUSAL_LM and getattr(config, "is_decoder", None) is False:
        raise ModelError(
            f"{name}: {config.model_type} reads a text in both directions, so it cannot learn causal-lm; "
            "choose a decoder, or the task seq-cls"
        )


def build_empty(name: str, task: TaskType, labels: int = 2) -> nn.Module:
    """The model without its weights (on the meta device), for planning: needs the folder's config alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    _check_folder(name)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(name)
        auto: Any = AutoModelForCausalLM
        if task is TaskType.SEQ_CLS:
            auto, config.num_labels = AutoModelForSequenceClassification, labels
            if config.pad_token_id is None:
                config.pad_token_id = 0  # decoders find the last real token by it
        with torch.device("meta"):
            model: nn.Module = auto.from_config(config)
    except Exception as error:
        raise ModelError(
            f"{_where(name)}: its config gives no model for {_words(task)} ({_first_line(error)})"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    _check_direction(name, model.config, task)
    return model


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
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such folder")


def _unloadable(name: str, task: TaskType, error: Exception) -> ModelError:
    for path in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as damage:
            return ModelError(f"{path}: cut off or damaged ({_first_line(damage)}); copy it again")
    return ModelError(f"{_where(name)}: cannot be loaded as a model for {_words(task)} ({_first_line(error)})")


def _where(name: str) -> str:
    return name if Path(name).exists() else f"{name} (no folder of this name is here, so it was looked for on the hub)"


def _words(task: TaskType) -> str:
    return task.value.lower().replace("_", "-")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
