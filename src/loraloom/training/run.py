"""A run before its first step: everything is read and checked.

``Trainer(prepare(options)).fit()`` is a whole run.
"""

from __future__ import annotations

from loraloom.config.train import TrainConfig
from loraloom.data.table.scan import OnProgress, silent
from loraloom.distributed.launch import find as find_device
from loraloom.distributed.launch import single_process_warning
from loraloom.engine.pack import Pack
from loraloom.errors import TargetError
from loraloom.files import lock, log
from loraloom.lora.targets import plan
from loraloom.messages import Message, Warn
from loraloom.models import activation_checkpointing
from loraloom.models.fsdp import shard
from loraloom.training.checkpointing.resume import Resume, date_of, resumes
from loraloom.training.output import check_output
from loraloom.training.preflight import doctor, machine
from loraloom.training.setup import ADAPTER, TrainJob, load


def prepare(options: TrainConfig, resume: Resume = None, reading: OnProgress = silent) -> TrainJob:
    """Read and check everything: options, output, data, tokenizer, model.

    Args:
        resume: what ``Trainer.fit`` will be given: the folder may then hold the run to resume.
        reading: called now and then with what is done with rows, how many are done, and of how many.

    Raises:
        InputError: anything wrong with what the user gave. Nothing was written.
    """
    place = find_device(options.device)
    place.world.main_process_first(lambda: lock.check(options.output))
    place.world.main_process_first(lambda: check_output(options, resumes=resumes(options, resume)))
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
    """What may be a mistake, or a surprise.

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
    """Modules that would not train, found by one forward and backward of a row.

    Raises:
        TargetError: the adapter would train something else than is used later, or nothing.
    """
    pack = Pack(job.model, task=job.task, pad_id=job.pad_id)
    train = job.data.train.examples
    rows = [train[number] for number in range(min(len(train), job.options.batch_size))]
    found = pack.probe({ADAPTER: pack.task.collate(rows, pack.pad_id)})
    if stops := next((fault for fault in found if fault.stops), None):
        raise TargetError(stops.text)
    return [Warn("note", text=fault.text) for fault in found]
