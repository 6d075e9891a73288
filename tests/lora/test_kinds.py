"""What a layer's own forward decides: the fast way, an update beside it, or a refusal before anything changes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from loraloom import LoraConfig, PeftModel, get_peft_model, plan
from loraloom.errors import MergeError, TargetError
from loraloom.lora.kinds import Forward, forward_of
from loraloom.lora.layers import layer_class


def of_transformers(path: str, *args: object, **fields: object) -> nn.Module:
    module, _, name = path.rpartition(".")
    made: nn.Module = getattr(importlib.import_module(f"transformers.models.{module}"), name)(*args, **fields)
    return made


#: A class whose forward is its own → whether it is its function, gives other numbers, or cannot be adapted.
OWN = {
    "falcon": (lambda: of_transformers("falcon.modeling_falcon.FalconLinear", 4, 6), "map"),
    "router of llama 4": (
        lambda: of_transformers("llama4.modeling_llama4.Llama4Router", _llama4()),
        "its forward returns a tuple, to which no update can be added",
    ),
    "grouped linear": (
        lambda: of_transformers("deepseek_v4.modeling_deepseek_v4.DeepseekV4GroupedLinear", 4, 6, n_groups=2),
        "its forward",
    ),
    "scaled embedding": (lambda: of_transformers("bart.modeling_bart.BartScaledWordEmbedding", 5, 4, 0, 3.0), "map"),
    "learned positions": (
        lambda: of_transformers("bart.modeling_bart.BartLearnedPositionalEmbedding", 8, 4),
        "its forward does not look up the rows that it is given",
    ),
    "standardised convolution": (
        lambda: of_transformers("bit.modeling_bit.WeightStandardizedConv2d", 3, 4, 3),
        "differs",
    ),
    "padded convolution": (
        lambda: of_transformers("gemma4.modeling_gemma4.Gemma4AudioCausalConv1d", 3, 4, 3),
        "its forward",
    ),
}


def _llama4() -> object:
    from transformers import Llama4TextConfig

    return Llama4TextConfig(hidden_size=8, num_local_experts=3, num_experts_per_tok=1)


@pytest.mark.parametrize(("make", "kind"), OWN.values(), ids=OWN)
def test_a_forward_of_its_own_is_called_once_and_compared(make, kind: str) -> None:
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    state, before = torch.get_rng_state(), [p.clone() for p in module.parameters()]
    found = forward_of(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    if kind == "map":
        assert found == Forward(is_map=True)
    elif kind == "differs":
        assert found == Forward(differs=True)
    else:
        assert found.obstacle is not None
        assert found.obstacle.startswith(kind)
        assert layer_class(module) is None
        with pytest.raises(TargetError, match=rf"0 is a {type(module).__name__}, which LoRA cannot wrap, because its"):
            get_peft_model(nn.Sequential(module), LoraConfig(target_modules=["0"]))
        assert all(p.requires_grad for p in module.parameters())


def test_a_model_without_numbers_is_planned_by_shapes() -> None:
    with torch.device("meta"):
        router, linear = OWN["router of llama 4"][0](), OWN["falcon"][0]()
    assert layer_class(router) is None
    assert layer_class(linear) is not None
    linear.to_empty(device="cpu")
    nn.init.normal_(linear.weight)
    nn.init.normal_(linear.bias)
    assert forward_of(linear).is_map


def test_falcons_own_linear_goes_the_fast_way() -> None:
    model = get_peft_model(nn.Sequential(OWN["falcon"][0]()), LoraConfig(target_modules=["0"], init_lora_weights=False))
    layer = model.lora_layers["0"]
    x = torch.randn(2, 3, 4)
    assert layer.fusable(x, layer.dispatcher.frame) is not None
    a, b = layer.factors("default")
    torch.testing.assert_close(model(x), x @ (layer.weight + layer.scaling["default"] * b @ a).T + layer.bias)


def test_an_update_beside_a_layer_that_changes_its_weight_is_never_merged() -> None:
    model = get_peft_model(
        nn.Sequential(OWN["standardised convolution"][0]()), LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    x = torch.randn(1, 3, 5, 5)
    wanted = model(x)
    with pytest.raises(MergeError, match="WeightStandardizedConv2d, which changes its weight before using it"):
        model.merge_adapter()
    assert torch.equal(model(x), wanted)


def test_a_quantised_weight_is_left_to_its_module() -> None:
    class Packed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("called")

    module = Packed(4, 4)
    module.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    assert forward_of(module) == Forward()
    assert layer_class(module) is not None


@pytest.mark.parametrize("model_type", ["mamba", "falcon_h1"])
def test_what_fused_kernels_read_is_not_in_all_linear_and_refused_by_name(model_type: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"model_type": model_type}
            self.in_proj, self.out_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    assert [t.name for t in plan(Net(), LoraConfig(target_modules="all-linear")).targets] == ["in_proj"]
    with pytest.raises(TargetError, match=rf"out_proj cannot be adapted, because the fused kernels of '{model_type}'"):
        plan(Net(), LoraConfig(target_modules=["out_proj"]))


@pytest.mark.filterwarnings("ignore")
def test_a_projection_that_attention_reads_is_skipped_with_a_line_in_the_report(tmp_path: Path) -> None:
    """PEFT adapts SigLIP's head.attention.out_proj, to no effect."""
    import peft
    from transformers import SiglipVisionConfig, SiglipVisionModel

    def siglip() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=8, patch_size=4)).eval()

    theirs = peft.get_peft_model(siglip(), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    images = torch.randn(2, 3, 8, 8)
    ours = PeftModel.from_pretrained(siglip(), tmp_path / "theirs").eval()
    report = ours.load_report
    assert len(report.skipped) == 2
    assert "2 skipped, because the model never calls their modules" in str(report)
    assert all("head.attention.out_proj" in key for key in report.skipped)
    wanted = theirs(images).pooler_output
    torch.testing.assert_close(ours(images).pooler_output, wanted, rtol=1e-4, atol=1e-5)
    made = plan(siglip(), LoraConfig(target_modules=["out_proj"]))
    assert [t.name.rpartition(".")[2] for t in made.targets] == ["out_proj"]
    assert "left out:" in str(made)
    assert "head.attention.out_proj" in str(made)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(siglip(), str(tmp_path / "ours")).eval()
    assert not any("head.attention.out_proj.lora" in name for name, _ in again.named_modules())
    torch.testing.assert_close(again(images).pooler_output, wanted, rtol=1e-4, atol=1e-5)
