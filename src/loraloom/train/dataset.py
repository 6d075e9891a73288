"""The rows of a run: read and checked before anything is loaded, tokenised once there is a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraloom.config import TaskType
from loraloom.data.batches import bucketed, padding_share
from loraloom.data.encode import Encoded, encode
from loraloom.data.rows import Row, check_columns, check_labels, data_hash, label_names, read_rows, split
from loraloom.train.load import length_within
from loraloom.train.options import TASKS, TrainOptions


@dataclass
class Data:
    """The rows of a run, tokenised. ``names`` are the labels in the order of their numbers."""

    train: Encoded
    evaluation: Encoded
    evaluation_rows: list[Row]
    names: list[str]
    padding: float
    hashes: dict[str, str]


def read_data(options: TrainOptions, tokenizer: Any) -> Data:
    """The rows of a run, checked, split and tokenised.

    Raises:
        DataError: a file that cannot be read or does not hold what the task needs.
    """
    return encode_run_rows(read_run_rows(options), options, tokenizer)


@dataclass
class Rows:
    """The rows of a run as they were read: checked and split, not tokenised."""

    train: list[Row]
    evaluation: list[Row]
    #: the file that the held-out rows came from
    source: str
    names: list[str]
    hashes: dict[str, str]


def read_run_rows(options: TrainOptions) -> Rows:
    task = TASKS[options.task]
    rows = read_rows(options.data)
    check_columns(rows, task, options.data)
    hashes = {options.data: data_hash(options.data)}
    source = options.data
    if isinstance(options.eval_split, str):
        source = options.eval_split
        held_out = read_rows(source)
        check_columns(held_out, task, source)
        hashes[source] = data_hash(source)
    else:
        if task is TaskType.SEQ_CLS:
            label_names(rows, options.data)  # of one class only, the split would say something else
        assert isinstance(options.eval_split, int | float)
        rows, held_out = split(rows, options.eval_split, options.seed, keep_labels=task is TaskType.SEQ_CLS)
    names: list[str] = []
    if task is TaskType.SEQ_CLS:
        names = label_names(rows, options.data)
        check_labels(rows, held_out, source)
    return Rows(rows, held_out, source, names, hashes)


def encode_run_rows(rows: Rows, options: TrainOptions, tokenizer: Any) -> Data:
    task, length = TASKS[options.task], length_within(None, options.max_length, options.model)
    train = encode(rows.train, tokenizer, task, length, options.data, rows.names)
    evaluation = encode(rows.evaluation, tokenizer, task, length, rows.source, rows.names)
    batches = bucketed(train.lengths, options.batch_size, options.seed, 0)
    padding = padding_share(train.lengths, batches)
    return Data(train, evaluation, rows.evaluation, rows.names, padding, rows.hashes)
