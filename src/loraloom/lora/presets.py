"""Default targets by model type."""

from __future__ import annotations

TARGET_MODULES: dict[str, tuple[str, ...] | str] = {"llama": ("q_proj", "v_proj")}


def preset(model_type: str | None) -> tuple[str, ...] | str | None:
    return TARGET_MODULES.get(model_type or "")
