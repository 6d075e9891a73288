"""Diagnoses from the best trial's adapter: directions and modules that were of no use.

Every function looks at one symptom and returns None if its figures do not show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median, median_low
from typing import Any

from loraloom.messages import Message
from loraloom.tuning.diagnostics.inputs import DiagnosticInputs

#: Directions to keep for each one that is used: the directions used are counted after training found them.
HEADROOM = 1.25
#: A module hardly moved if its relative norm is below this share of the median.
MOVED = 0.1


def rank(evidence: DiagnosticInputs) -> Message | None:
    """The update has far fewer directions than it was given."""
    moved = [(r, used) for r, used, norm in evidence.best.used.values() if used > 0 and math.isfinite(norm)]
    if not moved:
        return None
    r = round(median(r for r, _ in moved))
    used = sorted(used for _, used in moved)
    typical = median_low(used)
    enough: int = 2 ** math.ceil(math.log2(HEADROOM * typical))
    if enough > r / 2:
        return None
    return Message("rank", r=r, used=typical, largest=used[-1], enough=enough, modules=len(moved))


def unused_modules(evidence: DiagnosticInputs) -> Message | None:
    """Modules whose update is tiny beside that of the others."""
    norms = {name: norm for name, (_, _, norm) in evidence.best.used.items() if math.isfinite(norm)}
    if len(norms) < 3:
        return None
    middle = median(norms.values())
    unused = sorted(name for name, norm in norms.items() if norm < MOVED * middle)
    if not unused:
        return None
    largest = max(norms[name] for name in unused)
    return Message("still", modules=unused, groups=_groups(unused, norms), largest=largest, median=middle)


def _groups(names: Sequence[str], among: Iterable[str]) -> list[dict[str, Any]]:
    """``[{"type": "k_proj", "count": 22}, {"layer": "layers.0", "count": 3}, {"module": "layers.1.fc1"}]``."""
    left, groups = list(names), list[dict[str, Any]]()
    for what, part in (("type", lambda name: name.rpartition(".")[2]), ("layer", _layer)):
        for kind in sorted({part(name) for name in left} - {""}):
            members = [name for name in among if part(name) == kind]
            if len(members) > 1 and set(members) <= set(left):
                groups.append({what: kind, "count": len(members)})
                left = [name for name in left if name not in members]
    return groups + [{"module": name} for name in left]


def _layer(name: str) -> str:
    """``"model.layers.3.mlp.up_proj"`` → ``"layers.3"``; empty if no part is a number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return f"{parts[at - 1]}.{parts[at]}" if at else ""
