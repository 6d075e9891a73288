"""The metrics of a task by name, whether greater is better, and a user's own functions."""

from __future__ import annotations

import numbers
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraloom.config import objects
from loraloom.errors import ConfigError, nearest
from loraloom.tasks.base import Task
from loraloom.tasks.metrics.kinds import Kind, Scores

_LESS = ("loss", "perplexity", "mse", "mae", "rmse", "error", "wer", "cer")


def known_metrics(kinds: Iterable[Kind]) -> list[str]:
    """The names that a user can give, with the loss, which is always measured."""
    return list(dict.fromkeys(["loss", *(name for kind in kinds for name in (*kind.unasked, *kind.measures))]))


def greater_is_better(name: str) -> bool:
    """By the metric's name. A user's own metric is better when smaller if its name ends like a loss or an error."""
    return name.lower().replace(".", "_").rpartition("_")[2] not in _LESS


@dataclass(frozen=True)
class OwnMetric:
    """A user's function of predictions and right answers, which returns a number, or several by name."""

    spec: str
    function: Callable[[Sequence[Any], Sequence[Any]], Any]

    @property
    def name(self) -> str:
        found = self.spec.partition(":")[2]
        return found.rpartition("-")[0] if self.spec.startswith(objects.GIVEN) else found

    def __call__(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """
        Raises:
            ConfigError: the function fails, or returns something else.
        """
        try:
            found = self.function(predictions, references)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise ConfigError(
                f"metrics: {self.spec} failed with {type(error).__name__}: {error} "
                f"({os.path.basename(last.filename)}, line {last.lineno})"
            ) from error
        named = found if isinstance(found, Mapping) else {self.name: found}
        out: dict[str, float] = {}
        for key, value in named.items():
            figure = _number(value)
            if not isinstance(key, str) or figure is None:
                shown = f"{key!r}: {value!r}" if isinstance(found, Mapping) else repr(value)
                raise ConfigError(
                    f"metrics: {self.spec} must return a number or a dict of numbers by name, found "
                    f"{type(value).__name__} ({shown[:100]})"
                )
            out[key] = figure
        return out


def _number(value: Any) -> float | None:
    if isinstance(value, numbers.Real):  # including numpy's
        return float(value)
    try:
        return float(value.item())  # a tensor or an array of one number
    except Exception:  # any other type
        return None


def own_metric(spec: str) -> OwnMetric:
    """The function that ``spec`` names: see ``config.objects.load``."""
    return OwnMetric(spec, objects.load("metrics", spec))


@dataclass(frozen=True)
class Metrics:
    """What is measured on held-out rows of one task beside the loss."""

    task: Task
    kind: Kind
    names: tuple[str, ...]
    own: tuple[OwnMetric, ...] = ()

    def of_labels(self, labels: Sequence[str]) -> Metrics:
        """The metrics that fit these classes or tags: tags that mark no entities are measured word by word.

        Raises:
            ConfigError: such tags do not have a metric that was given.
        """
        kind = self.task.kind(self.kind.problem, labels)
        if kind == self.kind or not labels:
            return self
        names = kind.unasked if self.names == self.kind.unasked else self.names
        for name in names:
            if name != "loss" and name not in kind.measures:
                raise ConfigError(
                    f"metrics: {name!r} is not measured of these {self.task.class_word}s "
                    f"({', '.join(labels[:3])}, ...), {kind.which}; there are loss, {', '.join(kind.measures)}"
                )
        return replace(self, kind=kind, names=names)

    @property
    def needs_predictions(self) -> bool:
        return bool(self.own) or any(name in self.kind.measures for name in self.names)

    @property
    def needs_generation(self) -> bool:
        return self.task.generates and self.needs_predictions

    @property
    def first(self) -> str:
        """The metric that decides: the first one given."""
        return self.names[0] if self.names else self.own[0].name if self.own else "loss"

    def measure(
        self, scores: Scores, predictions: Sequence[Any] = (), references: Sequence[Any] = ()
    ) -> dict[str, float]:
        """The loss first, then the metrics in order.

        Raises:
            ConfigError: a user's function fails, or uses the name of another metric.
        """
        found = {"loss": scores.loss}
        plain = [self.kind.plain(given) for given in (predictions, references)]  # not for users' functions
        for name in self.names:
            if name in self.kind.measures:
                found[name] = self.kind.measures[name](*plain)
            elif name == "perplexity":
                found[name] = scores.perplexity
        for own in self.own:
            for name, value in own(predictions, references).items():
                if name in found:
                    raise ConfigError(f"metrics: {own.spec} returns {name!r}, which is measured already; rename it")
                found[name] = value
        return found


def choose(task: Task, problem: str | None = None, metrics: Sequence[str] | None = None) -> Metrics:
    """What to measure; by default the task's defaults.

    Raises:
        ConfigError: a name that the task does not have, or a function that cannot be loaded.
    """
    kind = task.kind(problem)
    if metrics is None:
        return Metrics(task, kind, kind.unasked)
    known = known_metrics(task.kinds(problem))
    names = []
    for name in metrics:
        if ":" in name:
            continue
        if name not in known:
            what = task.name + (f" ({kind.problem})" if kind.problem else "")
            raise ConfigError(
                f"metrics: {name!r} is none of {what}, which has {', '.join(known)}; a function of your own is given "
                f"as package.module:function{nearest(name, known)}"
            )
        names.append(name)
    own = tuple(own_metric(spec) for spec in dict.fromkeys(metrics) if ":" in spec)
    return Metrics(task, kind, tuple(dict.fromkeys(names)), own)
