"""The names that options have: tasks, what is done with long rows, keys of a source of data."""

from __future__ import annotations

from loraloom.config.lora import TaskType
from loraloom.errors import ConfigError, nearest

#: The tasks that a run can train, by their option.
TASKS = {
    "seq-cls": TaskType.SEQ_CLS,
    "causal-lm": TaskType.CAUSAL_LM,
    "token-cls": TaskType.TOKEN_CLS,
    "seq2seq-lm": TaskType.SEQ_2_SEQ_LM,
    "question-answering": TaskType.QUESTION_ANS,
}

#: What is done with a row of more than ``max_length`` tokens.
OVERLONG = ("error", "truncate", "drop", "split")

#: Keys of one source of data.
SOURCE_KEYS = ("path", "weight", "name", "split", "revision")


def as_task(task: TaskType | str) -> TaskType:
    """``"seq-cls"``, ``"SEQ_CLS"`` or the enum itself as a ``TaskType`` that a run can train."""
    if isinstance(task, str) and task in TASKS:
        return TASKS[task]
    name = (task.value if isinstance(task, TaskType) else str(task)).upper().replace("-", "_")
    known = {kind.value: kind for kind in TASKS.values()}
    if name not in known:
        raise ConfigError(f"task: {task!r} is not one of {', '.join(TASKS)}{nearest(str(task), TASKS)}")
    return known[name]


def task_option(task: TaskType) -> str:
    """The task by its option, as messages name it: ``"seq2seq-lm"``."""
    return next(option for option, kind in TASKS.items() if kind is task)
