"""Sets of targets by name, found in a model: the query and value projections, all of attention, all linear layers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loraloom.errors import TargetError, nearest

if TYPE_CHECKING:
    from torch import nn

#: From the fewest modules to the most.
SETS = ("q-v", "attention", "all-linear")

#: Projections of queries and values by the names that architectures give them; where none is, both are in one layer.
_QUERY_VALUE = {
    *("q_proj", "v_proj", "query", "value", "query_proj", "value_proj", "q_lin", "v_lin", "q", "v", "to_q", "to_v"),
    *("q_b_proj", "kv_b_proj"),
}
_FUSED = {"query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv", "in_proj"}


def resolve_targets(model: nn.Module, word: str) -> list[str] | str:
    """``LoraConfig.target_modules`` for one of ``SETS``: the shortest endings of names that mean just these modules.

    Raises:
        TargetError: the model has no such modules. Begins with ``target_modules``.
    """
    from loraloom.lora.base import Base
    from loraloom.lora.matching import matches_name, suffixes
    from loraloom.lora.presets import preset

    if word == "all-linear":
        return word
    base = Base(getattr(model, "get_base_model", lambda: model)())
    found = [name for name in base.linear if re.search(r"(?i)att(ention|n)[^.]*\.", name)]
    if word == "q-v":
        attention = found
        found = [name for name in attention if name.rpartition(".")[2] in _QUERY_VALUE]
        found = found or [name for name in attention if name.rpartition(".")[2] in _FUSED]
        usual = preset(base.type)
        if not found and isinstance(usual, tuple):
            found = [name for name in base.linear if any(matches_name(ending, name) for ending in usual)]
    elif word != "attention":
        raise TargetError(f"target_modules: must be one of {', '.join(SETS)}, found {word!r}{nearest(word, SETS)}")
    if not found:
        what = "query and value projections" if word == "q-v" else "linear layers in a module called attention"
        raise TargetError(
            f"target_modules: {word!r} matches nothing, because {type(base.model).__name__} has no {what}; "
            f"leave it out of the choices, or name the modules"
        )
    return suffixes(found, base.modules)
