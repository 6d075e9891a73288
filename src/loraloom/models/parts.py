"""Which class of transformers loads a config for text, and which part of a multimodal model reads the text."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from loraloom.config.lora import LoraConfig
from loraloom.config.names import TASKS
from loraloom.lora.auto import AUTO_CLASS
from loraloom.lora.targets import plan
from loraloom.models.configs import field, has_decoder_and_encoder, is_decoder, text_part

#: Auto classes of models that generate text from text and other input.
_WITH_TEXT = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def auto_class(config: Any, wanted: str) -> str | None:
    """``wanted``, or the multimodal class of a causal language model; None if no class has this config."""
    import transformers

    names = [wanted]
    if wanted == "AutoModelForCausalLM" and not has_decoder_and_encoder(config):
        names += _WITH_TEXT
    for name in names:
        known = getattr(transformers, name, None)
        if known is not None and type(config) in known._model_mapping:
            return name
    return None


def reads_both_ways(config: Any) -> bool:
    """Bidirectional attention: the type has a masked language model, and the config does not make it a decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    known = config.model_type in (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation")
    return known and not is_decoder(config)


def why_none(config: Any, task: str) -> str:
    """Why no class loads this config: the model reads no text, or has no class for this task."""
    what = reads(config)
    if what in ("images", "sound"):
        kind = "an image" if what == "images" else "an audio"
        return f"{config.model_type} is {kind} model; loraloom's command line trains text"
    one_way = not (has_decoder_and_encoder(config) or reads_both_ways(config))
    others = [name for name in TASKS if name != task and (one_way or name != "causal-lm")]
    fits = [name for name in others if auto_class(config, AUTO_CLASS[TASKS[name]])]
    instead = f"; it can be trained for {' or '.join(fits)}" if fits else ""
    return f"cannot be loaded as a model for {task} (transformers has no such class of {config.model_type}){instead}"


_INPUTS = {
    "pixel_values": "images",
    "pixel_values_videos": "images",
    "input_features": "sound",
    "input_values": "sound",
    "input_audio": "sound",
    "audio_values": "sound",
    "padded_audio": "sound",
}


def reads(config: Any) -> str:
    """``images``, ``sound`` or ``text``: the main input of the model with this config."""
    from transformers import MODEL_MAPPING

    try:
        model = MODEL_MAPPING[type(config)]
    except (KeyError, AttributeError):
        return "text"
    model = model[0] if isinstance(model, tuple) else model
    return _INPUTS.get(getattr(model, "main_input_name", ""), "text")


def text_modules(model: Any) -> list[str] | None:
    """The names of the outermost modules that read text in a multimodal model; None if the whole model does."""
    config = getattr(model, "config", None)
    part = text_part(config) if config is not None else None
    if part is config or has_decoder_and_encoder(config):
        return None
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name == other or name.startswith(f"{other}.") for other in found)
        if name and not inside and type(getattr(module, "config", None)) is type(part):
            found.append(name)
    return found or None


def one_way(model: Any) -> bool:
    """Make the text part of an image-text model causal if it reads prompts bidirectionally (PaliGemma).

    Returns whether anything changed. Otherwise a text without a prompt would see the tokens that it has to predict.
    """
    part = text_part(model.config)
    if part is model.config or field(part, "use_bidirectional_attention") is not True:
        return False
    part.use_bidirectional_attention = False
    for module in model.modules():
        if field(module, "is_causal") is False and type(field(module, "config")) is type(part):
            module.is_causal = True
    return True


def text_only(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """``config`` that excludes modules that process no text: towers for images and sound, and their projections.

    The same config if it adapts none of them. ``exclude_modules`` gets an expression that PEFT reads in the same way.
    """
    parts = text_modules(model)
    if parts is None:
        return config
    base: Any = model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    kept = [*parts, *(name for name, module in model.named_modules() if module is head and name)]

    def reads_text(name: str) -> bool:
        return any(name == part or name.startswith(f"{part}.") for part in kept)

    outside = [target.name for target in plan(model, config).targets if not reads_text(target.name)]
    if not outside:
        return config
    inside = "|".join(rf"{re.escape(part)}(?:\.|$)" for part in kept)
    pattern = rf"(?!{inside}).*"
    return excluding(config, pattern)


def excluding(config: LoraConfig, pattern: str) -> LoraConfig:
    """``config`` that also leaves alone the modules whose names match ``pattern`` in full."""
    given = config.exclude_modules
    if given:
        more = given if isinstance(given, str) else rf"(?:.*\.)?(?:{'|'.join(map(re.escape, given))})"
        pattern = f"{pattern}|{more}"
    return config.copy(exclude_modules=pattern)
