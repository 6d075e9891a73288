"""Numbers, times, hyperparameters and their values in few words, for tables, pictures and sentences."""

from __future__ import annotations

import math
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

#: Shorter still, for pictures.
BRIEF = {"alpha": "α", "dropout": "drop"}


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


def params(
    values: Mapping[str, Any], names: Iterable[str] | None = None, width: int | None = None, between: str = ", "
) -> str:
    """``"r=8, alpha=2r, rate=0.001"`` of the configuration, or of those ``names`` that it has."""
    chosen = [name for name in (values if names is None else names) if name in values]
    return between.join(f"{label(name)}={shown(values[name], width)}" for name in chosen)


def brief(values: Mapping[str, Any], names: Iterable[str], width: int = 12, most: int = 9) -> str:
    """``"r=8 q-v 1.5e-3 α=2r drop=0.1"``: a configuration for a picture, at most ``most`` of ``names``.

    What differs most between adapters is first; a dropout of 0 is left out.
    """
    words = {label(name): values[name] for name in names if values.get(name) not in (None, 0.0)}
    first = [word for word in ("r", "targets", "rate") if word in words]
    said = []
    for word in [*first, *(word for word in words if word not in first)][:most]:
        text = f"{words[word]:.1e}".replace("e-0", "e-") if word == "rate" else shown(words[word], width)
        said.append(text if word in ("targets", "rate") else f"{BRIEF.get(word, word)}={text}")
    return " ".join(said)


def figure(value: float, noise: float | None = None) -> str:
    """``"0.801 ±0.006"``; as many digits as the noise needs."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:.3g}"
    digits = 4 if noise and noise < 0.0005 else 3
    return f"{value:.{digits}f}" + (f" ±{noise:.{digits}f}" if noise and round(noise, digits) else "")


def gap(value: float) -> str:
    """A small difference: as ``figure``, but never ``"0.000"``."""
    return figure(value) if value >= 0.0005 else f"{value:.1g}"


def count(number: float) -> str:
    """``"295k"``, ``"1.18M"``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


def counted(number: int, noun: str) -> str:
    """``"1 row"``, ``"2,000 rows"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def about(seconds: float) -> str:
    """An estimated time: ``"40 s"``, ``"12 min"``, ``"3 h 20 min"``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def duration(seconds: float) -> str:
    """``"41 s"``, ``"12:34"``, ``"1:02:03"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
