"""What of PEFT's LoRA tests loraloom is not meant to pass, and why."""

from __future__ import annotations

#: Test files of PEFT that are about LoRA, wholly or in part. Cases elsewhere count where they are given a LoraConfig.
FILES = frozenset(
    f"test_{name}.py"
    for name in (
        "arrow", "auto", "bdlora", "config", "custom_models", "helpers", "hub_features", "initialization",
        "integrations", "lora_conversion", "lora_ga", "lora_intruders", "lora_variants", "lorafa", "loraplus",
        "low_level_api", "mapping", "mixed", "other", "riemannian_lora", "target_parameters", "torch_compile",
        "tuners_utils", "velora",
    )
)  # fmt: skip

#: Tests in them that are of PEFT's other methods.
OTHER_METHODS = (
    r"(?i)lokr|loha|adalora|adamss|prompt|prefix|vera|frod|vblora|c3a|waveft|road|delora|gralora|psoft|peanut|beft|"
    r"supertuning|hira|lily|tinylora|ia3|boft|\boft|osf|xlora|poly|shira|randlora|unilora|deft|cartridge|cpt|"
    r"lntuning|ln_tuning|miss|bone|adaption|fourier|hra\b|glora|trainable_tokens_config|prompt_learning"
)

#: Words of an error that refuses a feature by its name → the reason.
REFUSED: dict[str, str] = {
    r"not implemented in loraloom yet": "a field of LoraConfig that loraloom refuses by name",
    r"init_lora_weights: must be one of": "an initialisation that loraloom refuses by name",
    r"PeftModel has no '\w+' yet": "a method that loraloom refuses by name",
}

#: (expression over the test's id, expression over the error) → the reason.
DIFFERENCES: dict[tuple[str, str], str] = {}
