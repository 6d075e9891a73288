"""From rows to token ids and labels.

This file knows what each task's loss is taken on, and how texts are cut to ``max_length``. It does not know
files, batches or models. It needs a fast tokenizer, because only those say where in the text a token starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraloom.config import TaskType
from loraloom.data.rows import Row, as_task, check_columns, label_ids
from loraloom.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

#: The label of a position that the loss leaves out (what ``torch.nn.functional.cross_entropy`` ignores).
IGNORE = -100

#: Rows tokenized at a time: enough for the tokenizer's threads, few enough to keep its offsets out of memory.
CHUNK = 1000


@dataclass(slots=True)
class Example:
    """One row as numbers: ``labels`` is a class id, or one label per token, ``IGNORE`` where none counts."""

    input_ids: list[int]
    labels: int | list[int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples in the order of the rows, and what was done to them.

    ``truncated`` rows were cut to ``max_length``; ``merged`` rows have a token that spans the end of the
    prompt and the start of the completion, and is not trained on; ``tokens`` is the total after cutting.
    """

    examples: list[Example]
    truncated: int
    merged: int
    tokens: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example.input_ids) for example in self.examples]


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    task: TaskType | str,
    max_length: int,
    path: str | Path,
    labels: Sequence[str] = (),
) -> Encoded:
    """Tokenize ``rows`` for ``task``; no example is longer than ``max_length`` tokens.

    seq-cls: the text with the tokenizer's special tokens; the class id is the label's place in ``labels``.
    causal-lm: prompt and completion as one text, so that tokens are those the model would see, with the loss
    on every token that starts in the completion, and on the end-of-text token, which is added where the
    tokenizer has one and has not put it there itself. A plain ``text`` is a completion without a prompt.

    ``path`` is only named in errors. Raises ``DataError`` for rows that do not fit the task or leave nothing
    to train on, ``ConfigError`` for a ``max_length`` that has no room for text, and ``ModelError`` for a
    tokenizer that is not a fast one.
    """
    kind = as_task(task)
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, which says where in the text a token "
            f"starts; the model's folder needs a tokenizer.json"
        )
    room = tokenizer.num_special_tokens_to_add() + (1 if kind is TaskType.SEQ_CLS else 2)
    if max_length < room:
        raise ConfigError(f"max_length: {max_length} leaves no room for text; give at least {room}")
    if not rows:
        return Encoded([], truncated=0, merged=0, tokens=0)
    columns = check_columns(rows, kind, path)
    if kind is TaskType.SEQ_CLS:
        return _classified(rows, tokenizer, max_length, path, labels)
    return _completed(rows, columns, tokenizer, max_length, path)


def _classified(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    path: str | Path,
    labels: Sequence[str],
) -> Encoded:
    ids = label_ids(rows, labels, path)
    examples, truncated = [], 0
    texts = [row.fields["text"] for row in rows]
    for row, label, tokens in zip(rows, ids, _tokens(tokenizer, texts, max_length), strict=True):
        if not tokens.ids:
            raise DataError(f"{path}, line {row.line}: the tokenizer finds no token in 'text'")
        truncated += bool(tokens.overflowing)
        examples.append(Example(tokens.ids, label))
    return Encoded(examples, truncated, merged=0, tokens=sum(len(e.input_ids) for e in examples))


def _completed(
    rows: Sequence[Row],
    columns: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    path: str | Path,
) -> Encoded:
    examples, truncated, merged = [], 0, 0
    cut_off: list[int] = []
    swallowed: list[int] = []
    # The empty prompt of a plain text makes the boundary 0: every token starts in the completion.
    prompts = [row.fields["prompt"] if "prompt" in columns else "" for row in rows]
    texts = [prompt + row.fields[columns[-1]] for prompt, row in zip(prompts, rows, strict=True)]
    for row, prompt, tokens in zip(rows, prompts, _tokens(tokenizer, texts, None), strict=True):
        ids, targets = _targets(tokens, len(prompt))
        body = [span for span, special in zip(tokens.offsets, tokens.special_tokens_mask, strict=True) if not special]
        merged += any(start < len(prompt) < end for start, end in body)
        if not any(start >= len(prompt) for start, _ in body):
            swallowed.append(row.line)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
            targets.append(tokenizer.eos_token_id)
        truncated += len(ids) > max_length
        # The first position is never predicted, so a target there trains nothing.
        if all(target == IGNORE for target in targets[1:max_length]):
            cut_off.append(row.line)
        examples.append(Example(ids[:max_length], targets[:max_length]))
    if swallowed:
        raise DataError(
            f"{path}, line {swallowed[0]}: no token starts in {columns[-1]!r} (rows like this: "
            f"{len(swallowed)}): the tokenizer knows none of its characters, or joins it to the end of the "
            f"prompt; where a prompt ends in a space, move that space to the start of the completion"
        )
    if cut_off:
        raise DataError(
            f"{path}, line {cut_off[0]}: nothing of {columns[-1]!r} is left to train on within max_length="
            f"{max_length} (rows like this: {len(cut_off)}); raise max_length, or shorten the prompts"
        )
    return Encoded(examples, truncated, merged, tokens=sum(len(e.input_ids) for e in examples))


def _targets(tokens: Any, boundary: int) -> tuple[list[int], list[int]]:
    """Ids, and ids with ``IGNORE`` on each token before ``boundary`` and on the special tokens in front."""
    ids: list[int] = list(tokens.ids)
    targets: list[int] = []
    in_front = True
    for token, (start, _), special in zip(ids, tokens.offsets, tokens.special_tokens_mask, strict=True):
        # Special tokens have no place in the text: in front they open the prompt, behind they end the row.
        in_front = in_front and bool(special)
        masked = in_front if special else start < boundary
        targets.append(IGNORE if masked else token)
    return ids, targets


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None) -> Iterator[Any]:
    """One ``tokenizers.Encoding`` per text, cut to ``max_length`` unless that is None."""
    for start in range(0, len(texts), CHUNK):
        yield from tokenizer(
            list(texts[start : start + CHUNK]),
            truncation=max_length is not None,
            max_length=max_length,
            padding=False,
            verbose=False,  # without truncation it would warn of lengths that we cut ourselves
        ).encodings
