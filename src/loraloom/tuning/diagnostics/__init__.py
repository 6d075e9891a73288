"""What to try next: one diagnosis a function, and all that their figures support."""

from __future__ import annotations

from loraloom.messages import Message
from loraloom.tuning.diagnostics import adapter, curves, space
from loraloom.tuning.diagnostics.inputs import DiagnosticInputs


def advise(evidence: DiagnosticInputs) -> list[Message]:
    found = [
        space.failures(evidence),
        *space.edge(evidence),
        curves.loss_spikes(evidence),
        curves.overfitting(evidence),
        curves.undertrained(evidence),
        adapter.rank(evidence),
        adapter.unused_modules(evidence),
        *space.insensitive_params(evidence),
    ]
    return [message for message in found if message is not None]
