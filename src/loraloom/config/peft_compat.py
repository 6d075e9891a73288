"""Objects of ours that ``isinstance`` takes for peft's too, where peft is installed beside. Nothing is patched for it.

Libraries such as transformers, TRL and accelerate ask ``isinstance(x, peft.PeftModel)`` before they do the right thing.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, ClassVar


def seen_as(cls: type, module: str = "peft", name: str = "") -> type:
    """``cls``, or, where ``module`` of peft is loaded, a class that is also its ``name``: what ``isinstance`` looks at.

    Without a name it is the PeftModel for the task that ``cls`` is for.
    """
    there = sys.modules.get(module)
    if there is None:
        return cls
    names = [name] if name else [one.__name__ for one in cls.__mro__ if one.__name__.startswith("PeftModel")]
    theirs = next((found for one in names if isinstance(found := getattr(there, one, None), type)), None)
    if theirs is None or issubclass(cls, theirs):
        return cls
    mine: Any = cls
    both: type = _both(mine, theirs)
    return both


class SeenAsPeft:
    """What ``isinstance`` takes for a class of peft's, once peft is loaded; copied and pickled as what it is."""

    #: the class: its module in peft and its name
    peft_class: ClassVar[tuple[str, str]]

    @property
    def __class__(self) -> type:
        return seen_as(type(self), *self.peft_class)

    @__class__.setter
    def __class__(self, cls: type) -> None:  # also how FSDP2 marks a module
        object.__dict__["__class__"].__set__(self, cls)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return object.__new__, (type(self),), vars(self)  # pickle's own way asks for the class that others see


@lru_cache(1024)
def _both(cls: Any, theirs: Any) -> Any:
    return type(theirs)(cls.__name__, (cls, theirs), {"__module__": cls.__module__, "__doc__": cls.__doc__})
