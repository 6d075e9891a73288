"""The options of a search: the section ``tune`` of a run file. What varies and the metric are checked in ``tune/``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from loraloom.config.checks import Check, as_it_is, choice, duration, flag, number, size, text, whole
from loraloom.config.options import Option, Options, option

PRESETS = ("quick", "standard", "thorough")
PREFER = ("quality", "balanced", "small", "fast")
SAMPLERS = ("tpe", "random", "grid")

_tune = partial(option, section="tune", group="Search")
_run = partial(_tune, resume="nothing")  # how it runs
_PRESETS_OWN = "the preset's"
_SHARE = number(0, 1, above=True, what="a share of the steps")
_BUDGET = number(0, 1, what="a share of training all")
_ADDRESS = text("host:port or auto", "")


@dataclass(kw_only=True)
class SearchOptions(Options):
    """The options of a search that do not depend on what its trials train."""

    unknown = "there is no such option of a search"

    trials: int = _tune(16, whole(1), "Configurations to try", unset=_PRESETS_OWN)
    sampler: str = _tune("tpe", choice(*SAMPLERS), "What proposes configurations")
    reduction: int = _tune(2, whole(2), "At each rung, one trial in N continues")
    min_share: float = _tune(1 / 9, _SHARE, "First rung, as a share of the steps; 1 trains all to the end", unset="1/9")
    budget: float = _tune(
        1 / 3, _BUDGET, "What undecided trials may cost, over training all to the end", unset="1/3", since="0.2"
    )
    finalists: int = _tune(3, whole(1), "Best configurations to train again with other seeds", unset=_PRESETS_OWN)
    seeds: int = _tune(2, whole(0), "Other seeds for each finalist; 0 for none", unset=_PRESETS_OWN)
    metric: str = _tune("", Check(as_it_is, {"type": "string"}), "Metric to compare by", unset="the task's first")
    prefer: str = _run("balanced", choice(*PREFER), "What to want beside quality, among those as good", since="0.2")
    within: float | None = _run(
        None,
        number(above=True),
        "Take the smallest at most this far from the best",
        unset="the noise",
        since="0.2",
    )
    max_size: int | None = _run(None, size(), "Largest adapter to recommend, such as 5MiB", unset="any", since="0.2")
    allow_shared_rows: bool = _run(
        False, flag(), "Search although held-out rows are among the training rows", since="0.2"
    )
    max_trials: int | None = _run(
        None, whole(1), "Most configurations, extensions included", unset="no limit", since="0.2"
    )
    max_time: float | None = _run(None, duration(), "Time limit, such as 2h or 90m", unset="no limit", since="0.2")
    slots: int | None = _run(None, whole(1), "Trials to train together", unset="as many as pay")
    memory: int | None = _run(None, size(), "Memory limit, such as 8GiB", unset="what is free")
    workers: int = _run(1, whole(1), "Packs to train at once, each in its own process (Ray)")
    ray_address: str | None = _run(None, _ADDRESS, "Ray cluster: host:port, or auto", unset="this machine")


#: Keys of the section that are not fields: what the others are by default, and what varies.
PRESET = Option(
    choice(*PRESETS), "How far to search", key="tune.preset", group="Search", name="preset", default="standard",
    flags=("--preset",),
)  # fmt: skip
SPACE = Option(
    Check(as_it_is, {"type": "object"}), "What varies: keys such as lora.r, each with a list or a range",
    key="tune.space", group="Search", name="space", unset=_PRESETS_OWN,
)  # fmt: skip
