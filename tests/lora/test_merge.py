"""Merging is all or nothing, unmerging gives the same bytes back, and a merged model is a plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loraloom import LoraConfig, PeftModel, get_peft_model
from loraloom.errors import AdapterError, MergeError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Net(nn.Module):
    """One layer of every kind that merges."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.words = nn.Embedding(11, 6, padding_idx=0)
        self.turn = nn.Linear(6, 8)
        self.stored = Conv1D(6, 8)
        self.one = nn.Conv1d(6, 4, 3, padding=1)
        self.two = nn.Conv2d(1, 3, 3, dilation=2, padding=2)
        self.three = nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.stored(self.turn(self.words(ids)).tanh())
        x = self.one(x.transpose(1, 2)).tanh()
        x = self.two(x[:, None]).tanh()
        return self.three(x[:, None])


KINDS = ["words", "turn", "stored", "one", "two", "three"]
IDS = torch.tensor([[1, 2, 0, 10], [3, 3, 4, 5]])


def config(**fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 3, "target_modules": KINDS, "init_lora_weights": False, **fields})


def made(dtype: torch.dtype = torch.float64, *names: str, **fields: object) -> PeftModel:
    torch.manual_seed(0)
    net = Net().to(dtype)
    model = get_peft_model(net, config(**fields), adapter_name="a")
    for name in names:
        model.add_adapter(name, config(**fields))
    return model


def answers(model: nn.Module, inputs: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        out = model(inputs)
    return out if isinstance(out, Tensor) else out.logits


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert after.keys() == before.keys()
    assert [name for name in before if not same_bytes(after[name], before[name])] == []


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# -- equal ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("names", [[], ["b"], ["b", "c"]], ids=["one", "two", "three"])
def test_a_merged_model_answers_as_the_adapters_did(names: list[str]) -> None:
    model = made(torch.float64, *names)
    model.set_adapter(["a", *names])
    wanted = answers(model)
    with model.disable_adapter():
        assert (wanted - answers(model)).abs().max() > 1e-2
    model.merge_adapter()
    assert model.merged_adapters == ["a", *names]
    torch.testing.assert_close(answers(model), wanted, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    r=st.integers(1, 9),
    alpha=st.floats(-64, 64).filter(lambda alpha: abs(alpha) > 1e-3),
    rslora=st.booleans(),
    seed=st.integers(0, 2**32),
    others=st.integers(0, 2),
)
def test_merged_equals_unmerged_in_float64(
    kind: str, r: int, alpha: float, rslora: bool, seed: int, others: int
) -> None:
    torch.manual_seed(1)
    model = get_peft_model(
        Net().double(),
        config(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=[kind]),
        adapter_name="a",
        seed=seed,
    )
    names = ["a"]
    for number in range(others):
        names.append(f"other{number}")
        model.add_adapter(names[-1], config(r=r + number), seed=seed + number)
    model.set_adapter(names)
    wanted, before = answers(model), state(model)
    model.merge_adapter()
    torch.testing.assert_close(answers(model), wanted, rtol=1e-9, atol=1e-10 * max(1.0, float(wanted.abs().max())))
    model.unmerge_adapter()
    assert_same(state(model), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_merged_weight_is_rounded_once(dtype: torch.dtype) -> None:
    """In half precision too: the nearest number to the frozen weight plus all updates, summed in float32."""
    model = made(dtype, "b")
    model.set_adapter(["a", "b"])
    layer = model.base_model.lora_layers["turn"]
    wanted = layer.weight.detach().double()
    for name in ("a", "b"):
        a, b = layer.factors(name)
        wanted = wanted + layer.scaling[name] * (b.detach().double() @ a.detach().double())
    model.merge_adapter()
    found = layer.weight.detach()
    assert found.dtype == dtype
    error = (found.double() - wanted).abs()
    half_step = torch.finfo(dtype).eps / 2 * wanted.abs()
    slack = 1e-15 if dtype == torch.float64 else 1e-6  # of the sum itself, in float64 or float32
    assert (error <= half_step + slack).all()


# -- back again -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerging_gives_the_same_bytes_back(dtype: torch.dtype) -> None:
    model = made(dtype, "b")
    model.set_adapter(["a", "b"])
    with torch.no_grad():  # numbers whose sign or size a subtraction would lose
        model.base_model.lora_layers["turn"].weight[0, :3] = torch.tensor([-0.0, torch.finfo(dtype).tiny / 2, 1e4])
    before = state(model)
    weights = {name: layer.weight for name, layer in model.base_model.lora_layers.items()}
    for _ in range(3):
        model.merge_adapter()
        assert not any(same_bytes(layer.weight, before[f"base_model.model.{name}.base_layer.weight"])
                       for name, layer in model.base_model.lora_layers.items())  # fmt: skip
        model.unmerge_adapter()
        assert_same(state(model), before)
    assert all(layer.weight is weights[name] for name, layer in model.base_model.lora_layers.items())
    assert model.merged_adapters == []


def test_merging_one_after_the_other_is_merging_both_and_one_unmerge_restores() -> None:
    one, both = made(torch.float32, "b"), made(torch.float32, "b")
    before = state(one)
    one.merge_adapter(["a"])
    one.merge_adapter(["b"])
    both.merge_adapter(["a", "b"])
    assert one.merged_adapters == ["a", "b"]
    assert_same(state(one), state(both))
    one.unmerge_adapter()
    assert_same(state(one), before)


def test_merging_twice_merges_once() -> None:
    model = made()
    model.merge_adapter()
    merged = state(model)
    model.merge_adapter()
    assert_same(state(model), merged)


def test_unmerging_what_was_not_merged_changes_nothing() -> None:
    model = made()
    before = state(model)
    model.unmerge_adapter()
    assert_same(state(model), before)


def test_gradients_do_not_reach_a_merged_weight() -> None:
    model = made()
    model.merge_adapter()
    assert not any(layer.weight.requires_grad for layer in model.base_model.lora_layers.values())


# -- all or nothing ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_not_finite_changes_nothing_and_is_named(value: float, kind: str) -> None:
    model = made(torch.float64, "b")
    factor = model.base_model.lora_layers[kind].factors("b")[1]
    with torch.no_grad():
        factor.view(-1)[-1] = value
    before, wanted = state(model), answers(model)
    with pytest.raises(MergeError, match=rf"^{kind}: merging 'b' gives values that are not finite") as caught:
        model.merge_adapter(["a", "b"])
    assert caught.value.exit_code == 1
    assert_same(state(model), before)
    assert model.merged_adapters == []
    assert torch.equal(answers(model), wanted)


def test_a_failed_merge_keeps_what_was_merged_before() -> None:
    model = made(torch.float64, "b")
    with torch.no_grad():
        model.base_model.lora_layers["three"].factors("b")[0].fill_(torch.nan)
    model.merge_adapter(["a"])
    merged = state(model)
    with pytest.raises(MergeError):
        model.merge_adapter(["b"])
    assert_same(state(model), merged)
    assert model.merged_adapters == ["a"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_finite_factors_whose_sum_does_not_fit_the_dtype_are_refused(dtype: torch.dtype) -> None:
    model = made(dtype)
    layer = model.base_model.lora_layers["turn"]
    with torch.no_grad():
        layer.weight[0, 0] = 0.9 * torch.finfo(dtype).max
        a, b = layer.factors("a")
        a.zero_()[:, 0] = 1
        b.zero_()[0, 0] = 0.5 * torch.finfo(dtype).max
    before = state(model)
    with pytest.raises(MergeError, match=f"turn: .*not finite in {str(dtype).removeprefix('torch.')}"):
        model.merge_adapter()
    assert_same(state(model), before)


def grouped() -> nn.Module:
    net = nn.Sequential()
    net.plain, net.grouped = nn.Linear(4, 4), nn.Conv1d(4, 4, 1, groups=2)
    return net


def test_a_layer_that_cannot_be_merged_is_named_and_nothing_is_merged() -> None:
    net = grouped()
    model = get_peft_model(net, config(r=2, target_modules=["plain", "grouped"]))
    before = state(model)
    with pytest.raises(MergeError, match=r"^grouped: cannot be merged, because it is a convolution with groups=2"):
        model.merge_adapter()
    assert_same(state(model), before)
    assert model.merged_adapters == []


def test_what_cannot_be_merged_is_no_obstacle_to_an_adapter_without_it() -> None:
    net = grouped()
    model = get_peft_model(net, config(r=2, target_modules=["plain", "grouped"]), adapter_name="a")
    model.add_adapter("b", config(target_modules=["plain"]))
    model.merge_adapter(["b"])
    assert model.merged_adapters == ["b"]


def test_a_name_that_does_not_exist_merges_nothing() -> None:
    model = made()
    before = state(model)
    with pytest.raises(AdapterError, match="adapter 'aa' does not exist; did you mean 'a'"):
        model.merge_adapter(["a", "aa"])
    assert_same(state(model), before)


# -- while merged -----------------------------------------------------------------------------------------------------
def test_disable_adapter_gives_the_base_even_when_merged_and_merges_again() -> None:
    model = made(torch.float32)
    with model.disable_adapter():
        base = answers(model)
    model.merge_adapter()
    merged, wanted = state(model), answers(model)
    with pytest.raises(KeyError), model.disable_adapter():
        assert torch.equal(answers(model), base)
        assert model.merged_adapters == []
        raise KeyError
    assert model.merged_adapters == ["a"]
    assert_same(state(model), merged)
    assert torch.equal(answers(model), wanted)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.set_adapter("b"),
        lambda model: model.delete_adapter("a"),
        lambda model: model.add_adapter("c", config()),
        lambda model: model.disable_adapter_layers(),
        lambda model: model(IDS, adapter_names=["a", "b"]),
    ],
    ids=["set", "delete", "add", "disable", "route"],
)
def test_what_a_merged_weight_would_falsify_is_refused(call: Callable[[PeftModel], Any]) -> None:
    model = made(torch.float64, "b")
    model.merge_adapter()
    before = state(model)
    with pytest.raises(AdapterError, match=r"'a' are merged; call unmerge_adapter\(\) first"):
        call(model)
    assert_same(state(model), before)


def test_factors_that_train_after_a_merge_count_at_the_next_merge() -> None:
    model = made()
    model.merge_adapter()
    model.unmerge_adapter()
    with torch.no_grad():
        for factor in model.adapter_parameters("a").values():
            factor.mul_(1.5)
    wanted = answers(model)
    model.merge_adapter()
    torch.testing.assert_close(answers(model), wanted, rtol=0, atol=1e-12)


def two() -> PeftModel:
    """Adapter a on the first layer and b on the second, each with a head and biases of its own; c has neither."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    model = get_peft_model(net, config(target_modules=["0"], modules_to_save=["2"], bias="all"), adapter_name="a")
    model.add_adapter("b", config(target_modules=["1"], modules_to_save=["2"], bias="all"))
    model.add_adapter("c", config(target_modules=["1"]))
    with torch.no_grad():
        for number, name in enumerate("ab"):
            for key, parameter in model.adapter_parameters(name).items():
                parameter.add_(number + 1 if "lora" not in key else 0)
    return model


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("active", ["a", "b", "c"])
@pytest.mark.parametrize("names", [["a"], ["b"], ["c"], ["a", "c"]], ids="+".join)
def test_while_merged_the_merged_adapters_answer_and_no_other(active: str, names: list[str]) -> None:
    model = two()
    wanted = {}
    for key, chosen in {"merged": names, "active": [active]}.items():
        model.set_adapter(chosen)
        wanted[key] = answers(model, X)
    with model.disable_adapter():
        base = answers(model, X)
    model.set_adapter(active)
    model.merge_adapter(names)
    for training in (True, False):
        torch.testing.assert_close(answers(model.train(training), X), wanted["merged"], rtol=0, atol=1e-12)
    with model.disable_adapter():
        assert torch.equal(answers(model, X), base)
    torch.testing.assert_close(answers(model, X), wanted["merged"], rtol=0, atol=1e-12)
    assert model.merged_adapters == names
    assert model.active_adapters == [active]
    model.unmerge_adapter()
    assert torch.equal(answers(model, X), wanted["active"])


def test_an_adapter_of_a_head_alone_is_merged_and_unmerged_like_others() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    model = get_peft_model(net, config(target_modules=[], modules_to_save=["1"]), adapter_name="head")
    model.add_adapter("a", config(target_modules=["0"]))
    with torch.no_grad():
        next(iter(model.adapter_parameters("head").values())).add_(1)
    wanted = answers(model, X)
    model.set_adapter("a")
    model.merge_adapter(["head"])
    assert model.merged_adapters == ["head"]
    assert torch.equal(answers(model, X), wanted)
    with pytest.raises(AdapterError, match="'head' are merged"):
        model.delete_adapter("head")


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_two_heads_for_one_place_are_not_merged_together(call: str) -> None:
    model = two()
    before, wanted = state(model), answers(model, X)
    with pytest.raises(AdapterError, match=f"{call}: 'a', 'b' each train their own"):
        getattr(model, call)(adapter_names=["a", "b"])
    model2 = two()
    model2.merge_adapter(["a"])
    with pytest.raises(AdapterError, match="'a', 'b' each train their own"):
        model2.merge_adapter(["b"])
    assert_same(state(model), before)
    assert torch.equal(answers(model, X), wanted)
    assert model2.merged_adapters == ["a"]


def test_disabled_adapters_are_not_merged_and_the_error_says_what_to_do() -> None:
    model = two()
    model.disable_adapter_layers()
    before, wanted = state(model), answers(model, X)
    with pytest.raises(AdapterError, match=r"merge_adapter: the adapters are disabled.*enable_adapter_layers\(\)"):
        model.merge_adapter()
    assert_same(state(model), before)
    assert torch.equal(answers(model, X), wanted)
    model.enable_adapter_layers()
    with pytest.raises(AdapterError, match="adapters are disabled"), model.disable_adapter():
        model.merge_adapter()


# -- a plain model afterwards -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("merged_before", [False, True])
def test_merge_and_unload_gives_the_plain_model_with_the_same_answers(merged_before: bool) -> None:
    torch.manual_seed(0)
    net = Net().double()
    types, names = [type(m) for m in net.modules()], list(net.state_dict())
    model = get_peft_model(
        net,
        config(target_modules=["words", "turn", "two"], bias="all", modules_to_save=["stored"]),
        adapter_name="a",
    )
    with torch.no_grad():
        for parameter in model.adapter_parameters("a").values():
            parameter.add_(0.1)
    wanted = answers(model)
    if merged_before:
        model.merge_adapter()
    plain = model.merge_and_unload()
    assert plain is net
    assert [type(m) for m in plain.modules()] == types
    assert list(plain.state_dict()) == names
    assert all(p.requires_grad for name, p in plain.named_parameters() if name.startswith("stored."))
    torch.testing.assert_close(answers(plain), wanted, rtol=0, atol=1e-12)


def test_merge_and_unload_keeps_the_embeddings_max_norm_away_from_the_sum() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4, max_norm=0.5, dtype=torch.float64))
    model = get_peft_model(net, config(target_modules=["0"]))
    wanted = answers(model, torch.arange(5))
    torch.testing.assert_close(answers(model.merge_and_unload(), torch.arange(5)), wanted, rtol=0, atol=1e-12)


def test_merge_and_unload_of_some_adapters_leaves_the_others_out() -> None:
    model = made(torch.float64, "b")
    model.set_adapter("b")
    wanted = answers(model)
    model.set_adapter("a")
    torch.testing.assert_close(answers(model.merge_and_unload(adapter_names=["b"])), wanted, rtol=0, atol=1e-12)


def test_merge_and_unload_of_disabled_adapters_folds_in_weights_head_and_biases() -> None:
    model = two()
    wanted = answers(model, X)
    model.disable_adapter_layers()
    torch.testing.assert_close(answers(model.merge_and_unload(), X), wanted, rtol=0, atol=1e-12)


def test_a_failed_merge_and_unload_changes_nothing() -> None:
    model = two()
    with torch.no_grad():
        next(iter(model.adapter_parameters("b").values())).fill_(torch.nan)
    model.set_adapter("c")
    model.merge_adapter(["a"])
    before, wanted = state(model), answers(model, X)
    with pytest.raises(MergeError):
        model.merge_and_unload(adapter_names=["b"])
    with pytest.raises(AdapterError, match="'d' does not exist"):
        model.merge_and_unload(adapter_names=["d"])
    assert_same(state(model), before)
    assert torch.equal(answers(model, X), wanted)
    assert (model.active_adapters, model.merged_adapters) == (["c"], ["a"])


def test_merge_and_unload_of_no_adapter_gives_the_base() -> None:
    model = two()
    with model.disable_adapter():
        base = answers(model, X)
    assert torch.equal(answers(model.merge_and_unload(adapter_names=[]), X), base)


# -- tied embeddings --------------------------------------------------------------------------------------------------
def tied(kind: str, folder: Path) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    configs = {
        "Llama": {**small, "intermediate_size": 48, "tie_word_embeddings": True, "initializer_range": 0.3},
        "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 16},
        "Bert": {**small, "intermediate_size": 48, "max_position_embeddings": 16, "initializer_range": 0.3},
        "T5": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 40},
        "Bart": {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "init_std": 0.3,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "vocab_size": 40,
        },
    }
    classes = {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM",
               "T5": "T5ForConditionalGeneration", "Bart": "BartForConditionalGeneration"}  # fmt: skip
    options = {"decoder_start_token_id": 0} if kind in ("T5", "Bart") else {}
    model = getattr(transformers, classes[kind])(getattr(transformers, f"{kind}Config")(**configs[kind], **options))
    model.save_pretrained(folder / "base")
    return model.eval()


def reply(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits; where there is a decoder, it reads the same words."""
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


TIED = {"Llama": "embed_tokens", "GPT2": "wte", "Bert": "word_embeddings"}


@pytest.mark.parametrize("kind", TIED)
def test_merging_an_embedding_leaves_the_head_that_shares_its_weight_alone(kind: str, tmp_path: Path) -> None:
    base = tied(kind, tmp_path)
    ids = torch.arange(8)[None]
    head = base.get_output_embeddings()
    shared = head.weight
    model = get_peft_model(base, config(target_modules=[TIED[kind]]))
    frozen, wanted = shared.detach().clone(), reply(model, ids)
    model.merge_adapter()
    assert head.weight is shared
    assert torch.equal(head.weight, frozen)
    assert not torch.equal(base.get_input_embeddings().weight, frozen)
    torch.testing.assert_close(reply(model, ids), wanted, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert base.get_input_embeddings().weight is shared
    assert torch.equal(shared, frozen)


@pytest.mark.parametrize("kind", [*TIED, "T5"])
@pytest.mark.parametrize("target", ["embedding", "head", "both"])
def test_a_merged_model_with_tied_embeddings_is_the_same_after_save_and_load(
    kind: str, target: str, tmp_path: Path
) -> None:
    base = tied(kind, tmp_path)
    ids = torch.arange(8)[None]
    plain = reply(base, ids)
    head = next(name for name, module in base.named_modules() if module is base.get_output_embeddings())
    words = TIED.get(kind, "embed_tokens")
    names = {"embedding": [words], "head": [head], "both": [words, head]}[target]
    model = get_peft_model(base, config(target_modules=names, lora_alpha=2))
    wanted = reply(model, ids)
    assert (wanted - plain).abs().max() > 1e-2
    merged = model.merge_and_unload()
    torch.testing.assert_close(reply(merged, ids), wanted, rtol=1e-5, atol=1e-4)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(reply(again, ids), reply(merged, ids))


SOME = [["encoder.embed_tokens"], ["decoder.embed_tokens"], ["shared"], ["lm_head"], ["embed_tokens"],
        ["encoder.embed_tokens", "lm_head"]]  # fmt: skip


@pytest.mark.parametrize("kind", ["Bart", "T5"])
@pytest.mark.parametrize("names", SOME, ids="+".join)
def test_embeddings_of_which_some_stay_tied_are_the_same_after_merge_save_and_load(
    kind: str, names: list[str], tmp_path: Path
) -> None:
    base = tied(kind, tmp_path)
    ids = torch.arange(3, 11)[None]
    model = get_peft_model(base, config(target_modules=names, lora_alpha=2))
    wanted = reply(model, ids)
    merged = model.merge_and_unload()
    torch.testing.assert_close(reply(merged, ids), wanted, rtol=1e-5, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(reply(again, ids), reply(merged, ids))


def test_one_embedding_in_two_places_is_the_same_after_merge_save_and_load(tmp_path: Path) -> None:
    base = tied("Bart", tmp_path)
    base.set_input_embeddings(base.get_input_embeddings())
    assert base.model.encoder.embed_tokens is base.model.shared
    ids = torch.arange(3, 11)[None]
    model = get_peft_model(base, config(target_modules=["lm_head"], lora_alpha=2))
    wanted = reply(model, ids)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(reply(again, ids), wanted, rtol=1e-5, atol=1e-4)


def test_embeddings_that_stay_tied_stay_tied_in_the_config(tmp_path: Path) -> None:
    base = tied("Llama", tmp_path)
    merged = get_peft_model(base, config(target_modules=["q_proj"])).merge_and_unload()
    assert merged.config.tie_word_embeddings
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


def test_a_head_trained_in_full_with_its_tied_embedding_stays_tied_after_the_merge(tmp_path: Path) -> None:
    base = tied("Llama", tmp_path)
    ids = torch.arange(8)[None]
    model = get_peft_model(base, config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        (tied_weight,) = (p for key, p in model.adapter_parameters("default").items() if ".lora_" not in key)
        tied_weight.add_(torch.randn(40, 32, generator=torch.Generator().manual_seed(3)))
    wanted = reply(model, ids)
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(reply(again, ids), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_peft_trained_apart_from_its_embedding_is_the_same_after_merge_save_and_load(
    tmp_path: Path,
) -> None:
    import peft

    base = tied("Llama", tmp_path)
    ids = torch.arange(8)[None]
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("lm_head.modules_to_save.default.weight"):
                parameter.add_(torch.randn(40, 32, generator=torch.Generator().manual_seed(3)))
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    wanted = reply(model, ids)
    merged = model.merge_and_unload()
    torch.testing.assert_close(reply(merged, ids), wanted, rtol=1e-5, atol=1e-5)
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    again = type(base).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(reply(again, ids), reply(merged, ids))
