"""PEFT's adapter folder: read, verify, write. safetensors and JSON alone, no pickle, no network.

Reading is one direction: folder → tensors under PEFT's keys → checked against the plan → slots. Nothing of the model
changes before every tensor was checked.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.config import CONFIG_NAME, LoraConfig
from loraloom.errors import AdapterError, ConfigError, nearest
from loraloom.lora.adapters import PREFIX, LoraModel, file_key
from loraloom.lora.atomic import Contents, recover, write_files

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"


@dataclass
class LoadReport:
    """What became of each tensor of a file. Keys are PEFT's."""

    used: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    #: key → (dtype in the file, dtype in the model)
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)
    #: key in the file → key that it was read as
    renamed: dict[str, str] = field(default_factory=dict)
    #: repeats of other tensors and of the base's biases, which PEFT writes for bias="all"; left out
    repeated: list[str] = field(default_factory=list)
    #: embeddings of the base that the file carries along and that were put into the base, as PEFT does
    base_replaced: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    # PEFT's names for the two lists.
    @property
    def missing_keys(self) -> list[str]:
        return self.missing

    @property
    def unexpected_keys(self) -> list[str]:
        return self.unexpected

    def __str__(self) -> str:
        parts = [f"{len(self.used)} tensors used"]
        for words, entries in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("converted to another dtype", self.dtypes),
            ("renamed", self.renamed),
            ("repeated", self.repeated),
            ("put into the base", self.base_replaced),
        ):
            if entries:
                parts.append(f"{len(entries)} {words}")
        return ", ".join(parts)


# -- write ------------------------------------------------------------------------------------------------------------


def save(
    model: LoraModel,
    folder: str | Path,
    adapters: Sequence[str] | None = None,
    gathered: Mapping[int, Tensor] | None = None,
) -> None:
    """Write adapters (all by default) into ``folder`` as PEFT lays them out, in one atomic step.

    ``gathered``: id of a live tensor → what to write for it.
    """
    write_files(folder, files_of(model, adapters, gathered))


def files_of(
    model: LoraModel, adapters: Sequence[str] | None = None, gathered: Mapping[int, Tensor] | None = None
) -> dict[str, Contents]:
    """What ``save`` writes, for who writes more beside it in the same step."""
    files: dict[str, Contents] = {}
    for name in model.peft_config if adapters is None else adapters:
        place = "" if name == "default" else f"{name}/"
        tensors = model.tensors_of(name)
        if gathered is not None:
            if lost := [key for key, tensor in tensors.items() if id(tensor) not in gathered]:
                raise AdapterError(f"state_dict: it lacks {lost[0]}{_more(lost)}; pass a whole one or none")
            tensors = {key: gathered[id(tensor)] for key, tensor in tensors.items()}
        files[place + WEIGHTS_NAME] = partial(write_tensors, tensors)
        config = model.peft_config[name].copy(inference_mode=True)
        if config.task_type is None:  # what PEFT needs to find the base by itself
            base = type(model.model)
            config = config.copy(auto_mapping={"base_model_class": base.__name__, "parent_library": base.__module__})
        files[place + CONFIG_NAME] = config.to_json().encode()
    return files


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Straight from the tensors to the file. Sorted and unshared: the same adapter gives the same bytes."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its own class for what the system said
        raise OSError(None, str(error), str(path)) from None


# -- read -------------------------------------------------------------------------------------------------------------


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, under the keys of the file.

    Raises:
        AdapterError: no folder, no adapter in it, a pickled one, or a file that is cut off or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(
            f"{folder}: no such folder. loraloom reads adapters from disk alone; fetch one from a hub first "
            "(for example with `hf download NAME --local-dir FOLDER`)"
        )
    recover(folder)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if (folder / PICKLED_NAME).exists():
            raise AdapterError(
                f"{folder / PICKLED_NAME}: a pickled adapter can run code when it is loaded, so loraloom does not "
                "read it. Convert it once where you trust it: tensors = torch.load(path, weights_only=True); "
                f"safetensors.torch.save_file(tensors, {WEIGHTS_NAME!r})"
            )
        inside = sorted(p.parent.name for p in folder.glob(f"*/{WEIGHTS_NAME}"))
        hint = f"; there are adapters below it: {', '.join(inside)}" if inside else ""
        raise AdapterError(f"{folder}: holds no {WEIGHTS_NAME}{hint}")
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except SafetensorError as error:
        raise AdapterError(f"{path}: cut off or damaged ({error}); copy it again") from None
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror})") from None


def load(
    model: LoraModel,
    folder: str | Path,
    adapter_name: str,
    *,
    config: LoraConfig | None = None,
    is_trainable: bool = False,
    strict: bool = True,
    autocast_adapter_dtype: bool = True,
    key_mapping: Mapping[str, str] | None = None,
) -> LoadReport:
    """Put the adapter of ``folder`` on ``model`` as ``adapter_name``, after checking all of it."""
    tensors = read_tensors(folder)
    config = LoraConfig.from_pretrained(folder) if config is None else config
    config = config.copy(inference_mode=not is_trainable)
    report = LoadReport()
    renamed = _normalise(tensors, report, key_mapping or {})
    base = _take_base_tensors(model, renamed, config)
    new = adapter_name not in model.peft_config
    if new:
        model.add_adapter(
            adapter_name,
            config,
            strict=False,  # every tensor is checked below, which says more than the patterns do
            autocast_adapter_dtype=autocast_adapter_dtype,
            tensors=renamed,
        )
    else:
        model.check_same(adapter_name, config, f"{folder}: ")
    try:
        _check_base(model, base, f"{folder}: ")
        _fill(model, adapter_name, renamed, report, strict=strict, source=f"{folder}: ")
        for key, (live, tensor) in base.items():
            if not torch.equal(live.detach(), tensor.to(live)):
                live.data.copy_(tensor)
                report.base_replaced.append(key)
            report.used.append(key)
    except BaseException:  # Ctrl-C among them
        if new:
            model.delete_adapter(adapter_name)
        raise
    return report


def fill(model: LoraModel, adapter_name: str, tensors: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
    """Copy ``tensors`` into an adapter that exists, after checking all of them."""
    report = LoadReport()
    _fill(model, adapter_name, _normalise(tensors, report), report, strict=strict)
    return report


def _fill(
    model: LoraModel,
    adapter_name: str,
    tensors: Mapping[str, Tensor],
    report: LoadReport,
    *,
    strict: bool,
    source: str = "",
) -> None:
    """Check every tensor against the slot, then copy. The slot's own parameters stay the same objects."""
    live = model.tensors_of(adapter_name)
    report.missing = sorted(live.keys() - tensors.keys())
    report.unexpected = sorted(tensors.keys() - live.keys())
    wrong: list[str] = []
    # A sum of finite numbers is finite unless it overflows: one look at all sums spares a look at every number.
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors.values()]
    finite = not sums or bool(torch.isfinite(torch.stack(sums)).all())
    for key in sorted(live.keys() & tensors.keys()):
        found, wanted = tensors[key], live[key]
        if found.shape != wanted.shape:
            wrong.append(f"{key} has shape {tuple(found.shape)} and the model needs {tuple(wanted.shape)}")
        elif not finite and not torch.isfinite(found).all():
            wrong.append(f"{key} holds values that are not finite")
        elif _overflows(found, wanted.dtype):
            wrong.append(f"{key} holds values that are not finite in {_dtype(wanted)}")
        else:
            report.used.append(key)
            if found.dtype != wanted.dtype:
                report.dtypes[key] = (_dtype(found), _dtype(wanted))
    report.problems = wrong
    if wrong:
        raise AdapterError(
            f"{source}the adapter does not fit this model: {wrong[0]}{_more(wrong)}. Is it for another base?"
        )
    if strict and (report.missing or report.unexpected):
        lines = []
        if count := len(report.missing):
            lines.append(f"{count} tensor{'s are' if count > 1 else ' is'} missing, such as {report.missing[0]}")
        if count := len(report.unexpected):
            close = nearest(report.unexpected[0], live)
            lines.append(f"{count} {'are' if count > 1 else 'is'} unexpected, such as {report.unexpected[0]}{close}")
        text = "; ".join(lines)
        raise AdapterError(
            f"{source}the adapter and this model fit only in part ({len(report.used)} tensors): "
            f"{text}{'' if text.endswith('?') else '.'} Is it for another base? strict=False loads what fits"
        )
    if not report.used:
        raise AdapterError(f"{source}no tensor of the adapter fits this model")
    with torch.no_grad():
        for key in report.used:
            live[key].copy_(tensors[key])


def _normalise(
    tensors: Mapping[str, Tensor], report: LoadReport, key_mapping: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Keys as PEFT writes them, whichever tool wrote these."""
    out: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for key, tensor in tensors.items():
        new = file_key(key.removeprefix(PREFIX))
        if not key.startswith(PREFIX):  # absent, or after what another tool put in front
            new = PREFIX + new.removeprefix(PREFIX).removeprefix(PREFIX)
        if key_mapping:
            new = PREFIX + _mapped(new.removeprefix(PREFIX), key_mapping)
        if ".original_module." in new:
            report.repeated.append(key)
            continue
        if new in out:
            raise AdapterError(f"{names[new]} and {key} are both read as {new}; leave one of them out")
        if new != key:
            report.renamed[key] = new
        out[new], names[new] = tensor, key
    for key in [key for key in out if ".modules_to_save." in key]:
        module, _, leaf = key.partition(".modules_to_save.")
        # The adapter's name may or may not stand between.
        for plain in (f"{module}.{leaf}", f"{module}.{leaf.partition('.')[2]}"):
            if plain in out and torch.equal(out[plain], out[key]):
                report.repeated.append(key)
                del out[key]
                break
    return out


def _mapped(name: str, key_mapping: Mapping[str, str]) -> str:
    for pattern, replacement in key_mapping.items():
        try:
            new, hits = re.subn(pattern, replacement, name)
        except re.error as error:
            raise ConfigError(f"key_mapping: {pattern!r} → {replacement!r} is no replacement ({error})") from None
        if hits:
            return new
    return name


def _take_base_tensors(
    model: LoraModel, tensors: dict[str, Tensor], config: LoraConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """Take out copies of the base's embeddings, which PEFT adds when it adapts them or the vocabulary was resized."""
    out: dict[str, tuple[Tensor, Tensor]] = {}
    if all(".lora_" in key for key in tensors):
        return out
    saved = config.modules_to_save or []
    get = model.model
    tables = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # not every model has a table of words
            tables.append(getattr(get, getter)())
    for name, module in get.named_modules():
        if not any(module is table for table in tables) or any(name == s or name.endswith("." + s) for s in saved):
            continue
        for middle in (".base_layer.", "."):
            key = file_key(f"{name}{middle}weight")
            if key in tensors:
                weight = module.weight
                assert isinstance(weight, Tensor)
                out[key] = (weight, tensors.pop(key))
    return out


def _check_base(model: LoraModel, base: Mapping[str, tuple[Tensor, Tensor]], source: str) -> None:
    for key, (live, tensor) in base.items():
        if live.shape != tensor.shape:
            raise AdapterError(
                f"{source}it carries the base's {key} with shape {tuple(tensor.shape)}, this base has "
                f"{tuple(live.shape)}; resize the base's embeddings first (resize_token_embeddings({tensor.shape[0]}))"
            )
        if not torch.isfinite(tensor).all() or _overflows(tensor, live.dtype):
            raise AdapterError(f"{source}it carries the base's {key} with values that are not finite in {_dtype(live)}")


def _overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` turns finite numbers of ``tensor`` into infinite ones."""
    if tensor.dtype == dtype or not (tensor.is_floating_point() and dtype.is_floating_point):
        return False
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    return narrower and not bool(torch.isfinite(tensor.to(dtype)).all())


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _more(items: Sequence[str]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
