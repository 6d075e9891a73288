"""Load a model and its tokenizer from a folder or hub name, and report which of its modules have no weights there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from loraloom.errors import ConfigError, ModelError, first_line, some
from loraloom.files import network
from loraloom.files.log import Log, info
from loraloom.files.quiet import quiet
from loraloom.models.configs import ask, field, has_decoder_and_encoder, set_token, token, tokens_at_most
from loraloom.models.given import find
from loraloom.models.labels import SHOWN, in_order, known_labels
from loraloom.models.parts import auto_class, one_way, reads, reads_both_ways, why_none
from loraloom.models.task import ModelTask


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a folder or name, with a padding token.

    Raises:
        ModelError: no such folder, no tokenizer in it, or one that cannot be used.
    """
    tokenizer = given.tokenizer if (given := find(name)) else _read_tokenizer(name, revision)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # transformers makes this up for a folder without a tokenizer: every text would be unknown tokens.
        raise ModelError(f"{name}: holds no tokenizer, only special tokens; copy tokenizer.json into it")
    if tokenizer.pad_token_id is None:
        # Padding is masked, so any token works; models without a pad token have an end token.
        if tokenizer.eos_token is None:
            raise ModelError(f"{name}: its tokenizer has neither a pad nor an end-of-text token; set pad_token in it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_tokenizer(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    _check_folder(name, revision)
    try:
        return AutoTokenizer.from_pretrained(name, **_source(name, revision))
    except Exception as error:
        raise ModelError(f"{_where(name)}: its tokenizer cannot be loaded ({_reason(error)})") from None


def load_config(name: str, revision: str | None = None) -> Any:
    """The config of a folder or name.

    Raises:
        ModelError: the config is missing or cannot be read.
    """
    from transformers import AutoConfig

    if given := find(name):
        return given.model.config
    _check_folder(name, revision)
    try:
        return AutoConfig.from_pretrained(name, **_source(name, revision))
    except Exception as error:
        raise ModelError(f"{_where(name)}: its config cannot be read ({_reason(error)})") from None


def load_limit(name: str, revision: str | None = None) -> int | None:
    """``tokens_at_most`` of a folder or name, from its config only."""
    return tokens_at_most(load_config(name, revision))


def length_within(limit: int | None, wanted: int | None, name: str) -> int:
    """``max_length`` for a model with a maximum of ``limit`` tokens: ``wanted``, or by default at most 512.

    Raises:
        ConfigError: ``wanted`` exceeds the model's maximum.
    """
    if wanted is None:
        return min(512, limit or 512)
    if limit is not None and wanted > limit:
        raise ConfigError(f"max_length: {name} reads at most {limit} tokens, found {wanted}")
    return wanted


def load_base(
    name: str,
    task: ModelTask,
    dtype: str,
    labels: Sequence[str] = (),
    problem_type: str | None = None,
    *,
    revision: str | None = None,
    attn_implementation: str | None = None,
    tokenizer: Any = None,
    log: Log = info,
) -> tuple[nn.Module, list[str]]:
    """The model for ``task`` in ``dtype``, and the modules whose weights the folder lacks (such as a new head).

    Args:
        labels: the classes or tags by number, empty for regression. A head in the folder is kept if it has the same
            names in the same order, and replaced by a new one otherwise.
        problem_type: the kind of label of seq-cls, by default a single class.
        tokenizer: its padding token is set in the config; by default it is loaded if the task needs it.
        log: receives changes that the user should know.

    Raises:
        ModelError: no such folder, no model in it, a damaged file, or no architecture for the task.
    """
    from transformers.utils import logging

    if given := find(name):
        _check_direction(name, given.model.config, task)
        given.check(task.auto_class, task.head(labels, problem_type).get("num_labels"), bare=task.bare)
        return given.model, []
    _check_folder(name, revision)
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # a head for other labels is replaced by a new one; see _check_new
        **_source(name, revision),
        **({"attn_implementation": attn_implementation} if attn_implementation else {}),
        **task.head(labels, problem_type),
    }
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet("transformers"):
            config = load_config(name, revision)
            _check_direction(name, config, task)
            if mapping := task.key_mapping(config):
                options["key_mapping"] = mapping
            model, info = _auto(name, config, task).from_pretrained(name, **options)
    except ModelError:
        raise
    except Exception as error:
        raise _unloadable(name, task, error) from None
    finally:
        if bars:
            logging.enable_progress_bar()
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    new = {*info["missing_keys"], *mismatched}
    _check_new(name, model, task, new, mismatched)
    if task.class_word:
        new |= _own_head(name, model, config, labels, new, mismatched, log)
    if task.one_way and one_way(model):
        log(f"{config.model_type} reads the text beside an image in both directions; here text is read in one")
    if tokenizer is None and task.by_last_token and not reads_both_ways(config):
        tokenizer = load_tokenizer(name, revision)
    if tokenizer is not None:
        _same_ends(name, model, task, tokenizer, log)
    return model, sorted({key.rpartition(".")[0] for key in new}) if task.new_head else []


def _auto(name: str, config: Any, task: ModelTask) -> Any:
    """The class of transformers that loads a model with this config for ``task``.

    Raises:
        ModelError: there is none.
    """
    import transformers

    found = auto_class(config, task.auto_class)
    if found is None:
        raise ModelError(f"{_where(name)}: {why_none(config, task.name)}")
    return getattr(transformers, found)


def _same_ends(name: str, model: nn.Module, task: ModelTask, tokenizer: Any, log: Log) -> None:
    """Set the tokenizer's padding token in the config: a decoder finds a row's last token by it.

    Encoder-decoder models find it by the end token.
    """
    config: Any = model.config
    both = has_decoder_and_encoder(config)
    if both and ask(config, "decoder_start_token_id") is None:
        start = field(field(model, "generation_config"), "decoder_start_token_id")
        config.decoder_start_token_id = tokenizer.pad_token_id if start is None else start  # T5's default
    by_end = both and task.by_last_token and "gemma" not in config.model_type
    if by_end and tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ModelError(
            f"{name}: its tokenizer pads with the end token ({tokenizer.eos_token!r}), by which {config.model_type} "
            "finds where a text ends; set another pad_token in it"
        )
    for which in ("pad", "eos") if by_end else ("pad",):
        mine, theirs = getattr(tokenizer, f"{which}_token_id"), token(config, which)
        if mine is None or not set_token(config, which, mine) or theirs is None or not task.by_last_token:
            continue
        if theirs != mine and not reads_both_ways(config):
            what = "pads with" if which == "pad" else "ends a text with"
            log(
                f"the config of {name} {what} token {theirs}, its tokenizer with {mine} "
                f"({getattr(tokenizer, f'{which}_token')!r}); the tokenizer's is used"
            )


def _own_head(
    name: str, model: Any, config: Any, labels: Sequence[str], new: set[str], mismatched: set[str], log: Log
) -> set[str]:
    """If the folder's head has other classes, reinitialise the parameters that they shape. Returns their names."""
    inside = f"{model.base_model_prefix}."
    there = {key for key, _ in model.named_parameters() if not key.startswith(inside)} - new
    if not labels or in_order(labels, config) or not (there or mismatched):
        return set()
    found = there & set(_by_labels(model)) if there else set()
    for key in found:
        parameter = model.get_parameter(key)
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(0.0, float(ask(config, "initializer_range", 0.02)))
            else:
                parameter.zero_()
    if found or mismatched:
        classes = some(known_labels(config), SHOWN)
        log(f"{name} has a head for other classes ({classes}): a new one is trained in its place")
    return found


def _by_labels(model: Any) -> list[str]:
    """The parameters whose shape depends on the number of classes."""
    config = copy.deepcopy(model.config)
    config.num_labels = model.config.num_labels + 1
    with torch.device("meta"):
        other = type(model)(config)
    shapes = {key: parameter.shape for key, parameter in other.named_parameters()}
    return [key for key, parameter in model.named_parameters() if shapes.get(key, parameter.shape) != parameter.shape]


def _source(name: str, revision: str | None) -> dict[str, Any]:
    """Arguments that make transformers look for ``name`` only in its cache if the hub cannot be reached."""
    here = {"local_files_only": True} if not Path(name).exists() and network.unreachable() else {}
    return here | ({"revision": revision} if revision else {})


def _check_new(name: str, model: Any, task: ModelTask, new: set[str], mismatched: set[str]) -> None:
    """A new head is expected in fine-tuning. Any other module without weights means an incomplete folder."""
    inside = f"{model.base_model_prefix}."
    head = {key for key in new if task.new_head and not key.startswith(inside)}
    # Many encoders are published without their pooler, which only a classifier uses.
    head |= {key for key in new - mismatched if task.without_pooler and ".pooler." in f".{key}"}
    lost = sorted(new - head)
    if lost:
        what = "are of another size in its file" if lost[0] in mismatched else "are not in its file"
        raise ModelError(
            f"{name}: {len(lost)} weights {what}, such as {lost[0]}; is the folder copied whole, and does its "
            "config.json belong to its weights?"
        )


def _check_direction(name: str, config: Any, task: ModelTask) -> None:
    both = has_decoder_and_encoder(config)
    if both and reads(config) != "text":
        raise ModelError(f"{name}: {why_none(config, task.name)}")
    task.check_model(name, config)


def build_empty(
    name: str, task: ModelTask, labels: int = 2, problem_type: str | None = None, *, revision: str | None = None
) -> nn.Module:
    """The model without its weights (on the meta device), for planning: needs only the folder's config."""
    if given := find(name):
        return given.empty()
    config = load_config(name, revision)
    try:
        _check_direction(name, config, task)
        if task.new_head:
            config.num_labels = task.head([""] * labels, problem_type)["num_labels"]
            if token(config, "pad") is None:
                set_token(config, "pad", 0)  # decoders find the last real token by it
        with quiet("transformers"), torch.device("meta"):
            model: nn.Module = _auto(name, config, task).from_config(config)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{_where(name)}: its config gives no model for {task.name} ({_reason(error)})") from None
    return model


def _check_folder(name: str, revision: str | None) -> None:
    """Report errors of a local path before a library treats it as a hub name."""
    path = Path(name)
    if not name.strip():
        raise ConfigError(f"model: must be a path or a name, found {name!r}")
    if revision is not None and path.is_dir():
        raise ConfigError(f"revision: {name} is a folder, which has no revisions, found {revision!r}; leave it out")
    if path.is_file():
        raise ModelError(f"{name}: is a file; a model is a folder with config.json and model.safetensors")
    if path.is_dir():
        if not (path / "config.json").is_file():
            adapter = (path / "adapter_config.json").is_file()
            hint = "; it is an adapter: give the model that it was trained on" if adapter else ""
            raise ModelError(f"{name}: holds no config.json, so it is no model{hint}")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such folder")


def _unloadable(name: str, task: ModelTask, error: Exception) -> ModelError:
    for path in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as damage:
            return ModelError(f"{path}: cut off or damaged ({_reason(damage)}); copy it again")
    return ModelError(f"{_where(name)}: cannot be loaded as a model for {task.name} ({_reason(error)})")


def _where(name: str) -> str:
    if Path(name).exists():
        return name
    away = network.unreachable()
    return f"{name} (no folder of this name is here, so it was looked for on the hub{f', but {away}' if away else ''})"


def _reason(error: Exception) -> str:
    if str(error).startswith("We couldn't connect to"):
        return "nor is it in the hub's cache; check the name, and the network"
    return first_line(error)
