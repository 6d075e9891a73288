"""Knobs and their values in few words, for tables, pictures and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SHORT = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_rslora": "rslora",
    "init_lora_weights": "init",
    "learning_rate": "rate",
    "batch_size": "batch",
    "weight_decay": "decay",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule",
    "loraplus_lr_ratio": "lora+",
    "gradient_accumulation_steps": "accumulate",
}


def label(param: str) -> str:
    """``"lora.lora_alpha"`` → ``"alpha"``."""
    name = param.rpartition(".")[2]
    return SHORT.get(name, name)


def shown(value: Any, width: int | None = None) -> str:
    """A value for people: three digits of a number, a list with its common endings taken off, cut to ``width``."""
    if isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: "none"}[value]
    elif isinstance(value, float):
        # Below a thousandth the power is easier to read, and shorter: 6.16e-4.
        text = _power(value) if 0 < abs(value) < 1e-3 else f"{value:.3g}"
    elif isinstance(value, list | tuple) or (isinstance(value, str) and "," in value):
        names = [str(item).strip() for item in (value.split(",") if isinstance(value, str) else value)]
        text = "+".join(_without_endings(names)) if width is not None else ", ".join(names)
    else:
        text = str(value)
    return text if width is None or len(text) <= width else text[: width - 1] + "…"


def _power(value: float) -> str:
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def _without_endings(names: list[str]) -> list[str]:
    """``["q_proj", "v_proj"]`` → ``["q", "v"]``."""
    for ending in ("_proj", "_lin", "_linear", "_layer"):
        if all(name.endswith(ending) and len(name) > len(ending) for name in names):
            return [name.removesuffix(ending) for name in names]
    return names


def params(values: Mapping[str, Any], names: Iterable[str], width: int | None = None, between: str = " ") -> str:
    """``"r=8 alpha=2r rate=0.001"`` of those ``names`` that this configuration has."""
    return between.join(f"{label(name)}={shown(values[name], width)}" for name in names if name in values)
