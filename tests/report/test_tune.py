"""Promises of a search in the terminal and in pictures: tables fit, words follow the figures, nothing floods."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from loraloom import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Curve
from loraloom.messages import Message
from loraloom.report.format import count, duration, figure
from loraloom.report.tune import TuneMeter, conclusion, improvement, leaderboard
from loraloom.tuning.executor import SearchStatus
from loraloom.tuning.trial import Trial
from loraloom.tuning.verdict import verdict

TARGETS = ["q-v", "attention", "all-linear", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"]


def trial(
    number: int,
    score: float,
    state: str = "finished",
    seed: int = 0,
    repeats: int | None = None,
    metric: str = "accuracy",
) -> Trial:
    rate, r = 1.234567e-4 * (number % 7 + 1), 2 ** (number % 7 + 1)
    lora = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.05 * (number % 4))
    options = TrainConfig(model="m", data="d", task="seq-cls", output="o", learning_rate=rate, seed=seed, lora=lora)
    values = {
        "lora.r": r,
        "lora.lora_alpha": "2r" if number else "rslora",
        "lora.target_modules": TARGETS[number % 4],
        "lora.lora_dropout": lora.lora_dropout,
        "train.learning_rate": rate,
    }
    step = 120 if state == "finished" else 40
    evaluations = [{"step": s, "loss": 1.0, metric: score * s / step} for s in (20, step)]
    curve = Curve([2.0 - s / 100 for s in range(step)], [rate] * step, evaluations)
    size = 123_456 * r
    return Trial(number, values, options, 120, step, state, "", curve, size, 4 * size, 754.0, repeats)  # type: ignore[arg-type]


def search(metric: str = "accuracy") -> list[Trial]:
    trials = [trial(i, 0.6 + i / 50, "stopped" if i < 4 else "finished", metric=metric) for i in range(8)]
    trials += [trial(100 + i, 0.6 + i / 50, seed=1, repeats=i, metric=metric) for i in (6, 7)]
    for repeated in trials[-2:]:
        repeated.values = trials[repeated.repeats or 0].values
        repeated.curve.evaluations[-1][metric] += 0.005
    return [*trials, trial(20, math.nan, "failed", metric=metric)]


def shown(what: RenderableType, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


# The table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_with_five_hyperparameters_the_table_fits_100_columns_and_no_number_is_cut(metric: str) -> None:
    trials = search(metric)
    text = shown(leaderboard(verdict(trials, metric), metric), 1000)
    lines = text.splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= 100
    assert len(lines) == 1 + 9  # one row a configuration, further seeds are part of it
    assert [line.split()[-2] for line in lines[1:3]] == ["finished", "finished"]
    assert lines[1].rstrip().endswith("finished ×2")


def test_in_80_columns_words_are_cut_and_numbers_are_not() -> None:
    trials = search()
    full, narrow = (shown(leaderboard(trials, "accuracy", width=w), w) for w in (100, 80))
    assert max(cell_len(line) for line in narrow.splitlines()) <= 80
    for line, cut in zip(full.splitlines()[1:], narrow.splitlines()[1:], strict=True):
        place = next(i for i, cell in enumerate(cut.split()) if cell.startswith(("0.", "–")) and i > 4)
        assert "…" not in "".join(cut.split()[place:])
        assert line.split()[0] == cut.split()[0]


def test_in_80_columns_no_hyperparameter_is_lost_however_many_there_are() -> None:
    trials = search()
    for one in trials:
        one.values |= {"train.loraplus_lr_ratio": 4.0 ** (one.number % 3), "train.weight_decay": one.number % 3 / 10}
    lines = shown(leaderboard(trials, "accuracy", width=80), 80).splitlines()
    head = ["trial", "r", "alpha", "targets", "dropout", "rate", "lora+", "decay", "accuracy", "state"]
    assert lines[0].split() == head
    assert max(map(cell_len, lines)) <= 80
    rates = {"1.23e-4", "2.47e-4", "3.7e-4", "4.94e-4", "6.17e-4", "7.41e-4", "8.64e-4"}
    assert {line.split()[5] for line in lines[1:]} == rates


def test_the_best_stands_first_then_the_finished_then_the_stopped_then_the_failed() -> None:
    trials = search()
    found = verdict(trials, "accuracy")
    numbers = [int(line.split()[0]) for line in shown(leaderboard(found, "accuracy")).splitlines()[1:]]
    assert numbers[0] == found.best.number
    assert numbers == [*found.ranking]
    assert numbers[-5:] == [3, 2, 1, 0, 20]


def test_only_hyperparameters_that_vary_have_a_column() -> None:
    trials = search()
    for one in trials:
        one.values["lora.r"] = 8
    head = shown(leaderboard(trials, "accuracy")).splitlines()[0].split()
    assert head == ["trial", "alpha", "targets", "dropout", "rate", "accuracy", "params", "adapter", "time", "state"]


def test_numbers_are_short() -> None:
    assert [figure(0.80123, 0.0061), figure(0.8, 0.0002), figure(math.nan), figure(12345.6)] == [
        "0.801 ±0.006",
        "0.8000 ±0.0002",
        "–",
        "1.23e+04",
    ]
    assert [count(0), count(999), count(294_912), count(1_179_648)] == ["0", "999", "295k", "1.18M"]
    assert [duration(41.4), duration(754), duration(3723)] == ["41 s", "12:34", "1:02:03"]


# The end --------------------------------------------------------------------------------------------------


def test_the_conclusion_says_what_to_use_and_the_runner_up() -> None:
    text = " ".join(shown(conclusion(verdict(search(), "accuracy"))).split())
    assert "use r=2, alpha=4, targets=q_proj, k_proj" in text
    assert "trial 7: accuracy 0.742 ± 0.003 over 2 seeds, 246,912 parameters, 964.5 KiB" in text
    assert "runner-up, trial 6 (r=128, alpha=256, targets=all-linear" in text
    assert "64 times the size, 0.020 below" in text


def test_a_tie_is_called_one() -> None:
    trials = search()
    for one in trials:
        if 7 in (one.number, one.repeats):
            one.curve.evaluations[-1]["accuracy"] -= 0.021
    text = " ".join(shown(conclusion(verdict(trials, "accuracy"))).split())
    assert "trial 7:" in text
    assert "0.001 above: a tie within the noise of 0.0" in text
    assert "why: trials 6 and 7 differ by 0.001 in accuracy" in text


def test_the_conclusion_names_what_mattered_or_why_that_cannot_be_told() -> None:
    few = verdict(search()[4:6], "accuracy")
    assert "which hyperparameters mattered is unknown: 2 trials can be compared" in shown(conclusion(few))
    assert "one seed" in shown(conclusion(few))


def test_advice_and_events_are_text_and_not_markup() -> None:
    trials = search()
    trials[7].used = {f"layers.{i}.[b]": (32, 3, 0.02 if i else 1e-5) for i in range(4)}
    assert "layers.0.[b] hardly moved" in " ".join(shown(conclusion(verdict(trials, "accuracy"))).split())


# The live view --------------------------------------------------------------------------------------------


def status(
    running: list[Trial], trials: list[Trial], slots: int = 8, speed: float = 1.0, left: float | None = None
) -> SearchStatus:
    return SearchStatus(running, trials, "accuracy", slots, speed, left)


def terminal(width: int = 100, height: int = 24) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)


@pytest.mark.parametrize("width", [80, 100])
def test_the_live_view_has_slots_speed_time_trials_and_the_top_five(width: int) -> None:
    console = terminal(width)
    trials = search()
    running = trials[:4]
    for one in running:
        one.state = "running"
    with TuneMeter(console) as meter:
        meter.update(status(running, trials, 8, 12345.6, 754))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "slots 4/8 · 12,346 tokens/s · 12:34 left · 6 finished, 1 failed" in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["3"] and "40/120" in line)
    assert row.split()[-3:] == ["40/120", "1.655", "0.660"]
    assert row.split()[1:3] == ["16", "2r"]
    assert "4.94e-4" in row  # no hyperparameter is lost
    board = text[text.index("params") :].splitlines()[1:6]
    assert [int(line.split()[0]) for line in board] == [7, 6, 5, 4, 3]
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text)
    assert max(cell_len(line) for line in re.split(r"[\r\n]+", plain)) <= width


def test_the_live_view_fits_the_height_of_the_terminal() -> None:
    running = [trial(i, 0.5, "running") for i in range(40)]
    console = terminal(height=24)
    with TuneMeter(console) as meter:
        picture = meter.picture(status(running, running, 64))
    text = shown(picture)
    assert len(text.splitlines()) <= 23
    assert "and 27 more" in text


def test_the_live_view_is_drawn_at_most_a_few_times_a_second() -> None:
    now = 0.0
    console, trials = terminal(), search()
    drawn = []
    with TuneMeter(console, clock=lambda: now) as meter:
        for i in range(100):
            now = i / 100
            meter.update(status(trials[:2], trials))
            drawn.append(meter.drawn)
    assert len(set(drawn)) == 4


def test_without_a_terminal_there_is_one_line_an_evaluation() -> None:
    console, trials = Console(file=io.StringIO(), width=80), search()
    running = trials[:1]
    with TuneMeter(console) as meter:
        meter.update(status(running, trials))
        meter.update(status(running, trials))
        trials[0].curve.evaluations.append({"step": 60, "loss": 1.0, "accuracy": 0.7})
        meter.update(status([], trials))  # it left the pack at this evaluation
        meter.event(Message("note", text="trial 0 [/b] finished"))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 3
    assert lines[0].startswith(
        "trial 0 (r=2 alpha=rslora targets=q-v dropout=0 rate=1.23e-4) step 40 of 120: training loss "
    )
    assert lines[0].endswith("accuracy 0.600 (+1.5 in 100 steps)")
    assert lines[1].endswith("accuracy 0.700 (+0.5 in 100 steps)")
    assert lines[2] == "trial 0 [/b] finished"


def test_a_trial_evaluated_once_has_no_rate_of_improvement() -> None:
    one = trial(0, 0.5)
    one.curve.evaluations = one.curve.evaluations[:1]
    assert improvement(one, "accuracy") is None
