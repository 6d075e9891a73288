"""seq2seq-lm: the decoder of an encoder-decoder model learns to write a target for each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.config.lora import TaskType
from loraloom.data.example import IGNORE, Example
from loraloom.data.records import Record, Translated
from loraloom.data.shape.forms import Form, read_translated
from loraloom.data.tokenize.translations import TranslationEncoder
from loraloom.errors import ModelError
from loraloom.models.configs import has_decoder_and_encoder
from loraloom.models.parts import reads_both_ways
from loraloom.tasks.base import Inputs
from loraloom.tasks.texts import PLACEHOLDER, TextTask


class Seq2SeqLM(TextTask):
    name = "seq2seq-lm"
    task_type = TaskType.SEQ_2_SEQ_LM
    encoder = TranslationEncoder
    forms = (Form("source-target", ("source", "target"), read_translated),)
    layout = "target"
    indivisible = "it is not known which part of the target belongs to which part of the source"

    text_column = "source"

    def answered(self, columns: Mapping[str, Any], labels: Sequence[str], problem: str | None) -> dict[str, Any]:
        return {**columns, "target": PLACEHOLDER}

    def check_model(self, name: str, config: Any) -> None:
        if not has_decoder_and_encoder(config):
            instead = "seq-cls or token-cls" if reads_both_ways(config) else "causal-lm"
            raise ModelError(
                f"{name}: {config.model_type} has no encoder and decoder, which seq2seq-lm needs; choose a model such "
                f"as T5 or BART, or the task {instead}"
            )

    def inputs(self, model: Any, inputs: Inputs, labels: Tensor | None) -> Inputs:
        if labels is None or "decoder_input_ids" in inputs:
            return inputs
        return {**inputs, "decoder_input_ids": decoder_inputs(model, labels)}

    def prompt_and_target(self, example: Example) -> tuple[list[int], list[int]]:
        assert isinstance(example.labels, list)
        return example.input_ids, [int(label) for label in example.labels]

    def target_of(self, record: Record) -> str | None:
        return record.target if isinstance(record, Translated) else None

    def shown_input(self, record: Record, example: Example, tokenizer: Any) -> str:
        assert isinstance(record, Translated)
        return record.source

    def shown_target(self, example: Example, tokenizer: Any, names: Sequence[str]) -> str | None:
        return str(tokenizer.decode(example.labels))


def decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor:
    """The decoder's inputs for ``labels``, both [rows, length]: a start token, then all labels but the last.

    Raises:
        ModelError: the model is no encoder-decoder, or its config has no start token.
    """
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        found: Tensor = shift(labels=labels)
        return found
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"task: seq2seq-lm is for an encoder and a decoder, and {type(model).__name__} is a decoder alone; "
            "train its text as causal-lm"
        )
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ModelError(f"model: the config of {type(model).__name__} has no decoder_start_token_id; set it there")
    padding = getattr(config, "pad_token_id", None) or 0  # as in the forward of M2M100 and similar models
    before = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE, padding)
    return torch.cat([torch.full_like(labels[:, :1], start), before], 1)
