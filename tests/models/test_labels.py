"""Classes of the data and of a model are matched by name."""

from __future__ import annotations

import pytest
from transformers import BertConfig

from loraloom.models.labels import as_the_model, in_order

NLI = ["entailment", "neutral", "contradiction"]


@pytest.mark.parametrize(
    ("known", "mine", "wanted"),
    [
        (NLI, sorted(NLI), NLI),
        (["ENTAILMENT", "Neutral", "contradiction"], sorted(NLI), NLI),
        (["not entailment", "entailment"], ["entailment", "not_entailment"], ["not_entailment", "entailment"]),
        (["O", "B-PER", "I-PER"], ["B-PER", "I-PER", "O"], ["O", "B-PER", "I-PER"]),
        ([f"LABEL_{i}" for i in range(11)], [str(i) for i in range(11)], [str(i) for i in range(11)]),
        (
            [f"LABEL_{i}" for i in range(11)],
            sorted(f"LABEL_{i}" for i in range(11)),
            [f"LABEL_{i}" for i in range(11)],
        ),
        (["LABEL_0", "LABEL_1"], ["bad", "good"], None),  # nobody knows which is which
        (NLI, ["0", "1", "2"], None),
        (NLI, ["contradiction", "entailment"], None),
        (["us", "US"], ["US", "us"], ["us", "US"]),  # distinct by case alone
        (["us", "US"], ["Us", "uS"], None),
    ],
)
def test_classes_are_numbered_as_the_model_numbers_the_same_names(
    known: list[str], mine: list[str], wanted: list[str] | None
) -> None:
    config = BertConfig(id2label=dict(enumerate(known)), label2id={name: i for i, name in enumerate(known)})
    assert as_the_model(mine, config) == wanted
    assert in_order(mine, config) == (mine == wanted)
