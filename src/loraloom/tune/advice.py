"""What a user should try next, in the user's own terms: each advice has the figures behind it, or is not given.

The diagnoses are in ``tune.diagnostics``; the remedies are those of the literature: see the docs page on tuning.
"""

from __future__ import annotations

from loraloom.tune.diagnostics import adapter, curves, space
from loraloom.tune.diagnostics.inputs import Advice, DiagnosticInputs


def advise(evidence: DiagnosticInputs) -> list[Advice]:
    found = [
        space.failures(evidence),
        *space.edge(evidence),
        curves.spiky(evidence),
        curves.apart(evidence),
        curves.slow(evidence),
        adapter.rank(evidence),
        adapter.still(evidence),
        *space.idle(evidence),
    ]
    return [advice for advice in found if advice is not None]
