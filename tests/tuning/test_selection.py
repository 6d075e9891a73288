"""Promises of the balance: what a user prefers decides among configurations that are as good, and baselines count."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console

from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Curve
from loraloom.inference.jackknife import divide
from loraloom.report.sentences import sentence
from loraloom.report.tune import conclusion
from loraloom.tuning.bar import Bar
from loraloom.tuning.judge import Judge
from loraloom.tuning.selection import Balance, front
from loraloom.tuning.trial import Trial
from loraloom.tuning.verdict import Verdict, verdict

ROWS = 400
PARTS = divide(list(range(ROWS)))


def right(rows: Iterable[int]) -> list[float]:
    """Accuracy where these rows of 400 are right: over all, and over all but each part."""
    good = set(rows)
    kept = [[row in good for row in range(ROWS) if row not in part] for part in ([], *map(set, PARTS))]
    return [sum(one) / len(one) for one in kept]


def trial(number: int, rows: Iterable[int], parameters: int = 1000, steps: int = 100, **more: Any) -> Trial:
    accuracy = right(rows)
    options = TrainConfig(model="m", data="d", task="seq-cls", output="o", seed=0)
    curve = Curve([0.5] * steps, [], [{"step": steps, "loss": 0.3, "accuracy": accuracy[0]}])
    found = Trial(number, {"lora.r": number + 1}, options, steps, steps, "finished", curve=curve, **more)
    found.parameters, found.bytes = parameters, 4 * parameters
    found.parts = {"accuracy": accuracy, "loss": [0.3] * len(accuracy)}
    return found


#: The best; the same but for 2 rows, and smaller; clearly worse, and tiny; as good, on half of the steps.
TRIALS = [
    trial(0, range(300), 4000),
    trial(1, range(2, 300), 2000),
    trial(2, range(240), 10),
    trial(3, range(1, 300), 4000, steps=50),
]
BAR = Bar(ROWS, 0.7, False, {"always 'a'": {"accuracy": right(range(200, 400)), "loss": [0.7] * 21}})


def judged(trials: list[Trial] = TRIALS, head: Iterable[int] = (), **balance: Any) -> Verdict:
    figures = {"accuracy": right(head)} if head else {}
    bar = Bar(BAR.rows, BAR.base, BAR.begins, BAR.answers, figures)
    return verdict(trials, "accuracy", bar=bar, judge=Judge("accuracy", ROWS), balance=Balance(**balance))


@pytest.mark.parametrize(
    ("balance", "best", "decided"),
    [
        ({}, 0, "best"),
        ({"prefer": "quality"}, 0, "best"),
        ({"prefer": "small"}, 1, "preferred"),
        ({"prefer": "fast"}, 3, "preferred"),
        ({"within": 0.003}, 3, "preferred"),
        ({"within": 0.005}, 1, "preferred"),
        ({"within": 0.2}, 2, "preferred"),
        ({"within": 0.2, "prefer": "fast"}, 3, "preferred"),
        ({"max_size": 10_000}, 1, "best"),
    ],
)
def test_what_is_preferred_decides_among_those_as_good(balance: dict[str, Any], best: int, decided: str) -> None:
    same_size = [*TRIALS[:3], trial(3, range(1, 300), 3999, steps=50)]
    found = judged(same_size, **balance)
    assert (found.best.number, found.why.kind) == (best, decided)
    assert sentence(found.why)


def test_without_one_small_enough_the_smallest_is_taken_and_that_is_said() -> None:
    found = judged(max_size=39)
    assert found.best.number == 2
    (note,) = (sentence(note) for note in found.notes if note.kind == "none_fits")
    assert note.startswith("no adapter that learned something has at most 39 B: trial 2 is the smallest, with 40 B")


def test_the_front_holds_what_no_other_beats_in_quality_training_and_size() -> None:
    assert judged().front == [0, 3, 1, 2]
    assert front({0: (1, 1, 1), 1: (1, 1, 1), 2: (2, 1, 1), 3: (2, 0, 9)}) == [0, 1, 3]


def test_a_difference_is_taken_row_by_row_and_its_words_say_what_the_rows_can() -> None:
    rival = next(one for one in judged().against if one.trial == 3)
    assert (rival.better.clear, rival.better.rows, rival.better.seeds) == (False, ROWS, 1)
    assert rival.better.value == pytest.approx(1 / 400)
    worse = judged([TRIALS[0], TRIALS[2]]).against[0].better
    assert worse.value == pytest.approx(0.15)
    assert 0.1 < worse.low < 0.15 < worse.high < 0.2  # the standard error of 60 rows that the best alone has right


def test_what_is_not_shown_to_beat_a_new_head_is_not_recommended() -> None:
    equal = judged(head=range(5, 300))
    assert (equal.learned, equal.recommended, equal.best.number) == (True, False, 0)
    assert {"rows"} <= {advice.kind for advice in equal.advice}
    behind = judged(head=range(310))
    assert (behind.recommended, behind.advice[0].kind) == (False, "behind_head")
    assert sentence(behind.advice[0]).startswith("in 100 steps the best LoRA is 0.025 behind a new head in accuracy")
    assert judged(head=range(396)).advice[0].kind == "full"
    assert judged(head=range(240)).recommended
    assert judged(head=range(240)).against[1].words == "a new head on the frozen model"


def test_only_those_above_the_new_head_are_chosen_from() -> None:
    """The smaller one ties with the best, but a new head has all that it has."""
    assert judged(prefer="small").best.number == 1
    trials = [trial(0, range(300), 4000), trial(1, [*range(100), *range(115, 300)], 2000)]
    assert judged(trials, prefer="small", head=range(50, 300)).best.number == 0


def test_a_figure_of_one_adapter_on_rows_is_exact_and_that_of_stopped_trials_has_their_rows_error() -> None:
    found = judged()
    assert found.figure is not None
    assert (found.figure.value, found.rows) == (0.75, ROWS)
    assert (found.figure.low, found.figure.high) == pytest.approx((0.7046, 0.7917), abs=1e-3)  # Clopper and Pearson
    assert found.scores[0].error == pytest.approx(found.scores[0].of_rows)
    assert 0.015 < found.scores[0].of_rows < 0.03  # that of the textbook is 0.0217
    stopped = trial(4, range(100))
    stopped.state, stopped.rungs, stopped.parts = "stopped", {100: stopped.parts}, {}
    assert judged([*TRIALS, stopped]).scores[4].error == pytest.approx(0.0217, rel=0.35)


def words(found: Verdict) -> list[str]:
    console = Console(width=500, file=io.StringIO())
    console.print(conclusion(found))
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]  # type: ignore[attr-defined]


def test_the_first_line_says_what_to_do_and_the_next_how_sure_that_is() -> None:
    first, second, baseline, runner_up, *_ = words(judged(prefer="small", head=range(200)))
    assert first == "use r=2"
    assert second.startswith(
        "trial 1: accuracy 0.745 (0.699 to 0.787, 95 %) on the 400 rows that chose it, 2,000 param"
    )
    assert baseline.startswith("better than a new head on the frozen model (0.500) by 0.245 (")
    assert baseline.endswith(", 95 %, paired on 400 rows)")
    assert runner_up.startswith("cannot be told apart from the runner-up, trial 0 (0.750) on 400 rows; about ")
    assert runner_up.endswith(" would do: r=1, 2 times the size")
    assert "smaller or faster: trial 2 (accuracy 0.600, 40 B)" in words(judged(TRIALS[:3], prefer="small"))
    experts = trial(0, range(300), unadapted="7 expert weights, 9 parameters, 90.0 % of the model")
    assert words(judged([experts]))[0] == "use r=1 (7 expert weights, 9 parameters, 90.0 % of the model stay unadapted)"
    first, second, *_ = words(judged(head=range(300)))
    assert first.startswith("no configuration is recommended: none is shown to be better than a new head")
    assert second.startswith("the best of them is trial 0 (r=1): accuracy 0.750 (")
