"""Promises of a worker: who trains beside a trial, and how often it is put down and taken up, changes no bit of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraloom import PeftModel
from loraloom.engine.slot import Curve
from loraloom.engine.slot_state import SlotState
from loraloom.inference.evaluation import Evaluator
from loraloom.models.load import load_base
from loraloom.training.run import prepare
from loraloom.training.setup import load
from loraloom.training.trainer import Trainer
from loraloom.tuning import worker as module
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.state import TRIALS
from loraloom.tuning.trial import Trial
from loraloom.tuning.worker import SPAN, Report, TrialFactory, Worker, blown_up, name_of, rung_step

Make = Callable[..., TuneConfig]
#: All that trials of one search may differ in, at once.
MIXED = {
    "lora.r": [2, 4, 8],
    "lora.lora_dropout": [0.0, 0.2],
    "lora.target_modules": ["q-v", "all-linear"],
    "train.learning_rate": [1e-3, 1e-2],
    "train.gradient_accumulation_steps": [1, 3],
    "train.batch_size": [4, 8],
}
POINTS: list[dict[str, Any]] = [
    dict(zip(MIXED, point))
    for point in [
        (2, 0.2, "q-v", 1e-2, 3, 4), (8, 0.0, "all-linear", 1e-3, 1, 8), (4, 0.2, "all-linear", 1e-2, 1, 4),
        (4, 0.0, "q-v", 1e-3, 3, 8),
    ]
]  # fmt: skip


def begin(options: TuneConfig, numbers: list[int] | None = None, seeds: bool = True) -> tuple[Worker, list[Trial]]:
    """Trials with seeds of their own, or the search's own seed, which also chooses the held-out rows."""
    setup = load(options.train)
    factory = TrialFactory(options, setup)
    worker = Worker(options, setup, factory)
    trials = []
    for number in [0, 1, 2, 3] if numbers is None else numbers:
        made = factory.trial_options(POINTS[number], number if seeds else options.train.seed)
        trials.append(Trial(number, POINTS[number], made, setup.steps_of(made)[0], state="running"))
    return worker, trials


def to_the_end(worker: Worker, trials: list[Trial]) -> list[tuple[list[int], list[int]]]:
    """Everybody goes on from everywhere. Who came to something when, and the steps of all then."""
    log = []
    report = worker.run([(trial, None) for trial in trials], [])
    while True:
        log.append((sorted(report.events), [trial.step for trial in sorted(trials, key=lambda t: t.number)]))
        leave = [n for n in worker.trials if worker.trials[n].state != "running"]
        if len(leave) == len(worker.trials):
            return log
        report = worker.run([], leave)


def curves(trials: list[Trial]) -> dict[int, str]:
    return {trial.number: repr(trial.curve) for trial in trials}


def test_put_down_after_every_step_and_taken_up_by_another_worker_no_bit_changes(
    classify: Make, tmp_path: Path
) -> None:
    options = classify(MIXED)
    worker, whole = begin(options)
    wanted = to_the_end(worker, whole)
    adapters = {n: load_file(tmp_path / "search" / TRIALS / name_of(n) / "adapter_model.safetensors") for n in range(4)}

    worker, trials = begin(options)
    log, alive = [], [(trial, None) for trial in trials]
    for _ in range(9 * 3):  # steps and the forwards of each, at most
        report = worker.run(alive, [], stop=lambda: True)
        if report.events:
            log.append((sorted(report.events), [trial.step for trial in trials]))
        alive = [
            (trial, SlotState.from_bytes(report.states[trial.number].to_bytes()))
            for trial in report.trials
            if trial.state == "running"
        ]
        worker, _ = begin(options)
    assert not alive
    assert log == wanted
    assert curves(trials) == curves(whole)
    for number, tensors in adapters.items():
        found = load_file(tmp_path / "search" / TRIALS / name_of(number) / "adapter_model.safetensors")
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_a_trial_is_the_same_to_the_bit_alone_and_beside_others(classify: Make) -> None:
    worker, together = begin(classify(MIXED))
    to_the_end(worker, together)
    for number in range(4):
        worker, alone = begin(classify(MIXED), [number])
        to_the_end(worker, alone)
        assert curves(alone)[number] == curves(together)[number]


@pytest.mark.parametrize("task", ["classify", "complete"])
def test_a_trial_is_what_loraloom_train_makes_of_its_options(
    task: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    options = request.getfixturevalue(task)(MIXED)
    worker, trials = begin(options, seeds=False)
    to_the_end(worker, trials)
    for trial in trials:
        result = Trainer(prepare(replace(trial.options, output=str(tmp_path / f"alone-{trial.number}")))).fit()
        curve = result.record["curve"]
        assert trial.curve.loss == pytest.approx(curve["loss"], rel=1e-4)
        assert trial.curve.learning_rate == curve["learning_rate"]
        last, measured = curve["evaluations"][-1], trial.curve.evaluations[-1]
        assert measured == pytest.approx(last, rel=1e-4)


def test_a_trial_stops_where_it_is_held_and_is_measured_when_asked_or_once_it_has_taken_off(classify: Make) -> None:
    worker, trials = begin(classify(MIXED, train={"max_steps": 18}), [1, 2])

    def steps(trial: Trial) -> list[int]:
        return [int(e["step"]) for e in trial.curve.evaluations]

    trials[0].goal, trials[1].goal = 2, 6
    report = worker.run([(trial, None) for trial in trials], [])
    assert (report.events, trials[0].step, steps(trials[0])) == ([1], 2, [])
    worker.bar.base, worker.bar.begins = 99.0, False  # below which all are
    report = worker.run([], [1])
    assert (report.events, steps(trials[1])) == ([2], [])  # eight losses at least: six say nothing
    trials[1].measure = True
    report = worker.run([(trials[1], None)], [])  # what it is told of one that it has
    assert (report.events, trials[1].step, steps(trials[1]), trials[1].measure) == ([2], 6, [6], False)
    trials[1].goal = 10
    report = worker.run([], [])
    assert (report.events, steps(trials[1])) == ([2], [6, 10])
    trials[1].goal = 0
    report = worker.run([], [])  # between the last rung and the end it is measured without a stop
    assert (report.events, steps(trials[1]), trials[1].state) == ([2], [6, 10, 12, 18], "finished")
    for evaluation in trials[1].curve.evaluations:
        assert evaluation["accuracy"] * 40 == pytest.approx(round(evaluation["accuracy"] * 40))
    assert trials[1].parts["accuracy"][0] == trials[1].curve.evaluations[-1]["accuracy"]
    assert len(trials[1].parts["accuracy"]) == 21


def test_a_trial_measured_on_more_rows_keeps_the_figures_of_the_last_measurement_alone(classify: Make) -> None:
    worker, (trial,) = begin(classify(MIXED, train={"max_steps": 18}), [1])
    trial.goal = 4
    worker.run([(trial, None)], [])
    seen = []
    for rows in (10, 25, 0):
        trial.measure, trial.rows = True, rows
        worker.run([(trial, None)], [])
        assert (trial.measure, trial.rows) == (False, 0)
        seen.append(trial.measured_rows)
        (last,) = trial.curve.evaluations
        chosen = worker._examples(rows or 40)
        (wanted,) = worker.setup.evaluator(chosen).metrics([name_of(1)])
        assert {key: last[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
        assert {key: len(values) for key, values in trial.rungs[4].items()} == {
            "loss": 1 + min(20, len(chosen)),
            "accuracy": 1 + min(20, len(chosen)),
        }
        assert trial.rungs[4]["accuracy"][0] == last["accuracy"]
    assert seen == [10, 25, None]
    assert set(worker._examples(10)) < set(worker._examples(25)) < set(worker._examples(40)) == set(range(40))


def test_rungs_of_short_trials(classify: Make) -> None:
    options = classify(MIXED)
    _, (trial,) = begin(options, [0])

    def places(steps: int) -> list[int]:
        trial.steps = steps
        return [rung_step(options, trial, rung) for rung in range(5)]

    assert places(90) == [10, 20, 30, 45, 60]
    assert places(102) == [12, 23, 34, 51, 68]
    assert places(2) == [1, 1, 1, 1, 2]
    assert places(1) == [1] * 5


@pytest.mark.filterwarnings("ignore")
def test_a_trial_in_float16_that_comes_back_has_the_loss_scale_that_it_had(classify: Make) -> None:
    worker, (trial,) = begin(classify(MIXED, train={"dtype": "float16"}), [1])
    worker.run([(trial, None)], [], stop=lambda: True)
    worker.slots[1].loss_scale, worker.slots[1].good_steps = 512.0, 3
    saved = SlotState.from_bytes(worker.slots[1].state_dict().to_bytes())
    worker, _ = begin(classify(MIXED, train={"dtype": "float16"}), [])
    trial.goal = trial.step  # as one that is only looked at
    worker._enter(trial, saved)
    assert (worker.slots[1].loss_scale, worker.slots[1].good_steps) == (512.0, 3)


@pytest.mark.parametrize(
    ("space", "rows"),
    [
        ({"lora.r": [2, 4]}, 8),
        ({"lora.r": [2, 4], "train.batch_size": [32, 4]}, 32),
        ({"train.batch_size": {"range": [2, 12]}}, 12),
        ({"lora.r": [2, 4], "train.batch_size": 16}, 16),
    ],
)
def test_memory_is_planned_for_the_most_rows_that_a_trial_may_have(
    classify: Make, space: dict[str, Any], rows: int
) -> None:
    options = classify(space, trials=2)
    assert TrialFactory(options, load(options.train)).widest().options.batch_size == rows


def test_an_adapter_that_came_to_its_end_is_saved_and_gives_what_was_measured(classify: Make, tmp_path: Path) -> None:
    options = classify(MIXED)
    worker, trials = begin(options)
    to_the_end(worker, trials)
    for trial in trials:
        assert trial.state == "finished"
        assert trial.used
        assert all(0 <= used <= r == trial.options.lora.r for r, used, _ in trial.used.values())
        base, _ = load_base(trial.options.model, worker.setup.task, "float32", worker.setup.data.names)
        model = PeftModel.from_pretrained(base, tmp_path / "search" / TRIALS / name_of(trial.number))
        (found,) = replace(worker.setup, model=model).evaluator().metrics(["default"])
        last = {key: value for key, value in trial.curve.evaluations[-1].items() if key != "step"}
        assert found == pytest.approx(last, rel=1e-5)


def test_numbers_are_handed_over_from_time_to_time(classify: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.0)
    worker, trials = begin(classify(MIXED, train={"max_steps": 90}))
    report = worker.run([(trial, None) for trial in trials], [])
    assert report.events == []
    assert sorted(report.states) == [0, 1, 2, 3]


def test_those_who_leave_leave_nothing_behind(classify: Make) -> None:
    worker, trials = begin(classify(MIXED))
    worker.run([(trial, None) for trial in trials], [], stop=lambda: True)
    worker.run([], [0, 1, 2, 3])
    assert worker.pack.adapters == [SPAN]
    assert (worker.slots, worker.trials) == ({}, {})


@pytest.mark.parametrize("place", ["step", "enter", "evaluate"])
@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried"), MemoryError()])
def test_out_of_memory_is_a_report_and_the_worker_starts_again_with_fewer(
    classify: Make, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    worker, trials = begin(classify(MIXED))

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        if place == "enter":
            patch.setattr(worker.setup.__class__, "slot", fail)
        else:
            patch.setattr(*((module, "advance") if place == "step" else (Evaluator, "figures")), fail)
        report = worker.run([(trial, None) for trial in trials], [])
    assert report == Report([], [], seconds=report.seconds, out_of_memory=True)
    assert worker.pack.adapters == [SPAN]
    fresh = begin(classify(MIXED), [0])[1]
    to_the_end(worker, fresh)
    assert fresh[0].state == "finished"


def test_another_error_is_raised(classify: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("odd")

    worker, trials = begin(classify(MIXED))
    monkeypatch.setattr(module, "advance", fail)
    with pytest.raises(RuntimeError, match="odd"):
        worker.run([(trial, None) for trial in trials], [])


def test_a_trial_whose_held_out_loss_is_not_finite_fails_though_its_accuracy_is(
    classify: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluator, "figures", lambda *_: [{"loss": [math.nan], "accuracy": [0.5]}])
    worker, trials = begin(classify(MIXED), [1])
    worker.run([(trials[0], None)], [])
    assert (trials[0].state, trials[0].reason) == ("failed", "step 6: the held-out loss is nan")


def test_a_loss_that_doubles_is_blown_up_and_one_that_is_short_or_falls_is_not() -> None:
    def said(losses: list[float], base: float | None = None) -> str:
        trial = Trial(0, {}, options=None, steps=99, step=len(losses), curve=Curve(losses))  # type: ignore[arg-type]
        return blown_up(trial, base)

    assert said([1.0] * 10 + [2.1] * 10) == "step 20: the loss went up from 1 to 2.1"
    assert said([1.0] * 10 + [1.9] * 10) == ""
    assert said([1.0] * 9 + [9.0] * 10) == ""
    assert said([1.0] * 30 + [0.1] * 10) == ""
    assert said([1.0] * 30 + [9.0]) == ""  # one bad step is none
    # One whose first losses had blown up already began where the first step did, or at chance.
    wild = [0.7, *[9e3] * 9, *[8e3] * 10]
    assert said(wild, base=0.69) == "step 20: the loss went up from 0.7 to 8e+03"
    assert said(wild) == "step 20: the loss went up from 2.1 to 8e+03"
    assert said([0.1, *[1.0] * 19], base=1.1) == ""  # an easy first batch is no beginning
    assert said([0.4, *[1.0] * 19]) == ""
