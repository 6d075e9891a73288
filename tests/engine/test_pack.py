"""Promises of a pack: an adapter in it equals the same adapter alone, and is not touched by what befalls the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from loraloom import LoraConfig, TaskType, get_peft_model
from loraloom.engine.flat_adamw import FlatAdamW
from loraloom.engine.pack import Pack
from loraloom.errors import AdapterError, ConfigError

VOCABULARY = 96
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.1}
BERT = {**LLAMA, "max_position_embeddings": 64, "num_labels": 3}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

#: family → config, model class, task, three sets of targets
FAMILIES: dict[str, tuple[Any, Any, TaskType, list[list[str]]]] = {
    "llama": (
        transformers.LlamaConfig(vocab_size=VOCABULARY, **LLAMA),
        transformers.LlamaForCausalLM,
        TaskType.CAUSAL_LM,
        [
            ["q_proj", "v_proj"],
            ["q_proj", "k_proj", "v_proj", "o_proj"],
            ["k_proj", "gate_proj", "up_proj", "down_proj"],
        ],
    ),
    "gpt2": (
        transformers.GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **GPT2),
        transformers.GPT2LMHeadModel,
        TaskType.CAUSAL_LM,
        [["c_attn"], ["c_attn", "c_proj"], ["c_fc", "wte"]],
    ),
    "bert": (
        transformers.BertConfig(vocab_size=VOCABULARY, **BERT),
        transformers.BertForSequenceClassification,
        TaskType.SEQ_CLS,
        [
            ["query", "value"],
            ["query", "key", "value", "attention.output.dense"],
            ["intermediate.dense", "output.dense"],
        ],
    ),
    "t5": (
        transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **T5),
        transformers.T5ForConditionalGeneration,
        TaskType.SEQ_2_SEQ_LM,
        [["q", "v"], ["q", "k", "v", "o"], ["v", "wi", "wo"]],
    ),
}
#: What a BERT is for beside one class → config, model class, task
BERTS: dict[str, tuple[dict[str, Any], Any, TaskType]] = {
    "bert, a number": (
        {"num_labels": 1, "problem_type": "regression"},
        transformers.BertForSequenceClassification,
        TaskType.SEQ_CLS,
    ),
    "bert, several classes": (
        {"problem_type": "multi_label_classification"},
        transformers.BertForSequenceClassification,
        TaskType.SEQ_CLS,
    ),
    "bert, tags": ({}, transformers.BertForTokenClassification, TaskType.TOKEN_CLS),
    "bert, answers": ({"num_labels": 2}, transformers.BertForQuestionAnswering, TaskType.QUESTION_ANS),
}
FAMILIES |= {
    name: (transformers.BertConfig(vocab_size=VOCABULARY, **{**BERT, **changes}), cls, task, FAMILIES["bert"][3])
    for name, (changes, cls, task) in BERTS.items()
}
#: Their norms cast to float32 in every dtype, and how a sum is rounded there follows from the processor and from the
#: shape of the whole batch. Elsewhere float64 is float64 throughout.
CASTS = {"llama", "t5"}
NAMES = [f"n{i}" for i in range(8)]
RANKS = dict(zip(NAMES, (2, 4, 8, 8, 16, 16, 40, 64), strict=True))
RATES = dict(zip(NAMES, (1e-3, 3e-3, 1e-3, 2e-3, 5e-4, 1e-3, 2e-3, 1e-3), strict=True))
DROPOUT = dict(zip(NAMES, (0.0, 0.1, 0.0, 0.2, 0.05, 0.0, 0.2, 0.1), strict=True))
Run = tuple[dict[str, list[float]], dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, (config, cls, _, _) in FAMILIES.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        cls(config).save_pretrained(found[name])
    return found


def configs(family: str) -> dict[str, LoraConfig]:
    """Eight that differ in everything."""
    _, _, task, targets = FAMILIES[family]
    bias = ["none", "none", "lora_only", "none", "none", "all", "none", "none"]
    return {
        name: LoraConfig(
            r=RANKS[name],
            lora_alpha=RANKS[name] * (1 + i % 2),
            use_rslora=i == 4,
            lora_dropout=DROPOUT[name],
            target_modules=targets[i % 3],
            bias=bias[i] if family.startswith(("gpt2", "bert")) else "none",
            modules_to_save=["qa_outputs" if task is TaskType.QUESTION_ANS else "classifier"]
            if family.startswith("bert")
            else ["lm_head"]
            if family == "llama" and i == 3
            else None,
            task_type=task,
            init_lora_weights=i % 2 == 0,
        )
        for i, name in enumerate(NAMES)
    }


def rows(family: str, name: str, step: int, forward: int, times: int = 1) -> dict[str, Tensor]:
    """What depends on the adapter's own name, step and forward: one to three rows of ``times`` four to nine tokens."""
    i = NAMES.index(name)
    make = torch.Generator().manual_seed(1000 * i + 10 * step + forward)
    count, length = 1 + i % 3, times * (4 + int(torch.randint(6, (), generator=make)))
    ids = torch.randint(3, VOCABULARY, (count, length), generator=make)
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    if family == "bert, a number":
        labels = torch.randn(count, generator=make)
    elif family == "bert, several classes":
        labels = torch.randint(2, (count, 3), generator=make).float()
    elif family == "bert, answers":
        labels = torch.randint(length - 2, (count, 2), generator=make)
    elif family == "bert, tags":
        labels = torch.randint(3, (count, length), generator=make).masked_fill(mask == 0, -100)
    elif family == "t5":
        # Targets of lengths of their own. Of one token alone its decoder would attend to nothing else: gradients that
        # are rounding and nothing else, which the optimizer makes steps of.
        labels = torch.randint(3, VOCABULARY, (count, 4 + length % 4), generator=make)
        labels[0, -1] = -100
    elif FAMILIES[family][2] is TaskType.SEQ_CLS:
        labels = torch.randint(3, (count,), generator=make)
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(
    family: str,
    folder: Path,
    names: list[str],
    dtype: torch.dtype,
    steps: int,
    *,
    rates: Mapping[str, float] = RATES,
    around: Callable[[Pack, int], None] = lambda pack, step: None,
    multiple: int = 1,
    times: int = 1,
) -> Run:
    """Losses and final numbers of each adapter, trained for ``steps`` steps on its own rows."""
    _, cls, task, _ = FAMILIES[family]
    model = cls.from_pretrained(folder, dtype=dtype)
    given = configs(family)
    # Each begins from numbers of its own that do not depend on who is there.
    pack = Pack(
        model,
        {name: given[name] for name in names},
        task=task,
        seeds={n: NAMES.index(n) for n in names},
        pad_to_multiple_of=multiple,
    )
    accumulation = {name: 1 + (name == "n2") for name in names}
    optimizers = {
        name: FlatAdamW([(p, 4.0 if "lora_B" in key else 1.0) for key, p in pack.parameters_of(name).items()], 0.01)
        for name in names
    }
    losses: dict[str, list[float]] = {name: [] for name in names}
    stopped: set[str] = set()
    waits = dict.fromkeys(names, 0)
    for step in range(steps):
        around(pack, step)
        for forward in range(2):
            running = [n for n in names if n not in stopped and forward < accumulation[n]]
            if not running:
                continue
            found = pack.backward(
                {name: rows(family, name, step, forward, times) for name in running},
                dropout_seeds={name: 100 * NAMES.index(name) + 2 * step + forward for name in running},
                weights={name: 1 / accumulation[name] for name in running},
            )
            for name in running:
                if not torch.tensor(found[name]).isfinite():
                    stopped.add(name)
                    continue
                losses[name].append(found[name])
                waits[name] += 1
                if waits[name] % accumulation[name] == 0:
                    optimizers[name].step(rates[name], 1.0)
    return losses, {
        name: {key: p.detach().clone() for key, p in pack.model.adapter_parameters(name).items()} for name in names
    }


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_of_eight_equals_itself_alone_in_float64(family: str, folders: dict[str, Path]) -> None:
    """20 steps; ranks 2 to 64, three target sets, dropout, biases, heads, rates, row counts and accumulation."""
    losses, together = train(family, folders[family], NAMES, torch.float64, 20)
    close = 1e-5 if family in CASTS else 1e-10
    for name in NAMES:
        alone_losses, alone = train(family, folders[family], [name], torch.float64, 20)
        assert losses[name] == pytest.approx(alone_losses[name], rel=close)
        moved = 0.0
        for key, found in together[name].items():
            wanted = alone[name][key]
            if "key.bias" in key or (family == "bert, answers" and max(found.norm(), wanted.norm()) < 1e-9):
                continue  # they move all tokens alike: their gradients are rounding, which AdamW makes steps of
            assert (found - wanted).norm() <= close * wanted.norm().clamp_min(1e-3), (name, key)
            moved = max(moved, float(found.abs().max()))
        assert moved > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_curves_agree_in_float32(family: str, folders: dict[str, Path]) -> None:
    losses, _ = train(family, folders[family], NAMES, torch.float32, 10)
    for name in NAMES:
        alone, _ = train(family, folders[family], [name], torch.float32, 10)
        assert losses[name] == pytest.approx(alone[name], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", ["n6", "n0", "n3"])
def test_a_rate_of_a_million_in_one_leaves_seven_bit_identical(
    folders: dict[str, Path], dtype: torch.dtype, bad: str
) -> None:
    calm_losses, calm = train("llama", folders["llama"], NAMES, dtype, 12, multiple=16)
    wild_losses, wild = train("llama", folders["llama"], NAMES, dtype, 12, multiple=16, rates={**RATES, bad: 1e6})
    assert wild_losses[bad] != calm_losses[bad]
    for name in NAMES:
        if name != bad:
            assert wild_losses[name] == calm_losses[name]
            assert all(torch.equal(wild[name][key], calm[name][key]) for key in calm[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_forwards_of_like_width_give_the_same_bits_as_one_forward_of_all(
    folders: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    def fixed(cost: float) -> tuple[Run, int]:
        seen: list[Pack] = []

        def around(pack: Pack, step: int) -> None:
            seen[:] = [pack]
            pack._prepare({name: rows(family, name, step, 0) for name in NAMES})
            pack._fixed = cost

        return train(family, folders[family], NAMES, dtype, 4, around=around, multiple=16, times=9), seen[0].places

    (one_losses, one), most = fixed(1e9)
    (losses, found), places = fixed(0.0)
    assert places < 0.8 * most
    assert losses == one_losses
    for name in NAMES:
        assert all(torch.equal(found[name][key], one[name][key]) for key in one[name]), name


def test_a_slot_of_no_numbers_leaves_the_others_bit_identical_and_gets_no_gradient(folders: dict[str, Path]) -> None:
    def spoil(pack: Pack, step: int) -> None:
        if step == 3:
            for p in pack.parameters_of("n4").values():
                p.data.fill_(torch.nan)

    calm_losses, calm = train("bert", folders["bert"], NAMES, torch.float32, 8, multiple=16)
    wild_losses, wild = train("bert", folders["bert"], NAMES, torch.float32, 8, multiple=16, around=spoil)
    assert len(wild_losses["n4"]) == 3
    for name in NAMES:
        if name != "n4":
            assert wild_losses[name] == calm_losses[name]
            assert all(torch.equal(wild[name][key], calm[name][key]) for key in calm[name]), name


@pytest.mark.filterwarnings("error")
def test_one_that_is_active_is_taken_out_without_a_warning(folders: dict[str, Path]) -> None:
    pack = pair(folders)
    pack.model.set_adapter("a")
    pack.remove("a")
    assert pack.adapters == pack.model.active_adapters == ["b"]


def test_others_may_come_and_go_meanwhile(folders: dict[str, Path]) -> None:
    names = ["n1", "n4"]

    def around(pack: Pack, step: int) -> None:
        if step in (2, 5):
            pack.add(f"guest{step}", configs("gpt2")["n6"], seed=step)
            guest = {name: rows("gpt2", "n6", step, 0) for name in (f"guest{step}",)}
            assert pack.backward(guest)
        if step == 4:
            pack.remove("guest2")

    quiet_losses, quiet = train("gpt2", folders["gpt2"], names, torch.float64, 8)
    losses, found = train("gpt2", folders["gpt2"], names, torch.float64, 8, around=around)
    for name in names:
        assert losses[name] == pytest.approx(quiet_losses[name], rel=1e-10)
        for key, p in found[name].items():
            torch.testing.assert_close(p, quiet[name][key], rtol=1e-9, atol=1e-11)


def test_the_base_keeps_its_bytes(folders: dict[str, Path]) -> None:
    kept: list[dict[str, Tensor]] = []

    def base(pack: Pack, step: int) -> None:
        if step in (0, 3):
            mine = {id(p) for name in NAMES for p in pack.parameters_of(name).values()}
            kept.append({k: p.detach().clone() for k, p in pack.model.named_parameters() if id(p) not in mine})

    train("bert", folders["bert"], NAMES, torch.float32, 4, around=base)
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(folders: dict[str, Path], reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = transformers.LlamaForCausalLM.from_pretrained(folders["llama"], dtype=torch.float64)
        pack = Pack(model, configs("llama"))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            for layer in model.model.layers:  # transformers checkpoints in training mode alone
                layer.training = True
        pack.backward(
            {name: rows("llama", name, 0, 0) for name in NAMES}, dropout_seeds={n: i for i, n in enumerate(NAMES)}
        )
        return {f"{n} {k}": p.grad for n in NAMES for k, p in pack.parameters_of(n).items() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-9, atol=1e-12)


# In a user's own loop -------------------------------------------------------------------------------------


def pair(folders: dict[str, Path], **changes: Any) -> Pack:
    model = transformers.LlamaForCausalLM.from_pretrained(folders["llama"])
    given = configs("llama")
    return Pack(model, {"a": given["n0"], "b": given["n5"]}, **changes)


def test_rows_need_no_mask_and_may_be_of_any_length(folders: dict[str, Path]) -> None:
    pack = pair(folders)
    a, b = torch.randint(3, VOCABULARY, (2, 5)), torch.randint(3, VOCABULARY, (1, 9))
    both = pack.backward({"a": {"input_ids": a, "labels": a}, "b": {"input_ids": b, "labels": b}})
    for name, ids in (("a", a), ("b", b)):
        pack.model.set_adapter(name)
        pack.model.eval()
        with torch.no_grad():
            assert both[name] == pytest.approx(float(pack.model(ids, labels=ids).loss), rel=1e-5)


def test_dropout_is_on_again_after_the_user_evaluated(folders: dict[str, Path]) -> None:
    pack = pair(folders)
    pack.model.eval()
    ids = torch.randint(3, VOCABULARY, (1, 9))
    pack.add("c", configs("llama")["n7"])
    batch = {"c": {"input_ids": ids, "labels": ids}}
    for p in pack.parameters_of("c").values():
        p.data.normal_()
    found = set()
    for seed in range(3):
        pack.model.eval()
        found |= {pack.backward(batch, dropout_seeds={"c": seed})["c"]}
    assert len(found) == 3


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ({}, "found none"),
        ({"aa": {}}, "'aa' is no adapter of this pack; did you mean 'a'?"),
        ({"a": {"input_ids": torch.ones(1, 2, dtype=torch.long)}}, "that of 'a' has no labels"),
        (
            {
                "a": {"input_ids": torch.ones(1, 2, dtype=torch.long), "labels": torch.ones(1, 2, dtype=torch.long)},
                "b": {
                    "input_ids": torch.ones(1, 2, dtype=torch.long),
                    "labels": torch.ones(1, 2, dtype=torch.long),
                    "position_ids": torch.ones(1, 2, dtype=torch.long),
                },
            },
            "that of 'a' has no position_ids, which others have",
        ),
    ],
)
def test_batches_that_do_not_fit_are_said_and_nothing_is_computed(
    folders: dict[str, Path], batches: dict[str, dict[str, Tensor]], words: str
) -> None:
    pack = pair(folders)
    with pytest.raises(AdapterError, match=words.replace("?", r"\?")):
        pack.backward(batches)
    assert all(p.grad is None for p in pack.model.parameters())


def test_a_pack_without_adapters_or_task_says_so(folders: dict[str, Path]) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(folders["llama"])
    with pytest.raises(ConfigError, match="at least one adapter"):
        Pack(model)
    plain: nn.Module = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="task: not given"):
        Pack(plain)
    with pytest.raises(ConfigError, match="seeds: 'defalt' is no adapter"):
        Pack(model, {"default": LoraConfig(target_modules=["q_proj"])}, seeds={"defalt": 1})


@pytest.mark.parametrize("family", ["bert, several classes", "bert, answers", "t5"])
def test_rows_filled_up_to_a_multiple_keep_their_labels(family: str, folders: dict[str, Path]) -> None:
    plain, _ = train(family, folders[family], NAMES, torch.float64, 2)
    filled, _ = train(family, folders[family], NAMES, torch.float64, 2, multiple=16)
    for name in NAMES:
        assert filled[name] == pytest.approx(plain[name], rel=1e-5 if family in CASTS else 1e-9)


def test_rows_without_a_second_segment_stand_beside_rows_with_one(folders: dict[str, Path]) -> None:
    def loss(batches: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        model = transformers.BertForSequenceClassification.from_pretrained(folders["bert"], dtype=torch.float64)
        given = configs("bert")
        return Pack(model, {"a": given["n0"], "b": given["n5"]}).backward(batches)

    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    one = {"input_ids": ids, "labels": torch.tensor([0, 2])}
    types = torch.zeros_like(ids)
    two = {**one, "token_type_ids": types}
    types[:, 3:] = 1
    mixed = loss({"a": one, "b": two})
    assert mixed["a"] == pytest.approx(loss({"a": one, "b": one})["a"], rel=1e-12)
    assert mixed["b"] == pytest.approx(loss({"a": two, "b": two})["b"], rel=1e-12)
    assert mixed["b"] != pytest.approx(loss({"a": one, "b": one})["b"], rel=1e-6)


def test_rows_are_filled_up_with_the_models_own_padding_token_and_another_for_a_classifier_is_a_warning() -> None:
    """A decoder that classifies finds the end of a row by its config's padding token."""
    torch.manual_seed(0)
    base = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(vocab_size=VOCABULARY, pad_token_id=5, num_labels=3, **LLAMA)
    )
    given = {name: LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"]) for name in ("short", "long")}
    pack = Pack(base, given)
    assert pack.pad_id == 5
    rows = {"short": torch.full((2, 3), 7), "long": torch.full((2, 6), 8)}
    batches = {name: {"input_ids": ids, "labels": torch.tensor([0, 1])} for name, ids in rows.items()}
    together = pack.backward(batches)
    for name, batch in batches.items():
        assert pack.backward({name: batch})[name] == pytest.approx(together[name], rel=1e-5)
    with pytest.warns(UserWarning, match="pad_token_id, which is 5, found 0"):
        Pack(pack.model, pad_id=0)
