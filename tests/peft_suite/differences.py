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

_HUB = "no connection is opened: names and revisions of a hub"
#: Words of an error that refuses a feature by its name → the reason.
REFUSED: dict[str, str] = {
    r"not implemented in loraloom yet": "a field of LoraConfig that loraloom refuses by name",
    r"init_lora_weights: must be one of": "an initialisation that loraloom refuses by name",
    r"PeftModel has no '\w+' yet": "a method that loraloom refuses by name",
    r"is a MultiheadAttention, which LoRA cannot wrap": "MultiheadAttention is refused by name",
    r"loraloom writes no pickle": "no pickle is written or read",
    r"a pickled adapter can run code": "no pickle is written or read",
    r"mixed: loraloom has LoRA alone": "PEFT's other methods are refused by name",
    r"must be a loraloom.LoraConfig, found \w+Config": "PEFT's other methods are refused by name",
    r"chooses among files of a hub, and loraloom reads folders alone": _HUB,
    r"no such folder. loraloom reads adapters from disk alone": _HUB,
    r"adapter_config.json: cannot be read \(No such file": _HUB,
    r"ignore_mismatched_sizes: a tensor of another shape cannot be used": "a tensor of another shape is never left out",
    r"ephemeral_gpu_offload: only DoRA uses it": "an option of DoRA, refused by name",
    r"loraloom opens no connection": _HUB,
    r"state_dict: loraloom takes the targets from the config alone": "targets from a state dict are refused by name",
    r"'LoraConfig' object has no attribute '_register_custom_module'": "PEFT's private registry of layer classes",
    r"0 would switch the adapter off": "lora_alpha=0 is refused by name",
    r"loraloom reads LORA adapters": "PEFT's other methods are refused by name",
    r"LoraConfig has no such field": "an unknown field that says something is an error (Values that make no sense)",
    r"matches no module|matches no adapted module|nothing would be trained": "names that match nothing are errors",
    r"exists already; delete_adapter it first": "the same ValueError in other words",
    r"are merged; call unmerge_adapter\(\) first": "what merged adapters forbid is an error that says to unmerge first",
    r"it is a PeftModel already|it carries adapters already": "a model is wrapped once (Wrapping twice)",
    r"cannot be a name; use letters": "names of adapters hold no slash or dot",
    r"merging '\w+' gives values that are not finite": "a merge that is not finite is refused (Merging)",
    r"modules_to_save: \w+ is a (Module|Parameter)(List|Dict)": "the same error, as a ValueError",
    r"takes all of them out": "a pattern of which nothing is left is an error (Values that make no sense)",
    r"bias: must be one of": "the same error, as a ValueError",
    r"target_parameters: must be a list of module names": "the same error, as a ValueError",
    r"is trained in full already|modules_to_save trains all of them in full": "a module is a target or trained in full",
}

_WORDS = (
    r"^(AssertionError: Regex pattern did not match|AssertionError: assert '.*' in '|Failed: Regex pattern did not)"
)
_SILENT = r"^Failed: DID NOT WARN"
#: (expression over the test's id, expression over the error) → the reason. Names in parentheses are the headings of
#: docs/coming-from-peft.md that say the same to a user.
DIFFERENCES: dict[tuple[str, str], str] = {
    ("", _WORDS): "the same error or warning in other words",
    ("", _SILENT): "PEFT warns of what is an error here, or of what goes right here",
    (
        r"test_save_pretrained|test_inference_safetensors|model_card|test_from_pretrained_config_construction|"
        r"test_load_model_low_cpu_mem_usage|have_transformers_tag|card_has_expected_tags",
        r"^(AssertionError|FileNotFoundError|ValueError: Cannot load RepoCard)",
    ): "no model card is written; the config is a copy (Folders, Your config object)",
    (
        r"multiple_(adapters|configs)_with_bias_raises|training_mode_raises|naming_conflict|"
        r"TargetParameters::test_(generate_with_)?mixed_adapter_batches|"
        r"multiple_adapters_with_different_target_parameters_raises",
        r"^Failed: DID NOT RAISE",
    ): "works here: several adapters with biases or other parameters, rows of several adapters while training",
    (
        r"TestRequiresGrad|requires_grad|test_nb_params_large|test_lora_with_bias_argument",
        r"^(AssertionError|Failed|$|\w*Error)",
    ): "requires_grad is apart from which adapter is active (Activation and requires_grad)",
    (r"test_repr_", r"^AssertionError"): "the printed name of a layer: LoraLinear, not lora.Linear",
    (
        r"disable_adapters_exiting|multiple_active_adapters|irregular|enable_adapters|set_adapter",
        r"has no attribute '(disable_adapters|enable_adapters|set_adapter|active_adapters?|set_scale|scale_layer|"
        r"unscale_layer)'",
    ): "adapters are switched on the model, not layer by layer (a later issue)",
    (r"without_transformers_moe_patch", r"no attribute 'update_layer'"): "patches a method of PEFT's internals",
    (
        r"",
        r"has no attribute '(set_scale|scale_layer|unscale_layer|update_layer|reset_lora_parameters|enable_adapters|"
        r"merge|unmerge|set_adapter|disable_adapters|lora_alpha|use_dora|use_rslora|active_adapters?|"
        r"cast_input_dtype_enabled|lora_magnitude_vector|lora_bias|lora_variant)'",
    ): "methods of a single layer (a later issue)",
    (
        r"test_adapter_name_makes_no_difference|seed|test_lora_\w+_init|uniform|normal|"
        r"test_lora_embedding_(default|gaussian)|test_get_and_set_peft_model_state_dict|test_hotswap_works",
        r"^AssertionError",
    ): "a start follows from the adapter's name and the module's, not from torch's generator (Starts and seeds)",
    (
        r"test_config\.py",
        r"^(AssertionError|TypeError|Failed)",
    ): "target_modules stays a list; the file's version is that of the format; one kind of config",
    (
        r"only_params_are_updated",
        r"^AssertionError: assert not True",
    ): "a tensor that no gradient reaches stays as it is",
    (r"ignore_mismatched_sizes", r"does not fit this model"): "a tensor of another shape is never left out",
    (r"target_layer_without_in_features_out_features", r"consistent method resolution"): "a class of PEFT's internals",
    (
        r"learnable_bias",
        r"(are|is) unexpected, such as .*bias",
    ): "biases belong to an adapter that trains them, and load strictly (Biases, Loading)",
    (
        r"test_save_load_roundtrip\[",
        r"^AssertionError: assert False",
    ): "loading does not change to eval mode, and the base has dropout of its own (train() and eval())",
    (
        r"test_model_with_injected_layers",
        r"^ConfigError: model: No adapter layers",
    ): "the status is asked of the PeftModel, and not of the model inside it",
    (
        r"test_warning_name",
        r"^AssertionError: assert False",
    ): "the name that the config gives the base stays (Your config object)",
    (r"Kasa|Velora", r"^Failed: DID NOT RAISE"): "a variant of LoRA that loraloom refuses by name",
    (
        r"find_target_modules|qwen3_moe_\w*regex_target_modules_works",
        r"^AssertionError: assert \['.*\] == \{'",
    ): "target_modules stays a list",
    (r"warn_for_tied_embeddings_merge", r"^AssertionError"): "the merged model says that it is not tied (Merging)",
    (
        r"removes_adapter_name_when_same_as_module_name|needless_copy_modules_to_save",
        r"^AssertionError: assert (\(.*embed_tokens.weight|\['default', 'other'\] == \['other'\])",
    ): "modules that share a weight are trained and saved together (Tied embeddings)",
    (r"test_generate_pos_args", r"^Failed: DID NOT RAISE TypeError"): "works here: generate with positional arguments",
    (
        r"low_cpu_mem_usage(_works)?$",
        r"device\(type='meta'\)|'meta'",
    ): "low_cpu_mem_usage has no work to do: a folder's tensors are read into the adapter directly",
    (r"warning_naming_conflict", r"^AssertionError"): "an adapter's name is never mistaken for a module's",
    (r"no_disable_input_dtype_casting", r"^Failed: DID NOT RAISE"): "inputs of another dtype are cast",
    (r"", r"^TypeError: LoraLayer.__init__\(\)"): "a class of PEFT's internals",
    (r"", r"isinstance\(Factor\("): "a class of PEFT's internals",
    (
        r"test_target_multiple_parameters_on_same_module|test_target_parameter_result_caching_works",
        r"^AssertionError: assert 0 == ",
    ): "counts the calls of a class of PEFT's internals",
    (r"existing_parametrization", r"^TargetError"): "a parameter under torch's parametrize is no target",
    (r"non_existing_adapter", r"^Failed: DID NOT RAISE"): "PEFT's private names",
    (r"", r"has no attribute '_\w+'"): "PEFT's private names",
    (
        r"delete_adapter_multiple_adapters_with_modules_to_save",
        r"has no attribute 'modules_to_save'",
    ): "a module without copies is what it was before the first adapter",
}
