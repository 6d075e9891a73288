"""One run from options to a folder: data, model, adapter, loop, files.

The folder gets the adapter in PEFT's format and ``run.json``: every setting, the versions, the data's hash, curves.
Before the first step it gets ``run.yaml``, and on the way checkpoints, from which a run that was stopped goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loraloom.config.train import TrainOptions
from loraloom.data.batches import collate
from loraloom.data.table.scan import Watch
from loraloom.distributed.launch import find as find_place
from loraloom.distributed.launch import lonely
from loraloom.engine.loop import Progress
from loraloom.engine.pack import Pack
from loraloom.engine.slot import Slot
from loraloom.errors import ConfigError, TargetError
from loraloom.files import lock
from loraloom.lora.model import PeftModel, get_peft_model
from loraloom.lora.targets import plan
from loraloom.models import activation_checkpointing
from loraloom.models.fsdp import shard
from loraloom.train.checkpointing.resume import Resume, Say, date_of, goes_on
from loraloom.train.dataset import silent
from loraloom.train.output import check_output, described
from loraloom.train.preflight import doctor, machine
from loraloom.train.preflight.doctor import Finding
from loraloom.train.preflight.estimate import Outlook, look_ahead
from loraloom.train.setup import Prepared, load, predict
from loraloom.train.signals import asked_to_stop
from loraloom.train.trainer import Course

ADAPTER = "default"


@dataclass
class RunResult:
    """What came out. ``record`` is what ``run.json`` holds."""

    record: dict[str, Any]
    model: PeftModel
    predictions: list[dict[str, str]] = field(default_factory=list)


def prepare(options: TrainOptions, resume: Resume = None, reading: Watch = silent) -> Prepared:
    """Read and check everything: options, output, data, tokenizer, model.

    Args:
        resume: what ``run`` will be given: the folder may then hold what is gone on with.
        reading: told now and then what is done with rows, with how many, and of how many.

    Raises:
        InputError: anything wrong with what the user gave. Nothing was written.
    """
    place = find_place(options.device)
    place.world.agreed(lambda: lock.check(options.output))
    place.world.agreed(lambda: check_output(options, going_on=goes_on(options, resume)))
    loaded = load(options, place, reading, date_of(options, resume))
    options, config = loaded.options, loaded.config(loaded.options)
    made = plan(loaded.base, config)
    model = get_peft_model(loaded.base, config, adapter_name=ADAPTER, seed=options.seed)
    if options.gradient_checkpointing:
        activation_checkpointing.enable(model)
    if options.fsdp:
        shard(model, place)
    steps, per_epoch = loaded.steps(options)
    return Prepared(loaded, model, made, steps, per_epoch)


def examine(prepared: Prepared) -> list[Finding]:
    """What the doctor says of it.

    Raises:
        ConfigError: training would do nothing, or not what was asked.
    """
    options = prepared.options
    found = doctor.examine(
        prepared.model,
        ADAPTER,
        tokenizer=prepared.tokenizer,
        learning_rate=options.learning_rate,
        optim=options.optim,
        rows=len(prepared.data.train.examples),
        batch_size=options.batch_size * options.gradient_accumulation_steps,
        steps=prepared.steps,
    )
    if found and found[0].stops:
        raise ConfigError(found[0].text)
    if prepared.plan.note:
        found.append(Finding("targets", prepared.plan.note))
    found += _probed(prepared)
    found += machine.examine(prepared.loaded.place.device)
    return [Finding("lonely", text), *found] if (text := lonely()) else found


def _probed(prepared: Prepared) -> list[Finding]:
    """Modules that would not train, by one forward and backward of the first row.

    Raises:
        TargetError: what would train would not be what is used, or nothing would train.
    """
    pack = Pack(prepared.model, task=prepared.task, pad_id=prepared.tokenizer.pad_token_id)
    train = prepared.data.train.examples
    rows = [train[number] for number in range(min(len(train), prepared.options.batch_size))]
    found = pack.probe({ADAPTER: collate(rows, pack.pad_id, pack.task)})
    if stops := next((fault for fault in found if fault.stops), None):
        raise TargetError(stops.text)
    return [Finding("untrained", fault.text) for fault in found]


def outlook(prepared: Prepared) -> Outlook:
    """What training will need, in memory and time: see ``train.outlook``. The adapter stays as it is."""
    options, loaded = prepared.options, prepared.loaded
    processes = prepared.loaded.place.world.size  # of which each does its share
    every = {"steps": options.eval_steps, "epoch": prepared.steps_per_epoch}.get(options.eval_at)
    pack = Pack(prepared.model, task=prepared.task, pad_id=prepared.tokenizer.pad_token_id)
    return look_ahead(
        pack,
        ADAPTER,
        loaded.config(options),
        prepared.data.train.examples,
        prepared.data.evaluation.examples,
        empty=loaded.empty(),
        dtype=options.dtype,
        batch_size=-(-options.batch_size // processes),
        forwards=prepared.steps * options.gradient_accumulation_steps,
        evaluations=(1 if not every else max(1, prepared.steps // every)) / processes,
        gradient_checkpointing=options.gradient_checkpointing,
    )


def run(
    prepared: Prepared,
    watch: Callable[[Progress], None] = lambda progress: None,
    resume: Resume = None,
    say: Say = lambda text: None,
) -> RunResult:
    """Train, evaluate, and write the folder, with checkpoints on the way. What ends it early, loses nothing.

    Args:
        watch: called after each step.
        resume: True goes on from the newest whole checkpoint of the output folder, and begins afresh where there is
            none; a path goes on from that checkpoint. On a CPU, with as many threads, the adapter comes out as that of
            a run that was never stopped, to the byte. A run that has come to its end is not trained again.
        say: told what there is to know beside the steps: where it goes on, which checkpoint is damaged.

    Raises:
        ConfigError: what is to be resumed was trained with other options, data or weights; another run is under way in
            the folder.
        Interrupted: Ctrl-C, or SIGTERM.
        TrainingError: the loss is not finite, or the machine's memory was not enough.
        SaveError: the folder cannot be written; the message says what is saved, and where.
    """
    options, world = prepared.options, prepared.loaded.place.world
    with contextlib.ExitStack() as stack:
        world.agreed(lambda: stack.enter_context(lock.held(options.output)))
        return _run(prepared, watch, resume, say)


def _run(prepared: Prepared, watch: Callable[[Progress], None], resume: Resume, say: Say) -> RunResult:
    options, model = prepared.options, prepared.model
    slot = prepared.loaded.slot(ADAPTER, model, options, prepared.steps)

    def measure(slot: Slot) -> dict[str, float]:
        return prepared.loaded.evaluate(model, slot.name)

    course = Course(prepared, slot, measure, watch, say)
    finished, record, ended = course.begin(resume), None, None
    with described(options) if slot.world.first else contextlib.nullcontext():
        if finished:
            return RunResult(finished, model, predict(prepared, count=3))
        with asked_to_stop() as stop:
            try:
                course.train(stop)
            except BaseException as error:  # what is there is saved below, then it is raised again
                ended = error
            if slot.done and ended is None:
                record = course.finish()
        if record is None:
            course.end_early(ended, stop)
    return RunResult(record, model, predict(prepared, count=3))
