"""Before the first step it is known which modules would not train, and a model that sees what it is to predict."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraloom import LoraConfig
from loraloom.engine.gradient_probe import Seen, faults
from loraloom.engine.pack import Pack
from loraloom.errors import TargetError

ROW = torch.tensor([[1, 5, 6, 7, 8, 9]])
BATCH = {"input_ids": ROW, "labels": ROW}


def pack(base: nn.Module, targets: list[str], task: str = "CAUSAL_LM") -> Pack:
    return Pack(base, {"a": LoraConfig(r=2, target_modules=targets, task_type=task)})


class Odd(nn.Module):
    """One layer that is read and not called, one that is never used, one whose output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.used, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.read, self.idle, self.aside = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.closed = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.used(self.embed(input_ids))
        self.aside(x)
        x = x + x @ self.read.weight.T + 0.0 * self.closed(x)
        return type("Out", (), {"logits": self.head(x)})


def said(targets: list[str]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pack(Odd(), targets).backward({"a": BATCH})
    return [str(one.message) for one in caught]


def test_a_module_whose_weight_is_read_and_that_is_never_called_is_refused() -> None:
    with pytest.raises(TargetError, match=r"target_modules: read: Odd reads the weight and never calls the module"):
        pack(Odd(), ["used", "read"]).backward({"a": BATCH})


@pytest.mark.parametrize(
    ("name", "why"),
    [("idle", "does not call it"), ("aside", "does not reach the loss"), ("closed", "gradient there is exactly 0")],
)
def test_a_module_without_a_gradient_is_named_with_the_reason(name: str, why: str) -> None:
    (text,) = said(["used", name])
    assert text.startswith(f"{name}: ")
    assert why in text
    assert said(["used", "head"]) == []


def test_an_adapter_of_which_nothing_trains_is_refused() -> None:
    with pytest.raises(TargetError, match="target_modules: no adapter would train: idle: Odd does not call it"):
        pack(Odd(), ["idle"]).backward({"a": BATCH})


def test_the_probe_leaves_gradients_and_generators_alone_and_looks_once() -> None:
    mine = pack(Odd(), ["used", "idle"])
    state = torch.get_rng_state()
    (fault,) = mine.probe({"a": BATCH})
    assert "idle" in fault.text
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in mine.model.parameters())
    assert mine.probe({"a": BATCH}) == []


def test_an_expert_that_no_token_went_to_is_no_fault_and_a_projection_left_out_is_one() -> None:
    ran = {"layers", "layers.0", "layers.0.experts.1.up", "layers.0.attn", "layers.0.attn.k", "layers.1",
           "layers.1.attn", "layers.1.experts.1", "layers.1.experts.1.up"}  # fmt: skip
    names = ["layers.0.attn.k", "layers.0.experts.0.up", "layers.1.experts.0.up", "layers.1.attn.k"]
    (fault,) = faults("Net", names, Seen(called={"layers.0.attn.k"}, ran=ran, tokens=9))
    assert fault.text.startswith("layers.1.attn.k: Net does not call it")


def test_mambas_step_projection_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    base = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, state_size=2, num_hidden_layers=1))
    with pytest.raises(TargetError, match=r"mixer\.dt_proj: MambaForCausalLM reads .*exclude_modules: \[dt_proj\]"):
        pack(base, ["in_proj", "dt_proj"]).backward({"a": BATCH})


@pytest.mark.parametrize("both", [False, True])
def test_a_model_that_sees_what_it_is_to_predict_is_refused(both: bool) -> None:
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, use_bidirectional_attention=both, initializer_range=0.5,
    )  # fmt: skip
    mine = pack(GemmaForCausalLM(config), ["q_proj"])
    found = [fault.text for fault in mine.probe({"a": BATCH}) if fault.stops]
    assert found == (["model: GemmaForCausalLM sees a text's later tokens when it predicts earlier ones, so it would "
                      "learn to copy them; choose one that reads in one direction"] if both else [])  # fmt: skip
