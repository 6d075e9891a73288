"""Smaller adapters for free: the best one cut to lower ranks, and measured on the rows that chose it.

A trained adapter seldom uses all of its rank. Cutting costs no training, and all cuts are measured in one routed
forward. The smallest that loses no more than one standard error is offered (the rule of Breiman et al. 1984).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from loraloom.errors import AdapterError
from loraloom.files.atomic import write_files
from loraloom.inference.jackknife import error
from loraloom.lora.rank_cut import cut_rank
from loraloom.training.setup import Setup
from loraloom.training.usage import usage_files
from loraloom.tuning.ranking import goodness

#: The folder of the adapter that is offered, in that of the search.
SMALLER_NAME = "best-smaller"


@dataclass(frozen=True)
class Smaller:
    """The best adapter at rank ``r``: its figure, and how much worse that is than the whole one's, with its error."""

    r: int
    parameters: int
    bytes: int
    metric: float
    worse: float
    error: float


@dataclass(frozen=True)
class Cuts:
    """``measured`` are all cuts, the largest first; ``adapter`` is the folder of the ``offered`` one."""

    measured: list[Smaller]
    offered: Smaller | None = None
    adapter: str = ""


def cut(setup: Setup, metric: str, adapter: Path, folder: Path) -> Cuts:
    """Cut the adapter in the folder ``adapter`` to its rank's half, quarter, ... and write the one that is offered.

    Empty for an adapter that cannot be cut, and for metrics of generated texts, which take as long as a search.
    ``folder`` is that of the search.
    """
    if setup.metrics.needs_generation and metric != "loss":
        return Cuts([])
    with setup.temporary_adapters() as model:
        model.load_adapter(adapter, "whole")
        highest = max(layer.r["whole"] for layer in model.base_model.lora_layers.values() if "whole" in layer.slots)
        ranks = {f"whole-r{highest >> power}": highest >> power for power in range(1, highest.bit_length())}
        try:
            for name, r in ranks.items():
                cut_rank(model, "whole", name, r)
        except AdapterError:
            return Cuts([])
        evaluator = setup.evaluator()
        whole, *cuts = (one[metric] for one in evaluator.figures(["whole", *ranks], evaluator.parts))
        measured = []
        for (name, r), values in zip(ranks.items(), cuts, strict=True):
            worse = [goodness(metric, a - b) for a, b in zip(whole, values, strict=True)]
            tensors = model.adapter_parameters(name).values()
            extent = sum(one.numel() for one in tensors), sum(one.nbytes for one in tensors)
            measured.append(Smaller(r, *extent, values[0], worse[0], error(worse)))
        offered = next((one for one in reversed(measured) if one.worse <= one.error < math.inf), None)
        if offered is None:
            return Cuts(measured)
        cut_rank(model, "whole", SMALLER_NAME, offered.r)
        model.save_pretrained(folder, selected_adapters=[SMALLER_NAME], peft=False)
    write_files(folder / SMALLER_NAME, usage_files(setup))
    return Cuts(measured, offered, str(folder / SMALLER_NAME))
