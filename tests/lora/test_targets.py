"""Which modules a config adapts: PEFT's grammar, strictly; and the plan is what really happens."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loraloom import LoraConfig, Plan, get_peft_model, plan
from loraloom.errors import TargetError
from loraloom.lora.injection import base_modules

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 30,
}


def llama_of(**fields: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **fields}))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return llama_of()


def names(made: Plan) -> list[str]:
    return [target.name for target in made.targets]


def lasts(made: Plan) -> set[str]:
    return {name.rpartition(".")[2] for name in names(made)}


# -- the grammar ------------------------------------------------------------------------------------------------------


GRAMMAR: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "mlp.up_proj"]},
    "whole name": {"target_modules": ["model.layers.1.self_attn.v_proj"]},
    "head": {"target_modules": ["lm_head", "embed_tokens"]},
    "expression": {"target_modules": r".*\.layers\.[02]\.self_attn\.[qk]_proj"},
    "expression over whole names": {"target_modules": r"model\..*down_proj|lm_head|.*\.mlp\.gate"},
    "exclude names": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "exclude expression": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1.*"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "layers by name": {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
    "layers by names": {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
}


@pytest.mark.parametrize("fields", GRAMMAR.values(), ids=GRAMMAR)
def test_the_same_modules_as_peft(model: nn.Module, fields: dict[str, Any]) -> None:
    from peft import LoraConfig as Theirs
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = Theirs(**fields)
    wanted = [name for name, _ in model.named_modules() if name and check_target_module_exists(theirs, name)]
    assert wanted
    assert names(plan(model, LoraConfig(**fields), strict=False)) == wanted


def test_a_suffix_begins_at_a_dot(model: nn.Module) -> None:
    with pytest.raises(TargetError, match="'proj' matches no module"):
        plan(model, LoraConfig(target_modules=["proj"]))


# -- strict -----------------------------------------------------------------------------------------------------------


STRICT: dict[str, tuple[dict[str, Any], str]] = {
    "target": (
        {"target_modules": ["q_proj", "v_prj"]},
        r"target_modules: 'v_prj' matches no module; did you mean 'v_proj' \(3 modules\)\?; modules that can be "
        r"adapted: .*q_proj \(3\)",
    ),
    "target, dotted": ({"target_modules": ["self_attn.q_prj"]}, r"did you mean 'q_proj' \(3 modules\)"),
    "target, one": ({"target_modules": ["lm_haed"]}, r"did you mean 'lm_head' \(1 module\)\?"),
    "target, nothing close": ({"target_modules": ["xyz"]}, r"target_modules: 'xyz' matches no module; modules that"),
    "target expression": ({"target_modules": r".*\.q_porj"}, r"target_modules: '.*q_porj' matches no module; did you"),
    "exclude": (
        {"exclude_modules": ["lm_heda"]},
        r"exclude_modules: 'lm_heda' matches no module; did you mean 'lm_head' \(1 module\)",
    ),
    "exclude expression": ({"exclude_modules": r".*\.self_atn"}, r"exclude_modules: .*did you mean 'self_attn'"),
    "module to save": (
        {"modules_to_save": ["lm_hed"]},
        r"modules_to_save: 'lm_hed' matches no module; did you mean 'lm_head' \(1 module\)",
    ),
    "rank pattern": (
        {"rank_pattern": {"q_prj": 2}},
        r"rank_pattern: 'q_prj' matches no adapted module; did you mean 'q_proj' \(3 modules\)",
    ),
    "rank pattern, not adapted": ({"rank_pattern": {"up_proj": 2}}, r"rank_pattern: 'up_proj' matches no adapted"),
    "alpha pattern": (
        {"alpha_pattern": {"q_proj": 2, "v_porj": 2}},
        r"alpha_pattern: 'v_porj' matches no adapted module; did you mean 'v_proj' \(3 modules\)",
    ),
    "rank pattern, shadowed": (
        {"rank_pattern": {".*_proj": 2, "q_proj": 3}},
        r"rank_pattern: 'q_proj' never applies, because an earlier key matches the same modules",
    ),
    "alpha pattern, shadowed while the rank's is not": (
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {".*_proj": 2, "q_proj": 3}},
        r"alpha_pattern: 'q_proj' never applies",
    ),
    "excluded": (
        {"exclude_modules": ["q_proj"]},
        r"target_modules: 'q_proj' matches 3 modules, but exclude_modules takes all of them out",
    ),
    "saved": (
        {"modules_to_save": ["q_proj"]},
        r"target_modules: 'q_proj' matches 3 modules, but modules_to_save trains all of them in full",
    ),
    "layers": ({"layers_to_transform": 9}, r"target_modules: 'q_proj' matches 3 modules, but none is in layers_to"),
    "one of several layers": ({"layers_to_transform": [0, 9]}, r"layers_to_transform: .*9.*layers.* 0, 1, 2"),
    "layers pattern": ({"layers_to_transform": 0, "layers_pattern": "layerz"}, r"none is in layers_to_transform=0"),
    "not a layer": ({"target_modules": ["self_attn"]}, r"self_attn is a LlamaAttention, which LoRA cannot wrap"),
}


@pytest.mark.parametrize(("fields", "message"), STRICT.values(), ids=STRICT)
def test_what_matches_nothing_is_an_error_that_names_the_closest(model: nn.Module, fields: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        plan(model, LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **fields}))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "held",
    [
        nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleDict({"a": nn.Linear(4, 4)}),
        nn.ParameterList([nn.Parameter(torch.ones(2))]), nn.ParameterDict({"a": nn.Parameter(torch.ones(2))}),
    ],
)  # fmt: skip
def test_a_list_of_modules_is_not_trained_in_full_because_it_is_never_called(held: nn.Module) -> None:
    net = nn.Sequential()
    net.node, net.held = nn.Linear(4, 4), held
    with pytest.raises(TargetError, match=f"modules_to_save: held is a {type(held).__name__}, which holds"):
        plan(net, LoraConfig(target_modules=["node"], modules_to_save=["held"]))


def test_only_modules_that_lora_can_wrap_are_suggested_as_targets() -> None:
    net = nn.Sequential()
    net.norm, net.node = nn.LayerNorm(4), nn.Linear(4, 4)
    with pytest.raises(TargetError, match=r"'norme' matches no module; did you mean 'node' \(1 module\)"):
        plan(net, LoraConfig(target_modules=["norme"]))
    with pytest.raises(TargetError, match=r"modules_to_save: 'norme' matches no module; did you mean 'norm' "):
        plan(net, LoraConfig(target_modules=["node"], modules_to_save=["norme"]))
    del net.node
    with pytest.raises(TargetError, match=r"'nope' matches no module; this model has no module that LoRA can wrap"):
        plan(net, LoraConfig(target_modules=["nope"]))


@pytest.mark.parametrize(("fields", "message"), STRICT.values(), ids=STRICT)
def test_a_config_that_is_refused_leaves_the_model_as_it_was(fields: Any, message: str) -> None:
    model = llama_of()
    types, trained = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **fields}))
    assert [type(m) for m in model.modules()] == types
    assert [p.requires_grad for p in model.parameters()] == trained


FORGIVEN = ["target", "exclude", "module to save", "rank pattern", "alpha pattern", "excluded", "one of several layers"]


@pytest.mark.parametrize("name", FORGIVEN)
def test_not_strict_goes_on_with_what_matches(model: nn.Module, name: str) -> None:
    made = plan(model, LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **STRICT[name][0]}), strict=False)
    assert made.targets


@pytest.mark.parametrize("name", ["target, nothing close", "target expression", "layers", "not a layer"])
def test_not_strict_still_refuses_when_nothing_could_be_adapted(model: nn.Module, name: str) -> None:
    with pytest.raises(TargetError):
        plan(model, LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **STRICT[name][0]}), strict=False)


def test_an_empty_list_of_targets_trains_what_else_is_asked_for_or_nothing(model: nn.Module) -> None:
    for none in ([], ""):
        made = plan(model, LoraConfig(target_modules=none, modules_to_save=["lm_head"]))
        assert not made.targets
        assert [e.name for e in made.saved] == ["lm_head"]
    with pytest.raises(TargetError, match="nothing would be trained"):
        plan(model, LoraConfig(target_modules=[]))


def test_a_model_with_nothing_to_wrap_says_so() -> None:
    with pytest.raises(TargetError, match="this model has no module that LoRA can wrap"):
        plan(nn.Sequential(nn.ReLU()), LoraConfig(target_modules=["0"]))


# -- all-linear -------------------------------------------------------------------------------------------------------


def test_all_linear_takes_every_linear_layer_but_the_head(model: nn.Module) -> None:
    made = plan(model, LoraConfig(target_modules="all-linear"))
    wanted = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    assert names(made) == wanted
    assert made.config.target_modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_all_linear_leaves_a_classifier_to_its_task() -> None:
    model = bert()
    made = plan(model, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "classifier"]
    assert names(made) == linear
    assert [extra.name for extra in made.saved] == ["classifier"]


def test_all_linear_demands_nothing_of_what_is_taken_out(model: nn.Module) -> None:
    made = plan(
        model,
        LoraConfig(target_modules="all-linear", exclude_modules=["q_proj"], modules_to_save=["layers.0.mlp.up_proj"]),
    )
    assert lasts(made) == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert "model.layers.0.mlp.up_proj" not in names(made)
    assert "model.layers.1.mlp.up_proj" in names(made)


def trees() -> st.SearchStrategy[Any]:
    leaf = st.sampled_from(["linear", "norm", "embedding"])
    key = st.sampled_from(["a", "b", "q", "aq", "q1"])
    return st.recursive(
        leaf,
        lambda inner: st.dictionaries(key, inner, min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=2),
        max_leaves=8,
    )


def grown(tree: Any) -> nn.Module:
    if isinstance(tree, str):
        return {"linear": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "embedding": nn.Embedding(2, 2)}[tree]
    out = nn.Sequential()
    for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree):
        out.add_module(str(key), grown(inner))
    return out


@settings(max_examples=100, deadline=None)
@given(tree=st.dictionaries(st.sampled_from(["a", "q", "root"]), trees(), min_size=1, max_size=3))
def test_the_names_that_all_linear_writes_down_match_the_linear_layers_and_no_other(tree: Any) -> None:
    model = grown(tree)
    wanted = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not wanted:
        return
    made = plan(model, LoraConfig(target_modules="all-linear"))
    assert names(made) == wanted
    assert names(plan(model, made.config)) == wanted


# -- ranks and alphas -------------------------------------------------------------------------------------------------


def test_the_first_pattern_that_matches_counts(model: nn.Module) -> None:
    made = plan(
        model,
        LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj"],
            rank_pattern={r"layers\.0\..*": 2, "q_proj": 4},
            alpha_pattern={"q_proj": 3, r"layers\.[01]\..*": 5},
        ),
    )
    found = {t.name.replace("model.layers.", "").replace("self_attn.", ""): (t.r, t.alpha) for t in made.targets}
    assert found == {
        "0.q_proj": (2, 3), "0.k_proj": (2, 5), "0.v_proj": (2, 5),
        "1.q_proj": (4, 3), "1.k_proj": (8, 5), "1.v_proj": (8, 5),
        "2.q_proj": (4, 3), "2.k_proj": (8, 16), "2.v_proj": (8, 16),
    }  # fmt: skip
    assert {t.scale for t in made.targets if t.name.endswith("layers.0.self_attn.q_proj")} == {1.5}
    # What is written down means the same in the order of a sorted file.
    again = LoraConfig.from_dict(json.loads(made.config.to_json()))
    assert plan(model, again).targets == made.targets


def test_rslora_scales_by_the_root_of_each_modules_own_rank(model: nn.Module) -> None:
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "k_proj"],
                        rank_pattern={"k_proj": 9})  # fmt: skip
    assert {t.name.rpartition(".")[2]: t.scale for t in plan(model, config).targets} == {"q_proj": 3.0, "k_proj": 2.0}


# -- the plan is what happens -----------------------------------------------------------------------------------------


KNOBS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear", "r": 3},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "patterns": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "biases of targets": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "block in full": {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "model.norm"], "bias": "all"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True, "attention_bias": True},
}


@pytest.mark.parametrize("autocast", [True, False], ids=["float32 factors", "own dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
@pytest.mark.parametrize("base", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("fields", KNOBS.values(), ids=KNOBS)
def test_the_plans_totals_are_what_is_really_added(fields: Any, base: Any, dtype: torch.dtype, autocast: bool) -> None:
    model = llama_of(**base).to(dtype)
    before = list(model.parameters())
    made = plan(model, LoraConfig(**fields), autocast_adapter_dtype=autocast)
    assert made.base_parameters == sum(p.numel() for p in before)
    assert made.base_bytes == sum(p.numel() * p.element_size() for p in before)
    peft = get_peft_model(model, LoraConfig(**fields), autocast_adapter_dtype=autocast)
    mine = list(peft.adapter_parameters("default").values())
    assert made.parameters == sum(p.numel() for p in mine)
    assert made.bytes == sum(p.numel() * p.element_size() for p in mine)
    for target in made.targets:
        a, b = peft.base_model.lora_layers[target.name].factors("default")
        assert (target.r, target.parameters) == (a.shape[0], a.numel() + b.numel())
        assert target.bytes == a.numel() * a.element_size() + b.numel() * b.element_size()
        assert target.scale == peft.base_model.lora_layers[target.name].scaling["default"]
    assert list(peft.base_model.lora_layers) == names(made)


@pytest.mark.parametrize("base", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("fields", KNOBS.values(), ids=KNOBS)
def test_a_plan_on_the_meta_device_is_the_same(fields: Any, base: Any) -> None:
    with torch.device("meta"):
        empty = llama_of(**base)
    empty.tie_weights()
    assert all(p.is_meta for p in empty.parameters())
    assert plan(empty, LoraConfig(**fields)) == plan(llama_of(**base), LoraConfig(**fields))


@pytest.mark.parametrize("fields", KNOBS.values(), ids=KNOBS)
def test_a_plan_touches_nothing(fields: Any) -> None:
    model = llama_of().train()
    config = LoraConfig(**fields)
    before = [(name, type(m), m.training) for name, m in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    made, state = plan(model, config), torch.get_rng_state()
    assert [(name, type(m), m.training) for name, m in model.named_modules()] == before
    after = [(name, id(p), p.requires_grad, p.detach()) for name, p in model.named_parameters()]
    assert [a[:3] for a in after] == [b[:3] for b in parameters]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(after, parameters))
    assert torch.equal(torch.get_rng_state(), state)
    assert config == LoraConfig(**fields)
    assert plan(model, config) == made


def test_a_plan_beside_other_adapters_is_that_of_the_base() -> None:
    model = llama_of()
    wanted = plan(model, LoraConfig(target_modules="all-linear", bias="all"))
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["model.norm"]))
    assert plan(peft, LoraConfig(target_modules="all-linear", bias="all")).targets == wanted.targets


class Tied(nn.Module):
    """Two modules that share storage under names that say nothing of it, in two Parameter objects."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.inner = nn.Linear(4, 4)
        self.answer = nn.Linear(4, 10, bias=False)
        self.answer.weight = nn.Parameter(self.words.weight.detach())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.answer(self.inner(self.words(ids)))


@pytest.mark.parametrize("asked", ["answer", "words"])
def test_ties_are_found_by_storage_and_not_by_name(asked: str) -> None:
    model = Tied()
    assert model.answer.weight is not model.words.weight
    config = LoraConfig(target_modules=["inner"], modules_to_save=[asked], r=2)
    made = plan(model, config)
    assert {extra.name for extra in made.saved} == {"answer", "words"}
    assert {e.name for e in plan(model, config, follow_ties=False).saved} == {asked}
    peft = get_peft_model(model, config)
    copies = [peft.get_base_model().get_submodule(name).weight for name in ("answer", "words")]
    assert copies[0] is copies[1]
    assert made.parameters == sum(p.numel() for p in peft.parameters() if p.requires_grad)


def test_a_module_inside_one_that_is_trained_in_full_is_not_listed_again(model: nn.Module) -> None:
    made = plan(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.0.mlp", "up_proj"]))
    assert [e.name for e in made.saved] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp.up_proj",
        "model.layers.2.mlp.up_proj",
    ]


# -- what a person reads ----------------------------------------------------------------------------------------------


def test_the_table_shows_each_module_and_the_totals() -> None:
    net = nn.Sequential()
    net.first, net.second, net.head = nn.Linear(100, 50), nn.Conv2d(3, 4, 3), nn.Linear(2, 3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["first", "second"], modules_to_save=["head"],
                        bias="lora_only", rank_pattern={"second": 2})  # fmt: skip
    assert str(plan(net, config)).splitlines() == [
        "module       kind             r  alpha  scale  parameters  bytes",
        "-----------  ---------------  -  -----  -----  ----------  -----",
        "first        Linear           4      6    1.5         600  2,400",
        "second       Conv2d           2      6      3          62    248",
        "head         trained in full                            9     36",
        "first.bias   bias                                      50    200",
        "second.bias  bias                                       4     16",
        "total: 2 modules adapted, 1 trained in full, 2 biases; 725 of 5,896 parameters train (12.2965%), "
        "2,900 bytes beside a base of 20,684",
    ]


def test_base_modules_are_named_as_before_any_adapter(model: nn.Module) -> None:
    wanted = [name for name, _ in model.named_modules() if name]
    own = llama_of()
    get_peft_model(own, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert [name for name, _ in base_modules(own)] == wanted


def test_a_presets_targets_outside_the_layers_asked_for_name_the_layers(llama) -> None:
    with pytest.raises(TargetError, match=r"layers_to_transform: none of the 4 modules .* is in the layers \[9\]"):
        plan(llama, LoraConfig(layers_to_transform=[9]))
