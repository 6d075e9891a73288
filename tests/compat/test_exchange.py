"""An adapter that one library writes gives the same answers in the other."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what it does itself

TOLERANCE = 1e-5


def test_an_adapter_of_one_library_gives_the_same_answers_in_the_other(
    family, fields, writer, reader, outputs, tmp_path
) -> None:
    batch = family.batch(0)
    base = outputs(family.load(), batch)
    model = writer.create(family.load(), fields)
    wanted = outputs(model, batch)
    assert (wanted - base).abs().max() > 100 * TOLERANCE
    model.save_pretrained(str(tmp_path))

    copy = reader.open(family.load(), tmp_path)
    torch.testing.assert_close(outputs(copy, batch), wanted, rtol=0, atol=TOLERANCE)

    for either in (model, copy):
        either.merge_adapter()
        torch.testing.assert_close(outputs(either, batch), wanted, rtol=0, atol=TOLERANCE)
        either.unmerge_adapter()
        torch.testing.assert_close(outputs(either, batch), wanted, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(outputs(either.merge_and_unload(), batch), wanted, rtol=0, atol=TOLERANCE)
