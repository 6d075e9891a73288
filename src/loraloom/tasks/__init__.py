"""The tasks, one object and one file each, and the checks of options that depend on the task.

A new task is a file with a subclass of ``base.Task`` and an entry in ``TASKS``.
"""

from __future__ import annotations

from dataclasses import fields

from loraloom.config.train import TrainConfig
from loraloom.data.tokenize.encode import check_overlong
from loraloom.errors import ConfigError, nearest
from loraloom.tasks.base import Task
from loraloom.tasks.causal_lm import CausalLM
from loraloom.tasks.feature_extraction import FeatureExtraction
from loraloom.tasks.question_answering import QuestionAnswering
from loraloom.tasks.seq2seq_lm import Seq2SeqLM
from loraloom.tasks.seq_cls import SequenceClassification
from loraloom.tasks.token_cls import TokenClassification

#: By name. Rows without a given task are tried in this order, the most specific task first.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        QuestionAnswering(),
        TokenClassification(),
        SequenceClassification(),
        Seq2SeqLM(),
        CausalLM(),
        FeatureExtraction(),
    )
}


def get(task: Task | str) -> Task:
    """The task by its name (``"seq-cls"``) or PEFT's (``TaskType.SEQ_CLS``, ``"SEQ_CLS"``).

    Raises:
        ConfigError: there is no such task.
    """
    if isinstance(task, Task):
        return task
    name = getattr(task, "value", task)
    for known in TASKS.values():
        if str(name).upper().replace("-", "_") in (known.name.upper().replace("-", "_"), known.task_type.value):
            return known
    raise ConfigError(f"task: {name!r} is not one of {', '.join(TASKS)}{nearest(str(name), TASKS)}")


def check(options: TrainConfig) -> None:
    """Raise ``ConfigError`` for options that the task ignores or cannot follow."""
    task, defaults = get(options.task), {spec.name: spec.default for spec in fields(options)}
    for name, what in {name: what for other in TASKS.values() for name, what in other.options.items()}.items():
        if name not in task.options and getattr(options, name) != defaults[name]:
            readers = ", ".join(other.name for other in TASKS.values() if name in other.options)
            raise ConfigError(f"{name}: does nothing with task={task.name}; it is {what} ({readers}); leave it out")
    check_overlong(task, options.overlong)
