"""What belongs to a forward stays with it: in other threads, in repetitions, and whatever is set meanwhile."""

from __future__ import annotations

import asyncio
import copy
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loraloom import LoraConfig, PeftModel, get_peft_model
from loraloom.errors import AdapterError


@pytest.fixture(autouse=True)
def _nothing_was_compiled() -> None:
    """Threads are tried as in a process without compiled code, whatever tests ran before."""
    if (dynamo := sys.modules.get("torch._dynamo.utils")) is not None:
        dynamo.counters.clear()


SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = transformers.LlamaConfig(vocab_size=50, max_position_embeddings=32, **SHAPE)
BERT = transformers.BertConfig(
    vocab_size=50,
    max_position_embeddings=32,
    num_labels=3,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    **SHAPE,
)
TOKENS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(0))


def config(**fields: object) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **fields})


def made(base: Any = LLAMA, **fields: object) -> PeftModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(base) if base is LLAMA else transformers.BertModel(base)
    model = get_peft_model(model.double(), config(**fields), adapter_name="a")
    model.add_adapter("b", config(**fields, lora_alpha=3))
    return model


def in_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def grads(model: PeftModel) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def answer(model: PeftModel, **options: Any) -> Tensor:
    out = model(input_ids=TOKENS, **options)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


# -- repetitions by activation checkpointing ----------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("base", [LLAMA, BERT], ids=["llama", "bert"])
def test_a_backward_in_another_thread_repeats_its_own_forward(base: Any, reentrant: bool) -> None:
    """Of two models at once, each forward by a route that is over, and after the active adapter has changed."""
    names = ["b", "a", "b"]
    plain = made(base, lora_dropout=0.25).train()
    models = [copy.deepcopy(plain), copy.deepcopy(plain)]
    for model in (plain, *models):
        for name, module in model.named_modules():
            module.training = ".lora_dropout" in name or not isinstance(module, nn.Dropout)
        model.enable_input_require_grads()
    for model in models:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})

    def forward(model: PeftModel) -> Tensor:
        torch.manual_seed(3)
        return answer(model, adapter_names=names).square().sum()

    for _ in range(2):  # twice in a row: the second time layers are computed together
        forward(plain).backward()
        wanted = grads(plain)
        losses = [forward(model) for model in models]
        for model in models:
            model.set_adapter("b")
            answer(model, adapter_names=["a", "a", "b"])
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for model in models:
            found = grads(model)
            assert found.keys() == wanted.keys()
            for name, grad in found.items():
                torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("targets", [None, ["query", "value"], ["query", "key"], ["key", "value", "dense"]])
def test_layers_that_read_the_checkpointed_input_itself_train_step_after_step(targets: Any, reentrant: bool) -> None:
    """BERT has no norm before its projections: a repetition gives them the very tensor that the forward gave."""
    plain, model = made(BERT, target_modules=targets), made(BERT, target_modules=targets)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for one in (plain, model):
        one.train().enable_input_require_grads()
        for module in one.modules():
            module.training = module.training and not isinstance(module, nn.Dropout)
    for _ in range(3):
        for one in (plain, model):
            answer(one).square().sum().backward()
        wanted = grads(plain)
        for name, grad in grads(model).items():
            torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-10)


def test_a_repetition_after_another_adapter_became_active_is_that_of_its_forward() -> None:
    model = made().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for call in (model, model.get_base_model()):  # by way of the PeftModel, and past it
        model.set_adapter("a")
        loss = call(input_ids=TOKENS).logits.square().sum()
        model.set_adapter("b")
        loss.backward()
        assert {name.split(".")[-2] for name in grads(model)} == {"a"}


@pytest.mark.parametrize("drop", [0.0, 0.25])
def test_a_block_around_several_steps_and_calls_past_the_model_repeat_their_own_forward(drop: float) -> None:
    """A backward inside the block, or between calls by what is set, changes nothing of the forwards after it."""
    found = []
    for checkpointed in (False, True):
        model = made(lora_dropout=drop).train()
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inner, steps = model.get_base_model(), []
        torch.manual_seed(1)
        with model.base_model.lora_routed(["b", "a", "b"]):
            for _ in range(2):
                inner(TOKENS, labels=TOKENS).loss.backward()
                steps.append(grads(model))
        first = inner(TOKENS, labels=TOKENS).loss
        model.set_adapter("b")
        losses = [inner(TOKENS, labels=TOKENS).loss]
        first.backward()
        losses.append(inner(TOKENS, labels=TOKENS).loss)
        for loss in losses:
            loss.backward()
            steps.append(grads(model))
        found.append(steps)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("outer", [False, True], ids=["one", "nested"])
def test_a_region_without_gradients_that_begins_with_a_layer_repeats_its_own_forward(outer: bool) -> None:
    """Its node is made before any layer of it is called: inside another repetition, and in calls past the model."""
    found = []
    for checkpointed in (False, True):
        model = made().train()
        inner, steps = model.get_base_model().model.layers[0].mlp, []
        x = torch.randn(3, 7, 16, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()

        def region(call: Any, x: Tensor, checkpointed: bool = checkpointed) -> Tensor:
            return checkpoint(call, x, use_reentrant=True) if checkpointed else call(x)

        def both(x: Tensor, inner: Any = inner, region: Any = region) -> Tensor:
            return region(inner, region(inner, x)) if outer else inner(x)

        losses = []
        for names in (["b", "a", "b"], ["a", "a", "b"]):
            with model.base_model.lora_routed(names, inputs=[x]):
                losses.append(region(both, x).square().sum())
        for active in ("b", "a"):
            model.set_adapter(active)
            losses.append(region(both, x).square().sum())
        for loss in losses:
            loss.backward()
            steps.append(grads(model))
        found.append(steps)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_numbers_of_nodes_that_repetitions_made_in_another_thread_are_free_for_later_forwards() -> None:
    """Autograd counts nodes in each thread: those of CUDA's threads have the numbers of later steps."""

    def train(model: PeftModel) -> list[dict[str, Tensor]]:
        steps = []
        with ThreadPoolExecutor(1) as backwards:
            for step in range(4):
                names = ["b", "a", "b"] if step % 2 else ["a", "a", "b"]
                loss = model(TOKENS, labels=TOKENS, adapter_names=names).loss
                backwards.submit(loss.backward).result()
                steps.append(grads(model))
        return steps

    found = []
    for checkpointed in (False, True):
        model = made().train()
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        found.append(in_thread(lambda model=model: train(model)))  # a thread that counts from zero
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_a_part_of_a_model_that_is_checkpointed_shares_nothing_with_the_rest() -> None:
    """One reader of a tensor inside a checkpointed region and one outside."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + torch.utils.checkpoint.checkpoint(self.b, x, use_reentrant=False)

    model = get_peft_model(Half(), LoraConfig(target_modules=["a", "b"]))
    x = torch.randn(2, 4, requires_grad=True)
    for _ in range(3):
        model(x).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_jobs_that_train_in_threads_of_their_own_one_after_the_other_are_not_taken_for_each_other(reentrant) -> None:
    model = made().train()
    model.enable_input_require_grads()
    jobs = [["b"] * 3, ["a", "b", "a"], ["a"] * 3]
    wanted = []
    for names in jobs:
        answer(model, adapter_names=names).square().sum().backward()
        wanted.append(grads(model))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for names, gradients in zip(jobs * 2, wanted * 2, strict=True):
        in_thread(lambda names=names: answer(model, adapter_names=names).square().sum().backward())
        found = grads(model)
        assert found.keys() == gradients.keys()
        for name, grad in found.items():
            torch.testing.assert_close(grad, gradients[name], rtol=1e-9, atol=1e-10)


# -- threads ------------------------------------------------------------------------------------------------------


def test_two_threads_that_name_adapters_get_their_own_rows() -> None:
    model = made().eval()
    cases = [["a", "b", "a"], ["b", "b", "b"], ["__base__", "a", "b"], ["a", "a", "__base__"]]
    wanted = [answer(model, adapter_names=names).detach() for names in cases]
    barrier = threading.Barrier(4)

    def work(number: int) -> list[Tensor]:
        barrier.wait()
        return [answer(model, adapter_names=cases[number]).detach() for _ in range(10)]

    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(work, range(4))):
            for one in found:
                torch.testing.assert_close(one, wanted[number], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(answer(model), answer(model, adapter_names=["a"] * 3), rtol=0, atol=0)


class Gate:
    """Holds a forward until it may go."""

    def __init__(self) -> None:
        self.inside, self.go = threading.Event(), threading.Event()

    def wait(self, seconds: float) -> None:
        self.inside.set()
        self.go.wait(seconds)


class Meeting(nn.Module):
    """A model whose forward waits in its middle until another forward is there as well."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.barrier: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        if self.barrier is not None:
            self.barrier.wait(30)
        return self.norm(y + self.k(x))


def meet(model: PeftModel, calls: list[Callable[[], Tensor]]) -> list[Any]:
    """The answers, or errors, of calls that stand in the middle of the model at the same time."""
    model.get_base_model().barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Tensor]) -> Any:
        try:
            return call()
        except AdapterError as error:
            model.get_base_model().barrier.abort()
            return error
        except threading.BrokenBarrierError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        found = list(pool.map(run, calls))
    model.get_base_model().barrier = None
    return found


def meeting(**fields: object) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Meeting(), config(target_modules=["q", "k"], **fields), adapter_name="a")
    model.add_adapter("b", config(target_modules=["q", "k"], **fields))
    return model


def test_forwards_that_meet_inside_one_adapter_do_not_take_each_others_projections() -> None:
    model = meeting()
    x = torch.randn(2, 4)
    for _ in range(2):
        model(x).sum().backward()  # now k is computed with q
    wanted = model(x).detach()
    for found in meet(model, [lambda: model(x), lambda: model(x)]):
        torch.testing.assert_close(found.detach(), wanted)


def test_a_thread_that_names_rows_or_disables_leaves_the_others_alone() -> None:
    model = meeting()
    x = torch.randn(2, 4)

    def disabled() -> Tensor:
        with model.disable_adapter():
            return model(x)

    calls = [lambda: model(x), lambda: model(x, adapter_names=["b", "a"]), disabled]
    wanted = [call().detach() for call in calls]
    for found, one in zip(meet(model, calls), wanted, strict=True):
        torch.testing.assert_close(found.detach(), one)


def test_an_adapter_that_another_thread_made_active_is_never_taken_for_ones_own() -> None:
    model = made().eval()
    model.set_adapter("a")
    before = answer(model)
    in_thread(lambda: model.set_adapter("b"))
    with pytest.raises(AdapterError, match=r"set_adapter: this thread set \['a'\], and another one \['b'\] since"):
        answer(model)
    model.set_adapter("a")
    torch.testing.assert_close(answer(model), before, rtol=0, atol=0)
    # A thread that never set anything follows what the model is set to.
    torch.testing.assert_close(in_thread(lambda: answer(model).detach()), before.detach(), rtol=1e-9, atol=1e-12)


def test_tasks_of_an_event_loop_that_take_turns_inside_their_blocks_get_their_own_rows() -> None:
    model = made().eval()
    inner, cases = model.get_base_model(), [["a"] * 3, ["b", "a", "b"], ["b"] * 3, ["__base__", "a", "b"]]
    wanted = [answer(model, adapter_names=names) for names in cases]

    async def later() -> Tensor:
        await asyncio.sleep(0)
        return inner(TOKENS).logits

    async def one(names: list[str]) -> list[Tensor]:
        with model.base_model.lora_routed(names):
            await asyncio.sleep(0)
            return [inner(TOKENS).logits, await later(), await asyncio.create_task(later())]

    async def everything() -> list[Any]:
        return await asyncio.gather(*map(one, cases))

    for found, right in zip(asyncio.run(everything()), wanted, strict=True):
        for logits in found:
            torch.testing.assert_close(logits, right, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(inner(TOKENS).logits, wanted[0], rtol=1e-9, atol=1e-12)  # "a" is set


def test_forwards_of_two_threads_that_end_crosswise_leave_compiled_code_what_the_model_is_set_to() -> None:
    model = made()
    dispatcher = model.base_model.lora_dispatcher
    first, second = model.base_model.lora_routed(["b"]), model.base_model.lora_routed(["a", "b"])
    first.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        pool.submit(second.__exit__, None, None, None).result()
    assert dispatcher.compiled is dispatcher.default


def test_the_layers_do_not_change_under_a_forward_of_another_thread() -> None:
    model = meeting()
    x = torch.randn(2, 4)
    changes: dict[str, Callable[[], Any]] = {
        "merge_adapter": model.merge_adapter,
        "merge_and_unload": model.merge_and_unload,
        "unload": model.unload,
        "delete_adapter": lambda: model.delete_adapter("a"),
    }
    for name, change in changes.items():
        gate = model.get_base_model().barrier = Gate()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(lambda: model(x).detach())
            assert gate.inside.wait(30)
            with pytest.raises(AdapterError, match=f"{name}: another thread runs this model"):
                change()
            model.add_adapter(name, config(target_modules=["q"]))  # changes nothing for those that run
            gate.go.set()
            running.result()
        model.get_base_model().barrier = None


def test_threads_that_need_other_biases_are_refused() -> None:
    model = meeting(bias="all")
    x = torch.randn(2, 4)
    with torch.no_grad():
        model.get_base_model().norm.bias.add_(1)
    calls = [lambda: model(x, adapter_names=["a", "a"]), lambda: model(x, adapter_names=["b", "b"])]
    found = meet(model, calls)
    assert any(isinstance(one, AdapterError) and "biases that adapters train" in str(one) for one in found)
    for call in calls:  # one after the other
        call()


def test_a_forward_by_names_that_fails_leaves_nothing_behind() -> None:
    model = made().eval()
    before = answer(model).detach()
    with pytest.raises(IndexError):
        model(input_ids=TOKENS + 50, adapter_names=["a", "b", "a"])
    with pytest.raises(AdapterError):
        answer(model, adapter_names=["a"] * 2)
    torch.testing.assert_close(answer(model), before, rtol=0, atol=0)
