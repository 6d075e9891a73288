"""The folder that loraloom writes is PEFT's: file names, tensor keys, shapes and dtypes, JSON keys and values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what it does itself

TASKS = [
    ("llama", "CAUSAL_LM"),
    ("llama", "SEQ_CLS"),
    ("llama", "TOKEN_CLS"),
    ("llama", "QUESTION_ANS"),
    ("llama", "FEATURE_EXTRACTION"),
    ("bert", "SEQ_CLS"),
    ("bert", "TOKEN_CLS"),
    ("bert", "QUESTION_ANS"),
    ("bert", "FEATURE_EXTRACTION"),
    ("t5", "SEQ_2_SEQ_LM"),
]


def written(library, base, fields: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and the shape and dtype of every tensor."""
    options = {"save_embedding_layers": False} if str(library) == "peft" else {}
    library.create(base, fields).save_pretrained(str(folder), **options)
    config = json.loads((folder / "adapter_config.json").read_text())
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config[name], list):
            config[name] = sorted(config[name])  # PEFT's order depends on the process
    tensors = load_file(folder / "adapter_model.safetensors")
    return config, {key: (tuple(t.shape), t.dtype) for key, t in tensors.items() if ".modules_to_save." not in key
                    and ".original_module." not in key}  # fmt: skip


def test_files_have_the_same_keys_and_values(family, fields, libraries, tmp_path) -> None:
    ours, theirs = libraries
    try:
        config, tensors = written(theirs, family.load(), fields, tmp_path / "peft")
    except TypeError:
        pytest.skip("peft cannot make this one; see test_exchange")
    own_config, own_tensors = written(ours, family.load(), fields, tmp_path / "ours")
    assert own_tensors == tensors
    if fields.get("target_modules") == "all-linear":  # PEFT lists full names where ours are the shortest that do
        del config["target_modules"], own_config["target_modules"]
    assert own_config == config


@pytest.mark.parametrize(("family", "task"), TASKS, indirect=["family"])
def test_each_task_trains_and_saves_its_head_as_peft_does(family, task, writer, reader, outputs, tmp_path) -> None:
    fields = {"r": 4, "target_modules": family.targets, "task_type": task}
    model = writer.create(family.load(task), fields)
    batch = family.batch(0, task)
    wanted = outputs(model, batch)
    model.save_pretrained(str(tmp_path))
    copy = reader.open(family.load(task), tmp_path)
    torch.testing.assert_close(outputs(copy, batch), wanted, rtol=0, atol=1e-5)
    assert {k: t.shape for k, t in reader.tensors(copy).items()} == {
        k: t.shape for k, t in writer.tensors(model).items()
    }
