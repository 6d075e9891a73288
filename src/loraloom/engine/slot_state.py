"""What a slot needs to resume to the bit: tensors by name, and values that JSON can hold. Knows no slot."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from loraloom.errors import AdapterError
from loraloom.files.jsonio import exact, restored

#: The key of the values in the metadata of a safetensors file.
_VALUES = "slot"


@dataclass(frozen=True)
class SlotState:
    """The state of a slot.

    ``tensors`` are ``adapter/NAME``, ``optimizer/KIND/NAME`` (as ``Optimizer.state_dict`` has them) and, within an
    accumulation step, ``gradient/NAME``, where NAME is the parameter's. They may be views of live tensors.
    ``values`` are ``Slot``'s; numbers that are not finite are allowed.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix/``, without it."""
        start = f"{prefix}/"
        return {key.removeprefix(start): tensor for key, tensor in self.tensors.items() if key.startswith(start)}

    def copy(self) -> SlotState:
        """With copies of the tensors, on the CPU: a view would take all of the tensor along that it is part of."""
        tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in sorted(self.tensors.items())}
        return SlotState(tensors, self.values)

    def to_bytes(self) -> bytes:
        """A safetensors file with the values in its metadata."""
        data: bytes = save(self.copy().tensors, {_VALUES: json.dumps(exact(self.values))})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> SlotState:
        """The inverse of ``to_bytes``. Files of loraloom 0.1 have no values."""
        (size,) = struct.unpack_from("<Q", data)
        notes = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        return cls(load(data), restored(json.loads(notes.get(_VALUES, "{}"))))


def values_of_format_1(
    step: int, curve: dict[str, Any], within: Sequence[float] = (0, 0.0), scale: Sequence[float] = (1.0, 0)
) -> dict[str, Any]:
    """The values of a slot as loraloom 0.1 wrote it: ``within`` a step, the forwards seen and their part of its loss;
    ``scale`` is the loss scale, and for how many steps it held.
    """
    values = {"step": step, "curve": curve, "micro_step": int(within[0]), "step_loss": float(within[1])}
    values |= {"loss_scale": float(scale[0]), "good_steps": int(scale[1])}
    return values | {"stop_reason": "", "failure": "", "failed_examples": []}


def check_names(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """
    Raises:
        AdapterError: ``found`` has not the names and shapes of ``wanted``; the message begins with ``what`` and the
            first name that is missing, unknown or of another shape.
    """
    for name in sorted(found.keys() | wanted.keys()):
        there, here = (tuple(tensors[name].shape) if name in tensors else None for tensors in (found, wanted))
        if there is None:
            raise AdapterError(f"{what} {name} is missing in the saved state")
        if here is None:
            raise AdapterError(f"{what} {name} of the saved state is unknown here")
        if there != here:
            raise AdapterError(f"{what} {name} has shape {there} in the saved state, and needs {here}")
