"""Promises of the tasks as a whole: each is found by its names, and what does nothing with it is refused."""

from __future__ import annotations

import pickle

import pytest

from loraloom import TaskType, tasks
from loraloom.config.names import TASKS as NAMES
from loraloom.errors import ConfigError


@pytest.mark.parametrize("name", ["seq-cls", "SEQ_CLS", TaskType.SEQ_CLS])
def test_a_task_goes_by_its_option_its_peft_name_and_its_enum(name: str) -> None:
    assert tasks.get(name) is tasks.TASKS["seq-cls"]


def test_a_task_that_rows_are_not_read_for_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'seq_cl' is not one of .*seq-cls, .*; did you mean 'seq-cls'"):
        tasks.get("seq_cl")


def test_every_task_that_a_run_can_name_is_there_and_travels_to_other_processes() -> None:
    assert {name: task.task_type for name, task in tasks.TASKS.items()} == NAMES
    for task in tasks.TASKS.values():
        assert type(pickle.loads(pickle.dumps(task))) is type(task)
