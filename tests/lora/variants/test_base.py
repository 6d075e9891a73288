"""A variant is one small file: one that says only what differs goes through everything that plain LoRA goes through."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraloom import LoraConfig, PeftModel, get_peft_model, plan
from loraloom.engine.pack import Pack
from loraloom.errors import TargetError
from loraloom.lora import variants
from loraloom.lora.variants.base import Adapted, Shapes, Variant

EXACT = {"rtol": 1e-10, "atol": 1e-10}


class RowGain(Variant):
    """Every output is multiplied with a number that trains."""

    name = "a row gain"
    kinds = ("Linear", "Conv1D", "Embedding", "Conv")

    def applies(self, config: LoraConfig) -> bool:
        return config.revision == "gain"  # any field: PEFT's ``use_dora``, say

    def shapes(self, factors: Shapes) -> Shapes:
        _, (out, *_) = factors.values()
        return {**factors, "lora_gain": (out,)}

    def start(self, layer: Adapted, shapes: Shapes, config: LoraConfig, r: int, seed: int) -> dict[str, Tensor]:
        lengths = layer.rows().flatten(1).norm(dim=1)
        return {**super().start(layer, shapes, config, r, seed), "lora_gain": (1 + lengths / lengths.sum()).float()}

    def row_gain(self, layer: Adapted, slot: str) -> Tensor | None:
        return layer.tensors(slot)["lora_gain"]


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "VARIANTS", [RowGain()])


class Kinds(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.turn, self.stored = nn.Embedding(9, 4), nn.Linear(4, 6), Conv1D(4, 6)
        self.window = nn.Conv1d(4, 3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.window(self.stored(self.turn(self.words(ids))).transpose(1, 2))


KINDS = ["words", "turn", "stored", "window"]


def config(**fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 3, "target_modules": KINDS, "init_lora_weights": False, "revision": "gain", **fields})


def adapted(**fields: object) -> tuple[PeftModel, Tensor]:
    torch.manual_seed(0)
    model = Kinds().double()
    nn.init.normal_(model.stored.bias)
    return get_peft_model(model, config(**fields)), torch.randint(9, (2, 5))


def test_its_tensors_are_planned_counted_and_trained() -> None:
    model, ids = adapted()
    wanted = plan(Kinds().double(), config())
    plain = plan(Kinds().double(), config(revision=None))
    assert wanted.parameters - plain.parameters == 4 + 6 + 4 + 3
    assert wanted.bytes == sum(p.nbytes for p in model.adapter_parameters("default").values())
    keys = set(model.adapter_parameters("default"))
    assert {f"base_model.model.{kind}.lora_gain" for kind in KINDS} < keys
    assert len(keys) == 3 * len(KINDS)
    model(ids).square().sum().backward()
    assert all(p.grad.any() for p in model.adapter_parameters("default").values())


@pytest.mark.parametrize("fused", [True, False])
def test_forward_and_gradients_are_those_of_the_formula(fused: bool) -> None:
    model, _ = adapted()
    layer = model.lora_layers["turn"]
    if not fused:  # a hook sends the layer the plain way
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert (layer.fusable(x, layer.dispatcher.frame) is not None) == fused
    a, b, gain = (p.detach().clone().requires_grad_() for p in layer.tensors("default").values())
    weight, bias = layer.weight.detach(), layer.bias.detach()
    wanted = gain * (x @ (weight + layer.scaling["default"] * b @ a).T) + bias
    found = layer(x)
    torch.testing.assert_close(found, wanted, **EXACT)
    pull = torch.randn(wanted.shape, dtype=torch.float64)
    mine = torch.autograd.grad((found * pull).sum(), [x, *layer.tensors("default").values()])
    torch.testing.assert_close(mine, torch.autograd.grad((wanted * pull).sum(), [x, a, b, gain]), **EXACT)


def test_save_and_load_give_the_same_answers_and_bytes(tmp_path: Path) -> None:
    model, ids = adapted()
    wanted = model(ids)
    model.save_pretrained(tmp_path / "one")
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "one")
    assert torch.equal(again(ids), wanted)
    again.save_pretrained(tmp_path / "two")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_merged_it_answers_the_same_and_unmerged_the_base_is_the_same_to_the_bit() -> None:
    model, ids = adapted()
    model.add_adapter("plain", config(revision=None))
    before = {name: layer.weight.clone() for name, layer in model.lora_layers.items()}
    for names in (["default"], ["plain", "default"], ["default", "plain"]):  # a gain is of what lies beneath it
        model.set_adapter(names)
        wanted = model(ids)
        model.merge_adapter()
        torch.testing.assert_close(model(ids), wanted, **EXACT)
        model.unmerge_adapter()
        assert all(torch.equal(layer.weight, before[name]) for name, layer in model.lora_layers.items())


def test_rows_of_a_batch_answer_as_alone_beside_plain_ones() -> None:
    model, ids = adapted()
    model.add_adapter("plain", config(revision=None))
    ids = torch.randint(9, (3, 5))
    mixed = model(ids, adapter_names=["plain", "default", "__base__"])
    for row, name in enumerate(["plain", "default"]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(ids)[row], **EXACT)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[2], model(ids)[2], **EXACT)


def test_in_a_pack_beside_plain_slots_each_equals_itself_alone() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)
    base = transformers.BertForSequenceClassification(bert).double().eval()
    shared = {"target_modules": ["query", "key", "value", "output.dense"], "task_type": "SEQ_CLS"}
    configs = {
        "plain": config(**shared, revision=None),
        "gain": config(**shared),
        "other gain": config(**shared, r=2, lora_dropout=0.2, bias="lora_only"),
        "dropped": config(**shared, revision=None, lora_dropout=0.2),
        "one more gain": config(**shared),
    }
    names = list(configs)
    make = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1])
    batches = {n: {"input_ids": torch.randint(50, (2, 5), generator=make), "labels": labels} for n in names}
    seeds = {name: i for i, name in enumerate(names)}
    pack = Pack(copy.deepcopy(base), configs)
    losses = pack.backward(batches, dropout_seeds=seeds)
    for name in names:
        alone = Pack(copy.deepcopy(base), {name: configs[name]})
        (loss,) = alone.backward({name: batches[name]}, dropout_seeds=seeds).values()
        assert loss == pytest.approx(losses[name], abs=1e-10)
        for key, p in alone.parameters_of(name).items():
            torch.testing.assert_close(pack.parameters_of(name)[key].grad, p.grad, **EXACT)


def test_a_kind_of_layer_that_it_cannot_adapt_is_refused_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RowGain, "kinds", ("Linear",))
    with pytest.raises(
        TargetError, match=r"stored is a Conv1D, which a row gain cannot adapt; name layers of kind Linear"
    ):
        plan(Kinds(), config(target_modules=["turn", "stored"]))
