"""A row of a mixed batch answers as it does alone, in every kind of model, or the batch is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from loraloom import LoraConfig, PeftModel, get_peft_model
from loraloom.errors import AdapterError

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(3, 50, (4, 8), generator=torch.Generator().manual_seed(1))
NAMES = ["b", "a", "__base__", "b"]


def adapted(model: nn.Module, targets: Any = "all-linear", **fields: object) -> PeftModel:
    def config(r: int) -> LoraConfig:
        return LoraConfig(r=r, lora_alpha=4 * r, target_modules=targets, init_lora_weights=False, **fields)

    peft = get_peft_model(model.double().eval(), config(2), adapter_name="a")
    peft.add_adapter("b", config(5))
    return peft


def values(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def check(model: PeftModel, moves: float = 0.01, **inputs: Tensor) -> None:
    """Every row beside itself alone, and the adapters do something."""
    with torch.no_grad():
        mixed = values(model(**inputs, adapter_names=NAMES))
        for row, name in enumerate(NAMES):
            alone = values(model(**{k: v[row : row + 1] for k, v in inputs.items()}, adapter_names=[name]))
            torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-8, atol=1e-10)
        with model.disable_adapter():
            base = values(model(**inputs))
    assert float((mixed - base)[:2].abs().max()) > moves * float(base.abs().max())


def config(name: str, **fields: object) -> Any:
    return getattr(transformers, name)(vocab_size=50, **fields)


TEXT: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaForCausalLM, config("LlamaConfig", **SHAPE)),
    "bert": (transformers.BertForSequenceClassification, config("BertConfig", **SHAPE)),
    # A table of relative positions, shared by all rows, goes through the layers that hidden states go through.
    "deberta-v2": (
        transformers.DebertaV2ForSequenceClassification,
        config(
            "DebertaV2Config",
            **SHAPE,
            relative_attention=True,
            position_buckets=4,
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
        ),
    ),
    # Tokens first, rows second.
    "xlnet": (transformers.XLNetModel, config("XLNetConfig", d_model=16, n_layer=2, n_head=2, d_inner=24)),
    # Rows and tokens flattened.
    "opt": (
        transformers.OPTForCausalLM,
        config(
            "OPTConfig", hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
        ),
    ),
}


@pytest.mark.parametrize("family", TEXT)
def test_a_row_beside_others_answers_as_alone(family: str) -> None:
    cls, made = TEXT[family]
    torch.manual_seed(0)
    check(adapted(cls(made)), input_ids=IDS)
    torch.manual_seed(0)
    square = adapted(cls(made))  # as many rows as tokens
    check(square, input_ids=IDS[:, :4])
    check(square, input_ids=IDS)


class Experts(nn.Module):
    """Each expert sees the tokens that a router chose for it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(50, 8), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).flatten(0, 1)
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[chosen == i] = expert(x[chosen == i])
        return y.view(*input_ids.shape, 8)


def test_an_expert_that_sees_as_many_tokens_as_there_are_rows_or_a_multiple_is_not_taken_in() -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        check(adapted(Experts(), ["0", "1"]), input_ids=IDS[:, : 2 + seed % 3])


class InPlace(nn.Module):
    """Changes what its layers answer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.out, self.how = nn.Linear(6, 8), nn.Linear(8, 3), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.how == "relu":
            y = nn.functional.relu(y, inplace=True)
        elif self.how == "scale":
            y /= 2.0
        elif self.how == "part":
            y[..., :3] *= 2
        elif self.how == "view":
            y.view(-1, 8).mul_(3.0)
        return self.out(y)


@pytest.mark.parametrize("how", ["relu", "scale", "part", "view"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6), (4, 2, 5, 6)], ids=str)
def test_a_model_may_change_a_layers_answer_in_place(how: str, shape: tuple[int, ...]) -> None:
    from peft import LoraConfig as TheirConfig
    from peft import get_peft_model as theirs

    torch.manual_seed(0)
    plain = InPlace(how)
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    mine = get_peft_model(plain, LoraConfig(r=2, target_modules=["fc", "out"]))
    other = InPlace(how)
    other.load_state_dict(state)
    peft = theirs(other, TheirConfig(r=2, target_modules=["fc", "out"]))
    tensors = dict(peft.named_parameters())
    x = torch.randn(shape)
    with torch.no_grad():
        for name, p in mine.named_parameters():
            if "lora_" in name:
                tensors[name].copy_(p.normal_())
    for _ in range(2):
        for model in (mine, peft):
            model.zero_grad()
            model(x).square().sum().backward()
        for name, p in mine.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, tensors[name].grad, rtol=1e-4, atol=1e-5)


def test_images_of_unlike_size_are_refused_and_images_of_every_row_are_not() -> None:
    """Patches of all images lie one after another, and their number says nothing of rows."""

    class Seer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.embed, self.proj = nn.Linear(3, 8), nn.Embedding(50, 8), nn.Linear(8, 4)

        def forward(self, input_ids: Tensor, patches: Tensor) -> Tensor:
            seen = self.qkv(patches).mean(0, keepdim=True) if patches.dim() == 2 else self.qkv(patches).mean(1)
            return self.proj(self.embed(input_ids) + (seen if seen.dim() == 2 else seen[:, None])[:, None])

    torch.manual_seed(0)
    model = adapted(Seer(), ["qkv", "proj"])
    patches = torch.randn(8, 3, dtype=torch.float64)  # of three images, for four rows
    with pytest.raises(AdapterError, match="cannot be divided among 4 rows"):
        model(input_ids=IDS, patches=patches, adapter_names=NAMES)
    check(model, input_ids=IDS, patches=torch.randn(4, 6, 3, dtype=torch.float64))


def test_media_of_unlike_numbers_in_the_rows_are_refused() -> None:
    """Four images for four rows, two of them in one row: their first dimension is not the batch's."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(image_token_id=9)
            self.embed, self.tower = nn.Embedding(50, 8), nn.Linear(4, 8)

        def forward(self, input_ids: Tensor, images: Tensor) -> Tensor:
            x, seen = self.embed(input_ids), self.tower(images.flatten(2)).mean(1)
            return x.masked_scatter((input_ids == 9)[..., None], seen)

    model = adapted(Reader(), ["tower"])
    images, ids = torch.randn(4, 3, 2, 2, dtype=torch.float64), IDS.clone().clamp(10)
    odd = ids.clone()
    odd[0, :2] = odd[1:3, 0] = 9
    with pytest.raises(AdapterError, match="rows with unlike numbers of images, videos or sounds"):
        model(input_ids=odd, images=images, adapter_names=NAMES)
    ids[:, 0] = 9
    check(model, input_ids=ids, images=images)


def test_adapter_by_adapter_refuses_what_it_cannot_put_together() -> None:
    cls, made = TEXT["deberta-v2"]
    model = adapted(cls(made))
    with pytest.raises(AdapterError, match="labels cannot be divided"):
        model(input_ids=IDS, labels=torch.zeros(4, dtype=torch.long), adapter_names=NAMES)


def test_generation_in_a_mixed_batch_is_that_of_each_row_alone() -> None:
    torch.manual_seed(0)
    cls, made = TEXT["opt"]
    model = adapted(cls(made))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 2):
        mixed = model.generate(input_ids=IDS, adapter_names=NAMES, num_beams=beams, **options)
        for row, name in enumerate(NAMES):
            alone = model.generate(input_ids=IDS[row : row + 1], adapter_names=[name], num_beams=beams, **options)
            assert mixed[row].tolist() == alone[0].tolist()


def test_dropout_is_the_same_in_a_mixed_batch_whatever_the_layers_flatten_and_fill_up() -> None:
    torch.manual_seed(0)
    cls, made = TEXT["opt"]
    model = adapted(cls(made), lora_dropout=0.4)
    for layer in model.base_model.lora_layers.values():
        layer.train()
    seeds = {"a": 5, "b": 6}
    long, short = IDS[:2], IDS[2:, :5]
    filled = torch.cat([short, torch.zeros(2, 3, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(2, 5, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)], 1)
    both = {"input_ids": torch.cat([long, filled]), "attention_mask": torch.cat([torch.ones_like(long), mask])}
    lora = model.base_model
    model(**both, adapter_names=["a", "a", "b", "b"])  # whose rows are where is known now
    with lora.lora_routed(["a", "a", "b", "b"], seeds):
        mixed = lora(**both).logits
    with lora.lora_routed(["b", "b"], seeds):
        alone = lora(input_ids=short, attention_mask=torch.ones_like(short)).logits
    torch.testing.assert_close(mixed[2:, :5], alone, rtol=1e-9, atol=1e-10)
