"""The life of a run: ``Trainer.fit`` begins or resumes, takes the steps, evaluates, saves, and ends or fails.

What a step computes is ``engine``'s business, what files hold ``checkpointing``'s and ``output``'s.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from loraloom.engine.loop import OnStep, StepEvent, advance
from loraloom.engine.pack import Pack
from loraloom.errors import ConfigError, InputError, LoraloomError, SaveError, TrainingError
from loraloom.files import lock
from loraloom.lora import checkpoint as adapters
from loraloom.messages import Message, OnEvent, ignore, logged
from loraloom.training import early_stopping, output
from loraloom.training.checkpointing import folders, restore, resume
from loraloom.training.checkpointing.folders import Checkpoint
from loraloom.training.checkpointing.identity import identity
from loraloom.training.checkpointing.resume import Resume
from loraloom.training.failures import Interrupted, explain, nonfinite_examples, not_finite
from loraloom.training.preflight.estimate import step_memory
from loraloom.training.preflight.memory import Memory
from loraloom.training.run_record import record
from loraloom.training.setup import ADAPTER, TrainJob
from loraloom.training.signals import Stop, asked_to_stop
from loraloom.training.usage import usage_files

#: Held-out rows whose predictions are shown at the end.
SHOWN = 3


@dataclass
class RunResult:
    """What came out. ``record`` is what ``run.json`` holds."""

    record: dict[str, Any]
    job: TrainJob
    predictions: list[dict[str, str]]


class Trainer:
    """One run of ``job``. ``on_step`` is called after each step, ``on_event`` with all else that a user should know."""

    def __init__(self, job: TrainJob, on_step: OnStep = ignore, on_event: OnEvent = ignore) -> None:
        self.job, self.options, self.model, self.world = job, job.options, job.model, job.world
        self.slot = job.slot(ADAPTER, job.options, job.steps)
        self.folder = Path(job.options.output)
        self.identity = identity(job)
        self._on_step, self._on_event = on_step, logged(on_event)
        self._started = time.perf_counter()
        #: tokens since then; tokens and seconds of earlier starts of this run, and the steps that they ended at
        self._tokens, self._before, self._resumed_at = 0, (0, 0.0), list[int]()
        #: adapter and optimizer are those of a whole forward: a checkpoint of them can be resumed
        self._settled = True
        self._evaluating = False
        #: what the newest checkpoint holds, as ``_position`` gives it, and the steps with a whole checkpoint
        self._saved: tuple[int, int, int] | None = None
        self._kept: set[int] = set()

    def fit(self, resume: Resume = None) -> RunResult:
        """Train, evaluate, and write the output folder, with checkpoints. What ends the run early loses no step.

        Args:
            resume: True resumes from the newest whole checkpoint of the output folder, and starts over if there is
                none; a path resumes from that checkpoint. On a CPU, with as many threads, the adapter comes out as
                that of an uninterrupted run, to the byte. A finished run is not trained again.

        Raises:
            ConfigError: what is to be resumed was trained with other options, data or weights; another run is under
                way in the folder.
            Interrupted: Ctrl-C, or SIGTERM.
            TrainingError: the loss is not finite, or the machine's memory was not enough.
            SaveError: the folder cannot be written; the message says what is saved, and where.
        """
        main = self.world.is_main_process
        with contextlib.ExitStack() as stack:
            self.world.main_process_first(lambda: stack.enter_context(lock.held(self.options.output)))
            found = self.begin(resume)
            with output.described(self.options) if main else contextlib.nullcontext():
                if found is None:
                    found = self._train()
            return RunResult(found, self.job, self.job.shown(SHOWN, ADAPTER))

    def _train(self) -> dict[str, Any]:
        """From the first step to the end. What ends it early is raised once all is saved."""
        ended: BaseException | None = None
        found = None
        with asked_to_stop() as stop:
            try:
                self._steps(stop)
                step = self._take_best() if self.slot.done else 0
            except BaseException as error:
                ended = error
            if self.slot.done and ended is None:
                found = self._finish(step)
        if found is None:
            self.end_early(ended, stop)
        return found

    # -- the beginning ------------------------------------------------------------------------------------------------

    def begin(self, wanted: Resume) -> dict[str, Any] | None:
        """Go to the state that ``wanted`` names. Returns the record of a run that is finished already.

        Raises:
            ConfigError: there is a checkpoint, but of another training, or it cannot be resumed.
        """
        found = resume.find(self.options, wanted, self._on_event)
        if self.options.overwrite and wanted is True:
            found = self._replacing(found)
        if self.world.is_main_process:
            folders.clean(self.folder)
        if changes := found.changes(self.identity):
            self._on_event(Message("rounding", where=found.where, changes=changes))
        if found.stopped and not found.checkpoint:
            self._on_event(Message("no_checkpoint", folder=str(self.folder), step=found.stopped["steps"]))
        if found.finished:
            adapters.fill(self.model.base_model, ADAPTER, adapters.read_tensors(self.folder))
            self._on_event(Message("already_finished", folder=str(self.folder), steps=found.finished["steps"]))
            return found.finished
        if self.world.is_main_process and self.options.overwrite and (found.elsewhere or not found.checkpoint):
            folders.forget(self.folder)
        if found.checkpoint:
            self._restore(found.checkpoint, found.elsewhere)
        self.world.barrier()
        self._started = time.perf_counter()
        return None

    def _replacing(self, found: resume.Found) -> resume.Found:
        """``found``, or nothing if it is of other data or another model and ``overwrite`` allows to replace it."""
        if found.elsewhere or found.stopped:
            return found
        try:
            found.changes(self.identity)
        except ConfigError as error:
            self._on_event(Message("replaced", error=str(error)))
            if found.checkpoint:
                return resume.Found(self.folder)
            return self._replacing(resume.find(self.options, True, self._on_event, ended=False))
        return found

    def _restore(self, found: Checkpoint, elsewhere: bool) -> None:
        """Continue from ``found``, which is of this training."""
        restore.restore(found, self.slot, self.model)
        with restore.reading(found):
            self._before = int(found.state["tokens"]), float(found.state["seconds"])
            self._resumed_at = [*found.state["resumed_at"], found.step]
        if not elsewhere:
            self._saved = self._position
            self._kept.add(found.step)
        top = self._best
        if self.options.load_best_model_at_end and top and top[0] != found.step and self.world.is_main_process:
            name = f"checkpoint-{top[0]}"
            if not folders.is_whole(self.folder / name):
                folders.copy(folders.read(found.path.parent / name), self.folder)
        if self._kept and self.world.is_main_process:
            self._rotate()  # the process that saved the last one may have died before
        self._on_event(Message("run_resumed", path=str(found.path), step=found.step, steps=self.slot.steps))

    # -- the steps ----------------------------------------------------------------------------------------------------

    def _steps(self, stop: Stop) -> None:
        """Steps, checkpoints and evaluations until the last step, an early stop, or ``stop``. Failures are raised."""
        options, slot, world, per_epoch = self.options, self.slot, self.world, self.job.steps_per_epoch
        save = Every(options.save_at, options.save_steps, options.save_minutes, per_epoch)
        evaluate = Every(options.eval_at, options.eval_steps, options.eval_minutes, per_epoch)
        pack = Pack(self.model, task=self.job.task, pad_id=self.job.pad_id)
        # A checkpoint is written before the evaluation of its step, which may be missing in it.
        if slot.step and not slot.micro_step and self._evaluate(evaluate.at(slot.step)):
            self._on_step(self._event)
        while slot.running and not self._stops(stop):
            step, self._settled = slot.step, False
            self._tokens += advance(pack, [slot])
            self._settled = True
            if slot.step == step:
                continue  # gradients are accumulated over several forwards
            if world.agree(save.due(slot.step)):  # before an evaluation, which may take long and fail
                self._save()
            self._evaluate(world.agree(evaluate.due(slot.step)))
            self._on_step(self._event)
        if slot.failure:
            raise TrainingError(slot.failure)

    def _stops(self, stop: Stop) -> bool:
        """True if any process was asked to stop; several stop only between steps, where their gradients are summed."""
        return not (self.world.size > 1 and self.slot.micro_step) and self.world.any(stop.is_set())

    @property
    def _event(self) -> StepEvent:
        return StepEvent.of(self.slot, *self._spent)

    @property
    def _spent(self) -> tuple[int, float]:
        """Tokens and seconds of all starts of this run."""
        return self._before[0] + self._tokens, self._before[1] + time.perf_counter() - self._started

    # -- evaluations --------------------------------------------------------------------------------------------------

    def _evaluate(self, due: bool) -> bool:
        """Evaluate at the last step, or if ``due``, unless this step was evaluated. Then stop early, or keep the best.

        Returns whether it evaluated.
        """
        slot, options, evaluations = self.slot, self.options, self.slot.curve.evaluations
        there = bool(evaluations) and evaluations[-1]["step"] == slot.step
        missing = (slot.done or due) and not there
        if missing:
            evaluations.append({"step": slot.step, **self._measure()})
        if not (missing or there):
            return False
        asked, patience = options.metric_for_best_model, options.early_stopping_patience
        stalled = early_stopping.stalled(evaluations, asked, options.early_stopping_threshold) if patience else 0
        if patience and not slot.done and stalled >= patience:
            times = f"{patience} evaluations" if patience > 1 else "an evaluation"
            slot.stop_reason = f"no better {early_stopping.watched(evaluations[-1], asked)} in {times}"
            self._on_event(Message("stopped_early", step=slot.step, steps=slot.steps, reason=slot.stop_reason))
        top = self._best
        if options.load_best_model_at_end and top and top[0] == slot.step and not slot.done:
            self._save()
        return missing

    def _measure(self) -> dict[str, float]:
        """The metrics of the adapter over all held-out rows."""
        self._evaluating = True
        (found,) = self.job.evaluator().metrics([ADAPTER])
        self._evaluating = False
        return found

    @property
    def _best(self) -> tuple[int, str, float] | None:
        """Step, metric and value of the best evaluation."""
        return early_stopping.best(self.slot.curve.evaluations, self.options.metric_for_best_model)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def _position(self) -> tuple[int, int, int]:
        """Steps, forwards of the next step, evaluations."""
        return self.slot.step, self.slot.micro_step, len(self.slot.curve.evaluations)

    def _save(self) -> None:
        """A checkpoint of this step, unless there is one. Called by all processes; rank 0 writes."""
        if self.slot.step in self._kept:
            return
        problem = None
        if self.world.is_main_process:
            try:
                self._write()
            except SaveError as error:
                problem = error
        if not self.world.agree(problem is None):
            raise problem or SaveError("the first process cannot write the checkpoint")
        self._kept.add(self.slot.step)

    def _write(self) -> None:
        tokens, seconds = self._spent
        run = {"identity": self.identity, "tokens": tokens, "seconds": seconds, "resumed_at": self._resumed_at}
        restore.write(self.slot, self.model, self.options, run)
        self._saved = self._position
        self._rotate()

    def _rotate(self) -> None:
        """Delete the oldest checkpoints beyond the limit, but neither this step's nor the best one's."""
        top = self._best
        folders.rotate(self.folder, self.options.save_total_limit, {self.slot.step, *([top[0]] if top else [])})

    # -- the end ------------------------------------------------------------------------------------------------------

    def _take_best(self) -> int:
        """Put the adapter that the options keep into the model. Returns its step."""
        top = self._best
        if not self.options.load_best_model_at_end or top is None or top[0] == self.slot.step:
            return self.slot.step
        try:
            best = folders.read(self.folder / f"checkpoint-{top[0]}").adapter()
            adapters.fill(self.model.base_model, ADAPTER, best)
        except InputError as error:
            raise TrainingError(f"the adapter of step {top[0]}, the best one, is lost: {error}") from None
        self._on_event(Message("best_taken", step=top[0], metric=top[1], value=top[2]))
        return top[0]

    def _finish(self, adapter_step: int) -> dict[str, Any]:
        """Write the adapter and ``run.json``. Returns the record.

        Raises:
            SaveError: the folder cannot be written.
        """
        found = self._record("finished", adapter_step)
        if self.world.is_main_process:
            found = self._save_output(found)
        self.world.barrier()
        return found

    def _save_output(self, found: dict[str, Any]) -> dict[str, Any]:
        return output.save(self.model, self.folder, found, usage_files(self.job))

    def _record(self, state: str, adapter_step: int | None = None) -> dict[str, Any]:
        tokens, seconds = self._spent
        return record(
            self.job,
            self.slot,
            state=state,
            tokens=tokens,
            seconds=seconds,
            identity=self.identity,
            resumed_at=self._resumed_at,
            adapter_step=adapter_step,
        ).to_json()

    # -- a stop, a failure --------------------------------------------------------------------------------------------

    def end_early(self, error: BaseException | None, stop: Stop) -> NoReturn:
        """Save what there is, then raise why training ended. ``error`` is None after a stop between forwards."""
        stopped = error is None or isinstance(error, KeyboardInterrupt)
        slot, notes = self.slot, list[str]()
        found = self._record("interrupted" if stopped else "failed")
        if slot.step and self.world.is_main_process:
            notes = self._keep(found, error)
        if stopped:
            if error is None and stop.by != "SIGTERM" and slot.step and self.world.size == 1 and not slot.micro_step:
                found = self._evaluate_once_more(found)
            at = f"stopped at step {slot.step} of {slot.steps}" if slot.step else "stopped before the first step"
            raise Interrupted(
                "; ".join([at, *(notes or ["nothing was trained"])]), found if slot.step else None
            ) from None
        assert error is not None
        if isinstance(error, Exception) and slot.step:
            kind = type(error) if isinstance(error, InputError | SaveError) else TrainingError
            raise kind("; ".join([self._reason(error).rstrip("."), *notes])) from error
        if slot.failure:
            raise TrainingError(self._reason(error)) from error
        raise error

    def _keep(self, found: dict[str, Any], error: BaseException | None) -> list[str]:
        """Save the adapter, and a checkpoint if its state is that of a whole forward. Returns what there is now."""
        slot, notes = self.slot, []
        whole = error is None or (self._settled and isinstance(error, Exception) and not isinstance(error, SaveError))
        if whole and not slot.failure and self._saved != self._position:
            try:
                self._write()
            except Exception as problem:
                notes.append(str(problem) if isinstance(problem, LoraloomError) else explain(problem))
        try:
            self._save_output(found)
            there = f"the adapter as it was after step {slot.step} is saved in {self.folder}"
            notes.append(f"{there}; to see it: loraloom inspect {shlex.quote(str(self.folder))}")
        except SaveError as problem:
            notes.append(str(problem))
        if last := folders.listed(self.folder):
            what = "the last checkpoint is" if slot.failure else "the same command with --resume continues from"
            notes.append(f"{what} {last[0]}")
        return notes

    def _evaluate_once_more(self, found: dict[str, Any]) -> dict[str, Any]:
        """The record with an evaluation of the last step, which a resumed run does not see.

        All is saved by now: a second Ctrl-C, or a full disk, may end it.
        """
        evaluations = self.slot.curve.evaluations
        if any(one["step"] == self.slot.step for one in evaluations):
            return found
        with contextlib.suppress(KeyboardInterrupt, Exception):
            evaluations.append({"step": self.slot.step, **self._measure()})
            found = self._record("interrupted")
            self._save_output(found)
        return found

    def _reason(self, error: BaseException) -> str:
        """Where and why training failed, and what to do."""
        slot, job, options = self.slot, self.job, self.options
        if slot.failure:
            guilty: list[int] = []
            with contextlib.suppress(Exception):  # the failure is reported even if its rows cannot be found
                guilty = nonfinite_examples(job, slot, job.data.train.examples)
            return not_finite(slot.failure, slot.failed_examples, guilty, job.data.train.examples.where)
        if isinstance(error, LoraloomError):
            return str(error)

        def needs(batch_size: int) -> Memory:
            return step_memory(job, job.config(options), batch_size)

        if self._evaluating:
            return f"evaluation at step {slot.step}: {explain(error, options, evaluating=True)}"
        return f"step {slot.step + 1}: {explain(error, options, needs=needs)}"


class Every:
    """When a checkpoint or an evaluation is due: see ``TrainConfig.eval_at``.

    The clock decides only when to evaluate or save; no number of the training depends on it.
    """

    def __init__(self, moment: str, steps: int | None, minutes: float | None, steps_per_epoch: int) -> None:
        self._steps = {"steps": steps, "epoch": steps_per_epoch}.get(moment)
        self._minutes = minutes if moment == "minutes" else None
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        if self._minutes is not None and time.monotonic() - self._last >= 60 * self._minutes:
            self._last = time.monotonic()
            return True
        return self.at(step)

    def at(self, step: int) -> bool:
        """Whether it is due at ``step`` whatever the clock says."""
        return self._steps is not None and step % self._steps == 0
