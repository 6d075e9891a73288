"""A damaged adapter gives the same output, or one clear error of ours, or changes what its damage says it may change.

Never an exception of another kind, and never an adapter that answers otherwise in silence.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loraloom import LoraConfig, PeftModel, get_peft_model
from loraloom.errors import LoraloomError
from loraloom.lora.inspection import inspect

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Fields whose value is the adapter: another value is another adapter, and nothing in the folder says which is right.
MEANING = {"lora_alpha", "use_rslora", "alpha_pattern"}
VALUES: tuple[Any, ...] = (
    None, False, True, 0, -1, 3, 10**7, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "x", "(", "(a+)+$", ".*",
    "all-linear", "linear", "é" * 9, [], ["linear"], ["nothing"], [None], [[]], [1], [-1], {}, {"linear": 3}, {"(": 1},
    {"linear": None}, {"a": {"b": []}}, "eva", "pissa", "gaussian", "LORA", "CAUSAL_LM", "SEQ_CLS", "lora_only", "all",
)  # fmt: skip
DTYPES = (torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.bfloat16, torch.float64)
X = torch.arange(6).view(2, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.conv = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.linear(self.table(x)).transpose(1, 2)).transpose(1, 2))


def fresh() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    folder = tmp_path_factory.mktemp("whole")
    fields = {"target_modules": ["table", "linear", "conv"], "modules_to_save": ["head"], "bias": "lora_only"}
    model = get_peft_model(fresh(), LoraConfig(r=3, init_lora_weights=False, **fields))
    with torch.no_grad():
        for parameter in model.adapter_parameters("default").values():
            parameter.add_(0.1)
    model.save_pretrained(folder)
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS), model(X).detach()


def mutate(draw: random.Random, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[str, bool]:
    """Write the adapter with one damage into ``folder``: what it is, and whether another output is right then."""
    config, tensors = dict(config), dict(tensors)
    kind = draw.choice(["field", "unknown", "text", "key", "tensor", "dtype", "shape", "bytes", "cut"])
    name, key, value = draw.choice(sorted(config)), draw.choice(sorted(tensors)), draw.choice(VALUES)
    what, changes, text, raw = f"{kind} {name} {value!r:.40} {key}", False, None, None
    if kind == "field":
        config[name], changes = value, name in MEANING
    elif kind == "unknown":
        config[draw.choice(["new_field", "R", "lora_r", "enable_lora"])] = value
    elif kind == "text":
        text = json.dumps(config)
        at = draw.randrange(len(text))
        text = draw.choice(
            [
                text[:at],
                text[:at] + draw.choice('{}[]",:0e-x\x00') + text[at + 1 :],
                text.replace('"r": 3', '"r": 3, "r": 4'),
                "[" * 5000,
                text[:at] + "1" * 9000 + text[at:],
            ]
        )
        what, changes = f"text at {at}", True  # a digit, or a field's name, may be the one that was hit
    elif kind == "key":
        tensor = tensors.pop(key)
        new = draw.choice(
            [
                None,
                key.replace("lora_", "lora"),
                key + ".x",
                "x" * 300,
                key.replace("linear", "liner"),
                key.replace(".weight", ".default.weight"),
                key.removeprefix("base_model.model."),
                "",
                ".",
            ]
        )
        if new is not None:
            tensors[new] = tensor
        what = f"key {key} {new!r:.60}"
    elif kind == "tensor":
        other = tensors[key].clone()
        other.view(-1)[0] = draw.choice([float("nan"), float("inf"), -float("inf")])
        tensors[key] = other
    elif kind == "dtype":
        dtype = draw.choice(DTYPES)
        tensors[key], what = tensors[key].to(dtype), f"dtype {key} {dtype}"
        changes = dtype == torch.bfloat16  # rounded
    elif kind == "shape":
        change: Callable[[Tensor], Tensor] = draw.choice([
            lambda t: t[:1], lambda t: t.flatten(), lambda t: t[None], lambda t: torch.cat([t, t]), lambda t: t[:0],
            lambda t: t.reshape(-1)[0], lambda t: t.transpose(0, -1),
        ])  # fmt: skip
        tensors[key] = change(tensors[key]).contiguous()
        changes = (
            tensors[key].shape == tensors[key].T.shape if tensors[key].dim() == 2 else False
        )  # transposed in place
    (folder / CONFIG).write_text(json.dumps(config) if text is None else text)
    save_file(tensors, folder / WEIGHTS)
    if kind in ("bytes", "cut"):
        raw = bytearray((folder / WEIGHTS).read_bytes())
        at = draw.randrange(len(raw))
        if kind == "cut":
            raw = raw[:at]
        else:
            raw[at] ^= 1 << draw.randrange(8)
        (folder / WEIGHTS).write_bytes(raw)
        what, changes = f"{kind} at {at} of {len(raw)}", kind == "bytes"  # a bit of a number is another number
    return what, changes


def check(seed: int, folder: Path, saved: tuple[dict[str, Any], dict[str, Tensor], Tensor]) -> str:
    config, tensors, wanted = saved
    what, changes = mutate(random.Random(seed), folder, config, tensors)
    net = fresh()
    before = {name: p.clone() for name, p in net.named_parameters()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = PeftModel.from_pretrained(net, folder)(X)
    except LoraloomError as error:
        assert 10 < len(str(error)) < 2500, f"seed {seed}: {what}: {error}"
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters()), f"seed {seed}: {what}"
        outcome = "refused"
    except Exception as error:
        raise AssertionError(f"seed {seed}: {what}: {type(error).__name__}: {error}") from error
    else:
        same = torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
        assert same or changes, f"seed {seed}: {what}: other output in silence"
        outcome = "same" if same else "other"
    try:
        inspect(folder)
    except LoraloomError:
        pass
    except Exception as error:
        raise AssertionError(f"inspect, seed {seed}: {what}: {type(error).__name__}: {error}") from error
    return outcome


@pytest.mark.parametrize(
    "seeds", [range(120), pytest.param(range(120, 3000), marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_damage_is_refused_in_our_words_or_changes_nothing(tmp_path: Path, saved: Any, seeds: list[int]) -> None:
    failures, outcomes = [], []
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            outcomes.append(check(seed, folder, saved))
        except AssertionError as error:
            failures.append(str(error).partition("\nassert")[0][:300])
    assert not failures, "\n".join(failures)
    assert {"refused", "same"} <= set(outcomes)
