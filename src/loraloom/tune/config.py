"""What a search is told: checked as a whole before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from loraloom.config import runfile
from loraloom.config.names import TASKS
from loraloom.config.train import TrainConfig
from loraloom.errors import ConfigError, nearest
from loraloom.files import sizes
from loraloom.tasks.metrics.registry import DEFAULTS, greater_is_better, kind_of
from loraloom.tune.space import PRESETS, Space

#: What a training has and a search does not.
_FOR_LATER = (
    *("eval_strategy", "eval_steps", "eval_minutes", "metric_for_best_model", "load_best_model_at_end"),
    *("early_stopping_patience", "early_stopping_threshold"),
    *("save_strategy", "save_steps", "save_minutes", "save_total_limit", "report_to"),
)
SAMPLERS = ("tpe", "random", "grid")
#: Shares of the steps at which trials are compared. Few are early: early losses say least about the end.
RUNGS = (1 / 9, 2 / 9, 1 / 3, 1 / 2, 2 / 3)


@dataclass(kw_only=True)
class TuneConfig:
    """One search. ``train`` are the options of every trial but for what ``space`` varies; its ``output`` is the folder.

    Raises:
        ConfigError: an unknown option, a wrong type, a value out of range, or options that contradict.
    """

    train: TrainConfig
    space: Space
    #: Configurations to try.
    trials: int = 16
    #: What proposes them: Optuna's TPE, chance, or all there are.
    sampler: str = "tpe"
    #: Successive halving: once a trial has taken off, one in this many trains on from each rung to the next ...
    reduction: int = 2
    #: ... the first of which is at this share of the steps. 1 lets all trials train to their end.
    min_share: float = 1 / 9
    #: The best configurations, repeated with so many further seeds; 0 seeds turns that off.
    finalists: int = 3
    seeds: int = 2
    #: "loss" or one of the run's metrics, of which the first is the default.
    metric: str = ""
    #: Trials that train together; by default as many as pay.
    slots: int | None = None
    #: Bytes that the search may use, or text such as "8GiB"; by default what there is.
    memory: int | None = None
    #: Packs that train at once, each in a process of its own, over Ray ...
    workers: int = 1
    #: ... on the cluster at this address, host:port or "auto"; None is this machine.
    ray_address: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> TuneConfig:
        known = [spec.name for spec in fields(cls)]
        for name in kwargs:
            if name not in known:
                raise ConfigError(f"{name}: there is no such option of a search{nearest(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, kind in (("train", TrainConfig), ("space", Space)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name}: must be {kind.__name__}, found {type(getattr(self, name)).__name__}")
        for name, low in (
            ("trials", 1),
            ("reduction", 2),
            ("finalists", 1),
            ("seeds", 0),
            ("slots", 1),
            ("workers", 1),
        ):
            value = getattr(self, name)
            if name == "slots" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name}: must be a whole number of at least {low}, found {value!r}")
        share = self.min_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"min_share: must be a share of the steps above 0 and at most 1, found {share!r}")
        if self.sampler not in SAMPLERS:
            hint = nearest(str(self.sampler), SAMPLERS)
            raise ConfigError(f"sampler: must be one of {', '.join(SAMPLERS)}, found {self.sampler!r}{hint}")
        if self.sampler == "grid":
            self.space.grid()
        size = self.space.size
        if size is not None and self.trials > size:
            raise ConfigError(
                f"trials: the space has {size} configurations, found {self.trials}; lower it or widen the space"
            )
        if self.finalists > self.trials:
            raise ConfigError(f"finalists: must be at most trials ({self.trials}), found {self.finalists}")
        if self.ray_address is not None and (not isinstance(self.ray_address, str) or not self.ray_address.strip()):
            raise ConfigError(f"ray_address: must be host:port or auto, found {self.ray_address!r}")
        self._check_metric()
        self.memory = read_bytes("memory", self.memory)

    def _check_metric(self) -> None:
        train = self.train
        kind = kind_of(TASKS[train.task], train.problem_type)
        # Whether tags mark entities is not known before the data is read.
        measured = train.metrics or (*DEFAULTS[kind], *(DEFAULTS["words"] if kind == "tags" else ()))
        given = [name for name in measured if ":" not in name and name != "loss"]
        own = [spec.partition(":")[2] for spec in train.metrics or () if ":" in spec]
        self.metric = self.metric or next(iter([*given, *own]), "loss")
        # What a function returns is not known before.
        if self.metric not in (*given, "loss") and not own:
            words = " or ".join([", ".join(given), "loss"] if given else ["loss"])
            raise ConfigError(
                f"metric: {train.task} is measured by {words}, found {self.metric!r}"
                f"{nearest(str(self.metric), (*given, 'loss'))}"
            )

    @property
    def higher_is_better(self) -> bool:
        assert self.metric is not None
        return greater_is_better(self.metric)

    @property
    def left_for_later(self) -> list[str]:
        """Keys of what was chosen that a search has no use for: it measures at its rungs, and keeps what it needs.

        They are for the training of the best configuration in full.
        """
        changed = []
        for spec in fields(TrainConfig):
            usual = spec.default_factory() if spec.default_factory is not MISSING else spec.default
            if spec.name in _FOR_LATER and getattr(self.train, spec.name) != usual:
                changed.append(runfile.KEYS[spec.name])
        return changed

    @property
    def over_ray(self) -> bool:
        return self.workers > 1 or self.ray_address is not None

    @property
    def rungs(self) -> list[float]:
        """The shares of its steps at which a trial is compared with others, below 1 and rising."""
        first = float(self.min_share)
        return [share for share in (first, *(rung for rung in RUNGS if rung > first + 1e-9)) if share < 1 - 1e-9]

    @classmethod
    def read(
        cls,
        path: str | Path | None,
        overrides: Mapping[str, Any] | Sequence[str] = (),
        given: Mapping[str, Any] | None = None,
    ) -> TuneConfig:
        """The search of a run file; arguments as of ``runfile.read``. Its section ``tune`` has these fields' names.

        ``tune.preset`` (quick, standard or thorough) gives the space, the trials, the finalists and their seeds where
        the file does not. Numbers that come from it are lowered to what a small space allows.

        Raises:
            ConfigError: begins with the file and the line.
        """
        found = runfile.read(path, overrides, given)
        try:
            return cls(train=found.options, **_with_preset(found.tune, found.options))
        except ConfigError as error:
            found.fail(error, "tune")

    @classmethod
    def names(cls) -> list[str]:
        """The keys of the section ``tune``, ``preset`` aside."""
        return [spec.name for spec in fields(cls) if spec.name != "train"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return plain | {"train": self.train.to_dict(), "space": self.space.to_dict()}

    def fingerprint(self) -> str:
        """A hash of all that makes it this search and no other: not where it is kept or runs, nor how much at once."""
        values = self.to_dict()
        for name in ("slots", "memory", "workers", "ray_address"):
            del values[name]
        for name in ("output", "overwrite", *(["date"] if self.train.date is None else [])):
            del values["train"][name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_unread(found: runfile.RunFile) -> None:
    """What a run that is no search leaves unread: names that a search does not know, and what was set for nothing.

    Raises:
        ConfigError: begins with the place.
    """
    for key, place in found.places.items():
        if key.startswith("tune.") and place.startswith("--set"):
            raise ConfigError(f"{place}: does nothing here; it is read by loraloom tune alone")
    try:
        _check_names(found.tune)
    except ConfigError as error:
        found.fail(error, "tune")


def _check_names(tune: Mapping[str, Any]) -> None:
    known = ["preset", *TuneConfig.names()]
    for name in tune:
        if name not in known:
            hint = nearest(name, known) or f"; the keys here are {', '.join(known)}"
            raise ConfigError(f"{name}: there is no such key{hint}")


def _with_preset(tune: Mapping[str, Any], base: TrainConfig) -> dict[str, Any]:
    """The section ``tune`` with what its preset says of the rest."""
    values = dict(tune)
    _check_names(values)
    name = values.pop("preset", "standard")
    if not isinstance(name, str) or name not in PRESETS:
        hint = nearest(str(name), PRESETS)
        raise ConfigError(f"preset: must be one of {', '.join(PRESETS)}, found {name!r}{hint}")
    preset = PRESETS[name]
    space = Space.parse(values["space"], base) if "space" in values else Space.default(base, name)
    size = math.inf if space.size is None else space.size
    trials = int(size) if values.get("sampler") == "grid" and size < math.inf else int(min(preset.trials, size))
    limit = values.get("trials", trials)
    usual = {"trials": trials, "finalists": preset.finalists, "seeds": preset.seeds}
    if isinstance(limit, int):
        usual["finalists"] = max(1, min(preset.finalists, limit))
    return usual | values | {"space": space}


def read_bytes(name: str, value: Any) -> int | None:
    """Bytes as a whole number, or as text with a unit: ``"8GiB"``, ``"500 MB"``.

    Raises:
        ConfigError: begins with ``name``.
    """
    if value is None:
        return None
    size = sizes.read(str(value))
    if isinstance(value, bool) or size is None:
        raise ConfigError(f"{name}: must be bytes or a size such as 8GiB or 500MB, found {value!r}")
    if size < 1:
        raise ConfigError(f"{name}: must be above 0, found {value!r}")
    return size
