"""What the adapter that came out says: of its directions and its modules, which were of use?

Every function looks at one symptom and answers None when its figures do not support a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median, median_low
from typing import Any

from loraloom.tune.diagnostics.inputs import Advice, DiagnosticInputs

#: Directions to keep for each one that is used, since the directions used are those after training found them.
HEADROOM = 1.25
#: A module hardly moved where its relative norm is below this share of the median.
MOVED = 0.1


def rank(evidence: DiagnosticInputs) -> Advice | None:
    """The update has far fewer directions than it was given."""
    moved = {
        name: (r, used) for name, (r, used, norm) in evidence.best.used.items() if used > 0 and math.isfinite(norm)
    }
    if not moved:
        return None
    r = round(median(r for r, _ in moved.values()))
    used = sorted(used for _, used in moved.values())
    typical = median_low(used)
    enough: int = 2 ** math.ceil(math.log2(HEADROOM * typical))
    if enough > r / 2:
        return None
    most = f" ({used[-1]} in the layer that uses most)" if used[-1] > enough else ""
    return Advice(
        "rank",
        f"r of {r} uses {typical} direction{'' if typical == 1 else 's'} in the median layer{most}: r of {enough} will "
        "do",
        {"r": r, "used": typical, "largest": used[-1], "enough": enough, "modules": len(moved)},
    )


def still(evidence: DiagnosticInputs) -> Advice | None:
    """Modules whose update is tiny beside that of the others."""
    norms = {name: norm for name, (_, _, norm) in evidence.best.used.items() if math.isfinite(norm)}
    if len(norms) < 3:
        return None
    middle = median(norms.values())
    idle_ones = sorted(name for name, norm in norms.items() if norm < MOVED * middle)
    if not idle_ones:
        return None
    largest = max(norms[name] for name in idle_ones)
    words = _kinds(idle_ones, norms)
    return Advice(
        "still",
        f"{words} hardly moved (at most {largest:.2g} of the weight's norm, the median module {middle:.2g}): "
        "drop them from the targets",
        {"modules": idle_ones, "largest": largest, "median": middle},
    )


def _kinds(names: Sequence[str], among: Mapping[str, Any]) -> str:
    """``"all 22 k_proj and layers.0.fc1"``: whole kinds by their name, whole layers by theirs, the rest one by one."""
    left, parts = list(names), []
    for part in (lambda name: name.rpartition(".")[2], _layer):
        for kind in sorted({part(name) for name in left} - {""}):
            members = [name for name in among if part(name) == kind]
            if len(members) > 1 and set(members) <= set(left):
                parts.append(
                    f"all {len(members)} modules of {kind}" if part is _layer else f"all {len(members)} {kind}"
                )
                left = [name for name in left if name not in members]
    parts += left[:3] + ([f"{len(left) - 3} more"] if len(left) > 3 else [])
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _layer(name: str) -> str:
    """``"model.layers.3.mlp.up_proj"`` → ``"layers.3"``; empty where no part is a number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return f"{parts[at - 1]}.{parts[at]}" if at else ""
