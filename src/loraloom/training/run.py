"""One run from options to a folder: data, model, adapter, loop, files.

The folder gets the adapter in PEFT's format and ``run.json``: every setting, the versions, the data's hash, curves.
Before the first step it gets ``run.yaml``, and on the way checkpoints, from which a run that was stopped goes on.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

from loraloom.config.train import TrainConfig
from loraloom.data.table.scan import OnProgress, silent
from loraloom.distributed.launch import find as find_device
from loraloom.distributed.launch import single_process_warning
from loraloom.engine.loop import OnStep
from loraloom.engine.pack import Pack
from loraloom.errors import TargetError
from loraloom.files import lock, log
from loraloom.lora.model import PeftModel
from loraloom.lora.targets import plan
from loraloom.messages import Message, OnEvent, Warn, ignore, logged
from loraloom.models import activation_checkpointing
from loraloom.models.fsdp import shard
from loraloom.training.checkpointing.resume import Resume, date_of, resumes
from loraloom.training.output import check_output, described
from loraloom.training.preflight import doctor, machine
from loraloom.training.preflight.estimate import ResourceEstimate, estimate_resources
from loraloom.training.setup import TrainJob, load
from loraloom.training.signals import asked_to_stop
from loraloom.training.trainer import Trainer

ADAPTER = "default"


@dataclass
class RunResult:
    """What came out. ``record`` is what ``run.json`` holds."""

    record: dict[str, Any]
    job: TrainJob
    predictions: list[dict[str, str]] = field(default_factory=list)

    @property
    def model(self) -> PeftModel:
        return self.job.model


def prepare(options: TrainConfig, resume: Resume = None, reading: OnProgress = silent) -> TrainJob:
    """Read and check everything: options, output, data, tokenizer, model.

    Args:
        resume: what ``run`` will be given: the folder may then hold what is gone on with.
        reading: told now and then what is done with rows, with how many, and of how many.

    Raises:
        InputError: anything wrong with what the user gave. Nothing was written.
    """
    place = find_device(options.device)
    place.world.main_process_first(lambda: lock.check(options.output))
    place.world.main_process_first(lambda: check_output(options, going_on=resumes(options, resume)))
    setup = load(options, place, reading, date_of(options, resume))
    for text in setup.data.notes:
        log.info(text)
    for text in setup.data.warnings:
        log.warning(text)
    options, config = setup.options, setup.config(setup.options)
    made = plan(setup.base, config)
    setup.model.add_adapter(ADAPTER, config, seed=options.seed)
    setup.model.set_adapter(ADAPTER)
    if options.gradient_checkpointing:
        activation_checkpointing.enable(setup.model)
    if options.fsdp:
        shard(setup.model, place)
    steps, per_epoch = setup.steps_of(options)
    return TrainJob(**vars(setup), plan=made, steps=steps, steps_per_epoch=per_epoch)


def examine(job: TrainJob) -> list[Message]:
    """What may well be a mistake, or surprise.

    Raises:
        ConfigError: training would do nothing, or not what was asked.
    """
    options = job.options
    found = doctor.examine(
        job.model,
        ADAPTER,
        tokenizer=job.tokenizer,
        learning_rate=options.learning_rate,
        optim=options.optim,
        rows=len(job.data.train.examples),
        batch_size=options.batch_size * options.gradient_accumulation_steps,
        steps=job.steps,
    )
    if job.plan.note:
        found.append(Warn("note", text=job.plan.note))
    found += _probed(job)
    found += machine.examine(job.device)
    return [Warn("note", text=text), *found] if (text := single_process_warning()) else found


def _probed(job: TrainJob) -> list[Warn]:
    """Modules that would not train, by one forward and backward of the first row.

    Raises:
        TargetError: what would train would not be what is used, or nothing would train.
    """
    pack = Pack(job.model, task=job.task, pad_id=job.pad_id)
    train = job.data.train.examples
    rows = [train[number] for number in range(min(len(train), job.options.batch_size))]
    found = pack.probe({ADAPTER: pack.task.collate(rows, pack.pad_id)})
    if stops := next((fault for fault in found if fault.stops), None):
        raise TargetError(stops.text)
    return [Warn("note", text=fault.text) for fault in found]


def outlook(job: TrainJob) -> ResourceEstimate:
    """What training will need, in memory and time: see ``training.preflight.estimate``. The adapter stays as it is."""
    options = job.options
    processes = job.world.size  # of which each does its share
    every = {"steps": options.eval_steps, "epoch": job.steps_per_epoch}.get(options.eval_at)
    pack = Pack(job.model, task=job.task, pad_id=job.pad_id)
    return estimate_resources(
        pack,
        ADAPTER,
        job.config(options),
        job.data.train.examples,
        job.data.validation.examples,
        empty=job.empty(),
        dtype=options.dtype,
        batch_size=-(-options.batch_size // processes),
        forwards=job.steps * options.gradient_accumulation_steps,
        evaluations=(1 if not every else max(1, job.steps // every)) / processes,
        gradient_checkpointing=options.gradient_checkpointing,
    )


def run(
    job: TrainJob,
    on_step: OnStep = ignore,
    resume: Resume = None,
    on_event: OnEvent = ignore,
) -> RunResult:
    """Train, evaluate, and write the folder, with checkpoints on the way. What ends it early, loses nothing.

    Args:
        on_step: called after each step.
        resume: True resumes from the newest whole checkpoint of the output folder, and starts over where there is
            none; a path resumes from that checkpoint. On a CPU, with as many threads, the adapter comes out as that of
            a run that was never stopped, to the byte. A run that has come to its end is not trained again.
        on_event: called with all else: where it resumes, which checkpoint is damaged.

    Raises:
        ConfigError: what is to be resumed was trained with other options, data or weights; another run is under way in
            the folder.
        Interrupted: Ctrl-C, or SIGTERM.
        TrainingError: the loss is not finite, or the machine's memory was not enough.
        SaveError: the folder cannot be written; the message says what is saved, and where.
    """
    options, world = job.options, job.world
    with contextlib.ExitStack() as stack:
        world.main_process_first(lambda: stack.enter_context(lock.held(options.output)))
        return _run(job, on_step, resume, logged(on_event))


def _run(job: TrainJob, on_step: OnStep, resume: Resume, on_event: OnEvent) -> RunResult:
    options = job.options
    slot = job.slot(ADAPTER, options, job.steps)
    trainer = Trainer(job, slot, on_step, on_event)
    finished, record, ended = trainer.begin(resume), None, None
    with described(options) if slot.world.is_main_process else contextlib.nullcontext():
        if finished:
            return RunResult(finished, job, job.shown(3, ADAPTER))
        with asked_to_stop() as stop:
            try:
                trainer.train(stop)
            except BaseException as error:  # what is there is saved below, then it is raised again
                ended = error
            if slot.done and ended is None:
                record = trainer.finish()
        if record is None:
            trainer.end_early(ended, stop)
    return RunResult(record, job, job.shown(3, ADAPTER))
