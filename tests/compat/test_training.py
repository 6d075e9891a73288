"""Twenty AdamW steps from the same start on the same batches give the same weights in both libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what it does itself

KNOBS = {"plain", "rslora", "all-linear", "biases all", "biases of targets", "module to save", "embedding"}
STEPS = 20


def trained(library, family, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = library.open(family.load(dtype=dtype), folder, is_trainable=True)
    # The softmax does not see a key's bias: its gradient is rounding alone, which a smaller eps would make steps of.
    eps = 1e-4 if dtype is torch.float32 else 1e-8
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01, eps=eps)
    for step in range(STEPS):
        model(**family.batch(step % 4, dtype=dtype)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return library.tensors(model)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["f64", "f32"])
def test_both_libraries_train_to_the_same_weights(family, fields, libraries, tmp_path, dtype, tolerance) -> None:
    ours, theirs = libraries
    ours.create(family.load(dtype=dtype), fields).save_pretrained(tmp_path)
    start = ours.tensors(ours.open(family.load(dtype=dtype), tmp_path))
    found, wanted = trained(ours, family, tmp_path, dtype), trained(theirs, family, tmp_path, dtype)
    for key, begun in start.items():
        if "running_" in key or "num_batches" in key:  # statistics of batches, in eval mode here
            continue
        moved = (wanted[key] - begun).norm()
        assert moved > 0, f"{key} was not trained by peft"
        assert (found[key] - wanted[key]).norm() <= tolerance * wanted[key].norm(), key
