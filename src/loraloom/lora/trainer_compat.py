"""A class for each ``PeftModel`` whose ``forward`` shows the base model's arguments.

transformers' Trainer reads their names to choose the columns and labels that it keeps. Nothing is imported or patched.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn


def _class_for(peft_model: Any, base: Any) -> type[nn.Module]:
    """A subclass whose ``forward`` has the signature of ``base``'s, and whose name names both."""
    mine: Any = peft_model.forward
    forward = FunctionType(mine.__code__, mine.__globals__, mine.__name__, mine.__defaults__, mine.__closure__)
    forward.__kwdefaults__, forward.__doc__ = mine.__kwdefaults__, mine.__doc__
    forward.__signature__ = _signature(mine, base.forward)  # type: ignore[attr-defined]
    members = {"forward": forward, "__module__": peft_model.__module__, "__doc__": peft_model.__doc__}
    return type(f"{peft_model.__name__}Of{base.__name__}", (peft_model,), {**members, "made_of": (peft_model, base)})


#: Made once for each pair, so that two models of the same classes are of the same class.
class_for: Any = cache(_class_for)


def _signature(mine: Any, base: Any) -> inspect.Signature:
    own = inspect.signature(mine)
    try:
        arguments = list(inspect.signature(base).parameters.values())
    except (TypeError, ValueError):  # a forward that is not written in Python
        return own
    added = [
        p for p in own.parameters.values() if p.kind is p.KEYWORD_ONLY and p.name not in {a.name for a in arguments}
    ]
    return inspect.Signature(sorted([*arguments, *added], key=lambda p: p.kind))


def blank(peft_model: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    """An empty instance, for copy and pickle to fill."""
    cls: type[nn.Module] = class_for(peft_model, base)
    return cls.__new__(cls)
