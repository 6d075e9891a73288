"""feature-extraction: embeddings of texts, close to each other for texts that belong together.

Without scores the loss is contrastive (InfoNCE; van den Oord et al. 2018): each row's second text against the second
and third texts of all rows of its adapter in the forward. With scores it is the mean squared difference between cosine
and score, the CosineSimilarityLoss of sentence-transformers.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.config.lora import LoraConfig, TaskType
from loraloom.data import batches
from loraloom.data.example import Example
from loraloom.data.records import Record, Related
from loraloom.data.shape.forms import Form, read_related, read_scored, read_triplet
from loraloom.data.tokenize.texts import RelatedEncoder
from loraloom.errors import ModelError
from loraloom.lora.targets import plan
from loraloom.models.configs import field, has_decoder_and_encoder
from loraloom.models.parts import excluding, reads, reads_both_ways, why_none
from loraloom.tasks.base import Examples, Inputs, Outputs, Task
from loraloom.tasks.baseline import Constant, Known
from loraloom.tasks.metrics.kinds import MATCHES, SIMILARITIES, Kind, Scores
from loraloom.tasks.outputs import NOTHING, EvalRows, Predictions

#: Cosines are divided by it before the softmax; the usual value.
TEMPERATURE = 0.05
CONTRASTIVE, COSINE = "contrastive", "cosine"
_PAIRS = (("anchor", "positive"), ("query", "positive"))


class FeatureExtraction(Task):
    name = "feature-extraction"
    task_type = TaskType.FEATURE_EXTRACTION
    encoder = RelatedEncoder
    forms = (
        Form(
            "pair-score", ("text1", "text2", "score"), read_scored, problem=COSINE,
            aliases=(("sentence1", "sentence2", "score"),),
        ),
        Form(
            "triplet", ("text1", "text2", "negative"), read_triplet, problem=CONTRASTIVE,
            aliases=tuple((*names, "negative") for names in _PAIRS),
        ),
        Form("pair", ("text1", "text2"), read_related, problem=CONTRASTIVE, aliases=_PAIRS),
    )  # fmt: skip
    indivisible = "its texts are compared as wholes"
    texts = 2
    bare = True
    without_pooler = True
    needs = ()
    metrics = (MATCHES, SIMILARITIES)
    compares_rows = True

    def collate(self, examples: Examples, pad_id: int) -> dict[str, Tensor]:
        """Each text is a row; the texts of one example follow each other.

        ``labels`` are one-hot [texts, texts of an example] by the text's place in its example; or float32 [texts, 1],
        the score of its example.
        """
        return batches.collate([part for example in examples for part in _parts(example)], pad_id, self.layout)

    text_column = "text1"

    def answered(self, columns: Mapping[str, Any], labels: Sequence[str], problem: str | None) -> dict[str, Any]:
        firsts = [name for form in self.forms for name, *_ in (form.needs, *form.aliases) if name in columns]
        text = columns[firsts[0]] if firsts else None
        return {"text1": text, "text2": text} if firsts else dict(columns)

    def answers(self, examples: Examples, outputs: Outputs, held_out: EvalRows) -> Predictions:
        """The embedding of each row's first text."""
        made = Predictions()
        for number, embedding in enumerate(_stacked(outputs)[:, 0].tolist()):
            made.add(embedding, None, number)
        return made

    def widest(self, examples: Examples) -> tuple[int, int]:
        lengths = [_lengths(example) for example in examples]
        return max(map(len, lengths)), max(map(max, lengths))

    def adapted(self, model: Any, config: LoraConfig) -> LoraConfig:
        config = super().adapted(model, config)
        unread = [target.name for target in plan(model, config).targets if "pooler" in target.name.split(".")]
        return excluding(config, "|".join(map(re.escape, unread))) if unread else config

    def check_model(self, name: str, config: Any) -> None:
        if has_decoder_and_encoder(config):
            raise ModelError(
                f"{name}: {config.model_type} has an encoder and a decoder; for {self.name} choose an encoder such as "
                "BERT, or a decoder such as Llama"
            )
        if reads(config) != "text":
            raise ModelError(f"{name}: {why_none(config, self.name)}")

    def output(self, out: Any, inputs: Inputs, config: Any) -> Tensor:
        """[texts, dim] of norm 1: the mean over a text's tokens, or its last token with causal attention."""
        hidden = getattr(out, "last_hidden_state", None)
        if hidden is None:
            raise ModelError(f"model: {type(out).__name__} has no last_hidden_state, of which embeddings are made")
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        mask = inputs.get("attention_mask")
        mask = hidden.new_ones(hidden.shape[:2]) if mask is None else mask
        if _pooling(config) == "mean":
            pooled = hidden.masked_fill((mask == 0).unsqueeze(-1), 0.0).sum(1) / mask.sum(1, keepdim=True)
        else:
            last = (mask.sum(1).long() - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
            pooled = hidden.gather(1, last).squeeze(1)
        return F.normalize(pooled, dim=-1)

    def row_losses(self, out: Tensor, labels: Tensor, groups: Sequence[slice], config: Any) -> Tensor:
        if labels.is_floating_point():
            losses = (_cosines(out.view(-1, 2, out.shape[-1])) - labels[::2, 0].to(out.dtype)).square()
            return losses.repeat_interleave(2)
        texts = labels.shape[-1]
        losses = torch.cat([_contrastive(out[group].view(-1, texts, out.shape[-1])) for group in groups])
        return losses.repeat_interleave(texts)

    def probe_rows(self, batch: Inputs) -> slice:
        return slice(0, 4 if batch["labels"].is_floating_point() else 2 * batch["labels"].shape[-1])

    def kinds(self, problem: str | None = None) -> tuple[Kind, ...]:
        return tuple(kind for kind in self.metrics if problem in (None, kind.problem))

    def problem_of(self, examples: Examples) -> str | None:
        return CONTRASTIVE if _score(examples[0]) is None else COSINE

    def kept(self, out: Tensor, examples: int) -> Tensor:
        return out.float().view(examples, -1, out.shape[-1])

    def losses(self, examples: Examples, outputs: Outputs, block: int) -> list[float]:
        """Contrastive losses are among ``block`` examples, as in training, in a fixed random order."""
        found = _stacked(outputs)
        if _score(examples[0]) is not None:
            right = found.new_tensor([_score(example) for example in examples])
            return (_cosines(found) - right).square().tolist()
        losses, order = [0.0] * len(examples), list(range(len(examples)))
        random.Random("rows").shuffle(order)
        for start in range(0, len(order), block):
            own = order[start : start + block]
            among = own if len(own) == block else order[-block:]  # the last block has full size too
            for number, loss in zip(own, _contrastive(found[among])[-len(own) :].tolist(), strict=True):
                losses[number] = loss
        return losses

    def predictions(self, examples: Examples, outputs: Outputs, held_out: EvalRows) -> Predictions:
        """The cosine, or the text closest to a row's first one, among the second and third texts of all rows."""
        found, made = _stacked(outputs), Predictions()
        if _score(examples[0]) is not None:
            for number, cosine in enumerate(_cosines(found).tolist()):
                made.add(cosine, _score(examples[number]), number)
            return made
        texts = [_names(example, held_out, number) for number, example in enumerate(examples)]
        names = [row[place] for place in range(1, found.shape[1]) for row in texts]
        others = _others(found)
        for number, row in enumerate(texts):
            near = others @ found[number, 0]
            none = bool(found[number].isnan().any())
            made.add(NOTHING if none else names[int(near.nan_to_num(-1).argmax())], row[1], number)
        return made

    def constant(self, examples: Examples, known: Known) -> Constant | None:
        """One embedding for all texts, or two whose cosine is the mean of all scores."""
        scores = [score for example in examples if (score := _score(example)) is not None]
        if scores:
            mean = fmean(scores)
            pair = torch.tensor([[1.0, 0.0], [mean, math.sqrt(1 - mean**2)]])
            words = f"always the mean, {mean:.4g}"
            return Constant(words, lambda e: Scores(((_score(e) or 0.0) - mean) ** 2, 1), [(words, lambda e: pair)])
        texts = len(_lengths(examples[0]))
        loss, words = math.log(known.block * (texts - 1)), "the same embedding for every text"
        return Constant(words, lambda e: Scores(loss, 1), [(words, lambda e: torch.ones(texts, 1))])

    def shown_input(self, record: Record, example: Example, tokenizer: Any) -> str:
        assert isinstance(record, Related)
        return record.texts[0] if record.score is None else " | ".join(record.texts)

    def shown_target(self, example: Example, tokenizer: Any, names: Sequence[str]) -> str | None:
        score, third = _score(example), len(_lengths(example)) == 3
        return f"text 1 near text 2{', not near text 3' * third}" if score is None else f"cosine {score:g}"

    def usage(self, options: Any, problem: str | None, config: Any) -> dict[str, Any]:
        return {"pooling": _pooling(config), "normalize": True}


def _pooling(config: Any) -> str:
    """How hidden states are pooled: in a decoder only the last token has read the whole text."""
    both = reads_both_ways(config) or field(config, "use_bidirectional_attention") is True
    return "mean" if both else "last"


def _cosines(found: Tensor) -> Tensor:
    """[rows] of [rows, 2, dim]."""
    return (found[:, 0] * found[:, 1]).sum(-1)


def _others(found: Tensor) -> Tensor:
    """[(texts - 1) · rows, dim] of [rows, texts, dim]: all second texts, then all third ones."""
    return found[:, 1:].transpose(0, 1).flatten(0, 1)


def _contrastive(found: Tensor) -> Tensor:
    """[rows]: the cross-entropy of finding each row's second text among all. ``found`` [rows, texts, dim]."""
    logits = found[:, 0] @ _others(found).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(found), device=found.device), reduction="none")


def _stacked(outputs: Outputs) -> Tensor:
    return torch.stack([output for output in outputs if output is not None])


def _score(example: Example) -> float | None:
    assert isinstance(example.labels, list)
    return example.labels[-1] if isinstance(example.labels[0], float) else None


def _lengths(example: Example) -> list[int]:
    """Tokens of each text."""
    assert isinstance(example.labels, list)
    return [int(length) for length in (example.labels if _score(example) is None else example.labels[:-1])]


def _parts(example: Example) -> list[Example]:
    """Each text as a separate example, with its label of a batch."""
    lengths, score, made, start = _lengths(example), _score(example), list[Example](), 0
    for place, length in enumerate(lengths):
        label = [int(place == other) for other in range(len(lengths))] if score is None else [score]
        made.append(Example(example.input_ids[start : start + length], label))
        start += length
    return made


def _names(example: Example, held_out: EvalRows, number: int) -> list[str]:
    """The texts of an example, or their tokens if the texts are not known."""
    record = held_out.records[held_out.row(number)][1] if held_out.records else None
    if isinstance(record, Related):
        return list(record.texts)
    return [" ".join(map(str, part.input_ids)) for part in _parts(example)]
