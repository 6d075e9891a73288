"""The options of a search, checked as a whole before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from loraloom import tasks
from loraloom.config import runfile, yamltext
from loraloom.config.lora import LoraConfig
from loraloom.config.options import options_of
from loraloom.config.train import TrainConfig
from loraloom.config.tune import PRESET, SearchOptions
from loraloom.errors import ConfigError, nearest
from loraloom.tuning.space import PRESETS, Space

#: Shares of the steps at which trials are compared. Few are early: early losses say least about the end.
RUNGS = (1 / 9, 2 / 9, 1 / 3, 1 / 2, 2 / 3)
#: What an extension of a search may change.
EXTENT = ("trials", "space", "finalists", "seeds")
RUN_FILE_TITLE = "# The options of this search. To resume or extend it: loraloom tune and the name of this folder."


@dataclass(kw_only=True)
class TuneConfig(SearchOptions):
    """One search. ``train`` are the options of every trial but for what ``space`` varies; its ``output`` is the folder.

    Raises:
        ConfigError: an unknown option, a wrong type, a value out of range, or options that contradict.
    """

    train: TrainConfig
    space: Space
    #: Notes on how a run file was read, for people; not a field.
    notes: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        for name, kind in (("train", TrainConfig), ("space", Space)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name}: must be {kind.__name__}, found {type(getattr(self, name)).__name__}")
        self.check_fields()
        if self.sampler == "grid":
            self.space.grid()
        size = self.space.size
        if size is not None and self.trials > size:
            raise ConfigError(
                f"trials: the space has {size} configurations, found {self.trials}; lower it or widen the space"
            )
        if self.max_trials is not None and self.trials > self.max_trials:
            raise ConfigError(f"trials: must be at most max_trials ({self.max_trials}), found {self.trials}")
        if self.finalists > self.trials:
            raise ConfigError(f"finalists: must be at most trials ({self.trials}), found {self.finalists}")
        self._check_metric()
        self._check_within()

    def _check_metric(self) -> None:
        train = self.train
        # Which of its kinds a task has, such as whether tags mark entities, is not known before the data is read.
        kinds = tasks.get(train.task).kinds(train.problem_type)
        measured = train.metrics or list(dict.fromkeys(name for kind in kinds for name in kind.unasked))
        given = [name for name in measured if ":" not in name and name != "loss"]
        own = [spec.partition(":")[2] for spec in train.metrics or () if ":" in spec]
        self.metric = self.metric or next(iter([*given, *own]), "loss")
        # The metrics that a function returns are not known before.
        if self.metric not in (*given, "loss") and not own:
            words = " or ".join([", ".join(given), "loss"] if given else ["loss"])
            raise ConfigError(
                f"metric: {train.task} is measured by {words}, found {self.metric!r}"
                f"{nearest(str(self.metric), (*given, 'loss'))}"
            )

    def _check_within(self) -> None:
        """
        Raises:
            ConfigError: ``within`` has no metric to be measured in, or does nothing.
        """
        if self.within is not None and self.metric == "loss":
            raise ConfigError(
                f"within: {self.within:g} is a difference of a metric, and this search compares by the loss; give "
                "--metric, or leave it out"
            )
        if self.within is not None and self.prefer == "quality":
            raise ConfigError("within: does nothing with prefer=quality, which takes the best; leave one of them out")

    @property
    def left_for_later(self) -> list[str]:
        """Keys of chosen options that a search does not use: it evaluates at its rungs, and saves what it needs.

        They are used when the best configuration is trained in full.
        """
        unused = (one for one in options_of(TrainConfig).values() if one.search == "unused")
        return [one.key for one in unused if getattr(self.train, one.name) != one.default]

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
        found = runfile.read(path, overrides, given, tasks.check)
        try:
            config = cls(train=found.options, **_with_preset(found.tune, found.options))
        except ConfigError as error:
            found.fail(error, "tune")
        vars(config)["notes"] = found.notes
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return plain | {"train": self.train.to_dict(), "space": self.space.to_dict()}

    def fingerprint(self) -> str:
        """A hash of all that determines the result: not the folder, the machine, or how many trials train together."""
        return _hash(self._determining())

    def fixed(self) -> str:
        """The same of what no extension may change: not the test, nor options that a search does not use."""
        values = self._determining()
        for name in EXTENT:
            del values[name]
        for name, option in options_of(TrainConfig).items():
            if option.search == "unused" or option.resume == "nothing" or name == "test_split":
                values["train"].pop(name, None)
        return _hash(values)

    def _determining(self) -> dict[str, Any]:
        values = self.to_dict()
        train, lora = values["train"], values["train"]["lora"]
        lora["peft_version"] = "0.21.2"  # part of the hash since 0.1; no version makes another search
        for cls, section in ((SearchOptions, values), (TrainConfig, train), (LoraConfig, lora)):
            for name, option in options_of(cls).items():
                newer = option.since and section.get(name) == option.default
                if newer or (cls is SearchOptions and option.resume == "nothing"):
                    section.pop(name, None)
        for name in ("output", "overwrite", *(["date"] if self.train.date is None else [])):
            del values["train"][name]
        return values

    def run_file(self) -> str:
        """A run file that ``read`` gives back as equal options."""
        values = ((one, getattr(self, name)) for name, one in options_of(SearchOptions).items())
        lines = [f"  {one.leaf}: {yamltext.write(value)}" for one, value in values if value is not None]
        space = [f"    {key}: {yamltext.write(value)}" for key, value in self.space.to_dict().items()]
        head = [RUN_FILE_TITLE, ""]
        return "\n".join([*head, runfile.text(self.train), "tune:", *lines, "  space:", *space, ""])


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _with_preset(tune: Mapping[str, Any], base: TrainConfig) -> dict[str, Any]:
    """The section ``tune``, completed by its preset."""
    values = dict(tune)
    name = PRESET.check.test("preset", values.pop("preset", PRESET.default))
    preset = PRESETS[name]
    space = Space.parse(values["space"], base) if "space" in values else Space.default(base, name)
    size = math.inf if space.size is None else space.size
    trials = int(size) if values.get("sampler") == "grid" and size < math.inf else int(min(preset.trials, size))
    most = values.get("max_trials")
    trials = max(1, min(trials, most)) if isinstance(most, int) else trials
    limit = values.get("trials", trials)
    usual = {"trials": trials, "finalists": preset.finalists, "seeds": preset.seeds}
    if isinstance(limit, int):
        usual["finalists"] = max(1, min(preset.finalists, limit))
    return usual | values | {"space": space}
