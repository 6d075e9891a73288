"""PEFT's adapter folder: read, verify, write. safetensors and JSON alone, no pickle, no network.

Reading is one direction: folder → tensors under PEFT's keys → checked against the plan → slots. Nothing of the model
changes before every tensor was checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.config.lora import CONFIG_NAME, LoraConfig
from loraloom.config.peft_file import NOT_PEFT
from loraloom.errors import AdapterError, SaveError, nearest, some
from loraloom.files.atomic import Contents, recover, write_files
from loraloom.lora import embeddings
from loraloom.lora.adapters import LoraModel
from loraloom.lora.embeddings import dtype_name, overflows
from loraloom.lora.injection import base_modules
from loraloom.lora.keys import LoadReport, file_key, follow_renamings, normalise
from loraloom.lora.targets import Plan
from loraloom.lora.unstacked import restack

#: In the header of the tensors' file: the dropout of an adapter whose config may not name one.
DROPOUT = "lora_dropout"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# -- write ------------------------------------------------------------------------------------------------------------


def save(
    model: LoraModel,
    folder: str | Path,
    adapters: Sequence[str] | None = None,
    gathered: Mapping[int, Tensor] | None = None,
    save_embedding_layers: bool | str = False,
    peft: bool = True,
) -> None:
    """Write adapters (all by default) into ``folder`` as PEFT lays them out, in one atomic step.

    ``gathered``: id of a live tensor → what to write for it. ``save_embedding_layers``: see ``embeddings.to_save``.
    ``peft``: refuse what PEFT would read otherwise; else it is written with a mark, which PEFT refuses.
    """
    for name in model.peft_config if adapters is None else adapters:
        if peft and (lost := model.lora_unreadable.get(name)):
            raise SaveError(
                f"{folder}: PEFT would read adapter {name!r} otherwise than loraloom: it would not find the tensors of "
                f"{some(lost)}. Nothing was written; save_pretrained(..., peft=False) writes a folder that "
                "loraloom alone reads"
            )
    write_files(folder, files_of(model, adapters, gathered, save_embedding_layers))


def files_of(
    model: LoraModel,
    adapters: Sequence[str] | None = None,
    gathered: Mapping[int, Tensor] | None = None,
    save_embedding_layers: bool | str = False,
) -> dict[str, Contents]:
    """What ``save`` writes, for who writes more beside it in the same step."""
    files: dict[str, Contents] = {}
    for name in model.peft_config if adapters is None else adapters:
        place = "" if name == "default" else f"{name}/"
        tensors = to_write(model, name, gathered, save_embedding_layers)
        config = model.peft_config[name].copy(inference_mode=True)
        files[place + WEIGHTS_NAME] = partial(write_tensors, tensors)
        if config.target_parameters and config.lora_dropout:  # PEFT refuses the two together
            files[place + WEIGHTS_NAME] = partial(write_tensors, tensors, notes={DROPOUT: str(config.lora_dropout)})
            config = config.copy(lora_dropout=0.0)
        if config.task_type is None:  # what PEFT needs to find the base by itself
            base = type(model.model)
            config = config.copy(auto_mapping={"base_model_class": base.__name__, "parent_library": base.__module__})
        text = config.to_json()
        if model.lora_unreadable.get(name):
            text = text.replace('"peft_type": "LORA"', f'"peft_type": "{NOT_PEFT}"')
        files[place + CONFIG_NAME] = text.encode()
    return files


def to_write(
    model: LoraModel,
    adapter_name: str,
    gathered: Mapping[int, Tensor] | None = None,
    save_embedding_layers: bool | str = False,
) -> dict[str, Tensor]:
    """The tensors of one adapter's file by their keys. Arguments as for ``save``."""
    tensors = model.tensors_of(adapter_name)
    base = embeddings.to_save(model, adapter_name, save_embedding_layers)
    if gathered is None:
        return {**base, **tensors}
    if save_embedding_layers == "auto":  # a state dict of the adapter alone is whole too
        base = {key: tensor for key, tensor in base.items() if id(tensor) in gathered}
    tensors = {**base, **tensors}
    if lost := [key for key, tensor in tensors.items() if id(tensor) not in gathered]:
        raise AdapterError(f"state_dict: it lacks {some(lost)}; pass a whole one or none")
    return {key: gathered[id(tensor)] for key, tensor in tensors.items()}


def write_tensors(tensors: Mapping[str, Tensor], path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Straight from the tensors to the file. Sorted and unshared: the same adapter gives the same bytes."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    try:
        save_file(plain, path, metadata={"format": "pt", **(notes or {})})
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
        _check_dtypes(path, tensors)
        return tensors
    except SafetensorError as error:
        raise AdapterError(f"{path}: cut off or damaged ({error}); copy it again") from None
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror})") from None


def _check_dtypes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype not in _FLOATS and (".lora_" in key or tensor.is_floating_point() or tensor.is_complex()):
            raise AdapterError(
                f"{path}: {key} holds {dtype_name(tensor)} numbers; loraloom reads "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _FLOATS)}"
            )


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
    report = LoadReport(notes=list(config.notes))
    config = config.copy(inference_mode=not is_trainable)
    renamed = normalise(tensors, report, key_mapping or {})
    modules = dict(base_modules(model.model))
    if key_mapping is None:
        follow_renamings(model.model, renamed, modules, report)
    renamed, config = restack(renamed, config, modules, report, f"{folder}: ")
    if config.target_parameters and not config.lora_dropout:
        config = config.copy(lora_dropout=_noted_dropout(folder))
    base = embeddings.in_file(model.model, renamed, config)

    def fill_slot(made: Plan) -> None:
        for key in [key for key in renamed for name in made.idle if key.startswith(file_key(f"{name}.lora_"))]:
            report.skipped.append(key)
            del renamed[key]
        _fill(model.tensors_of(adapter_name), base, renamed, report, strict=strict, source=f"{folder}: ")

    if adapter_name in model.peft_config:
        fill_slot(model.check_same(adapter_name, config, f"{folder}: "))
    else:
        model.add_adapter(
            adapter_name,
            config,
            strict=False,  # ``fill_slot`` checks every tensor, and names it
            autocast_adapter_dtype=autocast_adapter_dtype,
            tensors=renamed,
            source=f"{folder}: ",
            fill=fill_slot,
        )
    return report


def _noted_dropout(folder: str | Path) -> float:
    with safe_open(Path(folder) / WEIGHTS_NAME, framework="pt") as file:
        noted = (file.metadata() or {}).get(DROPOUT, "0")
    try:
        return min(max(float(noted), 0.0), 0.99)
    except ValueError:
        return 0.0


def fill(model: LoraModel, adapter_name: str, tensors: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
    """Copy ``tensors`` into an adapter that exists, after checking all of them."""
    report, own = LoadReport(), model.tensors_of(adapter_name)
    renamed = normalise(tensors, report)
    base = embeddings.in_file(model.model, renamed, model.peft_config[adapter_name])
    _fill(own, base, renamed, report, strict=strict)
    return report


def _fill(
    own: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    report: LoadReport,
    *,
    strict: bool,
    source: str = "",
) -> None:
    """Copy ``tensors`` into a slot's ``own`` and into the ``base``'s embeddings, by key, after checking all of them.

    The slot's parameters stay the same objects.
    """
    live = {**base, **own}
    report.missing = sorted(live.keys() - tensors.keys())
    report.unexpected = sorted(tensors.keys() - live.keys())
    wrong: list[str] = []
    # A sum of finite numbers is finite unless it overflows: one look at all sums spares a look at every number.
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors.values()]
    finite = not sums or bool(torch.isfinite(torch.stack(sums)).all())
    for key in sorted(live.keys() & tensors.keys()):
        found, wanted = tensors[key], live[key]
        if found.shape != wanted.shape and key in base:
            wrong.append(
                f"it carries the base's {key} with shape {tuple(found.shape)}, this base has {tuple(wanted.shape)}; "
                f"resize the base's embeddings first (resize_token_embeddings({found.shape[0]}))"
            )
        elif found.shape != wanted.shape:
            wrong.append(f"{key} has shape {tuple(found.shape)} and the model needs {tuple(wanted.shape)}")
        elif found.is_floating_point() != wanted.is_floating_point():
            wrong.append(f"{key} holds {dtype_name(found)} numbers and the model needs {dtype_name(wanted)}")
        elif not finite and not torch.isfinite(found).all():
            wrong.append(f"{key} holds values that are not finite")
        elif overflows(found, wanted.dtype):
            wrong.append(f"{key} holds values that are not finite in {dtype_name(wanted)}")
        else:
            report.used.append(key)
            if found.dtype != wanted.dtype:
                report.dtypes[key] = (dtype_name(found), dtype_name(wanted))
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise AdapterError(f"{source}the adapter does not fit this model: {wrong[0]}{more}. Is it for another base?")
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
    if not report.used or report.used == sorted(base):
        raise AdapterError(f"{source}no tensor of the adapter fits this model")
    with torch.no_grad():
        for key in report.used:
            if key in base and not torch.equal(live[key], tensors[key].to(live[key])):
                report.base_replaced.append(key)
            live[key].copy_(tensors[key])
