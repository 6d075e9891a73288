"""One run under way: where it begins, what is saved on the way, and how it ends, in good ways and in bad ones.

The steps are ``loop``'s business, the files ``checkpoints``' and ``output``'s.
"""

from __future__ import annotations

import contextlib
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from loraloom.engine.loop import Every, OnStep, StepEvent, train_pack
from loraloom.engine.slot import Slot
from loraloom.errors import ConfigError, InputError, LoraloomError, SaveError, TrainingError
from loraloom.lora import checkpoint as adapters
from loraloom.messages import Message, OnEvent
from loraloom.training import early_stopping, output
from loraloom.training.checkpointing import folders, resume
from loraloom.training.checkpointing.folders import Checkpoint
from loraloom.training.checkpointing.resume import Resume
from loraloom.training.failures import Interrupted, explain, nonfinite_examples, not_finite
from loraloom.training.preflight import estimate
from loraloom.training.run_record import record
from loraloom.training.setup import TrainJob
from loraloom.training.signals import Stop
from loraloom.training.usage import usage_files


class Trainer:
    """From the first step, or a checkpoint, to the adapter in the output folder.

    Args:
        on_step: called after each step.
        on_event: called with all else that a user should know.
    """

    def __init__(
        self,
        job: TrainJob,
        slot: Slot,
        on_step: OnStep,
        on_event: OnEvent,
    ) -> None:
        self.job, self.slot, self.options, self.model = job, slot, job.options, job.model
        self.folder = Path(job.options.output)
        self.identity = resume.identity(job)
        self._on_step, self._on_event = on_step, on_event
        self._started = time.perf_counter()
        #: before this start, and in all
        self._before = self._spent = 0, 0.0
        self._resumed_at: list[int] = []
        #: where the adapter and the optimizer stand is known, as it is not within a forward or an update
        self._settled = False
        self._evaluating = False
        #: what the newest checkpoint holds: the step, forwards within it, evaluations
        self._saved: tuple[int, int, int] | None = None
        self._adapter_step: int | None = None
        #: steps of which this course knows a whole checkpoint
        self._kept: set[int] = set()

    # -- the beginning ----------------------------------------------------------------------------------------------

    def begin(self, wanted: Resume) -> dict[str, Any] | None:
        """Stand where ``wanted`` says. Returns the record of a run that has come to its end already.

        Raises:
            ConfigError: there is a checkpoint, but of another training, or it cannot be gone on from.
        """
        found = resume.find(self.options, wanted, self._on_event)
        if self.options.overwrite and wanted is True:
            found = self._replacing(found)
        if self.slot.world.is_main_process:
            folders.clean(self.folder)
        if found.stopped and not found.checkpoint:
            self._same(resume.identity_in(found.stopped), f"the run in {self.folder} that ended early")
            self._on_event(Message("no_checkpoint", folder=str(self.folder), step=found.stopped["steps"]))
        if found.finished:
            self._same(resume.identity_in(found.finished), f"the finished run in {self.folder}")
            adapters.fill(self.model.base_model, self.slot.name, adapters.read_tensors(self.folder))
            self._on_event(Message("already_finished", folder=str(self.folder), steps=found.finished["steps"]))
            return found.finished
        inside = found.checkpoint and found.checkpoint.path.parent.resolve() == self.folder.resolve()
        if self.slot.world.is_main_process and self.options.overwrite and not inside:
            folders.forget(self.folder)
        if found.checkpoint:
            with resume.understood(found.checkpoint):
                self._same(found.checkpoint.state["identity"], str(found.checkpoint.path))
            self._go_on(found.checkpoint)
        self.slot.world.barrier()
        self._started = time.perf_counter()
        return None

    def _replacing(self, found: resume.Found) -> resume.Found:
        """``found``, or nothing where that is of other data or another model and may be replaced."""
        if found.finished:
            then = resume.identity_in(found.finished)
        elif found.checkpoint and found.checkpoint.path.parent.resolve() == self.folder.resolve():
            then = found.checkpoint.state["identity"]
        else:
            return found
        try:
            resume.check_same(then, self.identity, f"what lies in {self.folder}")
        except ConfigError as error:
            if self.options.overwrite:
                self._on_event(Message("replaced", error=str(error)))
                if found.checkpoint:
                    return resume.Found()
                return self._replacing(resume.find(self.options, True, self._on_event, ended=False))
        return found

    def _same(self, then: dict[str, Any], where: str) -> None:
        if changes := resume.check_same(then, self.identity, where):
            self._on_event(Message("rounding", where=where, changes=list(changes)))

    def _go_on(self, found: Checkpoint) -> None:
        state = found.state
        resume.restore(found, self.slot, self.model)
        with resume.understood(found):
            self._before = self._spent = int(state["tokens"]), float(state["seconds"])
            self._resumed_at = [*state["resumed_at"], found.step]
        if found.path.parent.resolve() == self.folder.resolve():
            self._saved = self._stand
            self._kept.add(found.step)
        top = self._best
        if self.options.load_best_model_at_end and top and top[0] != found.step and self.slot.world.is_main_process:
            name = f"checkpoint-{top[0]}"
            if not folders.is_whole(self.folder / name):
                folders.copy(folders.read(found.path.parent / name), self.folder)
        if self._kept and self.slot.world.is_main_process:
            self._rotate()  # who saved the last one may have died before
        self._on_event(Message("run_resumed", path=str(found.path), step=found.step, steps=self.slot.steps))

    # -- the steps --------------------------------------------------------------------------------------------------

    def train(self, stop: Stop) -> None:
        """To the last step, or until ``stop`` is set. Whatever goes wrong is raised."""
        options, each = self.options, self.job.steps_per_epoch

        def ask() -> bool:
            self._settled = False
            return stop.is_set()

        # The last step is always evaluated: the result is what it says.
        tokens = train_pack(
            self.model,
            [self.slot],
            self.job.task,
            self.job.pad_id,
            evaluate_every=_every(options.eval_at, options.eval_steps, options.eval_minutes, each),
            evaluate=self._evaluate,
            save_every=_every(options.save_at, options.save_steps, options.save_minutes, each),
            save=self._save_on_the_way,
            measured=self._measured,
            on_step=self._seen,
            stopped=ask,
        )
        self._note(tokens, time.perf_counter() - self._started)
        if self.slot.done:
            self._adapter_step = self._take_best()

    def _evaluate(self, slot: Slot) -> dict[str, float]:
        self._settled = self._evaluating = True
        (found,) = self.job.evaluator().metrics([slot.name])
        self._evaluating = False
        return found

    def _measured(self, event: StepEvent) -> None:
        """What follows from an evaluation: an end, or an adapter that is to be kept."""
        self._note(event.tokens, event.seconds)
        slot, options = self.slot, self.options
        evaluations, asked = slot.curve.evaluations, options.metric_for_best_model
        patience, threshold = options.early_stopping_patience, options.early_stopping_threshold
        if patience and not slot.done and early_stopping.stalled(evaluations, asked, threshold) >= patience:
            times = f"{patience} evaluations" if patience > 1 else "an evaluation"
            slot.stop_reason = f"no better {early_stopping.watched(evaluations[-1], asked)} in {times}"
            self._on_event(Message("stopped_early", step=slot.step, steps=slot.steps, reason=slot.stop_reason))
        top = self._best
        if options.load_best_model_at_end and top and top[0] == slot.step and not slot.done:
            self._save_here()

    def _save_on_the_way(self, event: StepEvent) -> None:
        self._note(event.tokens, event.seconds)
        self._save_here()

    def _seen(self, event: StepEvent) -> None:
        self._note(event.tokens, event.seconds)
        tokens, seconds = self._spent
        self._on_step(replace(event, tokens=tokens, seconds=seconds))

    def _note(self, tokens: int, seconds: float) -> None:
        """``tokens`` and ``seconds`` are those of this start."""
        self._settled = True
        self._spent = self._before[0] + tokens, self._before[1] + seconds

    @property
    def _best(self) -> tuple[int, str, float] | None:
        return early_stopping.best(self.slot.curve.evaluations, self.options.metric_for_best_model)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def _stand(self) -> tuple[int, int, int]:
        return self.slot.step, self.slot.micro_step, len(self.slot.curve.evaluations)

    def _save_here(self) -> None:
        """A checkpoint of this step, unless there is one. All processes come here; the first one writes."""
        if self.slot.step in self._kept:
            return
        world, problem = self.slot.world, None
        if world.is_main_process:
            try:
                self._write()
            except SaveError as error:
                problem = error
        if not world.agree(problem is None):
            raise problem or SaveError("the first process cannot write the checkpoint")
        self._kept.add(self.slot.step)

    def _write(self) -> None:
        tokens, seconds = self._spent
        run = {
            "identity": self.identity,
            "tokens": tokens,
            "seconds": seconds,
            "resumed_at": self._resumed_at,
        }
        resume.write(self.slot, self.model, self.options, run)
        self._saved = self._stand
        self._rotate()

    def _rotate(self) -> None:
        top = self._best
        folders.rotate(self.folder, self.options.save_total_limit, {self.slot.step, *([top[0]] if top else [])})

    # -- the end ----------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Write the adapter and ``run.json`` of a training that came to its end. Returns the record.

        Raises:
            SaveError: the folder cannot be written.
        """
        found = self._record("finished", self._adapter_step)
        if self.slot.world.is_main_process:
            found = self._save_output(found)
        self.slot.world.barrier()
        return found

    def _save_output(self, found: dict[str, Any]) -> dict[str, Any]:
        return output.save(self.model, self.folder, found, usage_files(self.job))

    def _take_best(self) -> int:
        """The step of the adapter that is to be kept, which is then the one in the model."""
        top = self._best
        if not self.options.load_best_model_at_end or top is None or top[0] == self.slot.step:
            return self.slot.step
        try:
            resume.fill(folders.read(self.folder / f"checkpoint-{top[0]}"), self.slot.name, self.model)
        except ConfigError as error:
            raise TrainingError(f"the adapter of step {top[0]}, the best one, is lost: {error}") from None
        self._on_event(Message("best_taken", step=top[0], metric=top[1], value=top[2]))
        return top[0]

    def end_early(self, error: BaseException | None, stop: Stop) -> NoReturn:
        """Save what is there, then say why training ended. ``error`` is None for a stop that was waited for."""
        stopped = error is None or isinstance(error, KeyboardInterrupt)
        slot, notes = self.slot, []
        found = self._record("interrupted" if stopped else "failed")
        if slot.step and slot.world.is_main_process:
            notes = self._keep(found, error)
        if stopped:
            if error is None and stop.by != "SIGTERM" and slot.step and slot.world.size == 1 and not slot.micro_step:
                found = self._look_once_more(found)
            at = f"stopped at step {slot.step} of {slot.steps}" if slot.step else "stopped before the first step"
            raise Interrupted(
                "; ".join([at, *(notes or ["nothing was trained"])]), found if slot.step else None
            ) from None
        assert error is not None
        if isinstance(error, Exception) and slot.step:
            said = self._said(error).rstrip(".")
            kind: type[LoraloomError] = TrainingError
            if isinstance(error, InputError | SaveError):
                kind = type(error)
            raise kind("; ".join([said, *notes])) from error
        if slot.failure:
            raise TrainingError(self._said(error)) from error
        raise error

    def _said(self, error: Exception | BaseException) -> str:
        slot = self.slot
        if slot.failure:
            guilty: list[int] = []
            with contextlib.suppress(Exception):  # it is to be told even where it cannot be looked at
                guilty = nonfinite_examples(self.job, slot, self.job.data.train.examples)
            return not_finite(slot.failure, slot.failed_examples, guilty, self.job.data.train.examples.where)
        if isinstance(error, LoraloomError):
            return str(error)
        at = f"evaluation at step {slot.step}" if self._evaluating else f"step {slot.step + 1}"
        needs = None if self._evaluating else self._needs
        return f"{at}: {explain(error, self.options, evaluating=self._evaluating, needs=needs)}"

    def _needs(self, batch_sizes: list[int]) -> dict[int, int]:
        job, options = self.job, self.options
        widest, again = job.task.widest(job.data.train.examples), options.gradient_checkpointing
        return estimate.needs(job.empty, job.config(options), widest, options.dtype, batch_sizes, again)

    def _keep(self, found: dict[str, Any], error: BaseException | None) -> list[str]:
        """Save a checkpoint, where it is known what it would hold, and the adapter. Returns what there is now."""
        slot, notes = self.slot, []
        whole = error is None or (self._settled and isinstance(error, Exception) and not isinstance(error, SaveError))
        if whole and not slot.failure and self._saved != self._stand:
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

    def _look_once_more(self, found: dict[str, Any]) -> dict[str, Any]:
        """What the adapter is worth, for the record alone: a run that is gone on with knows nothing of it.

        All is saved: a second Ctrl-C may end this, and a full disk too.
        """
        if any(one["step"] == self.slot.step for one in self.slot.curve.evaluations):
            return found
        with contextlib.suppress(KeyboardInterrupt, Exception):
            self.slot.curve.evaluations.append({"step": self.slot.step, **self._evaluate(self.slot)})
            found = self._record("interrupted")
            self._save_output(found)
        return found

    def _record(self, state: str, adapter_step: int | None = None) -> dict[str, Any]:
        found = record(
            self.job,
            self.slot,
            state=state,
            tokens=self._spent[0],
            seconds=self._spent[1],
            identity=self.identity,
            resumed_at=self._resumed_at,
            adapter_step=adapter_step,
        )
        return found.to_json()


def _every(moment: str, steps: int | None, minutes: float | None, steps_per_epoch: int) -> Every:
    """When something is due by its options: see ``TrainConfig.eval_at``."""
    return Every(
        steps={"steps": steps, "epoch": steps_per_epoch}.get(moment),
        minutes=minutes if moment == "minutes" else None,
    )
