"""Why a check is skipped or a type is not built: the line of transformers, torch or peft that makes it right.

Each entry: patterns of ``type/kind/targets``, of the check and of what came out, and the reason. Lines are those of
transformers 5.23 and peft 0.21.2. Nothing else may fail.
"""

from __future__ import annotations

import re

ANY = r".*"

#: (type, check) that is not tried, because no alarm ends it → why.
UNTRIED = {
    ("wavlm", "reentrant"): "a layer's position bias is an argument of all that follow, which reentrant checkpointing"
    " runs again without end (transformers/models/wavlm/modeling_wavlm.py:335)",
}
PEFT_CHECKS = r"names|logits|exchange|gradient|steps|generation"

#: Types that cannot be built here → why.
UNBUILT: dict[str, str] = {
    **dict.fromkeys(
        ("conditional_detr", "dab-detr", "deformable_detr", "detr", "table-transformer", "timm_backbone",
         "timm_wrapper", "fast_vlm", "gemma3n", "perception_lm"),
        "needs timm (transformers/utils/import_utils.py:2514)",
    ),
    "dinat": "needs natten (transformers/utils/import_utils.py:2514)",
    "blt": "its config has no num_hidden_layers, which its cache asks for (transformers/configuration_utils.py:312)",
    "depth_pro": "three sizes of picture and patch, each of which must fit the others"
    " (transformers/models/depth_pro/configuration_depth_pro.py:129)",
    "diffusion_gemma": "its default config leaves sizes open"
    " (transformers/models/diffusion_gemma/modeling_diffusion_gemma.py:515)",
    "dots3_note": "its default config has widths that do not fit one another"
    " (transformers/models/dots3_note/configuration_dots3_note.py:184)",
    "fun_asr_nano": "text alone is no input (transformers/models/fun_asr_nano/modeling_fun_asr_nano.py:451)",
    "gemma4_assistant": "its default config is refused by its own check"
    " (transformers/models/gemma4_assistant/configuration_gemma4_assistant.py:86)",
    "gemma4_unified_assistant": "reads the cache of the model that it assists"
    " (transformers/models/gemma4_unified/configuration_gemma4_unified.py:208)",
    "granite4_vision": "its default config has no deepstack_layer_map"
    " (transformers/models/granite4_vision/modeling_granite4_vision.py:759)",
    "granite_speech5_ctc": "frames are stacked to a width that the default config does not say"
    " (transformers/models/granite_speech5/modeling_granite_speech5.py:378)",
    "hrm_text": "its small model has more layers than its cache (transformers/cache_utils.py:1570)",
    "kosmos-2": "a text without a picture is refused (transformers/models/kosmos2/modeling_kosmos2.py:1606)",
    "kyutai_speech_to_text": "its codec's groups fit its default width alone"
    " (transformers/models/kyutai_speech_to_text/modeling_kyutai_speech_to_text.py:250)",
    "xlstm": "its states fit some widths alone (transformers/models/xlstm/modeling_xlstm.py:126)",
    "levit": "its stages fit its default picture alone (transformers/models/levit/modeling_levit.py:206)",
    "musicgen": "a row is four rows of codes (transformers/models/musicgen/modeling_musicgen.py:493)",
    "musicgen_melody": "a row is four rows of codes (transformers/models/musicgen/modeling_musicgen.py:493)",
    "pi0": "takes a robot's state and actions (transformers/models/pi0/modeling_pi0.py:70)",
    "shieldgemma2": "answers about a picture through its text's first token"
    " (transformers/models/shieldgemma2/modeling_shieldgemma2.py:128)",
    "udop": "pictures, boxes and text must agree (transformers/models/udop/modeling_udop.py:1123)",
    "vibevoice": "its codec has 250 million parameters at any width given to its config"
    " (transformers/models/vibevoice_acoustic_tokenizer/modeling_vibevoice_acoustic_tokenizer.py:334)",
    "vibevoice_asr": "chunks must be multiples of 3200 samples"
    " (transformers/models/vibevoice_asr/configuration_vibevoice_asr.py:92)",
    "videoprism_vision_model": "a division by zero in its own initialisation (transformers/initialization.py:182)",
    "voxtral_realtime": "sound and text must be streamed together"
    " (transformers/models/voxtral_realtime/modeling_voxtral_realtime.py:952)",
    "layoutlmv2": "needs detectron2 (transformers/utils/import_utils.py:2514)",
}  # fmt: skip

#: (cells, checks, what came out, why)
SKIPPED: tuple[tuple[str, str, str, str], ...] = (
    (
        r"jamba/.*/all-linear|neomme/.*/all-linear|longcat_flash/.*/all-linear|wavlm/.*/all-linear|layoutlmv3/.*/all-linear",
        "names|gradient|steps",
        r".*only here 0.*only in peft.*|.*other names.*",
        "all-linear leaves out what the model reads and never calls; peft adapts it in vain"
        " (transformers/models/jamba/modeling_jamba.py:577,"
        " transformers/models/longcat_flash/modeling_longcat_flash.py:144,"
        " transformers/models/wavlm/modeling_wavlm.py:229)",
    ),
    (
        r".*/image-text/.*",
        "rows",
        r".*has to be run adapter by adapter, since not every layer.*|.*had to be run one by one, and.*",
        "refused: pictures of unlike size are one list of patches, in which no layer shows whose they are"
        " (transformers/models/qwen2_vl/modeling_qwen2_vl.py:691)",
    ),
    (
        r"dia/.*",
        "generation",
        r".*cannot reshape tensor of 0 elements.*",
        "is generated from a prompt of sound alone (transformers/models/dia/generation_dia.py:437)",
    ),
    (
        r".*/vision/default|ibert/.*",
        ANY,
        r".*no attention or repeated linear layer was found in it.*",
        "no default: neither attention nor plain linear layers, and refused with the names that there are, as in peft"
        " (peft/tuners/lora/model.py:704)",
    ),
    (
        r"ibert/.*/all-linear",
        ANY,
        r".*No modules were targeted for adaptation.*",
        "its layers are integer arithmetic of their own (transformers/models/ibert/quant_modules.py:219)",
    ),
    (
        r"mobilenet_v[12]/.*/default",
        PEFT_CHECKS,
        r".*'Conv2d' object has no attribute 'stride'.*",
        "reads a layer's stride, which peft's has not (transformers/models/mobilenet_v2/modeling_mobilenet_v2.py:58)",
    ),
    (
        r"lxmert/question-answering/.*",
        "pack",
        r".*object has no attribute 'start_logits'.*",
        "chooses among answers, not a span (transformers/models/lxmert/modeling_lxmert.py:94)",
    ),
    (
        r"pop2piano/.*",
        "generation",
        r".*composer_to_feature_token.*",
        "needs the composers of its checkpoint (transformers/models/pop2piano/modeling_pop2piano.py:1014)",
    ),
    (
        r"pp_formulanet/.*",
        PEFT_CHECKS,
        r".*get_input_embeddings.*",
        "peft asks for embeddings that the model does not name (peft/utils/other.py:1815)",
    ),
    (
        r"pvt_v2/.*",
        "reentrant",
        r".*does not require grad.*|.*step 1.*",
        "a stage answers with a tuple in a tuple, through which torch's reentrant checkpointing loses the gradient"
        " (transformers/models/pvt_v2/modeling_pvt_v2.py:340)",
    ),
    (
        r"reformer/.*",
        "gradient|steps|pack",
        r".*does not require grad and does not have a grad_fn.*|.*no adapter would train.*",
        "its reversible layers give no gradient where what they read requires none, in peft neither"
        " (transformers/models/reformer/modeling_reformer.py:1791)",
    ),
    (
        r"vit_mae/.*",
        "rows",
        r".*row 0.*",
        "draws which patches it sees, for a batch as a whole (transformers/models/vit_mae/modeling_vit_mae.py:313)",
    ),
    (
        r"git/.*|blip/.*",
        "checkpointing|reentrant",
        r".*leaf Variable that requires grad is being used in an in-place operation.*",
        "adds in place to embeddings (transformers/models/git/modeling_git.py:109), which transformers makes a leaf"
        " that requires gradients (transformers/modeling_utils.py:2144)",
    ),
    (
        r"glm4v_moe/.*/all-linear",
        "names|logits|gradient|steps|generation",
        r".*patch_embed.*|.*logits.*|.*token.*",
        "peft's all-linear ends in last names here, and takes a convolution of one of them along"
        " (peft/utils/transformers_weight_conversion.py:611)",
    ),
    (
        ANY,
        "exchange",
        r".*PEFT would read adapter 'default' otherwise than loraloom.*",
        "refused by name when saved: peft renames the keys of every adapter, as of old checkpoints"
        " (peft/utils/transformers_weight_conversion.py:611)",
    ),
    (
        ANY,
        PEFT_CHECKS,
        r".*modules_to_save cannot be applied to modules of type.*",
        "peft cannot train in full what it adapts as well (peft/utils/other.py:605)",
    ),
    (
        ANY,
        PEFT_CHECKS,
        r"FAIL: TypeError: CLIPEncoder.*",
        "peft passes inputs_embeds to a model that takes none (transformers/models/clip/modeling_clip.py:542)",
    ),
    (
        r".*/all-linear",
        "rows|pack",
        r".*is adapted as a whole, so the rows of one forward cannot have different adapters.*",
        "refused, as in peft: a parameter that is no layer cannot be adapted row by row"
        " (peft/tuners/lora/layer.py:2189)",
    ),
)


def reason(cell: str, check: str, outcome: str) -> str | None:
    for cells, checks, text, why in SKIPPED:
        if re.fullmatch(cells, cell) and re.fullmatch(checks, check) and re.fullmatch(text, outcome):
            return why
    return None


def lines_named() -> list[str]:
    """Every ``package/path.py:line`` that a reason names."""
    reasons = [*UNBUILT.values(), *UNTRIED.values(), *(why for *_, why in SKIPPED)]
    return sorted({line for why in reasons for line in re.findall(r"[\w/]+\.py:\d+", why)})
