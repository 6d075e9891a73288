"""LoRA on parameters that no layer calls: stacked experts, routers, matrices of a module's own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraloom import LoraConfig, PeftModel, get_peft_model, plan
from loraloom.errors import TargetError
from loraloom.lora.parameters import LoraParameter

E, WIDTH, INNER = 3, 4, 5


class Experts(nn.Module):
    """Every row goes through the expert of its number modulo E."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (E, INNER, WIDTH), (E, WIDTH, INNER)
        self.up = nn.Parameter(torch.randn(up).mT.contiguous() if transposed else torch.randn(up))
        self.down = nn.Parameter(torch.randn(down).mT.contiguous() if transposed else torch.randn(down))
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, *, offset: int = 0) -> Tensor:
        rows = []
        for i, row in enumerate(x):
            up, down = (w[(i + offset) % E] for w in (self.up, self.down))
            if self.is_transposed:
                up, down = up.mT, down.mT
            rows.append(down @ torch.tanh(up @ row) + self.bias)
        return torch.stack(rows)


class Block(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts(transposed)
        self.matrix = nn.ParameterDict({"m": nn.Parameter(torch.randn(WIDTH, WIDTH))})

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.experts(x, offset=1))


def net(transposed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(transposed), Block(transposed)).double()


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 2, "target_modules": [], "target_parameters": ["up", "down"], "init_lora_weights": False} | fields
    )


X = torch.randn(6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_update_of_an_expert_is_its_rows_of_a_and_its_columns_of_b(transposed: bool) -> None:
    model = get_peft_model(net(transposed), config(lora_alpha=3))
    wanted = net(transposed)
    for block, name in ((i, name) for i in (0, 1) for name in ("up", "down")):
        layer = model.lora_layers[f"{block}.experts.{name}"]
        a, b = layer.factors("default")
        weight = getattr(wanted[block].experts, name)
        for e in range(E):
            delta = 1.5 * b[:, [e, E + e]] @ a[2 * e : 2 * e + 2]  # A expert by expert, B rank by rank
            weight.data[e] += delta.mT if transposed else delta
    torch.testing.assert_close(model(X), wanted(X))
    assert not torch.allclose(model(X), net(transposed)(X))


def test_gradients_are_those_of_the_weight_through_the_factors() -> None:
    model = get_peft_model(net(), config())
    model(X).square().sum().backward()
    layer = model.lora_layers["1.experts.up"]
    wanted = net()
    for name, one in model.lora_layers.items():
        block, _, key = name.split(".")
        getattr(wanted[int(block)].experts, key).data += one.get_delta_weight("default")
    wanted(X).square().sum().backward()
    a, b = layer.factors("default")
    gradient = wanted[1].experts.up.grad
    for e in range(E):
        columns = b[:, [e, E + e]].detach()
        torch.testing.assert_close(a.grad[2 * e : 2 * e + 2], layer.scaling["default"] * columns.T @ gradient[e])
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_an_adapter_of_parameters_lives_like_any_other(tmp_path: Path) -> None:
    """Switch, disable, several at once, merge to the bit, delete, unload, save and load."""
    base = net()
    before = [p.clone() for p in base.parameters()]
    plain = base(X)
    model = get_peft_model(base, config())
    one = model(X)
    model.add_adapter("other", config(target_parameters=["1.experts.down"], target_modules=["proj"]))
    model.set_adapter("other")
    other = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), plain)
    model.set_adapter(["default", "other"])
    both = model(X)
    assert not torch.allclose(both, one)
    model.merge_adapter()
    torch.testing.assert_close(model(X), both)
    model.unmerge_adapter()
    assert torch.equal(model(X), both)
    model.save_pretrained(tmp_path)
    for name, folder, wanted in (("default", tmp_path, one), ("other", tmp_path / "other", other)):
        assert torch.equal(PeftModel.from_pretrained(net(), folder, name)(X), wanted)
    assert {one.module_type for one in model.get_layer_status()} == {"lora.ParamWrapper", "lora.Linear"}
    assert model.base_model.targeted_parameter_names == [
        f"{i}.experts.{name}" for i in (0, 1) for name in ("up", "down")
    ]
    model.delete_adapter("default")
    assert torch.equal(model(X), other)
    assert torch.equal(model.unload()(X), plain)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), before, strict=True))


def test_rows_of_different_adapters_each_answer_as_alone() -> None:
    model = get_peft_model(net(), config())
    model.add_adapter("other", config(), seed=3)
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(model(X))
    mixed = model(X, adapter_names=["default"] * 3 + ["other"] * 3)  # one adapter after the other, for experts see all
    torch.testing.assert_close(mixed[:3], alone[0][:3])
    assert torch.equal(model(X[3:], adapter_names=["other"] * 3), model(X[3:]))
    assert torch.equal(model(X, adapter_names=["other"] * 6), alone[1])


def test_a_call_in_another_thread_never_sees_the_updated_parameter() -> None:
    model = get_peft_model(net(), config())
    wanted = model(X)
    experts = model.get_base_model()[0].experts.get_base_layer()
    frozen = experts.up
    seen: list[bool] = []
    hook = experts.register_forward_hook(lambda module, args, out: seen.append(experts.up is frozen))
    threads = [threading.Thread(target=lambda: seen.append(torch.equal(model(X), wanted))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert len(seen) == 4
    assert all(seen)


def test_a_forward_that_another_library_put_on_the_module_is_used() -> None:
    model = get_peft_model(net(), config())
    wanted = model(X)
    for block in model.get_base_model():
        experts = block.experts.get_base_layer()
        own = experts.forward
        experts.forward = lambda x, own=own, **kwargs: own(x, **kwargs) * 1.0
    assert torch.equal(model(X), wanted)
    assert [type(block.experts.get_base_layer().up) for block in model.get_base_model()] == [nn.Parameter] * 2


def test_the_weight_of_a_linear_is_adapted_as_that_linear() -> None:
    made = plan(net(), config(target_parameters=["0.proj.weight"], lora_dropout=0.1))
    assert [(t.name, t.kind) for t in made.targets] == [("0.proj", "Linear")]
    assert made.config.target_parameters == ["0.proj.weight"]


def test_a_router_that_returns_a_tuple_is_adapted_through_its_weight_alone() -> None:
    class Router(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y, y.softmax(-1)

    base = nn.ModuleDict({"router": Router(WIDTH, E), "proj": nn.Linear(WIDTH, WIDTH)})
    assert [t.name for t in plan(base, LoraConfig(target_modules="all-linear")).targets] == ["proj"]
    with pytest.raises(
        TargetError, match=r"router is a Router.*returns a tuple.*target_parameters=\['router.weight'\]"
    ):
        get_peft_model(base, LoraConfig(target_modules=["router"]))
    model = get_peft_model(base, config(target_parameters=["router.weight"]))
    layer = model.get_base_model()["router"]
    assert isinstance(layer, LoraParameter)
    x = X.float()
    wanted = x @ (layer.weight + layer.get_delta_weight("default")).T + layer.bias
    torch.testing.assert_close(layer(x)[0], wanted)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_parameters": ["upp"]}, r"'upp' matches no parameter; did you mean 'up' \(2 parameters"),
        ({"target_parameters": ["experts.bias"]}, r"experts.bias has 1 dimensions"),
        ({"target_parameters": ["proj.weight"], "target_modules": ["proj"]}, r"0.proj, which target_modules adapts"),
        ({"target_parameters": ["up"], "exclude_modules": ["experts"]}, r"all are left out"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_anything_changes(fields: dict[str, Any], words: str) -> None:
    base = net()
    with pytest.raises(TargetError, match=words):
        get_peft_model(base, config(**fields))
    assert all(p.requires_grad for p in base.parameters())
    assert type(base[0].experts) is Experts


def test_layers_to_transform_and_exclude_modules_hold_for_parameters() -> None:
    model = nn.ModuleDict({"h": net()})
    names = [t.name for t in plan(model, config(layers_to_transform=[1])).targets]
    assert names == ["h.1.experts.up", "h.1.experts.down"]
    made = plan(model, config(exclude_modules=["0.experts.up"]))
    assert [t.name for t in made.targets] == ["h.0.experts.down", "h.1.experts.up", "h.1.experts.down"]
    assert "up" not in (made.config.target_parameters or [])  # by which PEFT would take all


def test_ranks_and_alphas_follow_the_name_of_the_parameter() -> None:
    made = plan(net(), config(rank_pattern={"experts.up": 3}, alpha_pattern={r"1\.experts\.\w+": 5}))
    found = {t.name: (t.r, t.alpha) for t in made.targets}
    assert found == {
        "0.experts.up": (3, 8),
        "0.experts.down": (2, 8),
        "1.experts.up": (3, 5),
        "1.experts.down": (2, 5),
    }


def test_the_plan_says_how_much_of_the_experts_stays_as_it_is() -> None:
    made = plan(net(), LoraConfig(r=2, target_modules=["proj"]))
    total = sum(p.numel() for p in net().parameters())
    left = 4 * E * WIDTH * INNER
    assert (made.experts.weights, made.experts.parameters) == (4, left)
    assert f"not adapted: 4 expert weights, {left} parameters, {100 * left / total:.1f} % of the model" in str(made)
    assert not plan(net(), config()).experts.weights


def test_dropout_that_does_not_reach_the_experts_is_said() -> None:
    made = plan(net(), config(target_modules=["proj"], lora_dropout=0.1))
    assert "lora_dropout does not reach 4 of the targets" in str(made)


def test_a_folder_is_inspected_expert_by_expert(tmp_path: Path) -> None:
    from loraloom.lora.inspection import inspect

    model = get_peft_model(net(), config(rank_pattern={"experts.up": 4}, alpha_pattern={"experts.down": 6}))
    model.save_pretrained(tmp_path)
    updates = {update.name: update for update in inspect(tmp_path).updates}
    assert set(updates) == set(model.lora_layers)
    for name, layer in model.lora_layers.items():
        delta = layer.get_delta_weight("default")
        assert (updates[name].r, updates[name].scale) == (layer.r["default"], layer.scaling["default"])
        assert updates[name].norm == pytest.approx(float(delta.norm()))
        wanted = torch.linalg.svdvals(delta).square().sum(0).sqrt()
        found = torch.tensor(updates[name].singular_values, dtype=torch.float64)
        size = min(len(found), len(wanted))  # what one has more is zero
        torch.testing.assert_close(found[:size], wanted[:size])


def test_the_doctor_says_which_experts_stay_as_they_are_and_takes_wrappers_of_one_module_for_one_adapter() -> None:
    from loraloom.report.sentences import sentence
    from loraloom.training.preflight import doctor

    kinds = {found.kind for found in doctor.examine(get_peft_model(net(), config()))}
    assert "experts" not in kinds  # and that it is no model with LoRA already
    found = doctor.examine(get_peft_model(net(), config(target_modules=["proj"], target_parameters=["up"])))
    (text,) = [sentence(one) for one in found if one.kind == "experts"]
    assert "2 expert weights" in text
    assert "target_parameters=['down']" in text


def test_half_precision_experts_answer_merged_as_they_do_with_the_adapter_beside_them() -> None:
    model = get_peft_model(net().bfloat16(), config())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    x = X.bfloat16()
    wanted = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted, rtol=1e-2, atol=1e-2)
    model.unmerge_adapter()
    assert torch.equal(model(x), wanted)
