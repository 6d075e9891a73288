"""The part of a task that loading a model asks about. Tasks themselves lie above this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraloom.config.lora import TASK_HEADS, TaskType
from loraloom.lora.auto import AUTO_CLASS


class ModelTask:
    """Members that a task does not set have the values below."""

    name: str
    #: PEFT's name
    task_type: TaskType
    #: what a class is called; empty where labels are no classes
    class_word = ""
    #: most folders lack the head, and it is trained in full
    new_head = False
    #: a decoder answers at the row's last token, which it finds by its config's padding token
    by_last_token = False
    #: text is read in one direction, also by models that read a prompt in both
    one_way = False
    #: a model whose folder lacks the pooler will do
    without_pooler = False

    @property
    def auto_class(self) -> str:
        """The class of transformers that has a model for it."""
        return AUTO_CLASS[self.task_type]

    @property
    def heads(self) -> tuple[str, ...]:
        """Modules that PEFT trains in full for this task, by their usual names."""
        return TASK_HEADS.get(self.task_type, ())

    def head(self, labels: Sequence[str], problem_type: str | None) -> dict[str, Any]:
        """What the config says of a new head."""
        return {}

    def key_mapping(self, config: Any) -> dict[str, str]:
        """Patterns of names of weights that the published folder has under others."""
        return {}

    def check_model(self, name: str, config: Any) -> None:
        """Raise ``ModelError`` if the model ``name`` with this config cannot learn the task."""
