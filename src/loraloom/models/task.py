"""The members of a task that loading a model needs. The tasks are in a higher package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraloom.config.lora import TASK_HEADS, TaskType
from loraloom.lora.auto import AUTO_CLASS


class ModelTask:
    """Defaults of the members."""

    name: str
    #: PEFT's name
    task_type: TaskType
    #: the word for a class; empty if labels are not classes
    class_word = ""
    #: the head is usually missing in the folder and is trained in full
    new_head = False
    #: a decoder predicts at the row's last token, which it finds by its config's padding token
    by_last_token = False
    #: attention is causal, also in models that read a prompt bidirectionally
    one_way = False
    #: the model has no head
    bare = False
    #: the folder may lack the pooler
    without_pooler = False

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads a model for the task."""
        return AUTO_CLASS[self.task_type]

    @property
    def heads(self) -> tuple[str, ...]:
        """Modules that PEFT trains in full for this task, by their usual names."""
        return TASK_HEADS.get(self.task_type, ())

    def head(self, labels: Sequence[str], problem_type: str | None) -> dict[str, Any]:
        """Fields of the config for a new head."""
        return {}

    def key_mapping(self, config: Any) -> dict[str, str]:
        """Patterns of weight names in the published folder → the model's names."""
        return {}

    def check_model(self, name: str, config: Any) -> None:
        """Raise ``ModelError`` if the model ``name`` with this config cannot learn the task."""
