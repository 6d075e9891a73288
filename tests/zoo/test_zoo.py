"""A sample of model types through all checks. ``make zoo`` runs and prints all of them."""

from __future__ import annotations

import pytest

from zoo.sweep import failures

#: Types that cover the ways through the code, each with one kind and one choice of targets: separate and fused
#: projections, Conv1D, shared and flattened inputs, latent attention, experts, state spaces, encoders with and without
#: a norm before attention, relative positions, tied parts, pictures, sound, convolutions.
SAMPLE = (
    "llama/causal/all-linear",
    "gpt2/causal/default",
    "opt/causal/all-linear",
    "gemma3_text/causal/default",
    "falcon/causal/all-linear",
    "deepseek_v3/causal/default",
    "mixtral/causal/default",
    "qwen3_moe/causal/all-linear",
    "qwen3_5_text/causal/default",
    "mamba/causal/default",
    "bert/seq-cls/default",
    "roberta/question-answering/default",
    "distilbert/token-cls/default",
    "deberta-v2/seq-cls/all-linear",
    "longformer/seq-cls/default",
    "bart/seq2seq/default",
    "t5/seq2seq/all-linear",
    "xlnet/causal/default",
    "vit/vision/default",
    "swinv2/vision/all-linear",
    "resnet/vision/default",
    "wav2vec2/audio/default",
    "whisper/speech/default",
    "llava/image-text/all-linear",
    "qwen2_vl/image-text/all-linear",
)


@pytest.mark.parametrize("cell", SAMPLE)
def test_a_sample_of_model_types_does_as_peft_does(cell: str) -> None:
    assert failures(cell) == []
