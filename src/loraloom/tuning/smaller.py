"""What the best adapter gives for free: lower ranks and other scales, measured on the rows that chose it.

A trained adapter seldom uses all of its rank, and seldom has the best scale. Neither change costs training, and all are
measured in one pass. The smallest that loses no more than one standard error is offered (the rule of Breiman et al.
1984); another scale only if its gain is more than chance explains for the best of several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

from loraloom.errors import AdapterError
from loraloom.files.atomic import write_files
from loraloom.inference.evaluation import Evaluator
from loraloom.inference.intervals import t_quantile
from loraloom.inference.jackknife import error
from loraloom.lora.model import PeftModel
from loraloom.lora.rank_cut import RankCuts, rescale
from loraloom.training.setup import Setup
from loraloom.training.usage import usage_files
from loraloom.tuning.ranking import goodness

#: The folders of the adapters that are offered, in that of the search.
SMALLER_NAME, SCALED_NAME = "best-smaller", "best-scaled"
#: The scales that are tried, as multiples of the trained one, and the chance of offering any if none is better.
FACTORS, CHANCE = (0.5, 0.75, 1.25), 0.05


@dataclass(frozen=True)
class Smaller:
    """The best adapter at rank ``r``: its figure, and how much worse that is than the whole one's, with its error.

    ``by_energy``: modules have unlike ranks, with no more parameters in all than if all had rank ``r``.
    """

    r: int
    parameters: int
    bytes: int
    metric: float
    worse: float
    error: float
    by_energy: bool = False


@dataclass(frozen=True)
class Scaled:
    """The best adapter with ``factor`` times its scale, and how much better that is, with its error."""

    factor: float
    lora_alpha: float
    metric: float
    better: float
    error: float


@dataclass(frozen=True)
class Cuts:
    """``measured`` are all cuts, the largest first; ``adapter`` is the folder of the ``offered`` one.

    ``scales`` are all scales; ``scaled_adapter`` is the folder of the ``scaled`` one, which is better by more than
    chance.
    """

    measured: list[Smaller]
    offered: Smaller | None = None
    adapter: str = ""
    scales: list[Scaled] = field(default_factory=list)
    scaled: Scaled | None = None
    scaled_adapter: str = ""


def cut(setup: Setup, metric: str, adapter: Path, folder: Path) -> Cuts:
    """Measure the adapter in the folder ``adapter`` at lower ranks and other scales, and write what is offered.

    Empty for metrics of generated texts, which take as long as a search; without ranks for an adapter that cannot be
    cut. ``folder`` is that of the search.
    """
    if setup.metrics.needs_generation and metric != "loss":
        return Cuts([])
    with setup.temporary_adapters() as model:
        model.load_adapter(adapter, "whole")
        cuts, ranks = _add_cuts(model)
        factors = {f"whole-scale-{place}": factor for place, factor in enumerate(FACTORS)}
        alphas = {name: rescale(model, "whole", name, factor).lora_alpha for name, factor in factors.items()}
        seen = _seen(setup.evaluator(), metric, [*ranks, *factors])
        measured = [_smaller(model, name, *rank, seen[name]) for name, rank in ranks.items()]
        scales = [Scaled(factor, alphas[name], *astuple(seen[name])[:3]) for name, factor in factors.items()]
        offered, scaled = smallest(measured), best_scale(scales, next(iter(seen.values())).degrees)
        if offered is not None and cuts is not None:
            cuts.add(SMALLER_NAME, offered.r, offered.by_energy)
        if scaled is not None:
            rescale(model, "whole", SCALED_NAME, scaled.factor)
        written = [name for name in (SMALLER_NAME, SCALED_NAME) if name in model.peft_config]
        if written:
            model.save_pretrained(folder, selected_adapters=written, peft=False)
    for name in written:
        write_files(folder / name, usage_files(setup))
    places = [str(folder / name) if name in written else "" for name in (SMALLER_NAME, SCALED_NAME)]
    return Cuts(measured, offered, places[0], scales, scaled, places[1])


def smallest(measured: Sequence[Smaller]) -> Smaller | None:
    """The smallest that loses no more than its error; of two of one ``r`` the even one, which every engine reads."""
    good = [one for one in measured if one.worse <= one.error < math.inf]
    return min(good, key=lambda one: (one.r, one.by_energy), default=None)


def best_scale(scales: Sequence[Scaled], degrees: int) -> Scaled | None:
    """The best, if its gain has only ``CHANCE`` to come from chance: Student's t with Bonferroni's correction."""
    least = t_quantile(1 - CHANCE / max(len(scales), 1), degrees)
    sure = [one for one in scales if one.better > least * one.error]
    return max(sure, key=lambda one: one.better, default=None)


@dataclass(frozen=True)
class _Seen:
    """An adapter's figure, how much better it is than the whole one's, the error of that, its degrees of freedom."""

    metric: float
    better: float
    error: float
    degrees: int


def _seen(evaluator: Evaluator, metric: str, names: Sequence[str]) -> dict[str, _Seen]:
    whole, *others = (one[metric] for one in evaluator.figures(["whole", *names], evaluator.parts))
    found = {}
    for name, values in zip(names, others, strict=True):
        better = [goodness(metric, a - b) for a, b in zip(values, whole, strict=True)]
        found[name] = _Seen(values[0], better[0], error(better), max(len(better) - 2, 1))
    return found


def _add_cuts(model: PeftModel) -> tuple[RankCuts | None, dict[str, tuple[int, bool]]]:
    """Adapters of half the rank, a quarter and so on: name → rank, and whether modules have unlike ranks."""
    ranks = {}
    try:
        cuts = RankCuts(model, "whole")
        for r in (cuts.highest >> power for power in range(1, cuts.highest.bit_length())):
            for by_energy in (False, *([True] if cuts.separable and cuts.ranks(r) != cuts.ranks(r, True) else ())):
                name = f"whole-r{r}{'-by-energy' if by_energy else ''}"
                cuts.add(name, r, by_energy)
                ranks[name] = r, by_energy
    except AdapterError:
        return None, {}
    return cuts, ranks


def _smaller(model: PeftModel, name: str, r: int, by_energy: bool, seen: _Seen) -> Smaller:
    tensors = model.adapter_parameters(name).values()
    extent = sum(one.numel() for one in tensors), sum(one.nbytes for one in tensors)
    return Smaller(r, *extent, seen.metric, 0.0 - seen.better, seen.error, by_energy)
