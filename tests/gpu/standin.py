"""A stand-in for a GPU: torch's fake tensors on a device that no machine has, called ``card``.

Nothing is computed, and all else is as on a GPU: tensors of two devices do not mix, a backward runs on a thread of the
device's own, and whoever asks for a number waits. This file makes the device and notes each wait with its line; it
changes the process for good, so it runs in one of its own (``python standin.py [SCENARIO ...]`` prints what it met).
"""

from __future__ import annotations

import collections
import json
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

CARD = "card"
aten = torch.ops.aten
_ASK = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}
_COPY = {aten._to_copy.default, aten.copy_.default}
_SOURCE = str(Path(__file__).resolve().parents[2] / "src")


class Waits(TorchDispatchMode):
    """Answers what a fake tensor cannot, a number that is asked for, and counts by line where the device is waited for.

    Numbers are 0.5, truth values true, whole numbers ``count`` but 0 for a place, and all of a mask is set. A copy to
    the processor waits, and so does one from its ordinary memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.places: collections.Counter[str] = collections.Counter()
        self._within = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func in _ASK and first is not None:
            if first.device.type == CARD:
                self._note()
            return self._answer(func, first, args, kwargs)
        if func is aten.index.Tensor:
            args = (args[0], [place for one in args[1] for place in self._places_of(one)])
        out = func(*args, **kwargs)
        if func is aten.argmax.default:
            out.is_place = True
        if func in _COPY and isinstance(out, Tensor):
            source = args[1] if func is aten.copy_.default else first
            assert isinstance(source, Tensor)
            if source.device.type != out.device.type and source.numel():
                self._note()
        return out

    def _places_of(self, index: Tensor | None) -> list[Tensor | None]:
        """A mask as the numbers of its places, which the device is waited for."""
        if index is None or index.dtype is not torch.bool:
            return [index]
        if index.device.type == CARD:
            self._note()
        return [torch.zeros(index.numel(), dtype=torch.long, device=index.device) for _ in range(index.dim())]

    def _answer(self, func: Any, first: Tensor, args: Any, kwargs: Any) -> Any:
        if func is aten.nonzero.default:
            return torch.zeros(first.numel(), first.dim(), dtype=torch.long, device=first.device)
        if func is aten.equal.default:
            return True
        try:
            return func(*args, **kwargs)  # known to torch.tensor(3), for one
        except DataDependentOutputException:
            if first.dtype is torch.bool or hasattr(first, "is_place"):
                return first.dtype is torch.bool  # a place is 0
            return 0.5 if first.dtype.is_floating_point else self.count

    @contextmanager
    def once(self) -> Iterator[None]:
        """However many operations are in it, the device is waited for once."""
        self._note()
        self._within = True
        try:
            yield
        finally:
            self._within = False

    def _note(self) -> None:
        if self._within:
            return
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(_SOURCE):
            frame = frame.f_back
        self.places[f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}" if frame else "elsewhere"] += 1


class _Mode(FakeTensorMode):
    avoid_device_init = True  # there is none

    def __deepcopy__(self, memo: Any) -> _Mode:
        return self  # a copy of a tensor is of the same


class _Module(_DummyBackendModule):
    """What gradient checkpointing asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


@contextmanager
def card() -> Iterator[Waits]:
    """Tensors made here are fake, and those of ``CARD`` are on a device. To be entered once in a process."""
    _setup_privateuseone_for_python_backend(CARD, _Module())
    waits, tolist, tensor = Waits(), FakeTensor.tolist, torch.tensor

    def listed(fake: FakeTensor) -> Any:
        with waits.once() if fake.device.type == CARD else nullcontext():
            return tolist(fake)

    def brought(data: Any, *, device: Any = "cpu", **options: Any) -> Tensor:  # torch's own would make it on the device
        with waits.once() if torch.device(device or "cpu").type == CARD else nullcontext():
            return tensor(data, **options).to(device)

    fake = mock.patch.object(FakeTensor, "tolist", listed), mock.patch.object(torch, "tensor", brought)
    with _Mode(allow_non_fake_inputs=False), waits, fake[0], fake[1]:
        yield waits


# -- what runs on it ----------------------------------------------------------------------------------------------

VOCABULARY, ROWS, TOKENS = 64, 2, 8
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
LM: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
Scenario = Callable[[Waits], None]
SCENARIOS: dict[str, tuple[Scenario, int]] = {}


def scenario(count: int = TOKENS - 1) -> Callable[[Scenario], Scenario]:
    """Waits are those of its last step; ``count`` answers how many labels a row has."""

    def note(function: Scenario) -> Scenario:
        SCENARIOS[function.__name__] = function, count
        return function

    return note


def llama(dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(CARD):
        model = LlamaForCausalLM._from_config(LlamaConfig(vocab_size=VOCABULARY, **SIZES), dtype=dtype)
    assert model.dtype is dtype
    return model


def batch(rows: int = ROWS) -> dict[str, Tensor]:
    ids = torch.zeros(rows, TOKENS, dtype=torch.long, device=CARD)
    return {"input_ids": ids, "labels": ids}


def packed(base: Any, dropouts: tuple[float, ...] = (0.0, 0.1, 0.2), task: dict[str, Any] = LM) -> Any:
    from loraloom import LoraConfig, Pack

    ranks = (4, 16, 24)
    configs = {name: LoraConfig(r=r, lora_dropout=p, **task) for name, r, p in zip("abc", ranks, dropouts, strict=True)}
    return Pack(base, configs)


def steps(waits: Waits, pack: Any, given: dict[str, dict[str, Tensor]], number: int = 2) -> list[Any]:
    from loraloom.engine.flat_adamw import FlatAdamW

    optimizers = [FlatAdamW([(p, 1.0) for p in pack.parameters_of(name).values()], 0.01) for name in given]
    for _ in range(number):
        waits.places.clear()
        pack.backward(given)
        assert all(p.grad is None or p.grad.device.type == CARD for p in pack.model.parameters())
        for optimizer in optimizers:
            optimizer.step(1e-3, 1e9)
    return optimizers


@scenario()
def a_pack(waits: Waits) -> None:
    pack = packed(llama())
    steps(waits, pack, {"a": batch(1), "b": batch(), "c": batch()})  # two side by side, one alone


@scenario()
def a_slot_with_a_loss_scale(waits: Waits) -> None:
    from loraloom import LoraConfig, Pack
    from loraloom.data.example import Example
    from loraloom.engine.loop import advance
    from loraloom.engine.slot import Slot

    pack = Pack(llama(torch.float16), {"a": LoraConfig(lora_dropout=0.1, bias="none", **LM)})
    rows = [Example([1] * TOKENS, [1] * TOKENS) for _ in range(ROWS)]
    slot = Slot("a", pack.parameters_of("a"), rows, steps=9, batch_size=ROWS, learning_rate=1e-3, scaled=True)
    for _ in range(2):
        waits.places.clear()
        advance(pack, [slot])
    assert not slot.failure


@scenario()
def rows_in_any_order(waits: Waits) -> None:
    model = packed(llama(torch.float32)).model.train()
    for _ in range(2):
        waits.places.clear()
        out = model(**batch(5), adapter_names=["c", "a", "__base__", "a", "b"])
        out.loss.backward()


def _checkpointed(waits: Waits, kind: str) -> None:
    from loraloom.models import activation_checkpointing

    base = llama(torch.float32)
    pack = packed(base)
    if kind == "own":
        activation_checkpointing.enable(pack.model)
    else:
        base.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        base.enable_input_require_grads()
        for layer in base.model.layers:
            layer.training = True
    steps(waits, pack, {name: batch() for name in "bc"}, 1 if kind == "reentrant" else 2)


@scenario()
def checkpointing(waits: Waits) -> None:
    _checkpointed(waits, "own")


@scenario()
def reentrant_checkpointing(waits: Waits) -> None:
    _checkpointed(waits, "reentrant")


@scenario()
def a_classifier_with_heads_and_biases(waits: Waits) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device(CARD):
        base = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=3, **SIZES))
    task = {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "word_embeddings"], "bias": "lora_only"}
    labels = torch.zeros(ROWS, dtype=torch.long, device=CARD)
    steps(waits, packed(base, task=task), {name: {**batch(), "labels": labels} for name in "abc"})


@scenario(count=TOKENS)
def an_encoder_and_a_decoder(waits: Waits) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    with torch.device(CARD):
        base = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))
    task = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v", "wi"]}
    steps(waits, packed(base, task=task), {name: batch() for name in "abc"})


@scenario()
def an_optimizer_that_goes_on(waits: Waits) -> None:
    from loraloom.engine.optimizers import build

    for name in ("adamw", "AdamW", "NAdam"):
        given = {"fused": True} if name == "AdamW" else {}
        one, two = ({"p": (torch.nn.Parameter(torch.ones(3, 2, device=CARD)), 1.0)} for _ in range(2))
        first, second = (build(name, parameters, 0.0, given) for parameters in (one, two))

        def step(optimizer: Any, parameters: Any) -> None:
            parameters["p"][0].grad = torch.ones(3, 2, device=CARD)
            optimizer.step(1e-3, 1e9)

        step(first, one)
        second.load_state_dict({key: value.to("cpu") for key, value in first.state_dict().items()})  # as from a file
        devices = [{k: v.device.type for k, v in o.state_dict().items()} for o in (first, second)]
        assert devices[0] == devices[1], (name, devices)
        step(second, two)
    waits.places.clear()


@scenario()
def merging(waits: Waits) -> None:
    model = packed(llama()).model.eval()
    model.merge_adapter(["a", "b"])
    model(**batch())
    model.unmerge_adapter()
    waits.places.clear()


@contextmanager
def _taken_for_real() -> Iterator[None]:
    """The type of a fake parameter is another, and layers look at it to see whether a weight is quantised.

    Whether a model sees later tokens, no fake numbers can tell.
    """
    from loraloom.engine import gradient_probe
    from loraloom.lora import frozen

    ahead = gradient_probe._reads_ahead

    def kind(value: Any) -> type:
        return torch.nn.Parameter if type(value) is FakeTensor and hasattr(value, "_is_param") else type(value)

    def never(*args: Any) -> bool:
        return ahead(*args) and False

    with mock.patch.object(frozen, "type", kind, create=True), mock.patch.object(gradient_probe, "_reads_ahead", never):
        yield


def _threads() -> tuple[set[int], Any]:
    """Threads on which projections are differentiated, from now on."""
    from loraloom.lora import functional

    seen: set[int] = set()
    backward = functional._Projections.backward

    def noted(ctx: Any, *grads: Any) -> Any:
        seen.add(threading.get_ident())
        return backward(ctx, *grads)

    return seen, mock.patch.object(functional._Projections, "backward", staticmethod(noted))


def main() -> None:
    found = {}
    with card() as waits, _taken_for_real():
        for name in sys.argv[1:] or SCENARIOS:
            function, waits.count = SCENARIOS[name]
            seen, noted = _threads()
            try:
                with noted:
                    function(waits)
                elsewhere = bool(seen) and threading.get_ident() not in seen
                found[name] = {"waits": dict(waits.places), "backward on another thread": elsewhere}
            except Exception as error:
                text = f"{type(error).__name__}: {error}"[:300]
                lines = traceback.extract_tb(error.__traceback__)
                ours = [line for line in lines if line.filename.startswith(_SOURCE)] or lines
                found[name] = {"error": text, "at": [f"{Path(o.filename).name}:{o.lineno} {o.name}" for o in ours[-4:]]}
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
