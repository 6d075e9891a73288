"""Times with units, such as 2h or 90m, in seconds."""

from __future__ import annotations

import re

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def read(text: str) -> float | None:
    """The seconds that ``text`` states, such as ``"1h30m"``, ``"90 min"`` or ``"45"``; None if it is no time."""
    plain = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", plain):
        return float(plain)
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])(?:ec|in)?(?:\s+|$|(?=\d))", plain)
    if not parts or not re.fullmatch(r"(\d+(\.\d+)?\s*[smhd](ec|in)?\s*)+", plain):
        return None
    return sum(float(count) * _UNITS[unit] for count, unit in parts)


def short(seconds: float) -> str:
    """A time as ``read`` reads it, in at most two units: ``"2h5m"``, ``"3m"``, ``"10s"``."""
    whole = max(round(seconds), 0)
    if whole < 120:
        return f"{whole}s"
    minutes = round(whole / 60)
    hours, rest = divmod(minutes, 60)
    return f"{minutes}m" if not hours else f"{hours}h{rest}m" if rest else f"{hours}h"
