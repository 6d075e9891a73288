from __future__ import annotations

import copy
import importlib
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from loraloom import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from loraloom.errors import AdapterError, ConfigError, TargetError


def config(**fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **fields})


def test_a_new_adapter_changes_nothing_until_it_is_trained(llama, tokens, logits) -> None:
    before = logits(llama, tokens)
    assert torch.equal(logits(get_peft_model(llama, config(init_lora_weights=True)), tokens), before)


def test_the_base_is_wrapped_and_not_copied(llama) -> None:
    before = {name: p.data_ptr() for name, p in llama.named_parameters()}
    model = get_peft_model(llama, config())
    base = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert base == set(before.values())


def test_the_callers_config_is_never_changed(llama) -> None:
    mine = config(target_modules="all-linear", task_type="SEQ_CLS")
    before = copy.deepcopy(mine)
    get_peft_model(llama, mine)
    assert mine == before


def test_initialisation_depends_on_the_seed_and_not_on_the_global_generator(llama_folder) -> None:
    from transformers import LlamaForCausalLM

    def make(seed: int | None, name: str = "default", **fields: object) -> dict[str, Tensor]:
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(llama_folder), config(**fields), adapter_name=name, seed=seed
        )
        return {key: p.detach() for key, p in model.adapter_parameters(name).items()}

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = make(7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = make(7), make(8)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    # The same module starts the same, whatever else is adapted.
    wide = make(7, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert all(torch.equal(first[key], wide[key]) for key in first)
    assert not torch.equal(*(next(iter(make(None, name).values())) for name in ("a", "b")))


def test_adapters_of_other_ranks_and_targets_live_on_one_base_and_switch_back_exactly(llama, tokens, logits) -> None:
    base = logits(llama, tokens)
    model = get_peft_model(llama, config())
    first = logits(model, tokens)
    model.add_adapter("wide", config(r=9, target_modules="all-linear"))
    assert torch.equal(logits(model, tokens), first)
    model.set_adapter("wide")
    wide = logits(model, tokens)
    assert not torch.allclose(wide, first)
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), base)
    assert torch.equal(logits(model, tokens), first)


def test_disable_comes_back_when_an_exception_passes_through(llama, tokens, logits) -> None:
    model = get_peft_model(llama, config())
    first = logits(model, tokens)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model, tokens), first)


def test_a_forward_that_fails_leaves_no_route_behind(llama, tokens, logits) -> None:
    model = get_peft_model(llama, config())
    model.add_adapter("b", config())
    first = logits(model, tokens)
    with pytest.raises(AdapterError, match="2 names for a batch of 3 rows"):
        model(tokens, adapter_names=["default", "b"])
    assert torch.equal(logits(model, tokens), first)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize("name", ["default", "__base__"])
def test_names_that_are_all_equal_are_counted_too(llama, tokens, logits, name: str, count: int) -> None:
    model = get_peft_model(llama, config())
    if count == 1:  # as for names that differ, each row has some consecutive places in the batch
        assert logits(model, tokens, adapter_names=[name]).shape[0] == 3
        return
    for call in (model, model.generate):
        with pytest.raises(AdapterError, match=f"adapter_names: {count} names for a batch of 3 rows"):
            call(input_ids=tokens, adapter_names=[name] * count)
        with pytest.raises(AdapterError, match=f"adapter_names: {count} names for a batch of 3 rows"):
            call(tokens, adapter_names=[name] * count)
    with pytest.raises(AdapterError, match=f"adapter_names: {count} names for a batch of 1 row;"):
        model(tokens[:1], adapter_names=[name] * count)


def test_what_is_broadcast_over_the_batch_is_not_counted(llama, tokens, logits) -> None:
    model = get_peft_model(llama, config())
    places = torch.arange(7)[None]
    names = ["default"] * 3
    found = logits(model, tokens, position_ids=places, adapter_names=names)
    assert torch.equal(found, logits(model, tokens, position_ids=places))


@pytest.mark.parametrize("order", [["a", "a", "b"], ["b", "a", "b"], ["__base__", "b", "a"]])
def test_each_row_of_a_mixed_batch_is_as_if_alone(llama, tokens, logits, order: list[str]) -> None:
    model = get_peft_model(llama, config(), adapter_name="a")
    model.add_adapter("b", config(r=2, target_modules=["embed_tokens", "o_proj", "down_proj"]))
    mixed = logits(model, tokens, adapter_names=order)
    for row, name in enumerate(order):
        alone = logits(model, tokens[row : row + 1], adapter_names=[name])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_disabled_wins_over_the_adapters_of_rows(llama, tokens, logits) -> None:
    base = logits(llama, tokens)
    model = get_peft_model(llama, config(bias="all", modules_to_save=["lm_head"]))
    model.add_adapter("b", config())
    names = ["b", "default", "__base__", "b"][: len(tokens)]
    routed = model(input_ids=tokens, adapter_names=names).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens, adapter_names=names).logits, base)
    assert torch.equal(model(input_ids=tokens, adapter_names=names).logits, routed)
    assert not torch.allclose(routed, base)


class Named(nn.Module):
    """A model whose own attributes have names that loraloom uses inside."""

    router, enabled, routed, saved_modules, thaw, tensors_of, _saved, _active = "r", "e", "d", "s", "t", "o", "v", "a"

    def __init__(self) -> None:
        super().__init__()
        self.layers = self._layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def test_no_attribute_of_the_base_is_hidden(llama) -> None:
    names = [name for name in vars(Named) if not name.startswith("__") and name != "forward"]
    made = get_peft_model(Named(), LoraConfig(target_modules=["0"]))
    for name in [*names, "layers", "_layers"]:
        assert getattr(made, name) is getattr(made.get_base_model(), name), name
    for name in ("layers", "router", "enabled", "routed", "saved_modules"):
        assert getattr(made.base_model, name) is getattr(made.get_base_model(), name), name
    assert get_peft_model(llama.model, config()).layers[0] is llama.model.layers[0]
    assert not hasattr(get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])), "layers")
    assert made.prefix == made.base_model.prefix == "lora_"


def test_a_slot_that_is_nan_leaves_the_other_rows_bit_identical(llama, tokens, logits) -> None:
    model = get_peft_model(llama, config(), adapter_name="a")
    model.add_adapter("b", config())
    names = ["a", "b", "a"]
    before = logits(model, tokens, adapter_names=names)
    for p in model.adapter_parameters("b").values():
        p.data.fill_(torch.nan)
    after = logits(model, tokens, adapter_names=names)
    assert torch.isnan(after[1]).all()
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_active_adapters_add_up(llama, tokens, logits) -> None:
    model = get_peft_model(llama, config(target_modules=["lm_head"]), adapter_name="a")
    with model.disable_adapter():
        base = logits(model, tokens)
    model.add_adapter("b", config(target_modules=["lm_head"], r=2))
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = logits(model, tokens) - base
    model.set_adapter(["a", "b"])
    torch.testing.assert_close(logits(model, tokens) - base, alone["a"] + alone["b"], rtol=1e-4, atol=1e-5)
    assert model.active_adapters == ["a", "b"]


def test_activation_and_requires_grad_are_apart(llama) -> None:
    model = get_peft_model(llama, config(), adapter_name="a")
    model.add_adapter("b", config())
    model.set_requires_grad("a", False)
    model.set_adapter("b")
    model.set_adapter("a")
    assert not any(p.requires_grad for p in model.adapter_parameters("a").values())
    assert all(p.requires_grad for p in model.adapter_parameters("b").values())


def test_only_the_rows_adapter_gets_gradients(llama, tokens) -> None:
    model = get_peft_model(llama, config(), adapter_name="a")
    model.add_adapter("b", config())
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.adapter_parameters("a").values())
    assert all(p.grad is None for p in model.adapter_parameters("b").values())
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("training", [True, False])
def test_train_and_eval_are_never_changed(llama, tmp_path: Path, training: bool) -> None:
    llama.train(training)
    model = get_peft_model(llama, config(lora_dropout=0.5))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    with model.disable_adapter():
        pass
    model.delete_adapter("again")
    assert {module.training for module in model.modules()} == {training}


def test_deleting_an_adapter_gives_untouched_layers_back(llama) -> None:
    model = get_peft_model(llama, config(), adapter_name="a")
    model.add_adapter("b", config(target_modules=["up_proj"], bias="none"))
    assert "up_proj" in "".join(model.base_model.lora_layers)
    model.delete_adapter("b")
    assert all("up_proj" not in name for name in model.base_model.lora_layers)
    assert type(model.get_base_model().model.layers[0].mlp.up_proj) is nn.Linear
    with pytest.raises(AdapterError, match="adapter 'b' does not exist"):
        model.set_adapter("b")


def test_deleting_the_active_adapter_activates_the_first_that_remains_and_warns(llama) -> None:
    model = get_peft_model(llama, config(), adapter_name="a")
    model.add_adapter("b", config())
    with pytest.warns(UserWarning, match="'b' is active now"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"]


def test_unload_restores_the_model_to_the_bit(llama, tokens, logits) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    types = [type(module) for module in llama.modules()]
    model = get_peft_model(llama, config(bias="all", modules_to_save=["lm_head"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    plain = model.unload()
    assert plain is llama
    after = plain.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [type(module) for module in plain.modules()] == types
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "__base__", "keys", 3])
def test_a_name_that_cannot_be_one_is_refused(llama, name: object) -> None:
    with pytest.raises(AdapterError, match="adapter_name"):
        get_peft_model(llama, config(), adapter_name=name)


def test_a_name_that_is_taken_is_refused(llama) -> None:
    with pytest.raises(AdapterError, match="'default' exists already"):
        get_peft_model(llama, config()).add_adapter("default", config())


def test_a_double_wrap_is_refused(llama) -> None:
    model = get_peft_model(llama, config())
    with pytest.raises(ConfigError, match="add_adapter"):
        get_peft_model(model, config())
    with pytest.raises(ConfigError, match="carries adapters already"):
        get_peft_model(llama, config())


def test_a_config_that_fits_nothing_leaves_the_model_as_it_was(llama) -> None:
    with pytest.raises(TargetError):
        get_peft_model(llama, config(target_modules=["q_prj"]))
    assert all(p.requires_grad for p in llama.parameters())
    assert isinstance(get_peft_model(llama, config()), PeftModel)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", [
    "loraloom.lora.layer.LoraLayer.add_slot", "loraloom.lora.layer.Factor.__init__",
    "loraloom.lora.modules_to_save.ModulesToSaveWrapper.new_copy", "loraloom.lora.biases.Biases.add",
])  # fmt: skip
def test_an_adapter_whose_adding_is_cut_off_leaves_nothing(llama, tokens, logits, monkeypatch, stop, where) -> None:
    before, names = logits(llama, tokens), [name for name, _ in llama.named_modules()]
    full = config(bias="all", modules_to_save=["lm_head"])
    cls, _, method = where.rpartition(".")
    owner = getattr(importlib.import_module(cls.rpartition(".")[0]), cls.rpartition(".")[2])
    real, calls = getattr(owner, method), []

    def cut_off(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) > (2 if method in ("add_slot", "__init__") else 0):
            raise stop
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(stop):
        patch.setattr(owner, method, cut_off)
        get_peft_model(llama, full)
    assert [name for name, _ in llama.named_modules()] == names
    assert all(p.requires_grad for p in llama.parameters())
    assert torch.equal(logits(llama, tokens), before)
    model = get_peft_model(llama, full)
    held = [(name, id(p)) for name, p in model.named_parameters()]
    calls.clear()
    with monkeypatch.context() as patch, pytest.raises(stop):
        patch.setattr(owner, method, cut_off)
        model.add_adapter("second", config(bias="all", modules_to_save=["lm_head"], target_modules="all-linear"))
    assert [(name, id(p)) for name, p in model.named_parameters()] == held
    assert list(model.peft_config) == ["default"]


def test_the_config_of_no_active_adapter_is_an_error_with_words(llama) -> None:
    model = get_peft_model(llama, config())
    assert model.active_peft_config is model.peft_config["default"]
    model.set_adapter([])
    with pytest.raises(AdapterError, match="active_peft_config: no adapter is active; call set_adapter first"):
        model.active_peft_config  # noqa: B018


# -- what PEFT takes ---------------------------------------------------------------------------------------------------
def test_pefts_options_that_change_nothing_here_are_taken(llama, tmp_path: Path) -> None:
    model = get_peft_model(llama, config(), "default", False, True, "v2", True)
    assert model.peft_config["default"].revision == "v2"
    model.add_adapter("b", config(), low_cpu_mem_usage=True)
    model.save_pretrained(tmp_path)
    plain = model.unload()
    options = {"torch_device": "cpu", "low_cpu_mem_usage": True, "ephemeral_gpu_offload": False, "token": None}
    again = PeftModel.from_pretrained(plain, tmp_path, key_mapping=None, **options)
    again.load_adapter(tmp_path, "b", subfolder="b", key_mapping={}, revision=None, **options)
    assert again.peft_config["default"].revision == "v2"
    # What examples write near it, and accelerate's way to save.
    more = {"device_map": "auto", "torch_dtype": torch.bfloat16, "dtype": "auto", "offload_folder": "x",
            "offload_dir": "x", "max_memory": {}, "use_safetensors": True, "trust_remote_code": True}  # fmt: skip
    third = PeftModel.from_pretrained(again.unload(), tmp_path, **more)
    third.load_adapter(tmp_path / "b", "b", device_map={"": "cpu"})
    third.save_pretrained(tmp_path / "c", True, None, False, save_function=torch.save, max_shard_size="5GB", token=None,
                          push_to_hub=False, state_dict=third.state_dict())  # fmt: skip
    assert (tmp_path / "c" / "b" / "adapter_model.safetensors").is_file()
    state = get_peft_model_state_dict(torch.compile(third, backend="eager"), None, "b", unwrap_compiled=True)
    set_peft_model_state_dict(third, peft_model_state_dict=state, adapter_name="b", ignore_mismatched_sizes=False,
                              low_cpu_mem_usage=True)  # fmt: skip
    assert get_peft_model_state_dict(third, "b").keys() == state.keys()
    assert PeftModel(third.unload(), config(), "mine").active_adapter == "mine"


def test_the_state_dict_is_found_through_wrappers(llama) -> None:
    model = get_peft_model(llama, config())
    outer = torch.nn.Module()
    outer.module = torch.compile(model, backend="eager")
    assert get_peft_model_state_dict(outer).keys() == get_peft_model_state_dict(model).keys()
    set_peft_model_state_dict(outer, {key: value * 0 for key, value in get_peft_model_state_dict(model).items()})
    assert not any(value.any() for value in get_peft_model_state_dict(model).values())
    with pytest.raises(ConfigError, match="model: No adapter layers found in the model, a Linear"):
        get_peft_model_state_dict(nn.Linear(2, 2))


def test_merging_what_is_merged_is_a_warning(llama, tokens, logits) -> None:
    model = get_peft_model(llama, config())
    model.merge_adapter()
    before = logits(model, tokens)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do: 'default'"):
        model.merge_adapter()
    assert torch.equal(logits(model, tokens), before)
    layer = next(iter(model.base_model.lora_layers.values()))
    assert (layer.merged_adapters, layer.in_features, layer.out_features) == (["default"], 64, 64)


@pytest.mark.parametrize(("option", "words"), [
    ({"push_to_hub": True}, "push_to_hub: loraloom opens no connection"),
    ({"save_functoin": print}, "save_functoin: loraloom has no such option; did you mean 'save_function'"),
    ({"path_initial_model_for_weight_conversion": "x"}, "nothing to convert"),
    ({"safe_serialization": False}, "writes no pickle"),
])  # fmt: skip
def test_options_of_saving_that_would_mean_something_are_errors(llama, tmp_path, option, words) -> None:
    with pytest.raises(ConfigError, match=words):
        get_peft_model(llama, config()).save_pretrained(tmp_path / "x", **option)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("ephemeral_gpu_offload", True, "only DoRA uses it"),
        ("revision", "v2", "chooses among files of a hub"),
        ("ignore_mismatched_sizes", True, "cannot be used"),
        ("key_maping", {}, "no such option; did you mean 'key_mapping'"),
    ],
)
def test_pefts_options_that_cannot_be_honoured_are_errors_with_words(
    llama, tmp_path: Path, option: str, value: object, words: str
) -> None:
    model = get_peft_model(llama, config())
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"^{option}: .*{words}"):
        model.load_adapter(tmp_path, "b", **{option: value})
    plain = model.unload()
    with pytest.raises(ConfigError, match=f"^{option}: .*{words}"):
        PeftModel.from_pretrained(plain, tmp_path, **{option: value})
    with pytest.raises(ConfigError, match="^mixed: "):
        get_peft_model(plain, config(), mixed=True)
    with pytest.raises(ConfigError, match="^revision: the config says 'a', found 'b'"):
        get_peft_model(plain, config(revision="a"), revision="b")
    assert all(p.requires_grad for p in plain.parameters())


def test_a_config_of_peft_is_refused_with_the_way_to_make_one_of_ours(llama) -> None:
    import peft

    theirs = peft.LoraConfig(r=4, target_modules=["q_proj"])
    for call in (lambda: get_peft_model(llama, theirs), lambda: get_peft_model(llama, theirs, revision="a")):
        with pytest.raises(ConfigError, match=r"peft's LoraConfig; LoraConfig\.from_dict\(theirs\.to_dict\(\)\)"):
            call()
    model = get_peft_model(llama, LoraConfig.from_dict(theirs.to_dict()))
    assert model.peft_config["default"].r == 4
    with pytest.raises(ConfigError, match="must be a loraloom.LoraConfig, found dict"):
        model.add_adapter("b", {"r": 4})


def test_print_shows_the_factors_with_rank_and_shape(llama) -> None:
    text = str(get_peft_model(llama, config(r=3)))
    assert "lora_A" in text
    assert "lora_B" in text
    assert "r=3" in text
    assert "shape=(3, 64)" in text


def test_the_trainable_parameters_line_is_pefts(llama_folder, capsys) -> None:
    import peft
    from transformers import LlamaForCausalLM

    mine = get_peft_model(LlamaForCausalLM.from_pretrained(llama_folder), config())
    mine.print_trainable_parameters()
    ours = capsys.readouterr().out
    theirs = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(llama_folder), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    theirs.print_trainable_parameters()
    assert ours == capsys.readouterr().out


def test_it_works_on_any_module_and_shows_no_warning() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(net, LoraConfig(target_modules=["0"], modules_to_save=["2"], r=2))
        out = model(torch.randn(5, 4))
    out.sum().backward()
    assert out.shape == (5, 2)
    assert {key for key, p in model.adapter_parameters("default").items() if p.grad is not None} == {
        "base_model.model.0.lora_A.weight",
        "base_model.model.0.lora_B.weight",
        "base_model.model.2.weight",
        "base_model.model.2.bias",
    }
