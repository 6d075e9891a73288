"""Promises of the search space: what a value means, what is refused before training, and where a search begins."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loraloom import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.errors import ConfigError, TargetError
from loraloom.lora.targets import plan
from loraloom.tuning.space import PRESETS, Space
from loraloom.tuning.targets import SETS, resolve_targets


def options(**changes: object) -> TrainConfig:
    return TrainConfig(**{"model": "m", "data": "d.csv", "task": "causal-lm", "output": "o", **changes})


def space(raw: Mapping[str, Any], **changes: object) -> Space:
    return Space.parse(raw, options(**changes))


EXAMPLE = {
    "lora.r": [4, 8, 16],
    "lora.lora_alpha": ["r", "2r", "rslora"],
    "lora.target_modules": ["q-v", "all-linear", ["q_proj", "o_proj"], r".*\.(up|down)_proj"],
    "lora.lora_dropout": {"range": [0, 0.2], "step": 0.05},
    "train.learning_rate": {"log": [5e-5, 5e-3]},
    "train.batch_size": {"range": [2, 8], "step": 2},
    "train.warmup_ratio": {"range": [0.0, 0.1]},
    "train.weight_decay": 0.01,
}


def build(name: str) -> nn.Module:
    """A model of transformers without weights."""
    import transformers

    small = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 11}
    config, kind = {
        "llama": (transformers.LlamaConfig(**small, intermediate_size=32), transformers.LlamaForCausalLM),
        "gpt2": (transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=11), transformers.GPT2LMHeadModel),
        "bert": (
            transformers.BertConfig(**small, intermediate_size=32),
            transformers.BertForSequenceClassification,
        ),
        "t5": (
            transformers.T5Config(d_model=16, d_kv=8, num_heads=2, num_layers=2, d_ff=32, vocab_size=11),
            transformers.T5ForConditionalGeneration,
        ),
        "mamba": (
            transformers.MambaConfig(num_hidden_layers=1, hidden_size=16, vocab_size=11),
            transformers.MambaForCausalLM,
        ),
    }[name]
    with torch.device("meta"):
        return kind(config)


# -- what a value means -----------------------------------------------------------------------------------------------


def test_lists_ranges_and_single_values_become_hyperparameters_and_fixed_values() -> None:
    found = space(EXAMPLE)
    assert list(found.params) == [key for key in EXAMPLE if key != "train.weight_decay"]
    assert found.fixed == {"train.weight_decay": 0.01}
    assert found.distributions()["lora.r"].choices == (4, 8, 16)  # type: ignore[attr-defined]
    ranges = {key: str(param) for key, param in found.params.items() if key.startswith(("lora.lora_drop", "train."))}
    assert ranges == {
        "lora.lora_dropout": "from 0 to 0.2 in steps of 0.05",
        "train.learning_rate": "from 5e-05 to 0.005, evenly in its logarithm",
        "train.batch_size": "whole numbers from 2 to 8 in steps of 2",
        "train.warmup_ratio": "from 0 to 0.1",
    }


def test_optuna_proposes_values_of_the_space_and_keeps_labels_of_lists() -> None:
    import optuna

    found = space(EXAMPLE)
    dists = found.distributions()
    assert dists["lora.r"] == optuna.distributions.CategoricalDistribution([4, 8, 16])
    assert dists["train.batch_size"] == optuna.distributions.IntDistribution(2, 8, step=2)
    assert dists["train.learning_rate"] == optuna.distributions.FloatDistribution(5e-5, 5e-3, log=True)
    assert dists["lora.lora_dropout"] == optuna.distributions.FloatDistribution(0, 0.2, step=0.05)
    assert "q_proj,o_proj" in dists["lora.target_modules"].choices  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("alpha", "r", "wanted"),
    [
        ("r", 4, (4, False, 1.0)),
        ("2r", 16, (32, False, 2.0)),
        ("0.5r", 8, (4, False, 0.5)),
        ("1.5r", 1, (1.5, False, 1.5)),
        ("rslora", 16, (8, True, 2.0)),
        ("rslora", 64, (8, True, 1.0)),
        (24, 8, (24, False, 3.0)),
    ],
)
def test_alpha_follows_the_rank_of_its_trial(alpha: Any, r: int, wanted: tuple[float, bool, float]) -> None:
    found = space({"lora.r": [1, 4, 8, 16, 64], "lora.lora_alpha": ["r", "2r", "0.5r", "1.5r", "rslora", 24]})
    lora = found.to_options({"lora.r": r, "lora.lora_alpha": alpha}, options()).lora
    assert (lora.lora_alpha, lora.use_rslora, lora.scale(lora.r, lora.lora_alpha)) == wanted


def test_alpha_follows_the_rank_of_the_base_where_the_rank_does_not_vary() -> None:
    found = space({"lora.lora_alpha": "2r", "lora.lora_dropout": [0.0, 0.1]})
    base = options(lora=LoraConfig(r=6))
    assert found.to_options({"lora.lora_dropout": 0.1}, base).lora == base.lora.copy(lora_alpha=12, lora_dropout=0.1)


def test_beside_the_choice_rslora_the_others_are_plain_and_without_it_the_base_decides() -> None:
    base = options(lora=LoraConfig(use_rslora=True))
    mixed, plain = space({"lora.lora_alpha": ["r", "rslora"]}), space({"lora.lora_alpha": ["r", "2r"]})
    assert not mixed.to_options({"lora.lora_alpha": "r"}, base).lora.use_rslora
    assert plain.to_options({"lora.lora_alpha": "r"}, base).lora.use_rslora


def test_a_configuration_becomes_options_and_the_base_stays_as_it_was() -> None:
    base = options(lora=LoraConfig(r=2))
    values = {
        "lora.r": 8, "lora.lora_alpha": "2r", "lora.target_modules": "q_proj,o_proj", "lora.lora_dropout": 0.15,
        "train.learning_rate": 1e-3, "train.batch_size": 4, "train.warmup_ratio": 0.02,
    }  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "o_proj"], lora_dropout=0.15)
    assert space(EXAMPLE).to_options(values, base) == options(
        lora=lora, learning_rate=1e-3, batch_size=4, warmup_ratio=0.02, weight_decay=0.01
    )
    assert base == options(lora=LoraConfig(r=2))


def test_structured_choices_go_by_a_label_and_come_back_whole() -> None:
    found = space({"lora.rank_pattern": [{}, {"q_proj": 4}], "lora.layers_to_transform": [[0, 1], 2, None]})
    dists = found.distributions()
    assert dists["lora.rank_pattern"].choices == ("{}", '{"q_proj": 4}')  # type: ignore[attr-defined]
    values = {"lora.rank_pattern": '{"q_proj": 4}', "lora.layers_to_transform": "[0, 1]"}
    lora = found.to_options(values, options()).lora
    assert (lora.rank_pattern, lora.layers_to_transform) == ({"q_proj": 4}, [0, 1])


@pytest.mark.parametrize("raw", [EXAMPLE, *(preset.space for preset in PRESETS.values())])
def test_a_space_is_plain_json_and_reads_as_itself(raw: Mapping[str, Any]) -> None:
    found = space(raw)
    assert Space.parse(json.loads(json.dumps(found.to_dict())), options()) == found


# -- sets of targets --------------------------------------------------------------------------------------------------


def endings(model: nn.Module, word: str, task: str) -> set[str]:
    """The last names of the modules that a set of targets adapts."""
    lora = options(task=task, lora=LoraConfig(target_modules=resolve_targets(model, word))).lora
    return {target.name.rsplit(".", 1)[-1] for target in plan(model, lora).targets}


@pytest.mark.parametrize(
    ("name", "word", "wanted"),
    [
        ("llama", "q-v", {"q_proj", "v_proj"}),
        ("llama", "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("llama", "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", "q-v", {"c_attn"}),
        ("gpt2", "attention", {"c_attn", "c_proj"}),
        ("bert", "q-v", {"query", "value"}),
        ("bert", "attention", {"query", "key", "value", "dense"}),
        ("t5", "q-v", {"q", "v"}),
        ("t5", "attention", {"q", "k", "v", "o"}),
    ],
)
def test_sets_of_targets_are_found_in_the_model(name: str, word: str, wanted: set[str]) -> None:
    task = "seq-cls" if name == "bert" else "causal-lm"
    assert endings(build(name), word, task) == wanted


def test_attention_means_attention_alone_where_names_are_shared_with_other_layers() -> None:
    for name, count in (("bert", 2 * 4), ("gpt2", 2 * 2)):
        model = build(name)
        targets = resolve_targets(model, "attention")
        found = plan(model, LoraConfig(target_modules=targets)).targets
        assert len(found) == count
        assert all("att" in target.name for target in found)


def test_a_set_that_matches_nothing_is_named_with_the_reason() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    for word, what in (("q-v", "query and value projections"), ("attention", "in a module called attention")):
        with pytest.raises(TargetError, match=f"target_modules: {word!r} matches nothing, because Sequential .*{what}"):
            resolve_targets(net, word)
    with pytest.raises(TargetError, match="target_modules: must be one of .* did you mean 'attention'?"):
        resolve_targets(net, "atention")


def test_a_set_needs_a_model_to_become_options() -> None:
    found = space({"lora.target_modules": [*SETS]})
    with pytest.raises(ConfigError, match="space.lora.target_modules: 'q-v' needs a model, and none was given"):
        found.to_options({"lora.target_modules": "q-v"}, options())
    assert found.to_options({"lora.target_modules": "all-linear"}, options()).lora.target_modules == "all-linear"
    model = build("llama")
    assert found.to_options({"lora.target_modules": "q-v"}, options(), model).lora.target_modules == [
        "q_proj",
        "v_proj",
    ]


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("llama", ["q_proj", "q_prj"], "space.lora.target_modules: 'q_prj' matches no module; did you mean 'q_proj'"),
        ("llama", ["all-linear", "atention"], "did you mean 'attention'?"),
        ("mamba", ["all-linear", "attention"], "space.lora.target_modules: 'attention' matches nothing, because Mamba"),
    ],
)
def test_a_choice_that_matches_nothing_in_the_model_is_found_before_training(
    name: str, raw: list[str], said: str
) -> None:
    with pytest.raises(TargetError) as error:
        space({"lora.target_modules": raw, "lora.r": [1, 2]}).check(build(name), options())
    assert said in str(error.value)


def test_choices_that_contradict_each_other_on_the_model_are_found_before_training() -> None:
    raw = {"lora.target_modules": ["q-v", "all-linear"], "lora.rank_pattern": [{}, {"up_proj": 4}]}
    with pytest.raises(TargetError, match="space.lora.rank_pattern: 'up_proj' matches no adapted module"):
        space(raw).check(build("llama"), options())


def test_what_the_base_has_wrong_is_said_of_the_base() -> None:
    base = options(lora=LoraConfig(target_modules=["q_prj"]))
    with pytest.raises(TargetError, match="^target_modules: 'q_prj' matches no module"):
        Space.parse({"lora.r": [1, 2]}, base).check(build("llama"), base)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_the_usual_models(name: str, preset: str) -> None:
    base = options(task="seq-cls" if name == "bert" else "causal-lm")
    Space.default(base, preset).check(build(name), base)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({}, "space: must map keys such as lora.r to lists or ranges, found {}"),
        ([1], "space: must map keys such as lora.r to lists or ranges, found [1]"),
        ({"lora.r": 8}, "space: nothing varies; give a key two choices or a range"),
        ({"lora.r": [8]}, "space: nothing varies"),
        ({"lora.r": []}, "space.lora.r: the list is empty; give choices, or leave the key out"),
        ({"lora.r": [0, 4]}, "space.lora.r: must be a whole number of at least 1, found 0"),
        ({"lora.r": [4, 8, 4]}, "space.lora.r: 4 is given twice; keep one"),
        ({"lora.r": [4, 4.0]}, "space.lora.r: 4.0 is given twice; keep one"),
        ({"lora.r": {"range": [4.0, 64.0]}}, "space.lora.r: must be a whole number of at least 1, found 4.0"),
        ({"lora.lora_dropout": [0.0, 1.0]}, "space.lora.lora_dropout: must be a number of at least 0"),
        ({"lora.lora_dropout": {"range": [0, 1]}}, "space.lora.lora_dropout: must be a number of at least 0"),
        ({"lora.lora_alpha": [0, 8]}, "space.lora.lora_alpha: 0 would switch the adapter off"),
        ({"lora.lora_alpha": ["2x", "r"]}, "space.lora.lora_alpha: must be a number, a multiple of the rank such"),
        ({"lora.lora_alpha": ["0r", "r"]}, "space.lora.lora_alpha: must be a number, a multiple of the rank such"),
        ({"lora.lora_alpha": ["r", "1r"]}, "space.lora.lora_alpha: r is given twice"),
        ({"lora.target_modules": ["q,v", ["q", "v"]]}, "space.lora.target_modules: q,v is given twice"),
        ({"lora.target_modules": ["([", "q"]}, "space.lora.target_modules: '([' is not a regular expression"),
        ({"lora.target_modules": [" ,", "q"]}, "space.lora.target_modules: holds no name, found ' ,'"),
        ({"lora.target_modules": [[], "q"]}, "space.lora.target_modules: a choice is an empty list"),
        ({"lora.lora_alpha": {"range": [-4, 4]}}, "space.lora.lora_alpha: 0 would switch the adapter off"),
        ({"lora.bias": ["none", "some"]}, "space.lora.bias: must be one of none, all, lora_only, found 'some'"),
        ({"train.learning_rate": {"log": [0, 1]}}, "space.train.learning_rate: a log range must begin above 0"),
        ({"train.learning_rate": {"log": [1e-3, 1e-4]}}, "space.train.learning_rate: log needs its low end below"),
        ({"train.learning_rate": {"log": [1e-3, 1e-3]}}, "space.train.learning_rate: log needs its low end below"),
        ({"train.learning_rate": {"log": [1e-3]}}, "space.train.learning_rate: log needs two numbers, [low, high]"),
        ({"train.learning_rate": {"log": [1e-3, "x"]}}, "space.train.learning_rate: log needs two numbers"),
        ({"train.learning_rate": {"log": [1e-3, math.inf]}}, "space.train.learning_rate: log needs two numbers"),
        ({"train.learning_rate": {"lgo": [1, 2]}}, "space.train.learning_rate: 'lgo' is no key of a range; did you"),
        ({"train.learning_rate": {"step": 2}}, "space.train.learning_rate: must be {log: [low, high]} or {range:"),
        ({"train.learning_rate": {"log": [1e-4, 1e-3], "step": 1e-4}}, "space.train.learning_rate: a log range has no"),
        ({"lora.r": {"range": [4, 64], "step": 7}}, "space.lora.r: steps of 7 from 4 do not reach 64; the last is 60"),
        ({"lora.r": {"range": [4, 64], "step": 0}}, "space.lora.r: step must be a number above 0, found 0"),
        ({"lora.rr": [1, 2]}, "space.lora.rr: there is no such key; did you mean 'r'?"),
        ({"r": [1, 2]}, "space.r: there is no such key; did you mean 'lora.r'?"),
        ({"learning_rate": [1, 2]}, "space.learning_rate: there is no such key; did you mean 'train.learning_rate'?"),
        ({"lora.task_type": ["SEQ_CLS"]}, "space.lora.task_type: follows from task"),
        ({"train.seed": [1, 2]}, "space.train.seed: must be the same in all trials; for more seeds see tune.seeds"),
        ({"train.epochs": [1, 2], "train.max_steps": 5}, "space.train.epochs: has no effect, because max_steps is"),
        (
            {"lora.use_rslora": [True, False], "lora.lora_alpha": ["r", "rslora"]},
            "space.lora.use_rslora: contradicts the choice rslora of lora.lora_alpha; keep one of the two",
        ),
        ({"lora.use_rslora": [True, False], "lora.lora_alpha": "rslora"}, "space.lora.use_rslora: contradicts"),
    ],
)  # fmt: skip
def test_a_bad_space_is_one_message_that_names_its_key(raw: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        space(raw)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "task", "output", "overwrite", "model.name", "model.dtype", "data.train", "data.validation", "data.max_length",
        "eval.batch_size", "eval.steps", "train.seed", "train.save_steps", "train.report_to", "train.fsdp",
        "train.gradient_checkpointing", "lora.inference_mode", "lora.fan_in_fan_out",
    ],
)  # fmt: skip
def test_what_trials_share_cannot_vary(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^space.{key}: must be the same in all trials"):
        space({key: ["a", "b"], "lora.r": [1, 2]})


def test_epochs_cannot_vary_beside_the_steps_of_the_base() -> None:
    with pytest.raises(ConfigError, match="space.train.epochs: has no effect"):
        space({"train.epochs": [1, 2]}, max_steps=10)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="preset: must be one of quick, .* did you mean 'standard'?"):
        Space.default(options(), "standart")


# -- all of it, its beginning, and its edges --------------------------------------------------------------------------


def test_a_grid_has_every_value() -> None:
    found = space(
        {
            "lora.r": [4, 8],
            "lora.lora_dropout": {"range": [0, 0.3], "step": 0.1},
            "train.batch_size": {"range": [2, 4]},
            "lora.lora_alpha": "r",
        }
    )
    values = {"lora.r": [4, 8], "lora.lora_dropout": [0.0, 0.1, 0.2, 0.3], "train.batch_size": [2, 3, 4]}
    assert list(found.grid()) == [
        dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())
    ]
    assert found.size == 24


def test_a_grid_over_a_continuous_range_is_refused() -> None:
    found = space({"train.learning_rate": {"log": [1e-4, 1e-3]}})
    assert found.size is None
    with pytest.raises(ConfigError, match="space.train.learning_rate: a grid needs choices or a step"):
        found.grid()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("count", [1, 4, 8, 16, 64])
def test_a_search_begins_with_what_is_known_and_spreads_from_there(preset: str, count: int) -> None:
    found = Space.default(options(), preset)
    first = found.prior(count)
    assert len(first) == count == len({tuple(values.values()) for values in first})
    assert first == Space.default(options(), preset).prior(count)
    best = first[0]
    assert (best["lora.r"], best["lora.lora_alpha"], best["lora.target_modules"]) == (16, "2r", "all-linear")
    assert best["train.learning_rate"] == 1e-3
    dists = found.distributions()
    for values in first:
        assert all(dists[key]._contains(dists[key].to_internal_repr(value)) for key, value in values.items())
    if count == 64:
        for key, values in (("lora.r", PRESETS[preset].space["lora.r"]), ("lora.target_modules", None)):
            assert {v[key] for v in first} == set(values or PRESETS[preset].space[key])
        rates = sorted(math.log(v["train.learning_rate"]) for v in first)
        low, high = (math.log(end) for end in PRESETS[preset].space["train.learning_rate"]["log"])
        assert max(b - a for a, b in itertools.pairwise([low, *rates, high])) < 0.1 * (high - low)


def test_first_rates_fall_with_the_square_root_of_the_rank_but_not_in_searches_of_before() -> None:
    found = space({"lora.r": [4, 16, 64], "train.learning_rate": {"log": [1e-5, 1e-1]}})
    rates: dict[int, list[float]] = {4: [], 16: [], 64: []}
    for values in found.prior(64, by_rank=False):
        rate = values["train.learning_rate"] * math.sqrt(16 / values["lora.r"])
        rates[values["lora.r"]].append(min(max(rate, 1.58e-5), 6.31e-2))  # not beyond the space
    first = found.prior(32)
    assert {values["lora.r"] for values in first} == {4, 16, 64}
    for values in first:
        rate = values["train.learning_rate"]
        assert any(rate == pytest.approx(wanted, rel=0.01) for wanted in rates[values["lora.r"]])
    assert {values["train.learning_rate"] for values in first} != {
        values["train.learning_rate"] for values in found.prior(32, by_rank=False)
    }


def test_a_small_space_begins_with_all_of_it() -> None:
    found = space({"lora.r": [4, 8, 16], "lora.lora_alpha": ["r", "2r"], "train.batch_size": {"range": [1, 2]}})
    first = found.prior(100)
    assert len(first) == found.size == 12
    assert {tuple(v.values()) for v in first} == set(itertools.product([4, 8, 16], ["r", "2r"], [1, 2]))


def test_values_at_an_end_of_the_space_are_at_its_edge() -> None:
    found = space(EXAMPLE | {"lora.lora_alpha": ["r", "rslora", "4r", "2r"]})
    inside = {"lora.r": 8, "lora.lora_alpha": "2r", "lora.target_modules": "q-v", "train.learning_rate": 5e-4}
    assert found.edges(inside) == {}
    assert found.edges({"lora.r": 4, "lora.lora_alpha": "4r", "train.learning_rate": 4.9e-3}) == {
        "lora.r": "low", "lora.lora_alpha": "high", "train.learning_rate": "high",
    }  # fmt: skip
    assert found.edges({"train.learning_rate": 5.2e-5, "train.batch_size": 2, "lora.lora_dropout": 0.2}) == {
        "train.learning_rate": "low", "train.batch_size": "low", "lora.lora_dropout": "high",
    }  # fmt: skip
    assert found.edges({"lora.lora_alpha": "rslora", "lora.target_modules": "all-linear"}) == {}
    assert found.order() == {"lora.lora_alpha": ["r", "2r", "4r"]}


def test_nothing_lies_below_a_rank_of_1_and_a_dropout_of_0() -> None:
    found = space({"lora.r": [1, 2, 4], "lora.lora_dropout": {"range": [0.0, 0.5]}})
    assert found.edges({"lora.r": 1, "lora.lora_dropout": 0.0}) == {}
    assert found.edges({"lora.r": 4, "lora.lora_dropout": 0.5}) == {"lora.r": "high", "lora.lora_dropout": "high"}


@given(st.data())
def test_every_configuration_of_a_space_becomes_options(data: st.DataObject) -> None:
    raw = {key: value for key, value in EXAMPLE.items() if key != "lora.target_modules"}
    found = space(raw)
    values: dict[str, Any] = {}
    for key, param in found.params.items():
        values[key] = param.point(data.draw(st.floats(0, 1, exclude_max=True)), [])
    made = found.to_options(values, options())
    assert made.lora.r == values["lora.r"]
    assert made.learning_rate == values["train.learning_rate"]
    assert 5e-5 <= made.learning_rate <= 5e-3
    assert made.batch_size in (2, 4, 6, 8)
