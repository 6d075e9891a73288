"""causal-lm: a decoder learns texts, completions, and the assistant's turns of conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraloom.config.lora import TaskType
from loraloom.data.example import IGNORE, Example
from loraloom.data.records import Pair, Record
from loraloom.data.shape.conversations import read_alpaca, read_messages, read_prompt_completion, read_sharegpt
from loraloom.data.shape.forms import Form, read_text
from loraloom.data.tokenize.causal import CausalEncoder
from loraloom.errors import ModelError
from loraloom.models.configs import has_decoder_and_encoder
from loraloom.models.parts import reads_both_ways
from loraloom.tasks.texts import PLACEHOLDER, TextTask

#: Tokens that serve as the prompt if all of a text is trained on.
PROMPT = 8


class CausalLM(TextTask):
    name = "causal-lm"
    task_type = TaskType.CAUSAL_LM
    encoder = CausalEncoder
    options: Mapping[str, str] = {
        "chat_template": "how conversations are written",
        "date": "the day that a chat template writes",
        **TextTask.options,
    }
    forms = (
        Form("messages", ("messages",), read_messages, ("tools",), item="role"),
        Form("sharegpt", ("conversations",), read_sharegpt, ("system", "tools"), item="from"),
        Form("alpaca", ("instruction", "output"), read_alpaca, ("input", "system", "history")),
        Form("prompt-completion", ("prompt", "completion"), read_prompt_completion, ("tools",)),
        Form("text", ("text",), read_text),
    )
    layout = "token"
    min_tokens = 2  # the first token is never predicted
    one_way = True
    head_in_loss = True
    shifted = True

    text_column = "prompt"

    def answered(self, columns: Mapping[str, Any], labels: Sequence[str], problem: str | None) -> dict[str, Any]:
        if isinstance(talk := columns.get("messages"), list):
            return {**columns, "messages": [*talk, {"role": "assistant", "content": PLACEHOLDER}]}
        if isinstance(talk := columns.get("conversations"), list):
            return {**columns, "conversations": [*talk, {"from": "gpt", "value": PLACEHOLDER}]}
        return {**columns, "output" if "instruction" in columns else "completion": PLACEHOLDER}

    def check_model(self, name: str, config: Any) -> None:
        # Some of these load as the decoder alone, which was trained to read the encoder's output.
        if has_decoder_and_encoder(config):
            raise ModelError(
                f"{name}: {config.model_type} has an encoder and a decoder, so it cannot learn causal-lm; choose a "
                "decoder such as Llama or GPT-2, or the task seq2seq-lm with source and target"
            )
        # The language head of an encoder would see the tokens to predict.
        if reads_both_ways(config):
            raise ModelError(
                f"{name}: {config.model_type} reads a text in both directions, so it cannot learn causal-lm; "
                "choose a decoder, or the task seq-cls"
            )

    def prompt_and_target(self, example: Example) -> tuple[list[int], list[int]]:
        """The last labelled part and all before it; without a prompt, the first tokens of a text and the rest."""
        labels = example.labels
        assert isinstance(labels, list)
        trained = [i for i, label in enumerate(labels) if label != IGNORE]
        stop = start = trained[-1] + 1 if trained else len(labels)
        while start > 0 and labels[start - 1] != IGNORE:
            start -= 1
        # A row's first token is never predicted. If all tokens are labelled, the first ones are the prompt.
        start = start if start > 1 else max(1, min(PROMPT, stop - 1))
        return example.input_ids[:start], example.input_ids[start:stop]

    def target_of(self, record: Record) -> str | None:
        return record.completion if isinstance(record, Pair) else None

    def shown_input(self, record: Record, example: Example, tokenizer: Any) -> str:
        if isinstance(record, Pair) and record.prompt:
            return record.prompt
        return str(tokenizer.decode(self.prompt_and_target(example)[0], skip_special_tokens=True))
