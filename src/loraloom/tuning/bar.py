"""What a configuration has to beat before it may be recommended, and whether it does.

The bar is the best answer that does not look at the row (the commonest class, the mean, the tag O, the commonest text)
and the frozen model's own where its head is not a new one. A configuration has learned something if it lies above the
bar by more than its standard error, and by more than the luck of the best of all that were tried explains: by the
metric, or by the loss, on the same held-out rows. To be recommended it must be better than a new head on the frozen
model as well. The training loss of the constant answer says when a trial has taken
off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from loraloom.inference.evaluation import Evaluator
from loraloom.inference.intervals import t_quantile
from loraloom.inference.jackknife import Figures, error, figures
from loraloom.lora.routing import BASE
from loraloom.tasks.baseline import Constant, Known
from loraloom.tasks.metrics.kinds import total
from loraloom.tasks.outputs import Predictions
from loraloom.training.setup import Setup
from loraloom.tuning.asha import ERRORS, taken_off
from loraloom.tuning.head_baseline import HEAD, measure_head
from loraloom.tuning.ranking import goodness
from loraloom.tuning.trial import Trial

#: One chance in twenty that nothing but luck passes, over all configurations together.
LUCK = 0.05
#: A loss is better only from this share on: differences of a thousandth can be certain, and are of no use.
SHARE = 0.02
#: Training rows that the shares of constant answers are counted in, spread over all.
COUNTED = 5000
#: Training losses that say where a trial began, where no constant answer does.
FIRST = 4
#: Metrics that no constant answer has: it goes along with nothing.
CORRELATIONS = ("pearson", "spearman")
FROZEN = "the frozen model"


@dataclass
class Bar:
    """``answers`` are figures in words → metric → over all held-out rows, and over all but each part of them.

    ``base`` is the training loss of the best constant answer, None if there is none. ``begins`` says whether a
    trial's own first losses count as well, because its head has learned before.
    """

    rows: int
    base: float | None = None
    begins: bool = True
    answers: dict[str, Figures] = field(default_factory=dict)
    #: figures of a new head on the frozen model; empty if none was measured. It stops and resumes no trial
    head: Figures = field(default_factory=dict)

    def best(self, metric: str) -> tuple[str, list[float]] | None:
        """The hardest to beat, in words, and its figures."""
        found = [(words, one[metric]) for words, one in self.answers.items() if metric in one]
        finite = [(words, values) for words, values in found if math.isfinite(values[0])]
        if not finite:
            return None
        return max(finite, key=lambda pair: goodness(metric, pair[1][0]))

    def baselines(self, metric: str) -> list[tuple[str, list[float]]]:
        """All that needs no LoRA, the hardest to beat first: a new head, the frozen model, the best constant answer."""
        constant = replace(self, answers={words: one for words, one in self.answers.items() if words != FROZEN})
        found = [(HEAD, self.head.get(metric)), (FROZEN, self.answers.get(FROZEN, {}).get(metric))]
        found += [constant.best(metric) or ("", None)]
        finite = [(words, values) for words, values in found if values and math.isfinite(values[0])]
        return sorted(finite, key=lambda pair: -goodness(metric, pair[1][0]))

    def figures(self, metric: str, *, hardest: bool = False) -> dict[str, Any]:
        """The figures of a message about the bar, or with ``hardest`` about the hardest baseline."""
        best = next(iter(self.baselines(metric)), None) if hardest else self.best(metric)
        return {"metric": metric, "bar_words": best and best[0], "bar": best and best[1][0]}

    @property
    def parts(self) -> int:
        """Parts that the held-out rows are divided into."""
        return max((len(values) - 1 for one in self.answers.values() for values in one.values()), default=0)

    def has_taken_off(self, losses: list[float], steps: int) -> bool:
        """Whether a trial of ``steps`` steps with these training losses has left where it began."""
        base = self.starting_loss(losses)
        return base is not None and taken_off(losses, base, steps)

    def is_beaten(self, loss: Sequence[float], rows: int) -> bool:
        """Whether a held-out ``loss``, over ``rows`` rows and without each part, is clearly below the best answer's."""
        best = self.best("loss")
        if best is None:
            return False
        gap = [other - one for other, one in zip(best[1], loss, strict=False)]
        paired = rows == self.rows and len(loss) == len(best[1])
        spread = error(gap) if paired else math.hypot(error(loss), error(best[1]))
        return gap[0] > max(ERRORS * spread, SHARE * abs(best[1][0]))

    def starting_loss(self, losses: Sequence[float]) -> float | None:
        """The training loss that a trial with these ``losses`` must leave behind; None while that is not known."""
        first = fmean(losses[:FIRST]) if len(losses) >= FIRST else None
        if not self.begins:
            return self.base
        return first if self.base is None else self.base if first is None else min(first, self.base)


@dataclass(frozen=True)
class Gain:
    """How far above the bar: ``gain`` with its standard error, and the standard error of the figure itself."""

    metric: str
    bar: float
    bar_words: str
    figure: float
    gain: float
    error: float
    own_error: float
    sure: bool


def set_bar(setup: Setup) -> Bar:
    """Measure the bar on the held-out rows of ``setup``."""
    return measure_bar(setup, setup.evaluator())


def measure_bar(setup: Setup, evaluator: Evaluator, *, head: bool = True) -> Bar:
    """Measure it on the rows of ``evaluator``; the ``head`` is fitted to training rows first."""
    bar, data = Bar(evaluator.row_count), setup.data
    if setup.task.own_loss is None:  # the losses of a constant answer are not those of a user's own function
        count = len(data.train.examples)
        counted = [data.train.examples[i * count // min(count, COUNTED)] for i in range(min(count, COUNTED))]
        block = min(setup.options.batch_size, len(evaluator.examples))
        known = Known(data.names, data.problem, setup.tokenizer, data.train.largest + 1, block)
        if (found := setup.task.constant(counted, known)) is not None:
            bar.base, bar.answers = found.loss(counted), _constant_figures(found, setup, evaluator)
    bar.begins = not (setup.new_modules and setup.task.class_word)  # a new head for classes is of no use untrained
    if bar.begins:
        (bar.answers[FROZEN],) = evaluator.figures([BASE], evaluator.parts)
    bar.head = measure_head(setup, evaluator) if head else {}
    return bar


def _constant_figures(found: Constant, setup: Setup, evaluator: Evaluator) -> dict[str, Figures]:
    """Answer in words → its figures on the rows of ``evaluator``."""
    examples, parts = evaluator.examples, evaluator.parts
    scores = [total(found.score(examples[number]) for number in part) for part in parts]
    if found.texts:
        texts = found.texts if setup.metrics.needs_predictions else found.texts[:1]
        targets = [setup.task.prompt_and_target(example)[1] for example in examples]
        references = [setup.tokenizer.decode(target, skip_special_tokens=True) for target in targets]
        numbers = list(range(len(examples)))
        saying = {f"always {text!r}": Predictions([text] * len(numbers), references, numbers) for text in texts}
        return {words: figures(setup.metrics, scores, one, parts) for words, one in saying.items()}
    held_out, needed = evaluator.rows, setup.metrics.needs_predictions
    out: dict[str, Figures] = {}
    for words, answer in found.answers if needed else found.answers[:1]:
        outputs = [answer(example) for example in examples] if needed else []
        made = setup.task.predictions(examples, outputs, held_out) if needed else Predictions()
        out[words] = figures(setup.metrics, scores, made, parts)
    return out


def gain(bar: Bar, trials: Sequence[Trial], metric: str, tried: int) -> Gain | None:
    """How far a configuration, trained with one seed or several, lies above the bar; None where that is not known."""
    seeds = [trial.parts[metric] for trial in trials if trial.parts.get(metric)]
    best = bar.best(metric)
    words, values = best if best is not None else ("no correlation", [])
    if best is None and metric in CORRELATIONS and seeds:
        values = [0.0] * len(seeds[0])
    if not seeds or not values or any(len(seed) != len(values) for seed in seeds):
        return None
    mean = [fmean(column) for column in zip(*seeds, strict=True)]
    above = [goodness(metric, one - other) for one, other in zip(mean, values, strict=True)]
    # One more row might have gone the other way: no difference is surer than that.
    least = abs(above[0]) / max(bar.rows, 1)
    spread, own = max(error(above), least), max(error(mean), least)
    least_share = SHARE * abs(values[0]) if metric == "loss" else 0.0
    sure = above[0] > least_share and above[0] > needed(len(values) - 1, tried) * spread
    return Gain(metric, values[0], words, mean[0], above[0], spread, own, sure)


def learned(bar: Bar, trials: Sequence[Trial], metric: str, tried: int) -> bool:
    """Whether the configuration of ``trials`` (its seeds) is above the bar, of ``tried`` configurations."""
    by_metric = gain(bar, trials, metric, tried)
    by_loss = gain(bar, trials, "loss", tried)
    if by_metric is None:  # a metric that no answer but the trials' has: the loss alone decides
        return by_loss is not None and by_loss.sure
    return by_metric.gain > by_metric.own_error and (by_metric.sure or (by_loss is not None and by_loss.sure))


def needed(parts: int, tried: int) -> float:
    """Standard errors that the best of ``tried`` must lie above the bar: Student's t, with Bonferroni's correction."""
    if parts < 2:
        return math.inf
    return t_quantile(1 - LUCK / max(tried, 1), parts - 1)
