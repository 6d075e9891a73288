"""Which metrics a task has, which of them are better when greater, and a user's own functions.

Knows names and plain values; how the figures are worked out is ``train.measures``'s business, and where predictions
come from ``train.evaluation``'s.
"""

from __future__ import annotations

import importlib
import math
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraloom.config import objects
from loraloom.config.lora import TaskType
from loraloom.config.names import task_option
from loraloom.errors import ConfigError, nearest
from loraloom.tasks.metrics import functions
from loraloom.tasks.metrics.tagging import Scheme, scheme_of

#: (predictions, what was right) → figure
Measure = Callable[[Sequence[Any], Sequence[Any]], float]

_TEXTS: dict[str, Measure] = {
    "exact_match": functions.text_exact,
    "rouge1": functions.rouge1,
    "rouge2": functions.rouge2,
    "rougeL": functions.rouge_l,
}
#: What is measured → metric → how. Perplexity follows from the loss. "tags" mark entities, and "words" are tagged with
#: anything else; which of the two it is shows in the tags' names.
MEASURES: dict[str, dict[str, Measure]] = {
    "classes": {
        "accuracy": functions.accuracy,
        "f1_macro": lambda a, b: functions.f1_macro([(x,) for x in a], [(x,) for x in b]),
        "f1_micro": lambda a, b: functions.f1_micro([(x,) for x in a], [(x,) for x in b]),
    },
    "several classes": {
        "f1_micro": functions.f1_micro,
        "f1_macro": functions.f1_macro,
        "subset_accuracy": lambda a, b: functions.accuracy([*map(set, a)], [*map(set, b)]),
    },
    "numbers": {
        "mse": functions.mse,
        "mae": functions.mae,
        "pearson": functions.pearson,
        "spearman": functions.spearman,
        "r2": functions.r2,
    },
    "tags": {
        "f1": functions.entity_f1,
        "precision": functions.entity_precision,
        "recall": functions.entity_recall,
        "accuracy": functions.word_accuracy,
    },
    "words": {
        "accuracy": functions.word_accuracy,
        "f1_macro": functions.word_f1_macro,
        "f1_micro": functions.word_f1_micro,
    },
    "answers": {"f1": functions.answer_f1, "exact_match": functions.answer_exact},
    "texts": _TEXTS,
}
#: What is measured where nothing is asked for, the most telling first. Texts are generated only when asked for.
DEFAULTS = {
    "classes": ("accuracy", "f1_macro"),
    "several classes": ("f1_micro", "f1_macro", "subset_accuracy"),
    "numbers": ("mse", "mae", "pearson", "spearman", "r2"),
    "tags": ("f1", "precision", "recall", "accuracy"),
    "words": ("accuracy", "f1_macro", "f1_micro"),
    "answers": ("f1", "exact_match"),
    "texts": ("perplexity",),
}
_KINDS = {
    TaskType.TOKEN_CLS: "tags",
    TaskType.QUESTION_ANS: "answers",
    TaskType.CAUSAL_LM: "texts",
    TaskType.SEQ_2_SEQ_LM: "texts",
}
_PROBLEMS = {"regression": "numbers", "multi_label_classification": "several classes"}
_LESS = ("loss", "perplexity", "mse", "mae", "rmse", "error", "wer", "cer")


@dataclass(frozen=True)
class Scores:
    """Sums over rows or tokens, so that batches of any size add up to the exact mean."""

    loss_sum: float = 0.0
    count: int = 0

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.loss_sum + other.loss_sum, self.count + other.count)

    @property
    def loss(self) -> float:
        return self.loss_sum / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf if self.loss >= 700 else math.nan


def total(parts: Iterable[Scores]) -> Scores:
    return sum(parts, Scores())


def kind_of(task: TaskType, problem_type: str | None = None) -> str:
    """What is predicted: a key of ``MEASURES``."""
    return _KINDS.get(task) or _PROBLEMS.get(problem_type or "", "classes")


def _kinds_of(task: TaskType, problem_type: str | None) -> list[str]:
    kind = kind_of(task, problem_type)
    return ["tags", "words"] if kind == "tags" else [kind]


def known_metrics(task: TaskType, problem_type: str | None = None) -> list[str]:
    """The names that can be asked for, the loss among them, which is always measured.

    Of token-cls both those of entities and those of words: see ``Metrics.of_labels``.
    """
    kinds = _kinds_of(task, problem_type)
    return list(dict.fromkeys(["loss", *(name for kind in kinds for name in (*DEFAULTS[kind], *MEASURES[kind]))]))


def metric_name(task: TaskType, problem_type: str | None = None) -> str:
    """The metric by which a task's adapters are told apart where nothing else is asked for."""
    return DEFAULTS[kind_of(task, problem_type)][0]


def greater_is_better(name: str) -> bool:
    """By the metric's name. Of a user's own, less is better where its name ends as those of losses and errors do."""
    return name.lower().replace(".", "_").rpartition("_")[2] not in _LESS


@dataclass(frozen=True)
class OwnMetric:
    """A user's function of predictions and of what was right, which gives a number or several by name."""

    spec: str
    function: Callable[[Sequence[Any], Sequence[Any]], Any]

    @property
    def name(self) -> str:
        found = self.spec.partition(":")[2]
        return found.rpartition("-")[0] if self.spec.startswith(objects.GIVEN) else found

    def __call__(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """
        Raises:
            ConfigError: it fails, or gives something else.
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
    if isinstance(value, numbers.Real):  # also numpy's
        return float(value)
    try:
        return float(value.item())  # a tensor or an array of one number
    except Exception:  # whatever else it is
        return None


def own_metric(spec: str) -> OwnMetric:
    """The function that ``package.module:function`` names; modules of the working directory are found.

    Raises:
        ConfigError: there is no such module or function, or the module cannot be imported.
    """
    if (given := objects.find(spec)) is not None:
        return OwnMetric(spec, given)
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ConfigError(f"metrics: {spec!r} must have the form package.module:function")
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"metrics: {spec}: there is no module {error.name!r}, neither in {here} nor installed"
            ) from None
        raise ConfigError(f"metrics: {spec}: importing {module_name} failed: {error}") from error
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"metrics: {spec}: importing {module_name} failed: {why}") from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    function = getattr(module, name, None)
    if function is None:
        raise ConfigError(f"metrics: {module_name} has no {name!r}{nearest(name, vars(module))}")
    if not callable(function):
        raise ConfigError(f"metrics: {spec} is no function, found {type(function).__name__}")
    return OwnMetric(spec, function)


@dataclass(frozen=True)
class Metrics:
    """What is measured of one task's held-out rows beside the loss."""

    task: TaskType
    kind: str
    names: tuple[str, ...]
    own: tuple[OwnMetric, ...] = ()
    #: how the tags mark entities, once they were seen
    scheme: Scheme | None = None

    def of_labels(self, labels: Sequence[str]) -> Metrics:
        """The metrics that fit these classes or tags: tags that mark no entities are measured word by word.

        Raises:
            ConfigError: a metric was asked for that such tags do not have.
        """
        if self.kind != "tags" or not labels:
            return self
        scheme = scheme_of(labels)
        kind = "tags" if scheme else "words"
        names = DEFAULTS[kind] if self.names == DEFAULTS["tags"] else self.names
        for name in names:
            if name != "loss" and name not in MEASURES[kind]:
                raise ConfigError(
                    f"metrics: {name!r} is not measured of these tags ({', '.join(labels[:3])}, ...), which mark "
                    f"{'' if scheme else 'no '}entities; there are loss, {', '.join(MEASURES[kind])}"
                )
        return replace(self, kind=kind, names=names, scheme=scheme)

    @property
    def needs_predictions(self) -> bool:
        return bool(self.own) or any(name in MEASURES[self.kind] for name in self.names)

    @property
    def needs_generation(self) -> bool:
        return self.kind == "texts" and self.needs_predictions

    @property
    def first(self) -> str:
        """The metric that is watched: the first that was asked for."""
        return self.names[0] if self.names else self.own[0].name if self.own else "loss"

    def measure(
        self, scores: Scores, predictions: Sequence[Any] = (), references: Sequence[Any] = ()
    ) -> dict[str, float]:
        """The loss first, then what was asked for.

        Raises:
            ConfigError: a user's function fails, or names its figures as others are named.
        """
        found = {"loss": scores.loss}
        plain = predictions, references
        if self.scheme is not None:  # a user's own function sees the tags as they are
            plain = self.scheme.rows(predictions), self.scheme.rows(references)
        for name in self.names:
            if name in MEASURES[self.kind]:
                found[name] = MEASURES[self.kind][name](*plain)
            elif name == "perplexity":
                found[name] = scores.perplexity
        for own in self.own:
            for name, value in own(predictions, references).items():
                if name in found:
                    raise ConfigError(f"metrics: {own.spec} returns {name!r}, which is measured already; rename it")
                found[name] = value
        return found


def choose(task: TaskType, problem_type: str | None = None, metrics: Sequence[str] | None = None) -> Metrics:
    """What to measure; None is the task's defaults.

    Raises:
        ConfigError: a name that the task does not have, or a function that cannot be had.
    """
    kind = kind_of(task, problem_type)
    if metrics is None:
        return Metrics(task, kind, DEFAULTS[kind])
    known = known_metrics(task, problem_type)
    names = []
    for name in metrics:
        if ":" in name:
            continue
        if name not in known:
            what = task_option(task) + (f" ({problem_type})" if kind in _PROBLEMS.values() else "")
            raise ConfigError(
                f"metrics: {name!r} is none of {what}, which has {', '.join(known)}; a function of your own is given "
                f"as package.module:function{nearest(name, known)}"
            )
        names.append(name)
    own = tuple(own_metric(spec) for spec in dict.fromkeys(metrics) if ":" in spec)
    return Metrics(task, kind, tuple(dict.fromkeys(names)), own)
