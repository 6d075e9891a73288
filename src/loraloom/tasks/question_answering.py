"""question-answering: the first and last token of the part of a text that answers a question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.config.lora import TaskType
from loraloom.data.example import Example, Settings
from loraloom.data.records import Asked, Record
from loraloom.data.shape.forms import Form, read_asked
from loraloom.data.tokenize.answers import AnswerEncoder, Window
from loraloom.tasks.base import Examples, Inputs, Outputs, Task
from loraloom.tasks.baseline import Constant, Known
from loraloom.tasks.metrics.kinds import ANSWERS, Scores
from loraloom.tasks.outputs import NOTHING, EvalRows, Predictions, words_of

#: Maximum number of tokens of an answer, as in the official baselines.
LONGEST_ANSWER = 30


class QuestionAnswering(Task):
    name = "question-answering"
    task_type = TaskType.QUESTION_ANS
    encoder = AnswerEncoder
    options: Mapping[str, str] = {"stride": "how much the windows of a long context share"}
    forms = (Form("squad", ("question", "context", "answers"), read_asked),)
    min_tokens = 2
    windows = True
    new_head = True
    needs = ("records", "tokenizer")
    metrics = (ANSWERS,)

    def answered(self, columns: Mapping[str, Any], labels: Sequence[str], problem: str | None) -> dict[str, Any]:
        start = str(columns.get("context", ""))[:1]
        return {**columns, "answers": {"text": [start], "answer_start": [0]}}

    def head(self, labels: Sequence[str], problem_type: str | None) -> dict[str, Any]:
        return {"num_labels": 2}  # first and last token, for any head in the folder

    def key_mapping(self, config: Any) -> dict[str, str]:
        """In Llama's family the body of this model has another name than in the published causal models."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_QUESTION_ANSWERING_MAPPING

        wanted, given = (
            getattr(mapping.get(type(config), None), "base_model_prefix", "")
            for mapping in (MODEL_FOR_QUESTION_ANSWERING_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
        )
        return {rf"^{given}\.": f"{wanted}."} if given and wanted and given != wanted else {}

    def output(self, out: Any, inputs: Inputs, config: Any) -> Tensor:
        """[rows, length, 2] with padding masked, so that a row's loss does not depend on the length of other rows."""
        both, mask = torch.stack([out.start_logits, out.end_logits], -1), inputs.get("attention_mask")
        return both if mask is None else both.masked_fill((mask == 0).unsqueeze(-1), -torch.inf)

    def row_losses(self, out: Tensor, labels: Tensor, groups: Sequence[slice], config: Any) -> Tensor:
        return F.cross_entropy(out, labels, reduction="none").mean(-1)

    def own(self, out: Tensor, example: Example) -> Tensor:
        return out[: len(example.input_ids)]

    def predictions(self, examples: Examples, outputs: Outputs, held_out: EvalRows) -> Predictions:
        encoder = AnswerEncoder(held_out.tokenizer, Settings(held_out.max_length, stride=held_out.stride))
        asked = [record for _, record in held_out.records if isinstance(record, Asked)]
        empty = any(not record.answers for record in asked)
        made = Predictions()
        for row, parts in held_out.by_row(len(examples)).items():
            record = asked[row]
            # Found by tokens, because a subset of the examples may lack some windows of a row.
            windows = {tuple(window.ids): window for window in encoder.windows([record])[0]}
            seen = [windows[tuple(examples[part].input_ids)] for part in parts]
            logits = [output for output in (outputs[part] for part in parts) if output is not None]
            none = any(bool(both.isnan().any()) for both in logits)
            found = NOTHING if none else best_answer(record.context, seen, logits, empty)
            made.add(found, [text for text, _ in record.answers], parts[0])
        return made

    def constant(self, examples: Examples, known: Known) -> Constant | None:
        """No answer (the first token) as often as in the training rows; otherwise all positions equally likely."""
        none = sum(example.labels == [0, 0] for example in examples)
        share = min(max(none, 0.5), len(examples) - 0.5) / len(examples) if none else 0.0

        def score(example: Example) -> Scores:
            assert isinstance(example.labels, list)
            places = max(len(example.input_ids) - 1, 1)
            each = [-math.log(max(share, 1e-9)) if not label else math.log(places) - math.log1p(-share)
                    for label in example.labels]  # fmt: skip
            return Scores(fmean(each), 1)

        def nothing(example: Example) -> Tensor:
            logits = torch.zeros(len(example.input_ids), 2)
            logits[0] = 1.0
            return logits

        return Constant("always no answer", score, [("always no answer", nothing)])

    def shown_input(self, record: Record, example: Example, tokenizer: Any) -> str:
        assert isinstance(record, Asked)
        return record.question

    def shown_value(self, record: Record, value: Any, output: Tensor | None = None) -> str:
        first = next(iter(value), "") if isinstance(value, list) else value
        return words_of(first) or "(no answer)"

    def shown_target(self, example: Example, tokenizer: Any, names: Sequence[str]) -> str | None:
        assert isinstance(example.labels, list)
        start, end = (int(label) for label in example.labels)
        return str(tokenizer.decode(example.input_ids[start : end + 1])) if end else "(not in this window)"

    def usage(self, options: Any, problem: str | None, config: Any) -> dict[str, Any]:
        return {"stride": options.stride}


def best_answer(context: str, windows: Sequence[Window], logits: Sequence[Tensor], empty: bool) -> str:
    """The likeliest span of at most ``LONGEST_ANSWER`` tokens of the context, over all its windows.

    ``logits`` [tokens, 2] are each window's starts and ends. With ``empty`` the answer is ``""`` if the first token,
    in the window where it scores lowest, scores no less than the span.
    """
    best, text = -torch.inf, ""
    null = torch.inf
    for window, both in zip(windows, logits, strict=True):
        null = min(null, float(both[0, 0] + both[0, 1]))
        inside = both[window.first : window.first + len(window.offsets)]
        spans = inside[:, 0, None] + inside[None, :, 1]
        # The end is the start or a later token.
        allowed = torch.ones_like(spans, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
        spans = spans.masked_fill(~allowed, -torch.inf)
        place = int(spans.argmax())
        start, stop = divmod(place, len(window.offsets))
        if float(spans[start, stop]) > best:
            best = float(spans[start, stop])
            text = context[window.offsets[start][0] : window.offsets[stop][1]].strip()
    return "" if empty and not best > null else text
