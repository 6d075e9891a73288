"""Promises of padding: what a model says of a row does not depend on the rows beside it, whatever the model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraloom import LoraConfig, PeftModel, TaskType, get_peft_model, tasks
from loraloom.data.batches import evaluation_batches
from loraloom.data.example import Example
from loraloom.inference import batching
from loraloom.inference.evaluation import Evaluator
from loraloom.inference.generate import generate
from loraloom.inference.session import Session

SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 3}


def rows(*lengths: int) -> list[list[int]]:
    source = torch.Generator().manual_seed(1)
    return [torch.randint(3, 50, (n,), generator=source).tolist() for n in lengths]


def adapted(kind: str, name: str, task: TaskType, **more: Any) -> PeftModel:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**SMALL, "initializer_range": 0.3, **more})
    base = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    given = LoraConfig(task_type=task, r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, given, seed=1)


@pytest.mark.parametrize("name", ["convbert", "nystromformer", "bert"])
def test_a_row_is_evaluated_in_a_batch_as_alone_also_where_a_model_sees_padding(name: str) -> None:
    model = adapted("TokenClassification", name, TaskType.TOKEN_CLS)
    examples = [Example(ids, [i % 3 for i in range(len(ids))]) for ids in rows(5, 17, 9, 9)]
    names = [str(number) for number in range(50)]
    session = Session(model=model, task=tasks.get("token-cls"), labels=names)
    together, alone = Evaluator(session, examples), [Evaluator(session, [example]) for example in examples]
    losses = torch.cat([one.losses(["default"]) for one in alone], 1)
    torch.testing.assert_close(together.losses(["default"]), losses, rtol=1e-4, atol=1e-4)
    (said,) = together.predictions(["default"])
    assert said.predictions == [one.predictions(["default"])[0].predictions[0] for one in alone]


def test_texts_are_written_in_a_batch_as_alone_also_without_a_mask() -> None:
    class TensorState:
        pad_token_id, eos_token_id = 0, 1

        def batch_decode(self, ids: Tensor, skip_special_tokens: bool) -> list[str]:
            return [" ".join(map(str, row)) for row in ids.tolist()]

    model = adapted("CausalLM", "rwkv", TaskType.CAUSAL_LM, attention_hidden_size=16, context_length=64)
    prompts = rows(3, 11, 6)  # of two as long, transformers' own cache for RWKV takes one for the other
    session = Session(model=model, task=tasks.get("causal-lm"), tokenizer=TensorState())
    together = generate(session, ["default"] * 3, prompts, 6, 8)
    assert together == [generate(session, ["default"], [prompt], 6, 8)[0] for prompt in prompts]


def test_a_model_is_tried_once_and_only_where_there_is_padding() -> None:
    tried: list[list[int]] = []

    def answer(places: list[int]) -> Tensor:
        tried.append(places)
        return torch.ones(2) * (1.0 if len(places) == 1 else 1.1)

    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    assert not batching.is_seen(model, "a task", [3, 3], answer)
    assert not tried
    assert batching.is_seen(model, "a task", [4, 3, 9, 5], answer)
    assert batching.is_seen(model, "a task", [7, 8], answer)
    assert tried == [[1], [1, 2]]
    assert not batching.is_seen(other, "a task", [3, 4], lambda places: torch.full((2,), 1.0 + 1e-5 * len(places)))
    assert not batching.is_seen(nn.Linear(1, 1), "a task", [3, 4], lambda places: torch.full((2,), torch.nan))


def test_batches_of_one_length_hold_every_row_once() -> None:
    lengths = [3, 5, 3, 9, 5, 3]
    batches = evaluation_batches(lengths, 2, alike=True)
    assert sorted(row for batch in batches for row in batch) == list(range(6))
    assert [{lengths[row] for row in batch} for batch in batches] == [{9}, {5}, {3}, {3}]
