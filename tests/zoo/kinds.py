"""The kinds of model that the zoo tries, and which model types have them in the installed transformers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """``mappings``: names in transformers' ``modeling_auto``, of which the first counts. ``task``: as in PEFT."""

    name: str
    mappings: tuple[str, ...]
    task: str | None
    generates: bool = False
    packs: bool = True


KINDS = {
    kind.name: kind
    for kind in (
        Kind("causal", ("CAUSAL_LM",), "CAUSAL_LM", generates=True),
        Kind("seq-cls", ("SEQUENCE_CLASSIFICATION",), "SEQ_CLS"),
        Kind("token-cls", ("TOKEN_CLASSIFICATION",), "TOKEN_CLS"),
        Kind("question-answering", ("QUESTION_ANSWERING",), "QUESTION_ANS"),
        Kind("seq2seq", ("SEQ_TO_SEQ_CAUSAL_LM",), "SEQ_2_SEQ_LM", generates=True),
        Kind("encoder", ("MASKED_LM", "TEXT_ENCODING"), "FEATURE_EXTRACTION", packs=False),
        Kind("vision", ("IMAGE_CLASSIFICATION", "IMAGE"), None, packs=False),
        Kind("audio", ("AUDIO_CLASSIFICATION", "CTC"), None, packs=False),
        Kind("speech", ("SPEECH_SEQ_2_SEQ",), None, generates=True, packs=False),
        Kind("image-text", ("IMAGE_TEXT_TO_TEXT",), None, generates=True, packs=False),
    )
}


def class_name(model_type: str, kind: str) -> str | None:
    """The transformers class of a type for a kind, None where it has none."""
    from transformers.models.auto import modeling_auto

    for mapping in KINDS[kind].mappings:
        found = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").get(model_type)
        if found is not None:
            return found if isinstance(found, str) else found[0]
    return None


def kinds_of(model_type: str) -> list[str]:
    return [kind for kind in KINDS if class_name(model_type, kind)]


def model_types() -> list[str]:
    """Every type that has one of the kinds."""
    from transformers.models.auto import modeling_auto

    return sorted(
        {
            model_type
            for kind in KINDS.values()
            for mapping in kind.mappings
            for model_type in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
        }
    )
