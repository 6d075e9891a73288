"""Promises of the verdict: it names the best by measurement, says when that is a tie, and advises only from figures."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Curve
from loraloom.errors import TrainingError
from loraloom.messages import Message
from loraloom.report.sentences import sentence
from loraloom.tasks.metrics.registry import greater_is_better
from loraloom.tuning.ranking import compare, goodness
from loraloom.tuning.record import record
from loraloom.tuning.selection import pareto
from loraloom.tuning.trial import Trial
from loraloom.tuning.verdict import Verdict, verdict

STEPS = 120
#: The curves of these trials do not call for advice: they fall, level out, and wobble a little.
CALM = [0.5 + 1.5 * math.exp(-step / 12) + 0.02 * math.sin(step * 1.7) for step in range(STEPS)]


def trial(
    number: int,
    score: float = 0.8,
    *,
    parameters: int = 1000,
    state: str = "finished",
    seed: int = 0,
    repeats: int | None = None,
    rate: float = 1e-3,
    values: Mapping[str, Any] | None = None,
    losses: list[float] | None = None,
    held_out: list[float] | None = None,
    step: int = STEPS,
    metric: str = "accuracy",
    used: dict[str, tuple[int, int, float]] | None = None,
    **lora: Any,
) -> Trial:
    losses = (CALM if losses is None else losses)[:step]
    held_out = [0.9, 0.7, 0.6] if held_out is None else held_out
    at = [step * (i + 1) // len(held_out) for i in range(len(held_out))]
    evaluations = [{"step": s, "loss": loss, metric: score} for s, loss in zip(at, held_out, strict=True)]
    options = TrainConfig(
        model="m", data="d", task="seq-cls", output="o", learning_rate=rate, seed=seed, lora=LoraConfig(**lora)
    )
    values = {"train.learning_rate": rate} if values is None else values
    curve = Curve(losses, [rate] * len(losses), evaluations)
    return Trial(
        number,
        dict(values),
        options,
        STEPS,
        step,
        state,
        "",
        curve,
        parameters,
        4 * parameters,
        1.0,
        repeats,
        used or {},
    )  # type: ignore[arg-type]


def seeds(number: int, scores: list[float], **more: Any) -> list[Trial]:
    """A configuration and its repetitions."""
    first = trial(number, scores[0], **more)
    return [first] + [
        trial(100 * (number + 1) + i, score, seed=i, repeats=number, **more) for i, score in enumerate(scores[1:], 1)
    ]


def advice(found: Verdict, kind: str) -> Message | None:
    return next((item for item in found.advice if item.kind == kind), None)


# Who wins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 2), ("loss", 1), ("perplexity", 1)])
def test_more_accuracy_is_better_and_less_loss_and_perplexity(metric: str, best: int) -> None:
    trials = [trial(i, score, metric=metric, held_out=[score]) for i, score in enumerate([0.6, 0.5, 0.7])]
    assert verdict(trials, metric).best.number == best
    assert greater_is_better(metric) == (metric == "accuracy")


def test_a_single_early_peak_gives_no_rank() -> None:
    rising, peaked, stopped = trial(0), trial(1), trial(2, state="stopped", step=80)
    for one, curve in ((rising, [0.5, 0.6, 0.8]), (peaked, [0.95, 0.5, 0.7]), (stopped, [0.99, 0.5])):
        at = [40, 80, 120][: len(curve)]
        one.curve.evaluations[:] = [{"step": s, "accuracy": a, "loss": 1 - a} for s, a in zip(at, curve, strict=True)]
    assert verdict([rising, peaked, stopped], "accuracy").ranking == [0, 1, 2]
    assert compare([rising, peaked, stopped], "accuracy").values == {0: 0.6, 1: 0.5, 2: 0.5}  # all at step 80


def test_a_tie_goes_to_the_cheaper_and_says_so() -> None:
    large, small = seeds(0, [0.80, 0.81, 0.82], parameters=4000), seeds(1, [0.79, 0.81, 0.82], parameters=1000)
    found = verdict([*large, *small], "accuracy")
    assert (found.best.number, found.runner_up and found.runner_up.number, found.tie) == (1, 0, True)
    assert "a tie, so the cheaper one wins, with 1,000 parameters against 4,000" in sentence(found.why)


def test_a_difference_above_the_noise_goes_to_the_better() -> None:
    large, small = seeds(0, [0.84, 0.85, 0.86], parameters=4000), seeds(1, [0.79, 0.81, 0.82], parameters=1000)
    found = verdict([*large, *small], "accuracy")
    assert (found.best.number, found.tie) == (0, False)
    assert sentence(found.why) == "the best accuracy"


def test_the_noise_is_the_pooled_deviation_over_the_root_of_the_seeds() -> None:
    found = verdict([*seeds(0, [0.8, 0.82]), *seeds(1, [0.7, 0.71, 0.72]), trial(2, 0.6)], "accuracy")
    pooled = math.sqrt((0.0002 + 0.0002) / 3)  # sums of squares over 1 + 2 degrees of freedom
    assert found.scores[0].noise == pytest.approx(pooled / math.sqrt(2))
    assert found.scores[1].noise == pytest.approx(pooled / math.sqrt(3))
    assert found.scores[2].noise == pytest.approx(pooled)
    assert found.scores[1].values == {0: 0.7, 1: 0.71, 2: 0.72}
    assert found.scores[1].mean == pytest.approx(0.71)


def test_one_unstable_configuration_does_not_make_the_others_a_tie() -> None:
    steady = [*seeds(0, [0.80, 0.801, 0.802], parameters=4000), *seeds(1, [0.78, 0.781, 0.782])]
    assert verdict([*steady, *seeds(2, [0.81, 0.3, 0.8])], "accuracy").best.number == 0


def test_a_single_lucky_seed_does_not_beat_the_finalists() -> None:
    found = verdict([*seeds(0, [0.82, 0.80]), *seeds(1, [0.81, 0.79]), trial(2, 0.815)], "accuracy")
    assert found.best.number == 0
    assert found.runner_up is not None
    assert found.runner_up.number == 1


def test_without_repeats_the_noise_is_said_to_be_unknown() -> None:
    found = verdict([trial(0, 0.8), trial(1, 0.79)], "accuracy")
    assert (found.best.number, found.tie) == (0, False)
    assert any("one seed" in sentence(note) for note in found.notes)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_what_is_not_finite_never_wins(odd: Any, metric: str) -> None:
    found = verdict([trial(0, odd, metric=metric), trial(1, 0.1, metric=metric)], metric)
    assert found.best.number == 1
    assert found.runner_up is None
    assert found.pareto == [1]


def test_a_configuration_of_which_a_seed_diverged_stands_behind_those_that_held() -> None:
    broken = seeds(0, [0.9, 0.9, 0.9])
    broken[2].state = "failed"
    assert verdict([*broken, *seeds(1, [0.8, 0.8, 0.8])], "accuracy").best.number == 1


def test_only_finished_trials_win_while_there_is_one() -> None:
    found = verdict([trial(0, 0.9, state="stopped", step=60), trial(1, 0.5)], "accuracy")
    assert found.best.number == 1
    assert found.pareto == [1]


def test_without_a_finished_trial_the_furthest_are_compared_and_that_is_said() -> None:
    trials = [trial(0, 0.9, state="stopped", step=30), trial(1, 0.5, state="running", step=60)]
    found = verdict([*trials, trial(2, 0.6, state="stopped", step=60)], "accuracy")
    assert found.best.number == 2
    assert sentence(found.notes[0]) == "no trial finished: the 2 that came furthest are compared, at 50% of their steps"


def test_a_failed_trial_never_wins_whatever_it_had_reached() -> None:
    assert (
        verdict([trial(0, 0.9, state="failed"), trial(1, 0.5, state="stopped", step=30)], "accuracy").best.number == 1
    )


def test_nothing_measured_is_an_error_with_the_reasons() -> None:
    failed = trial(0, math.nan, state="failed")
    failed.reason = "its loss is not finite at step 3"
    with pytest.raises(TrainingError, match="none of 1 trials has a finite accuracy.*not finite at step 3"):
        verdict([failed], "accuracy")


def test_equal_trials_go_by_their_number_in_whatever_order_they_come() -> None:
    trials = [trial(i, 0.8) for i in range(5)]
    orders = [trials, trials[::-1], trials[2:] + trials[:2]]
    assert {(v.best.number, tuple(v.ranking)) for v in (verdict(o, "accuracy") for o in orders)} == {
        (0, (0, 1, 2, 3, 4))
    }


# The front ------------------------------------------------------------------------------------------------

POINTS = st.dictionaries(st.integers(0, 30), st.tuples(st.integers(1, 6), st.integers(0, 6).map(float)), min_size=1)


@given(POINTS)
@settings(deadline=None)
def test_no_trial_of_the_front_is_dominated_and_every_other_one_is(points: dict[int, tuple[int, float]]) -> None:
    front = pareto(points)

    def beats(one: int, other: int) -> bool:
        (a, x), (b, y) = points[one], points[other]
        return a <= b and x >= y and (a, x) != (b, y)

    for number in points:
        assert (number in front) == (not any(beats(other, number) for other in points))
    assert front == sorted(front, key=lambda n: (points[n][0], n))


# Which hyperparameter mattered --------------------------------------------------------------------------------------


def searched(count: int = 24, *, matters: bool = True, metric: str = "accuracy") -> list[Trial]:
    """Random trials in which the rate decides, or nothing does."""
    draw = random.Random(3)
    trials = []
    for number in range(count):
        r, targets = draw.choice([4, 8, 16]), draw.choice(["q_proj,v_proj", "all-linear"])
        rate = 10 ** draw.uniform(-4, -2)
        score = (0.8 - 0.1 * (math.log10(rate) + 3) ** 2 if matters else 0.7) + draw.gauss(0, 0.003)
        values = {"lora.r": r, "lora.target_modules": targets, "train.learning_rate": rate}
        score = score if metric == "accuracy" else 1 / score
        size = r * 100 * (2 if "," in targets else 7)
        trials.append(trial(number, score, rate=rate, r=r, values=values, parameters=size, metric=metric))
    return trials


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_the_importance_finds_the_hyperparameter_that_matters(metric: str) -> None:
    found = verdict(searched(metric=metric), metric)
    assert next(iter(found.importance)) == "train.learning_rate"
    assert sum(found.importance.values()) == pytest.approx(1)
    assert found.mattered == ["train.learning_rate"]


def test_where_nothing_matters_no_hyperparameter_is_said_to() -> None:
    found = verdict(searched(matters=False), "accuracy")
    assert found.importance
    assert found.mattered == []


def test_the_importance_takes_the_distributions_of_the_space() -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    spaces = {
        "train.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        "lora.r": CategoricalDistribution([4, 8, 16]),
    }
    assert verdict(searched(), "accuracy", distributions=spaces).mattered == ["train.learning_rate"]


def test_the_importance_is_the_same_each_time_and_leaves_optunas_logging_alone() -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verdict(searched(), "accuracy").importance == verdict(searched(), "accuracy").importance
    assert optuna.logging.get_verbosity() == before


@pytest.mark.parametrize(
    ("trials", "reason"),
    [
        (searched(7), "7 trials can be compared; 8 are needed"),
        ([trial(i, i / 10) for i in range(9)], "no hyperparameter had more than one value"),
        ([trial(i, 0.5, rate=(i + 1) * 1e-4) for i in range(9)], "all trials have the same accuracy"),
    ],
)
def test_where_the_importance_cannot_be_told_there_is_a_reason(trials: list[Trial], reason: str) -> None:
    found = verdict(trials, "accuracy")
    assert found.importance == {}
    assert found.importance_reason is not None
    assert sentence(found.importance_reason).startswith(reason)


def test_trials_are_compared_at_the_furthest_point_that_half_of_them_and_eight_reached() -> None:
    stopped = [trial(i, 0.1 * i, state="stopped", step=30, held_out=[1.0]) for i in range(8)]
    ended = [trial(8 + i, 0.9, held_out=[1.0, 0.9, 0.8, 0.7]) for i in range(4)]
    compared = compare([*stopped, *ended, trial(20, 0.3, state="failed")], "accuracy")
    assert compared.share == 0.25
    assert compared.values.keys() == {*range(12), 20}
    assert compared.values[20] == 0.0  # the worst
    assert goodness("loss", 2.0) < goodness("loss", 1.0)


# Advice: given with its figures, and not without ----------------------------------------------------------


def rates(scores: list[float], low: float = 1e-4) -> list[Trial]:
    return [trial(i, score, rate=low * 2**i) for i, score in enumerate(scores)]


def top(values: Mapping[str, Any]) -> dict[str, str]:
    return {"train.learning_rate": "high"} if values["train.learning_rate"] > 1e-2 else {}


def test_a_best_at_the_edge_where_the_trend_leads_there_says_to_widen() -> None:
    item = advice(verdict(rates([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]), "accuracy", edges=top), "edge")
    assert item is not None
    assert "best rate, 0.0128, is at the upper edge of the space" in sentence(item)
    assert (item.figures["near"], item.figures["far"]) == (pytest.approx(0.65), pytest.approx(0.25))


def test_a_low_edge_of_less_is_better_and_of_words_says_so_too() -> None:
    values = ["r", "2r", "4r", "8r"]
    trials = [
        trial(i, 1.0 + values.index(word), metric="perplexity", values={"lora.lora_alpha": word})
        for i, word in enumerate(values * 2)
    ]
    sides = {"lora.lora_alpha": "low"}
    assert advice(verdict(trials, "perplexity", edges=lambda v: sides), "edge") is None  # words have no order
    found = verdict(trials, "perplexity", edges=lambda v: sides, order={"lora.lora_alpha": values})
    item = advice(found, "edge")
    assert item is not None
    assert "alpha, r, is at the lower edge" in sentence(item)


@pytest.mark.parametrize(
    ("scores", "edges"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], lambda values: {}),  # not at the edge
        ([0.6, 0.3, 0.7, 0.5, 0.4, 0.6, 0.3, 0.8], top),  # no trend
        ([0.1, 0.2, 0.3, 0.4], lambda values: {"train.learning_rate": "high"}),  # too few
    ],
)
def test_an_edge_without_a_trend_says_nothing(scores: list[float], edges: Any) -> None:
    assert advice(verdict(rates(scores), "accuracy", edges=edges), "edge") is None


def test_an_edge_of_a_hyperparameter_that_only_varied_with_another_says_nothing() -> None:
    trials = []
    for i in range(24):  # the rate decides, and a high rate mostly came with a high alpha
        values = {
            "train.learning_rate": (rate := 1e-4 * 1.2**i),
            "lora.lora_alpha": 2 if (i > 11) == (i % 4 > 0) else 1,
        }
        trials.append(trial(i, i / 30, rate=rate, values=values))
    found = verdict(trials, "accuracy", edges=lambda values: dict.fromkeys(values, "high"))
    assert found.best.values["lora.lora_alpha"] == 2
    assert [item.figures["knob"] for item in found.advice if item.kind == "edge"] == ["train.learning_rate"]


def test_an_edge_beyond_which_trials_failed_says_nothing() -> None:
    trials = rates([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, math.nan])
    trials[-1].state = "failed"
    assert advice(verdict(trials, "accuracy", edges=top), "edge") is None


LEARNT = [2 * math.exp(-step / 25) + 0.05 for step in range(STEPS)]


def test_training_and_held_out_loss_apart_says_more_dropout_less_r_more_data() -> None:
    item = advice(verdict([trial(0, losses=LEARNT, held_out=[0.9, 0.6, 0.7, 0.8], r=32)], "accuracy"), "apart")
    assert item is not None
    assert "more dropout (now 0), less r (now 32)" in sentence(item)
    assert (item.figures["held_out"], item.figures["lowest"], item.figures["step"]) == (0.8, 0.6, 60)


@pytest.mark.parametrize(
    ("losses", "held_out"),
    [
        (LEARNT, [0.9, 0.7, 0.6, 0.55]),  # a gap, and still going down
        (LEARNT, [0.9, 0.6, 0.7, 0.65]),  # turned back
        ([0.9] * STEPS, [0.9, 0.8, 0.85, 0.9]),  # rising, and training loss as high
        (LEARNT, [0.6, 0.8]),  # two points are no curve
    ],
)
def test_losses_that_are_not_apart_say_nothing(losses: list[float], held_out: list[float]) -> None:
    assert advice(verdict([trial(0, losses=losses, held_out=held_out)], "accuracy"), "apart") is None


EVEN = [2.0 - step / 100 + 0.01 * (-1) ** step for step in range(STEPS)]


def test_slow_and_even_says_raise_alpha_or_the_rate() -> None:
    item = advice(verdict([trial(0, losses=EVEN, lora_alpha=16)], "accuracy"), "slow")
    assert item is not None
    assert "raise lora_alpha (now 16) or the learning rate (now 0.001)" in sentence(item)
    assert item.figures["fall"] == pytest.approx(0.33, abs=0.02)


def test_slow_where_higher_rates_did_worse_says_train_longer() -> None:
    trials = [trial(0, 0.8, losses=EVEN), trial(1, 0.5, rate=4e-3), trial(2, 0.4, rate=8e-3)]
    item = advice(verdict(trials, "accuracy"), "slow")
    assert item is not None
    assert sentence(item).endswith("2 of 2 trials with higher rates did worse: train longer")


@pytest.mark.parametrize(
    ("losses", "held_out"),
    [
        (CALM, [0.9, 0.7, 0.6]),  # level
        ([x + random.Random(i).uniform(-0.8, 0.8) for i, x in enumerate(EVEN)], [0.9, 0.7, 0.6]),  # uneven
        (EVEN, [0.9, 0.6, 0.7]),  # what it learns no longer helps
        (EVEN[:40], [0.9, 0.7, 0.6]),  # a short curve
    ],
)
def test_what_is_not_slow_and_even_says_nothing(losses: list[float], held_out: list[float]) -> None:
    found = verdict([trial(0, losses=losses, held_out=held_out, step=len(losses))], "accuracy")
    assert advice(found, "slow") is None


SPIKES = [loss + (1.2 if step in (30, 50, 70, 90, 110) else 0) for step, loss in enumerate(CALM)]


def test_a_spiky_loss_says_lower_the_rate() -> None:
    trials = [trial(0, 0.8, losses=SPIKES), trial(1, 0.7, rate=1e-4)]
    item = advice(verdict(trials, "accuracy"), "spiky")
    assert item is not None
    assert "spiked at 5 of 120 steps; at lower rates the median is 0: lower the learning rate (now 0.001)" in sentence(
        item
    )


def test_spikes_that_lower_rates_have_too_are_the_rows_and_say_nothing() -> None:
    trials = [trial(0, 0.8, losses=SPIKES), trial(1, 0.7, rate=1e-4, losses=SPIKES)]
    assert advice(verdict(trials, "accuracy"), "spiky") is None
    assert advice(verdict([trial(0)], "accuracy"), "spiky") is None


def modules(r: int, used: int, norm: float = 0.02) -> dict[str, tuple[int, int, float]]:
    return {f"layers.{layer}.{kind}": (r, used, norm) for layer in range(4) for kind in ("q_proj", "k_proj", "fc1")}


def test_a_rank_that_uses_few_directions_says_which_rank_will_do() -> None:
    item = advice(verdict([trial(0, used=modules(32, 5), r=32)], "accuracy"), "rank")
    assert item is not None
    assert sentence(item) == "r of 32 uses 5 directions in the median layer: r of 8 will do"


@pytest.mark.parametrize("used", [modules(8, 5), modules(16, 12), modules(32, 0), {}])
def test_a_rank_that_is_used_says_nothing(used: dict[str, tuple[int, int, float]]) -> None:
    assert advice(verdict([trial(0, used=used)], "accuracy"), "rank") is None


def test_layers_that_hardly_moved_are_to_be_dropped() -> None:
    used = {name: (r, d, 1e-4 if "k_proj" in name else norm) for name, (r, d, norm) in modules(8, 6).items()}
    item = advice(verdict([trial(0, used=used)], "accuracy"), "still")
    assert item is not None
    assert sentence(item).startswith(
        "all 4 k_proj hardly moved (at most 0.0001 of the weight's norm, the median module 0.02)"
    )
    assert item.figures["modules"] == [f"layers.{layer}.k_proj" for layer in range(4)]
    used = {name: (r, d, 1e-4 if "layers.0" in name else norm) for name, (r, d, norm) in modules(8, 6).items()}
    item = advice(verdict([trial(0, used=used)], "accuracy"), "still")
    assert item is not None
    assert sentence(item).startswith("all 3 modules of layers.0 hardly moved")


def test_layers_that_all_moved_say_nothing() -> None:
    used = {name: (8, 6, 0.01 * (1 + i)) for i, name in enumerate(modules(8, 6))}
    assert advice(verdict([trial(0, used=used)], "accuracy"), "still") is None


def test_rates_that_diverged_bound_the_space() -> None:
    trials = rates([0.5, 0.6, 0.7, math.nan, math.nan])
    for failed in trials[3:]:
        failed.state = "failed"
    item = advice(verdict(trials, "accuracy"), "failures")
    assert item is not None
    assert sentence(item) == "2 of 2 trials from rate 8e-4 on diverged; 4e-4 held: make it the upper bound of the rate"


@pytest.mark.parametrize("failed", [[], [0], [0, 2]])
def test_failures_that_the_rate_does_not_explain_bound_nothing(failed: list[int]) -> None:
    trials = rates([0.5, 0.6, 0.7, 0.8, 0.9])
    for number in failed:
        trials[number].state = "failed"
    assert advice(verdict(trials, "accuracy"), "failures") is None


def test_a_hyperparameter_that_did_not_matter_is_fixed_at_the_cheapest() -> None:
    found = verdict(searched(), "accuracy")
    idle = {item.figures["knob"]: item for item in found.advice if item.kind == "idle"}
    assert "train.learning_rate" not in idle
    assert idle["lora.target_modules"].figures["value"] == "q_proj,v_proj"
    assert "targets made no difference" in sentence(idle["lora.target_modules"])


def test_of_few_trials_no_hyperparameter_is_called_idle() -> None:
    assert advice(verdict(searched(10), "accuracy"), "idle") is None


def test_a_calm_search_gets_no_advice() -> None:
    assert verdict([trial(0, 0.8, used=modules(8, 6)), trial(1, 0.7)], "accuracy").advice == []


# As JSON --------------------------------------------------------------------------------------------------


def test_the_json_is_plain_and_without_nan() -> None:
    trials = [*searched(), trial(30, math.nan, state="failed", losses=[2.0, math.nan])]
    found = verdict(trials, "accuracy")
    built = record(found, trials, adapter="best", seconds=1.5, machine={"cores": 2}).to_json()
    assert json.loads(json.dumps(built, allow_nan=False)) == built
    assert built["trials"][-1]["metric"] is None


def test_the_record_has_the_promised_keys_and_is_the_same_each_time() -> None:
    trials = [*seeds(0, [0.8, 0.81]), *seeds(1, [0.7, 0.71])]
    built = record(verdict(trials, "accuracy"), trials, adapter="out/best", seconds=3.0, machine={}).to_json(sentence)
    assert built.keys() == {
        *("learned", "best", "to_beat", "trials", "pareto", "importance", "advice", "seconds", "machine", "usage"),
        *("test", "cuts", "format", "recommended", "held_out", "front"),
    }
    assert built["best"]["config"] == {"train.learning_rate": 1e-3}
    assert built["best"]["metric"] == pytest.approx(0.805)
    assert built["best"]["adapter"] == "out/best"
    assert built["best"]["why"] == "the best accuracy"
    assert built["best"]["decision"] == {"kind": "best", "figures": {"metric": "accuracy", "tied": 1}}
    assert {"config", "state", "curve", "metric", "seconds", "steps"} <= built["trials"][0].keys()
    assert built["trials"][0]["curve"].keys() == {"loss", "learning_rate", "evaluations"}
    assert [t["number"] for t in built["trials"]] == [0, 1, 101, 201]
    again = record(
        verdict(trials[::-1], "accuracy"), trials[::-1], adapter="out/best", seconds=3.0, machine={}
    ).to_json(sentence)
    assert json.dumps(built) == json.dumps(again)
