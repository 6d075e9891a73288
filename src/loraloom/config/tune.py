"""The options of a search: the section ``tune`` of a run file. What varies and the metric are checked in ``tune/``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from loraloom.config.checks import Check, as_it_is, choice, number, size, text, whole
from loraloom.config.options import Option, Options, option

PRESETS = ("quick", "standard", "thorough")
SAMPLERS = ("tpe", "random", "grid")

_tune = partial(option, section="tune", group="Search")
_PRESETS_OWN = "the preset's"


@dataclass(kw_only=True)
class SearchOptions(Options):
    """What a search does with its trials, whatever they train."""

    unknown = "there is no such option of a search"

    trials: int = _tune(16, whole(1), "Configurations to try", unset=_PRESETS_OWN)
    sampler: str = _tune("tpe", choice(*SAMPLERS), "What proposes configurations")
    reduction: int = _tune(2, whole(2), "At each rung, one trial in N trains on")
    min_share: float = _tune(
        1 / 9, number(0, 1, above=True, what="a share of the steps"),
        "Share of the steps at which the first rung is; 1 trains every trial to its end", unset="1/9",
    )  # fmt: skip
    finalists: int = _tune(
        3, whole(1), "The best N configurations are trained again with other seeds", unset=_PRESETS_OWN
    )
    seeds: int = _tune(2, whole(0), "Other seeds for each finalist; 0 for none", unset=_PRESETS_OWN)
    metric: str = _tune("", Check(as_it_is, {"type": "string"}), "Metric to compare by", unset="the task's first")
    slots: int | None = _tune(None, whole(1), "Trials that train together", unset="as many as pay", resume="nothing")
    memory: int | None = _tune(None, size(), "Memory limit, such as 8GiB", unset="what is free", resume="nothing")
    workers: int = _tune(1, whole(1), "Packs that train at once, each in its own process (Ray)", resume="nothing")
    ray_address: str | None = _tune(
        None, text("host:port or auto", ""), "Ray cluster for the workers: host:port, or auto", unset="this machine",
        resume="nothing",
    )  # fmt: skip


#: Keys of the section that are not fields: what the others are by default, and what varies.
PRESET = Option(
    choice(*PRESETS), "How far to search", key="tune.preset", group="Search", name="preset", default="standard",
    flags=("--preset",),
)  # fmt: skip
SPACE = Option(
    Check(as_it_is, {"type": "object"}), "What varies: keys such as lora.r, each with a list or a range",
    key="tune.space", group="Search", name="space", unset=_PRESETS_OWN,
)  # fmt: skip
