"""The adapter folder: what is saved comes back to the bit, and what does not fit changes nothing and is named."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loraloom import (
    LoraConfig,
    LoraloomError,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from loraloom.errors import AdapterError, ConfigError, SaveError
from loraloom.lora.keys import LoadReport

WEIGHTS = "adapter_model.safetensors"
Q, V = (f"base_model.model.model.layers.0.self_attn.{name}_proj" for name in "qv")
Change = Callable[[dict[str, Tensor]], object]


def config(**fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **fields})


def llama_of(folder: Path, **options: object) -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture
def saved(llama, tmp_path: Path) -> Path:
    """A folder with one adapter."""
    get_peft_model(llama, config()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def fresh(llama_folder: Path) -> nn.Module:
    """A base as it comes from disk, one part of it frozen by its owner."""
    model = llama_of(llama_folder)
    model.model.norm.requires_grad_(False)
    return model


def change(folder: Path, work: Change) -> Path:
    tensors = load_file(folder / WEIGHTS)
    work(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def rename(old: str, new: str) -> Change:
    def work(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return work


def poke(key: str, value: float) -> Change:
    return lambda tensors: tensors[key].view(-1)[3:4].fill_(value)


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that a failed load must leave alone."""
    return {
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "modes": [module.training for module in model.modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "bytes": [p.detach().clone().flatten().tolist() for p in model.parameters()],
    }


# -- save and load ----------------------------------------------------------------------------------------------------
SHAPES = {
    "plain": {},
    "all-linear, rslora": {"target_modules": "all-linear", "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "biases and a module": {"bias": "all", "modules_to_save": ["lm_head", "norm"]},
    "patterns": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {r"layers\.1.*": 3}},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_what_was_saved_gives_bit_identical_logits(llama_folder, tokens, logits, tmp_path, fields, dtype) -> None:
    model = get_peft_model(llama_of(llama_folder, dtype=dtype), config(**fields))
    with torch.no_grad():
        for parameter in model.adapter_parameters("default").values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) / 10)
    wanted = logits(model, tokens)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama_of(llama_folder, dtype=dtype), tmp_path)
    assert torch.equal(logits(again, tokens), wanted)
    with again.disable_adapter():
        assert not torch.allclose(logits(again, tokens), wanted, atol=1e-3)
    report = again.load_report
    assert report.used == sorted(get_peft_model_state_dict(model))
    assert (report.missing, report.unexpected, report.dtypes, report.renamed, report.repeated) == ([], [], {}, {}, [])
    assert str(report) == f"{len(report.used)} tensors used"


def test_an_adapter_lies_in_two_files_with_pefts_keys(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["adapter_config.json", WEIGHTS]
    with safe_open(saved / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        keys = list(file.keys())
    assert f"{Q}.lora_A.weight" in keys
    assert len(keys) == 8
    values = json.loads((saved / "adapter_config.json").read_text())
    assert list(values) == sorted(values)
    assert values["inference_mode"] is True


def test_saving_does_not_change_the_adapter_that_goes_on_training(llama, tmp_path) -> None:
    model = get_peft_model(llama, config())
    before = copy.deepcopy(model.peft_config)
    model.save_pretrained(tmp_path)
    assert model.peft_config == before
    assert all(p.requires_grad for p in model.adapter_parameters("default").values())


ONE_ADAPTER = """
import sys
import torch
from loraloom import LoraConfig, get_peft_model
net = torch.nn.Sequential()
for name in ("query", "value", "output", "score", "other"):
    net.add_module(name, torch.nn.Linear(4, 4))
config = LoraConfig(target_modules={"query", "value", "output"}, modules_to_save={"score", "other"}, r=2,
                    rank_pattern={"value": 3, "query": 1}, alpha_pattern={"output": 2.5}, init_lora_weights=False)
with torch.no_grad():
    for p in net.parameters():
        p.fill_(1)
get_peft_model(net, config).save_pretrained(sys.argv[1])
"""


def test_the_same_adapter_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    folders = [tmp_path / seed for seed in ("0", "1", "31")]
    runs = [
        subprocess.Popen([sys.executable, "-c", ONE_ADAPTER, str(folder)], env={"PYTHONHASHSEED": folder.name})
        for folder in folders
    ]
    assert [run.wait() for run in runs] == [0, 0, 0]
    for name in (WEIGHTS, "adapter_config.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


def test_saving_what_was_loaded_gives_the_same_bytes(saved, fresh, tmp_path) -> None:
    PeftModel.from_pretrained(fresh, saved).save_pretrained(tmp_path / "again")
    for name in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_several_adapters_lie_in_folders_of_their_names(llama, llama_folder, tokens, logits, tmp_path) -> None:
    model = get_peft_model(llama, config())
    model.add_adapter("wide", config(r=6, target_modules=["o_proj"]))
    model.add_adapter("third", config(r=1))
    wanted = {}
    for name in ("default", "wide", "third"):
        model.set_adapter(name)
        wanted[name] = logits(model, tokens)
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "some", selected_adapters=["wide"])
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.safetensors"))
    assert names == [f"all/{WEIGHTS}", f"all/third/{WEIGHTS}", f"all/wide/{WEIGHTS}", f"some/wide/{WEIGHTS}"]

    again = PeftModel.from_pretrained(llama_of(llama_folder), tmp_path / "all")
    again.load_adapter(tmp_path / "all" / "wide", "wide")
    again.load_adapter(tmp_path / "all" / "third", "renamed")
    assert again.active_adapters == ["default"]
    for name, found in (("default", "default"), ("wide", "wide"), ("third", "renamed")):
        again.set_adapter(found)
        assert torch.equal(logits(again, tokens), wanted[name])


def test_an_adapter_that_does_not_exist_cannot_be_saved_and_leaves_the_folder_alone(fresh, saved) -> None:
    model = get_peft_model(fresh, config(), adapter_name="a")
    before = (saved / WEIGHTS).read_bytes()
    with pytest.raises(LoraloomError, match="'b' does not exist"):
        model.save_pretrained(saved, selected_adapters=["a", "b"])
    assert (saved / WEIGHTS).read_bytes() == before
    assert not (saved / "a").exists()


def test_a_pickle_is_not_written(llama, tmp_path) -> None:
    with pytest.raises(ConfigError, match="safe_serialization"):
        get_peft_model(llama, config()).save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_of_save_is_named(llama, tmp_path) -> None:
    with pytest.raises(ConfigError, match="selected_adapter: loraloom has no such option"):
        get_peft_model(llama, config()).save_pretrained(tmp_path, selected_adapter=["default"])


def test_another_process_writes_nothing(llama, tmp_path) -> None:
    get_peft_model(llama, config()).save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_a_save_error(llama, tmp_path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(SaveError, match="taken"):
        get_peft_model(llama, config()).save_pretrained(tmp_path / "taken")


def test_an_adapter_whose_save_was_cut_off_is_finished_when_it_is_read(llama, fresh, tokens, logits, tmp_path) -> None:
    model = get_peft_model(llama, config())
    model.save_pretrained(tmp_path)
    old = (tmp_path / WEIGHTS).read_bytes()
    with torch.no_grad():
        for parameter in model.adapter_parameters("default").values():
            parameter.mul_(3)
    model.save_pretrained(tmp_path)
    # As a crash right after the journal's rename leaves it.
    (tmp_path / WEIGHTS).rename(tmp_path / f".{WEIGHTS}.0123abcd")
    (tmp_path / WEIGHTS).write_bytes(old)
    (tmp_path / ".loraloom-commit.json").write_text(json.dumps({f".{WEIGHTS}.0123abcd": WEIGHTS}))
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path), tokens), logits(model, tokens))


# -- no pickle, no network --------------------------------------------------------------------------------------------
def test_neither_pickle_nor_network_is_touched_by_save_and_load(llama, fresh, tokens, logits, tmp_path, monkeypatch):
    model = get_peft_model(llama, config(bias="all", modules_to_save=["lm_head"]))
    wanted = logits(model, tokens)

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle or network")

    class Forbidden:
        def __init__(self, *args: object, **kwargs: object) -> None:
            forbidden()

    for name in ("Unpickler", "Pickler", "load", "loads", "dump", "dumps"):
        monkeypatch.setattr(pickle, name, Forbidden if name[0].isupper() else forbidden)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, forbidden)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, forbidden)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, forbidden)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True)
    again.load_adapter(tmp_path, "second")
    assert torch.equal(logits(again, tokens), wanted)


def test_a_name_on_a_hub_is_not_fetched_and_the_message_says_how_to(fresh) -> None:
    before = snapshot(fresh)
    with pytest.raises(AdapterError, match=r"someone/adapter: no such folder.*from disk alone.*hf download"):
        PeftModel.from_pretrained(fresh, "someone/adapter")
    assert snapshot(fresh) == before


def test_a_pickled_adapter_is_refused_with_the_reason_and_the_way_out(saved, fresh) -> None:
    torch.save(load_file(saved / WEIGHTS), saved / "adapter_model.bin")
    (saved / WEIGHTS).unlink()
    before = snapshot(fresh)
    with pytest.raises(
        AdapterError, match=r"adapter_model\.bin: .*can run code.*weights_only=True.*save_file"
    ) as caught:
        PeftModel.from_pretrained(fresh, saved)
    assert caught.value.exit_code == 2
    assert snapshot(fresh) == before
    # The message's own words work.
    save_file(torch.load(saved / "adapter_model.bin", weights_only=True), saved / WEIGHTS)
    assert PeftModel.from_pretrained(fresh, saved).load_report.missing == []


# -- what does not fit ------------------------------------------------------------------------------------------------
def drop(key: str) -> Change:
    return lambda tensors: tensors.pop(key)


def put(key: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({key: tensor})


A, B = f"{Q}.lora_A.weight", f"{V}.lora_B.weight"
WRONG = {
    "missing": (drop(B), rf"1 tensor is missing, such as {B}\. Is it for another base\?"),
    "all of a module missing": (
        lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(V)],
        rf"2 tensors are missing, such as {V}\.lora_A\.weight",
    ),
    "unexpected": (
        put(A.replace("q_proj", "k_proj"), torch.ones(4, 64)),
        r"1 is unexpected, such as base_model.*k_proj\.lora_A\.weight; did you mean '[^']*'\? Is it for another base\?",
    ),
    "another prefix": (rename("model.layers", "model.blocks"), r"missing.*unexpected|no tensor"),
    "wrong rank": (put(A, torch.ones(5, 64)), rf"{A} has shape \(5, 64\) and the model needs \(4, 64\)"),
    "wrong width": (put(A, torch.ones(4, 63)), rf"{A} has shape \(4, 63\) and the model needs \(4, 64\)"),
    "transposed": (lambda t: t.update({B: t[B].T.contiguous()}), rf"{B} has shape \(4, 32\)"),
    "a number": (put(A, torch.ones(())), rf"{A} has shape \(\)"),
    "NaN": (poke(A, torch.nan), rf"{A} holds values that are not finite"),
    "infinite": (poke(B, torch.inf), rf"{B} holds values that are not finite"),
    "infinities that cancel": (
        lambda t: (poke(A, torch.inf)(t), poke(B, -torch.inf)(t)),
        rf"{A} holds values that are not finite \(and 1 more\)",
    ),
    "empty": (lambda tensors: tensors.clear(), "8 tensors are missing"),
}


@pytest.mark.parametrize(("work", "message"), WRONG.values(), ids=WRONG)
def test_a_tensor_that_does_not_fit_is_named_and_changes_nothing(saved, fresh, tokens, logits, work, message) -> None:
    change(saved, work)
    before, wanted = snapshot(fresh), logits(fresh, tokens)
    with pytest.raises(AdapterError, match=message) as caught:
        PeftModel.from_pretrained(fresh, saved)
    assert str(saved) in str(caught.value)
    assert caught.value.exit_code == 2
    assert snapshot(fresh) == before
    assert torch.equal(logits(fresh, tokens), wanted)


@pytest.mark.parametrize(("work", "message"), WRONG.values(), ids=WRONG)
def test_a_failed_load_leaves_the_adapters_that_were_there(saved, fresh, tokens, logits, work, message) -> None:
    model = get_peft_model(fresh, config(r=2), adapter_name="mine")
    before, wanted = snapshot(model), logits(model, tokens)
    change(saved, work)
    with pytest.raises(AdapterError, match=message):
        model.load_adapter(saved, "theirs")
    assert snapshot(model) == before
    assert list(model.peft_config) == ["mine"]
    assert model.active_adapters == ["mine"]
    assert torch.equal(logits(model, tokens), wanted)


def damage(folder: Path, data: Callable[[bytes], bytes]) -> None:
    (folder / WEIGHTS).write_bytes(data((folder / WEIGHTS).read_bytes()))


@pytest.mark.parametrize(
    "data",
    [
        lambda d: d[:-1],
        lambda d: d[: len(d) // 2],
        lambda d: d[:20],
        lambda d: d[:4],
        lambda d: b"",
        lambda d: b"\xff" * len(d),
        lambda d: b"PK\x03\x04" + d,
        lambda d: d + b"more",
    ],
    ids=["a byte short", "half", "header cut", "four bytes", "empty", "garbage", "a zip", "too long"],
)
def test_a_file_that_is_cut_off_or_garbage_is_named_and_changes_nothing(saved, fresh, data) -> None:
    damage(saved, data)
    before = snapshot(fresh)
    with pytest.raises(AdapterError, match=rf"{WEIGHTS}: cut off or damaged"):
        PeftModel.from_pretrained(fresh, saved)
    assert snapshot(fresh) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"peft_type": "LORA", "target_modules": ["q_proj"], "rr": 3}', "rr: LoraConfig has no such field"),
        ('{"peft_type": "LORA", "target_modules": ["q_proj"], "use_dora": true}', "use_dora: not implemented"),
        ('{"peft_type": "IA3"}', "loraloom reads LORA adapters"),
        (None, "cannot be read"),
    ],
)
def test_a_config_that_cannot_be_used_is_named_and_changes_nothing(saved, fresh, text, message) -> None:
    file = saved / "adapter_config.json"
    file.unlink() if text is None else file.write_text(text)
    before = snapshot(fresh)
    with pytest.raises(ConfigError, match=rf"adapter_config\.json.*{message}"):
        PeftModel.from_pretrained(fresh, saved)
    assert snapshot(fresh) == before


def test_a_folder_without_an_adapter_names_those_below_it(llama, fresh, tmp_path) -> None:
    model = get_peft_model(llama, config(), adapter_name="a")
    model.add_adapter("b", config())
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=rf"holds no {WEIGHTS}; there are adapters below it: a, b"):
        PeftModel.from_pretrained(fresh, tmp_path)


def test_an_adapter_of_a_wider_base_is_refused_and_changes_nothing(saved) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(
        LlamaConfig(hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    )
    before = snapshot(wide)
    with pytest.raises(AdapterError, match=r"\(4, 64\) and the model needs \(4, 96\) \(and \d more\)\. .*another base"):
        PeftModel.from_pretrained(wide, saved)
    assert snapshot(wide) == before


def test_an_adapter_of_a_deeper_base_is_refused_and_changes_nothing(saved, llama_folder) -> None:
    short = llama_of(llama_folder, num_hidden_layers=1)
    before = snapshot(short)
    with pytest.raises(AdapterError, match=r"fit only in part.*4 are unexpected, such as .*layers\.1\."):
        PeftModel.from_pretrained(short, saved)
    assert snapshot(short) == before


def test_a_number_too_large_for_the_models_dtype_is_not_finite(saved, llama_folder) -> None:
    change(saved, poke(A, 1e30))
    half = llama_of(llama_folder, dtype=torch.float16)
    before = snapshot(half)
    with pytest.raises(AdapterError, match=rf"{A} holds values that are not finite in float16"):
        PeftModel.from_pretrained(half, saved, autocast_adapter_dtype=False)
    assert snapshot(half) == before


EMBEDDINGS = "base_model.model.model.embed_tokens.weight"


def test_embeddings_of_the_base_in_the_file_are_put_into_the_base_and_reported(saved, fresh) -> None:
    table = torch.randn(100, 64, generator=torch.Generator().manual_seed(4))
    change(saved, put(EMBEDDINGS, table))
    model = PeftModel.from_pretrained(fresh, saved)
    assert model.load_report.base_replaced == [EMBEDDINGS]
    assert EMBEDDINGS in model.load_report.used
    assert torch.equal(fresh.model.embed_tokens.weight, table)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.ones(101, 64), r"\(101, 64\), this base has \(100, 64\); .*resize_token_embeddings\(101\)"),
        (torch.full((100, 64), torch.nan), "embed_tokens.weight holds values that are not finite"),
        (torch.full((100, 64), torch.inf), "embed_tokens.weight holds values that are not finite"),
    ],
    ids=["resized", "NaN", "infinite"],
)
def test_embeddings_that_do_not_fit_the_base_change_nothing(saved, fresh, table: Tensor, message: str) -> None:
    change(saved, put(EMBEDDINGS, table))
    before = snapshot(fresh)
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(fresh, saved)
    assert snapshot(fresh) == before


def test_two_names_for_one_tensor_are_an_error_that_names_both(saved, fresh) -> None:
    short = A.removeprefix("base_model.model.")
    change(saved, put(short, torch.ones(4, 64)))
    with pytest.raises(AdapterError, match=rf"{short}.*{A}|{A}.*{short}"):
        PeftModel.from_pretrained(fresh, saved)


def test_a_large_sum_of_finite_numbers_is_no_error(saved, fresh) -> None:
    change(saved, lambda tensors: tensors[A].fill_(3e38))
    assert PeftModel.from_pretrained(fresh, saved).load_report.missing == []


def test_after_a_failed_load_the_right_adapter_loads(saved, fresh, tokens, logits, tmp_path) -> None:
    good = load_file(saved / WEIGHTS)
    change(saved, drop(B))
    model = PeftModel(fresh)
    with pytest.raises(AdapterError):
        model.load_adapter(saved, "a")
    save_file(good, saved / WEIGHTS)
    model.load_adapter(saved, "a")
    model.set_adapter("a")
    assert {key: t.tolist() for key, t in get_peft_model_state_dict(model, "a").items()} == {
        key: t.tolist() for key, t in good.items()
    }


# -- strict=False -----------------------------------------------------------------------------------------------------
def test_not_strict_loads_what_fits_and_the_report_tells_the_rest(saved, fresh, tmp_path) -> None:
    stray = A.replace("q_proj", "k_proj")
    change(saved, lambda tensors: (tensors.pop(B), tensors.update({stray: torch.ones(4, 64)})))
    model = PeftModel.from_pretrained(fresh, saved, strict=False)
    report = model.load_report
    assert isinstance(report, LoadReport)
    assert report.missing == report.missing_keys == [B]
    assert report.unexpected == report.unexpected_keys == [stray]
    assert len(report.used) == 7
    assert str(report) == "7 tensors used, 1 missing, 1 unexpected"
    found, wanted = get_peft_model_state_dict(model), load_file(saved / WEIGHTS)
    assert all(torch.equal(found[key], wanted[key]) for key in report.used)
    assert torch.isfinite(found[B]).all()


def test_what_a_file_lacks_starts_as_a_new_adapter_would(saved, fresh, llama_folder) -> None:
    change(saved, drop(B))
    found = get_peft_model_state_dict(PeftModel.from_pretrained(fresh, saved, strict=False))
    new = get_peft_model_state_dict(get_peft_model(llama_of(llama_folder), LoraConfig.from_pretrained(saved)))
    assert torch.equal(found[B], new[B])


@pytest.mark.parametrize("name", ["wrong rank", "NaN"])
def test_not_strict_still_refuses_wrong_shapes_and_numbers(saved, fresh, name: str) -> None:
    work, message = WRONG[name]
    change(saved, work)
    before = snapshot(fresh)
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(fresh, saved, strict=False)
    assert snapshot(fresh) == before


def test_not_strict_still_refuses_a_file_of_which_nothing_fits(saved, fresh) -> None:
    change(saved, rename("layers", "blocks"))
    before = snapshot(fresh)
    with pytest.raises(AdapterError, match="no tensor of the adapter fits"):
        PeftModel.from_pretrained(fresh, saved, strict=False)
    assert snapshot(fresh) == before


# -- dtypes and names -------------------------------------------------------------------------------------------------
def test_a_change_of_dtype_is_reported(saved, fresh) -> None:
    change(saved, lambda tensors: tensors.update({A: tensors[A].bfloat16()}))
    model = PeftModel.from_pretrained(fresh, saved)
    assert model.load_report.dtypes == {A: ("bfloat16", "float32")}
    assert str(model.load_report) == "8 tensors used, 1 converted to another dtype"
    assert torch.equal(get_peft_model_state_dict(model)[A], load_file(saved / WEIGHTS)[A].float())


@pytest.mark.parametrize("autocast", [True, False])
def test_on_a_half_precision_base_factors_are_float32_unless_asked_otherwise(
    saved, llama_folder, tokens, logits, autocast: bool
) -> None:
    model = PeftModel.from_pretrained(
        llama_of(llama_folder, dtype=torch.bfloat16), saved, autocast_adapter_dtype=autocast
    )
    wanted = torch.float32 if autocast else torch.bfloat16
    assert {t.dtype for t in get_peft_model_state_dict(model).values()} == {wanted}
    assert model.load_report.dtypes == ({} if autocast else dict.fromkeys(WANTED, ("float32", "bfloat16")))
    full = logits(PeftModel.from_pretrained(llama_of(llama_folder), saved), tokens)
    assert logits(model, tokens).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model, tokens).float(), full, rtol=0.1, atol=0.05)


WANTED = [
    f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_{factor}.weight"
    for layer in range(2)
    for name in "qv"
    for factor in "AB"
]
OTHER_TOOLS = {
    "no prefix": rename("base_model.model.", ""),
    "torch.compile": rename("base_model.model.", "base_model.model._orig_mod."),
    "torch.compile outside": rename("base_model.model.", "_orig_mod.base_model.model."),
    "FSDP": rename("self_attn.", "_fsdp_wrapped_module.self_attn._fsdp_wrapped_module."),
    "checkpointing": rename("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    "all of them": rename("base_model.model.model.", "_orig_mod.model._fsdp_wrapped_module."),
}


@pytest.mark.parametrize("work", OTHER_TOOLS.values(), ids=OTHER_TOOLS)
def test_keys_of_other_tools_load_and_the_report_tells(saved, fresh, work: Change) -> None:
    wanted = load_file(saved / WEIGHTS)
    change(saved, work)
    written = list(load_file(saved / WEIGHTS))
    model = PeftModel.from_pretrained(fresh, saved)
    found = get_peft_model_state_dict(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert sorted(model.load_report.renamed) == sorted(set(written) - set(wanted))
    assert set(model.load_report.renamed.values()) <= wanted.keys()
    assert len(model.load_report.renamed) == 8 or "self_attn" in written[0]


def test_a_compiled_or_wrapped_model_writes_plain_keys(llama, tmp_path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

        def forward(self, x: Tensor) -> Tensor:
            return self._orig_mod(x)

    llama.model.layers[0].self_attn.q_proj = Wrapper(llama.model.layers[0].self_attn.q_proj)
    get_peft_model(llama, config(target_modules=["q_proj._orig_mod"])).save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / WEIGHTS)) == [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"]


# -- for inference, for training --------------------------------------------------------------------------------------
@pytest.mark.parametrize("trainable", [False, True])
def test_is_trainable_decides_what_requires_gradients(llama, fresh, tokens, tmp_path, trainable: bool) -> None:
    get_peft_model(llama, config(bias="all", modules_to_save=["lm_head"])).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=trainable)
    mine = {id(p) for p in model.adapter_parameters("default").values()}
    assert mine
    assert {p.requires_grad for p in model.parameters() if id(p) in mine} == {trainable}
    assert not any(p.requires_grad for p in model.parameters() if id(p) not in mine)
    assert model.peft_config["default"].inference_mode is not trainable


@pytest.mark.parametrize("training", [False, True])
def test_loading_leaves_train_and_eval_mode_alone(saved, fresh, training: bool) -> None:
    fresh.train(training)
    fresh.model.norm.train(not training)
    model = PeftModel.from_pretrained(fresh, saved)
    assert model.training is training
    assert fresh.model.norm.training is not training
    assert {m.training for name, m in model.named_modules() if not name.endswith("model.norm")} == {training}


def test_a_given_config_is_used_instead_of_the_folders(saved, fresh) -> None:
    mine = LoraConfig.from_pretrained(saved).copy(lora_alpha=40, inference_mode=False)
    before = copy.deepcopy(mine)
    model = PeftModel.from_pretrained(fresh, saved, config=mine)
    assert {layer.scaling["default"] for layer in model.base_model.lora_layers.values()} == {10.0}
    assert mine == before


def test_a_name_that_is_taken_by_another_adapter_loads_nothing(saved, fresh) -> None:
    model = PeftModel.from_pretrained(fresh, saved)
    for other in (config(r=2), config(lora_alpha=5), config(target_modules=["q_proj"])):
        model.add_adapter("other", other)
        before = snapshot(model)
        with pytest.raises(AdapterError, match="'other' exists already and has other targets, ranks or scales"):
            model.load_adapter(saved, "other")
        assert snapshot(model) == before
        model.delete_adapter("other")


def test_an_adapter_of_the_same_shape_takes_a_folders_numbers_as_the_trainer_asks(saved, fresh) -> None:
    model = PeftModel.from_pretrained(fresh, saved, is_trainable=True)
    parameters = model.adapter_parameters("default")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1)
    report = model.load_adapter(saved, "default")
    assert report.used == sorted(load_file(saved / WEIGHTS))
    assert all(torch.equal(parameters[key], tensor) for key, tensor in load_file(saved / WEIGHTS).items())
    assert all(p is parameters[key] and p.requires_grad for key, p in model.adapter_parameters("default").items())


def test_a_key_mapping_renames_the_keys_of_a_file(saved, fresh, tmp_path) -> None:
    tensors = load_file(saved / WEIGHTS)
    old = {key.replace(".layers.", ".blocks."): tensor for key, tensor in tensors.items()}
    shutil.copytree(saved, tmp_path / "old")
    save_file(old, tmp_path / "old" / WEIGHTS)
    model = PeftModel.from_pretrained(
        fresh, tmp_path / "old", key_mapping={"nothing": "x", r"^model\.blocks": "model.layers"}
    )
    assert all(torch.equal(p, tensors[key]) for key, p in model.adapter_parameters("default").items())
    assert model.load_report.renamed == {key.replace(".layers.", ".blocks."): key for key in tensors}
    with pytest.raises(ConfigError, match=r"key_mapping: '\(' → 'x' is no replacement"):
        model.load_adapter(tmp_path / "old", "b", key_mapping={"(": "x"})


@pytest.mark.parametrize("where", ["_fill", "embeddings.in_file"])
def test_a_load_that_is_cut_off_leaves_nothing(saved, fresh, monkeypatch, where: str) -> None:
    def cut_off(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    model = get_peft_model(fresh, config(), adapter_name="first")
    before = snapshot(model)
    monkeypatch.setattr(f"loraloom.lora.checkpoint.{where}", cut_off)
    with pytest.raises(KeyboardInterrupt):
        model.load_adapter(saved, "b")
    assert snapshot(model) == before
    assert list(model.peft_config) == ["first"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_both_files_follow_the_umask(fresh, tmp_path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        get_peft_model(fresh, config()).save_pretrained(tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {
        WEIGHTS: mode,
        "adapter_config.json": mode,
    }


# -- state dicts ------------------------------------------------------------------------------------------------------
def test_the_state_dict_of_an_adapter_is_what_its_file_holds(saved, fresh) -> None:
    model = PeftModel.from_pretrained(fresh, saved)
    found, wanted = get_peft_model_state_dict(model), load_file(saved / WEIGHTS)
    assert found.keys() == wanted.keys() == set(WANTED)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not any(t.requires_grad for t in found.values())


def test_setting_a_state_dict_copies_it_into_the_same_parameters(saved, fresh, tokens, logits) -> None:
    model = get_peft_model(fresh, config(), seed=99)
    parameters = {key: id(p) for key, p in model.adapter_parameters("default").items()}
    optimizer = torch.optim.SGD(model.adapter_parameters("default").values(), lr=0.1)
    tensors = load_file(saved / WEIGHTS)
    report = set_peft_model_state_dict(model, tensors)
    assert report.used == sorted(tensors)
    assert {key: id(p) for key, p in model.adapter_parameters("default").items()} == parameters
    assert all(p.requires_grad for p in model.adapter_parameters("default").values())
    assert all(torch.equal(t, tensors[key]) for key, t in get_peft_model_state_dict(model).items())
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert not any(torch.equal(t, tensors[key]) for key, t in get_peft_model_state_dict(model).items())


@pytest.mark.parametrize(("work", "message"), WRONG.values(), ids=WRONG)
def test_setting_a_state_dict_that_does_not_fit_changes_nothing(saved, fresh, work, message) -> None:
    model = get_peft_model(fresh, config(), seed=99)
    before = snapshot(model)
    tensors = load_file(saved / WEIGHTS)
    work(tensors)
    with pytest.raises(AdapterError, match=message):
        set_peft_model_state_dict(model, tensors)
    assert snapshot(model) == before


def test_setting_part_of_a_state_dict_is_possible_when_asked_for(saved, fresh) -> None:
    model = get_peft_model(fresh, config(), seed=99)
    old = {key: t.clone() for key, t in get_peft_model_state_dict(model).items()}
    tensors = load_file(saved / WEIGHTS)
    report = set_peft_model_state_dict(model, {A: tensors[A]}, strict=False)
    assert report.used == [A]
    assert len(report.missing) == 7
    new = get_peft_model_state_dict(model)
    assert torch.equal(new[A], tensors[A])
    assert all(torch.equal(new[key], old[key]) for key in old if key != A)
