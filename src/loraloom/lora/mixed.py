"""A batch whose rows use different adapters: in one forward if that is exact, else adapter by adapter.

One forward needs to know, for every adapted layer, which part of its input belongs to which row (``lora.routing``). If
shapes do not tell, a probe with the frozen model finds out once. If a layer's input cannot be divided by rows, the
model is called with the rows of one adapter at a time, and the outputs are joined.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loraloom.errors import AdapterError
from loraloom.lora.adapters import LoraModel
from loraloom.lora.dispatch import Plan
from loraloom.lora.routed import media_tokens
from loraloom.lora.routing import Batch, Route, RowProbe, Unproven, rows_of, tensors

T = TypeVar("T")
Run = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
_INSTEAD = "call it with one adapter at a time"
#: Arguments and outputs that hold the state of generation, which cannot be joined from parts.
_CACHES = ("past_key_values", "cache_params", "state", "mems")


def call(
    lora: LoraModel,
    run: Run,
    names: Sequence[str],
    args: Args,
    kwargs: Kwargs,
    plain: Run | None = None,
) -> Any:
    """``run(*args, **kwargs)``, row ``i`` through ``names[i]``. ``plain``: a single forward with the same arguments."""
    names, plain = list(names), plain or run
    given = [*args, *kwargs.values()]
    check_rows(len(names), tensors(given))

    def together() -> Any:
        with lora.lora_routed(names, inputs=given):
            return run(*args, **kwargs)

    found = in_one_forward(lora, names, together, lambda site: prove(lora, plain, args, kwargs, len(names), site))
    return found[0] if found is not None else _adapter_by_adapter(lora, run, names, args, kwargs)


def in_one_forward(
    lora: LoraModel, slots: Sequence[str], run: Callable[[], T], prove: Callable[[str], bool]
) -> tuple[T] | None:
    """``(run(),)``, in which rows of all ``slots`` share a forward; None if they cannot.

    ``prove(site)`` probes the model, and returns whether the rows at ``site`` are known afterwards.
    """
    rows = lora.lora_dispatcher.rows
    for attempt in range(2 if rows.may_share_forward(slots) else 0):
        try:
            return (run(),)
        except Unproven as reason:
            if attempt or not prove(reason.site):
                rows.note_failure(reason.site, slots)
                break
    return None


def generate(lora: LoraModel, run: Run, names: Sequence[str], args: Args, kwargs: Kwargs) -> Any:
    """The model's ``generate`` in place of its forward."""

    def plain(*args: Any, **kwargs: Any) -> Any:
        known = inspect.signature(lora.model.forward).parameters
        given = {key: value for key, value in kwargs.items() if isinstance(value, Tensor) and key in known}
        return lora.model(*args[:1], **given)

    return call(lora, run, names, args, kwargs, plain)


def prove(lora: LoraModel, forward: Run, args: Args, kwargs: Kwargs, names: int, site: str) -> bool:
    """Probe which rows layers see, with forwards of the frozen model; whether ``site`` is proven now."""
    given = [*args, *kwargs.values()]
    rows = _rows_in(given, names)
    other = _unlike_the_first(given, rows)
    if other is None or site in lora.lora_dispatcher.rows.indivisible or lora.lora_dispatcher.other_plans():
        return False
    probe = RowProbe(rows, other)
    kwargs = {key: value for key, value in kwargs.items() if key not in _CACHES}
    if "use_cache" in kwargs:
        kwargs["use_cache"] = False
    try:
        with lora.following(Plan(Route(), probe=probe, disabled=True)), _as_in_use(lora):
            for turn, row in enumerate((0, other)):
                probe.begin(turn)
                forward(*rows_of(args, slice(row, row + 1), rows), **rows_of(kwargs, slice(row, row + 1), rows))
            probe.begin(2)
            forward(*args, **kwargs)
    except Exception:  # a model that cannot be run with a row alone shows nothing
        return False
    probe.finish()
    lora.lora_dispatcher.rows.record(probe.proven, probe.failed)
    return site in probe.proven


def check_rows(names: int, inputs: Iterator[Tensor]) -> None:
    """Raise AdapterError unless one input has a row, or several consecutive ones, for each name.

    Other inputs may be broadcast over the batch, like position ids.
    """
    rows = [tensor.shape[0] for tensor in inputs if tensor.dim()]
    if rows and not any(count and count % names == 0 for count in rows):
        found = f"{rows[0]} row{'s' if rows[0] != 1 else ''}"
        raise AdapterError(f"adapter_names: {names} names for a batch of {found}; give one name for each row")


def _rows_in(values: Sequence[Any], names: int) -> int:
    """The number of rows of the batch: a multiple of ``names``."""
    return next((t.shape[0] for t in tensors(values) if t.dim() and t.shape[0] % names == 0), 0)


def _unlike_the_first(values: Sequence[Any], rows: int) -> int | None:
    """The last row whose inputs differ from those of row 0."""
    mine = [tensor for tensor in tensors(values) if tensor.dim() > 1 and tensor.shape[0] == rows and not tensor.is_meta]
    return next((row for row in range(rows - 1, 0, -1) if any(not torch.equal(t[row], t[0]) for t in mine)), None)


@contextmanager
def _as_in_use(lora: LoraModel) -> Iterator[None]:
    """Eval mode and no gradients within the block; modes and torch's generators are restored afterwards."""
    modes = [(module, module.training) for module in lora.modules()]
    devices = {p.device for p in lora.parameters() if p.device.type not in ("cpu", "meta")}
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng([d.index or 0 for d in devices], enabled=True):
            yield
    finally:
        for module, training in modes:
            module.training = training


# -- adapter by adapter -------------------------------------------------------------------------------------------


def _adapter_by_adapter(lora: LoraModel, run: Run, names: list[str], args: Args, kwargs: Kwargs) -> Any:
    given = [*args, *kwargs.values()]
    rows = _rows_in(given, len(names))
    times = rows // len(names)
    for name in ("labels", *_CACHES):
        if kwargs.get(name) is not None:
            raise _undivided(lora, f"{name} cannot be divided; leave it out, or give one adapter at a time")
    for value in tensors(given):
        if value.dim() > 1 and value.shape[0] not in (1, rows):
            shape = tuple(value.shape)
            raise _undivided(lora, f"an input of shape {shape} cannot be divided among {rows} rows; {_INSTEAD}")
    batch = Batch(len(names))
    batch.note(given, media_tokens(lora.model))
    if not batch.aligned:
        raise _undivided(lora, f"rows with unlike numbers of images, videos or sounds cannot be divided; {_INSTEAD}")
    parts, order, counts = [], [], []
    for name in dict.fromkeys(names):
        mine = [row * times + i for row, other in enumerate(names) if other == name for i in range(times)]
        index = torch.tensor(mine)
        with lora.lora_routed([name] * (len(mine) // times)):
            parts.append(run(*rows_of(args, index, rows), **rows_of(kwargs, index, rows)))
        order += mine
        counts.append(len(mine))
    pad = getattr(getattr(lora.model, "generation_config", None), "pad_token_id", None)
    return _join(parts, counts, torch.tensor(order).argsort(), pad)


def _undivided(lora: LoraModel, why: str) -> AdapterError:
    return AdapterError(
        f"adapter_names: {type(lora.model).__name__} has to be run adapter by adapter, since not every layer shows "
        f"whose rows it sees, and {why}"
    )


def _join(parts: list[Any], counts: list[int], inverse: Tensor, pad: int | None) -> Any:
    """Join the parts, which have ``counts`` rows, in the batch's order."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        if any(not part.dim() or part.shape[0] != count for part, count in zip(parts, counts, strict=True)):
            raise AdapterError(
                f"adapter_names: adapters had to be run one by one, and an answer of shape {tuple(first.shape)} for "
                f"{counts[0]} rows cannot be put together; call the model with one adapter at a time"
            )
        if first.dim() == 2 and not first.is_floating_point():  # generated ids: pad shorter rows
            longest = max(part.shape[1] for part in parts)
            parts = [nn.functional.pad(part, (0, longest - part.shape[1]), value=pad or 0) for part in parts]
        return torch.cat(parts).index_select(0, inverse.to(first.device))
    if isinstance(first, Mapping):
        kept = {k: _join([p[k] for p in parts], counts, inverse, pad) for k in first if k not in _CACHES}
        return type(first)(**kept)
    if isinstance(first, list | tuple):
        if len({len(part) for part in parts}) > 1:
            raise AdapterError(
                "adapter_names: adapters had to be run one by one, and came to answers of unlike length "
                f"({', '.join(str(len(part)) for part in parts)}); call the model with one adapter at a time"
            )
        return type(first)(_join(list(each), counts, inverse, pad) for each in zip(*parts, strict=True))
    raise AdapterError(f"adapter_names: an answer of type {type(first).__name__} cannot be put together by rows")
