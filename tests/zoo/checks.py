"""What is compared, one small function for each check, on one model type, kind and choice of targets.

A check returns a short note (a figure, or "") where all is well, raises ``Differs`` where loraloom and its reference
do not agree, and ``NotHere`` where the question does not arise; any other error is a failure too.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from zoo.build import build
from zoo.inputs import ROWS, batch_of
from zoo.kinds import KINDS

#: Shares of the larger figure: models compute parts in float32 even where their weights are float64.
LOGITS, GRADIENTS, STEPS = 1e-5, 1e-4, 1e-3
#: An adapter that moves the logits by less would prove nothing.
EFFECT = 0.01
RATE = 1e-3


class Differs(AssertionError):
    """The two do not agree."""


class NotHere(Exception):
    """The question does not arise for this model; the message says why."""


@dataclass
class Cell:
    """One model type, kind and choice of targets: ``default`` or ``all-linear``."""

    model_type: str
    kind: str
    targets: str
    dtype: torch.dtype = torch.float64

    @cached_property
    def _base(self) -> nn.Module:
        return build(self.model_type, self.kind, self.dtype)

    def base(self) -> nn.Module:
        return copy.deepcopy(self._base)

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        return batch_of(self._base, self.kind)

    @cached_property
    def rows(self) -> dict[str, Any]:
        """The batch of a step: nobody keeps keys and values while training."""
        known = inspect.signature(self._base.forward).parameters
        return {**self.batch, "use_cache": False} if "use_cache" in known else self.batch

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The arguments of a ``LoraConfig`` in both libraries."""
        import loraloom

        task = KINDS[self.kind].task
        fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": task}
        if self.targets != "default" or self._peft_has_default:
            wanted = None if self.targets == "default" else self.targets
            if not self._peft_refuses(wanted):
                return {**fields, "target_modules": wanted}
            fields["target_modules"] = wanted
        planned = loraloom.plan(self._base, loraloom.LoraConfig(**fields))
        if self.targets == "default":
            return {**fields, "target_modules": [target.name for target in planned.targets]}
        names = {name: getattr(planned.config, name, None) for name in ("target_modules", "target_parameters")}
        return {**fields, **names}

    @property
    def _peft_has_default(self) -> bool:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT

        return getattr(self._base.config, "model_type", None) in PEFT

    def _peft_refuses(self, wanted: str | None) -> bool:
        """Where peft takes no default (Mixtral's kin), or not its own "all-linear" (Mamba's), or fails with it
        (routers, DeepSeek-V4's grouped layers), what we adapt is given to it by name."""
        import peft

        try:
            outputs(peft.get_peft_model(self.base(), peft.LoraConfig(r=4, target_modules=wanted)), self.batch)
        except Exception:
            return True
        return False

    def ours(self, *, filled: bool = True, **fields: Any) -> Any:
        import loraloom

        model = loraloom.get_peft_model(self.base(), loraloom.LoraConfig(**{**self.fields, **fields})).eval()
        if filled:
            fill(loraloom.get_peft_model_state_dict(model), self.strength)
        return model

    def theirs(self, *, filled: bool = True) -> Any:
        import peft

        model = peft.get_peft_model(self.base(), peft.LoraConfig(**copy.deepcopy(self.fields))).eval()
        if filled:
            fill(peft_tensors(model), self.strength)
        return model

    @cached_property
    def peft(self) -> Any:
        """Their model, filled, for checks that leave its numbers alone."""
        return self.theirs()

    @cached_property
    def wanted(self) -> Tensor:
        """What their model answers."""
        return outputs(self.peft, self.batch)

    @cached_property
    def strength(self) -> float:
        """How large an adapter's numbers must be to move the logits by over 1 %."""
        import loraloom

        with torch.no_grad():
            plain = outputs(self._base, self.batch)
            for strength in (0.1, 0.3, 1.0, 3.0):
                model = loraloom.get_peft_model(self.base(), loraloom.LoraConfig(**self.fields)).eval()
                fill(loraloom.get_peft_model_state_dict(model), strength)
                moved = distance(outputs(model, self.batch), plain)
                if moved > 2 * EFFECT:
                    return strength
        raise Differs(f"no adapter moves the logits by {EFFECT:.0%}: {moved:.1e}")


def peft_tensors(model: Any) -> dict[str, Tensor]:
    import peft

    found: dict[str, Tensor] = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return found


def fill(tensors: Mapping[str, Tensor], strength: float, salt: str = "") -> None:
    """Numbers that depend on a tensor's key alone; heads and biases are moved, not replaced."""
    with torch.no_grad():
        for key, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            source = torch.Generator().manual_seed(zlib.crc32((salt + key).encode()))
            noise = torch.randn(tensor.shape, generator=source, dtype=torch.float64)
            if "lora_" in key:
                tensor.copy_((noise * strength).to(tensor.dtype))
            elif "running_" not in key:
                tensor.add_((0.05 * noise).to(tensor.dtype))


FIRST = ("logits", "prediction_logits", "start_logits", "last_hidden_state", "text_embeds", "image_embeds",
         "logits_per_image", "pooler_output", "feature_maps", "reconstruction")  # fmt: skip


def output_of(out: Any) -> Tensor:
    """[rows, ...]: what a model answers."""
    if isinstance(out, Tensor):
        return out
    for name in FIRST:
        if name in out and out[name] is not None:
            found = out[name]
            if name == "start_logits" and "end_logits" in out and found.shape == out["end_logits"].shape:
                return torch.stack([found, out["end_logits"]], -1)
            return found[0] if isinstance(found, (list, tuple)) else found
    return next(v for v in out.values() if isinstance(v, Tensor) and v.is_floating_point())


def outputs(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return output_of(model(**batch, **options)).detach()


def loss_of(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Tensor:
    """A number that every answer has a say in: each with a weight of its own."""
    out = output_of(model(**batch, **options))
    out = torch.where(out.isfinite(), out, torch.zeros_like(out)).clamp(-1e6, 1e6)
    source = torch.Generator().manual_seed(7)
    return (out * torch.randn(out.shape, generator=source, dtype=torch.float64).to(out.dtype)).mean()


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest figure; places that are infinite must be so in both."""
    if found.shape != wanted.shape:
        raise Differs(f"shapes {tuple(found.shape)} and {tuple(wanted.shape)}")
    found, wanted = found.double(), wanted.double()
    odd = ~wanted.isfinite() | (wanted.abs() > 1e30)
    if not torch.equal(odd, ~found.isfinite() | (found.abs() > 1e30)):
        raise Differs("not finite at other places")
    found, wanted = found.masked_fill(odd, 0), wanted.masked_fill(odd, 0)
    if not wanted.numel():
        return 0.0
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def same(what: str, found: Tensor, wanted: Tensor, tolerance: float) -> float:
    far = distance(found, wanted)
    if not far <= tolerance:
        raise Differs(f"{what}: {far:.1e} of {tolerance:.0e}")
    return far


def gradients(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.zeros_like(t) if t.grad is None else t.grad.clone() for k, t in tensors.items()}


def same_all(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> float:
    """Every tensor, measured by the largest number among them all: a gradient that is rounding alone has no say."""
    if found.keys() != wanted.keys():
        raise Differs(f"{what}: other names: {sorted(found.keys() ^ wanted.keys())[:3]}")
    largest = max((float(t.abs().max()) for t in wanted.values() if t.numel()), default=0.0)
    if not largest > 0:
        raise Differs(f"{what}: all zero")
    worst = 0.0
    for key, tensor in wanted.items():
        far = float((found[key].double() - tensor.double()).abs().max()) / largest
        worst = max(worst, far)
        if not far <= tolerance:
            raise Differs(f"{what}: {key} {far:.1e} of {tolerance:.0e}")
    return worst


def live(model: Any, name: str = "default") -> dict[str, Tensor]:
    """Our adapter's trainable tensors under PEFT's keys."""
    return dict(model.adapter_parameters(name))


def live_theirs(model: Any) -> dict[str, Tensor]:
    """Their trainable tensors under the keys of the file, but for those that do nothing.

    peft adapts the last projection of torch's MultiheadAttention, which reads its weight and never calls it
    (torch/nn/modules/activation.py:1405).
    """
    idle = {
        id(parameter)
        for module in model.modules()
        if isinstance(getattr(module, "base_layer", None), nn.modules.linear.NonDynamicallyQuantizableLinear)
        for parameter in module.parameters()
    }
    by_pointer = {t.data_ptr(): key for key, t in peft_tensors(model).items()}
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in idle:
            found[by_pointer.get(parameter.data_ptr(), name)] = parameter
    return found


# -- the checks ---------------------------------------------------------------------------------------------------


def names(cell: Cell) -> str:
    """The same modules, tensors and number of trainable parameters as in peft."""
    ours, theirs = live(cell.ours(filled=False)), live_theirs(cell.theirs(filled=False))
    if ours.keys() != theirs.keys():
        only, lacks = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        raise Differs(f"only here {len(only)}: {only[:2]}; only in peft {len(lacks)}: {lacks[:2]}")
    shapes = [k for k in ours if ours[k].shape != theirs[k].shape]
    if shapes:
        raise Differs(f"shape of {shapes[0]}: {tuple(ours[shapes[0]].shape)}, {tuple(theirs[shapes[0]].shape)}")
    return str(sum(t.numel() for t in ours.values()))


def logits(cell: Cell) -> str:
    plain, found = outputs(cell.base(), cell.batch), outputs(cell.ours(), cell.batch)
    moved = distance(found, plain)
    if moved <= EFFECT:
        raise Differs(f"the adapter moves the logits by {moved:.1e} only")
    return f"{same('logits', found, cell.wanted, LOGITS):.0e}"


def exchange(cell: Cell) -> str:
    """An adapter's folder gives the same answers in the other library, both ways."""
    import peft

    import loraloom

    ours, theirs = cell.ours(), cell.peft
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        read = peft.PeftModel.from_pretrained(cell.base(), folder).eval()
        worst = same("peft reads ours", outputs(read, cell.batch), outputs(ours, cell.batch), LOGITS)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder, save_embedding_layers=False)
        mine = loraloom.PeftModel.from_pretrained(cell.base(), folder).eval()
        far = same("we read peft's", outputs(mine, cell.batch), cell.wanted, LOGITS)
    return f"{max(worst, far):.0e}"


def gradient(cell: Cell) -> str:
    ours, theirs = cell.ours(), cell.peft
    loss_of(ours, cell.rows).backward()
    loss_of(theirs, cell.rows).backward()
    return f"{same_all('gradient', gradients(live(ours)), gradients(live_theirs(theirs)), GRADIENTS):.0e}"


def steps(cell: Cell) -> str:
    """Three AdamW steps end at the same weights."""
    ended = []
    eps = 1.0
    for model, tensors_of in ((cell.theirs(), live_theirs), (cell.ours(), live)):
        tensors = tensors_of(model)
        start = {k: t.detach().clone() for k, t in tensors.items()}
        if not ended:  # gradients that are rounding alone must not become steps
            loss_of(model, cell.rows).backward()
            eps = max(0.1 * max(float(g.abs().max()) for g in gradients(tensors).values()), 1e-12)
            model.zero_grad()
        optimizer = torch.optim.AdamW(list(tensors.values()), lr=RATE, eps=eps)
        for _ in range(3):
            loss_of(model, cell.rows).backward()
            optimizer.step()
            optimizer.zero_grad()
        ended.append({k: t.detach() - start[k] for k, t in tensors.items()})
    return f"{same_all('steps', ended[1], ended[0], STEPS):.0e}"


def merge(cell: Cell) -> str:
    """Merged weights answer as the adapter did; taken out again the base has its bits; merged for good, as peft's."""
    ours = cell.ours()
    wanted, before = outputs(ours, cell.batch), base_bits(ours)
    ours.merge_adapter()
    worst = same("merged", outputs(ours, cell.batch), wanted, LOGITS)
    ours.unmerge_adapter()
    after = base_bits(ours)
    changed = [k for k in before if not torch.equal(before[k], after[k])]
    if changed:
        raise Differs(f"unmerged: {changed[0]} has other bits")
    far = same("merge_and_unload", outputs(ours.merge_and_unload(), cell.batch), wanted, LOGITS)
    return f"{max(worst, far):.0e}"


def base_bits(model: Any) -> dict[str, Tensor]:
    return {k: t.detach().clone() for k, t in model.state_dict().items() if "lora_" not in k}


def disable(cell: Cell) -> str:
    import loraloom

    base = cell.base().requires_grad_(False)  # torch multiplies in another order where a weight is to be trained
    plain = outputs(base, cell.batch)
    ours = loraloom.get_peft_model(base, loraloom.LoraConfig(**cell.fields)).eval()
    fill(loraloom.get_peft_model_state_dict(ours), cell.strength)
    with ours.disable_adapter():
        found = outputs(ours, cell.batch)
    if not torch.equal(torch.nan_to_num(found), torch.nan_to_num(plain)):
        raise Differs(f"disabled: {distance(found, plain):.1e}")
    return ""


def _checkpointing(cell: Cell, use_reentrant: bool) -> str:
    """Two steps in a row, each with the gradients that it has without checkpointing."""
    base = cell._base
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise NotHere(f"{type(base).__name__}.supports_gradient_checkpointing is False")
    found = []
    for on in (False, True):
        model = cell.ours()
        inner = model.get_base_model()
        if on:
            inner.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        batch = cell.rows
        if use_reentrant:
            batch = requiring_gradients(inner, batch)
        model.train()
        for module in model.modules():  # a comparison needs models without chance and without statistics
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
                module.eval()
        rounds = []
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(3)
            loss_of(model, batch).backward()
            rounds.append(gradients(live(model)))
        found.append(rounds)
    worst = [same_all(f"step {i + 1}", found[1][i], found[0][i], GRADIENTS) for i in range(2)]
    return f"{max(worst):.0e}"


def requiring_gradients(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Reentrant checkpointing gives gradients to layers alone whose input requires them.

    As ``enable_input_require_grads``, which knows one table of words alone.
    """

    def hook(module: nn.Module, inputs: Any, out: Any) -> Any:
        if isinstance(out, tuple):  # ProphetNet's positions
            return out
        return out if out.requires_grad else out.requires_grad_(True).clone()

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(hook)
    if "input_values" in batch:  # models of sound do it themselves
        return dict(batch)
    return {
        k: v.clone().requires_grad_(True) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in batch.items()
    }


def checkpointing(cell: Cell) -> str:
    return _checkpointing(cell, use_reentrant=False)


def reentrant(cell: Cell) -> str:
    return _checkpointing(cell, use_reentrant=True)


def generation(cell: Cell) -> str:
    """The same tokens and scores as in peft, with a cache; rows of two adapters in one batch as each alone."""
    base = cell._base
    if not KINDS[cell.kind].generates or not base.can_generate():
        raise NotHere("does not generate")
    batch = {k: v for k, v in batch_of(base, cell.kind, lengths=(6, 6, 6)).items() if k != "decoder_input_ids"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": True, "num_beams": 1,
               "output_scores": True, "return_dict_in_generate": True}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = (m.generate(**batch, **options) for m in (cell.peft, cell.ours()))
    worst = [same(f"token {i}", a, b, LOGITS) for i, (a, b) in enumerate(zip(ours.scores, theirs.scores, strict=True))]
    if not torch.equal(ours.sequences, theirs.sequences):
        raise Differs("other tokens")
    return f"{max(worst):.0e}"


def _two(cell: Cell) -> Any:
    """A model with two filled adapters, ``default`` and ``other``."""
    import loraloom

    model = cell.ours()
    model.add_adapter("other", loraloom.LoraConfig(**{**cell.fields, "r": 2}))
    fill(loraloom.get_peft_model_state_dict(model, "other"), cell.strength, salt="other")
    return model.eval()


def rows(cell: Cell) -> str:
    """Each row of a batch of several adapters as in a batch that is that adapter's alone."""
    model = _two(cell)
    mixed = ["default", "other", "__base__"]
    found = outputs(model, cell.batch, adapter_names=mixed)
    alone = {name: outputs(model, cell.batch, adapter_names=[name] * ROWS) for name in mixed}
    if found.shape[0] % ROWS:
        raise NotHere(f"the answer has {found.shape[0]} rows")
    if distance(alone["default"], alone["other"]) <= EFFECT:
        raise Differs("both adapters answer alike")
    each = found.shape[0] // ROWS
    worst = [
        same(f"row {i} ({name})", found[i * each : (i + 1) * each], alone[name][i * each : (i + 1) * each], LOGITS)
        for i, name in enumerate(mixed)
    ]
    return f"{max(worst):.0e}"


#: adapter → (rank, dropout, lengths of its rows, seed of its dropout)
PACKED = {"a": (4, 0.0, (9, 9), 11), "b": (8, 0.3, (5,), 22), "c": (2, 0.1, (7, 7), 33)}


def pack(cell: Cell) -> str:
    """Three adapters of unlike rank, dropout and row lengths train in a pack as each alone."""
    kind = KINDS[cell.kind]
    if not kind.packs:
        raise NotHere("a pack is for models of text")
    if cell.kind == "seq2seq" and not getattr(cell._base.config, "is_encoder_decoder", False):
        raise NotHere("a decoder alone, of sound and text")
    even = "bbox" in cell.batch or not ignores_padding(cell)
    batches = {name: packed_batch(cell, name, even) for name in PACKED}
    together = _trained(cell, batches)
    worst = 0.0
    for name in PACKED:
        ((loss, grads),) = _trained(cell, {name: batches[name]}).values()
        worst = max(worst, same(f"loss of {name}", *map(torch.tensor, (together[name][0], loss)), LOGITS))
        worst = max(worst, same_all(f"gradient of {name}", together[name][1], grads, GRADIENTS))
    return f"{worst:.0e}" + (
        " (rows of one length: a longer row changes the answer of the model itself)" if even else ""
    )


def ignores_padding(cell: Cell) -> bool:
    """Whether a row answers alike with padding behind it: a property of the model, not of adapters."""
    short = batch_of(cell._base, cell.kind, lengths=(5,))
    padded = {k: v for k, v in short.items() if k != "attention_mask"}
    pad = getattr(cell._base.config, "pad_token_id", 0) or 0
    padded["input_ids"] = torch.nn.functional.pad(short["input_ids"], (0, 4), value=pad)
    padded["attention_mask"] = torch.nn.functional.pad(torch.ones_like(short["input_ids"]), (0, 4))
    for name in ("bbox",):
        if name in short:
            padded[name] = torch.nn.functional.pad(short[name], (0, 0, 0, 4))
    try:
        a, b = outputs(cell._base, short), outputs(cell._base, padded)
    except Exception:
        return False
    if a.shape != b.shape:
        b = b[:, : a.shape[1]]
    return distance(b, a) < 1e-6


def packed_batch(cell: Cell, name: str, even: bool) -> dict[str, Tensor]:
    _, _, lengths, seed = PACKED[name]
    if even:
        lengths = tuple(8 for _ in lengths)
    batch = batch_of(cell._base, cell.kind, seed=seed, lengths=lengths)
    source = torch.Generator().manual_seed(seed)
    shape = batch["input_ids"].shape
    classes = max(2, getattr(cell._base.config, "num_labels", 2))
    batch["labels"] = {
        "causal": lambda: batch["input_ids"].clone(),
        "seq-cls": lambda: torch.randint(0, classes, shape[:1], generator=source),
        "token-cls": lambda: torch.randint(0, classes, shape, generator=source),
        "question-answering": lambda: torch.randint(0, min(lengths), (shape[0], 2), generator=source),
        "seq2seq": lambda: torch.randint(4, 59, (shape[0], 5), generator=source),
    }[cell.kind]()
    batch.pop("decoder_input_ids", None) if cell.kind == "seq2seq" else None
    return batch


def _trained(cell: Cell, batches: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[float, dict[str, Tensor]]]:
    import loraloom

    configs = {
        name: loraloom.LoraConfig(**{**cell.fields, "r": PACKED[name][0], "lora_dropout": PACKED[name][1]})
        for name in batches
    }
    packed = loraloom.Pack(cell.base(), configs, seeds={name: PACKED[name][3] for name in batches}, pad_id=0)
    for name in batches:
        fill(loraloom.get_peft_model_state_dict(packed.model, name), cell.strength, salt=name)
    losses = packed.backward(batches, dropout_seeds={name: PACKED[name][3] for name in batches})
    if not all(abs(loss) < float("inf") for loss in losses.values()):
        raise Differs(f"losses {losses}")
    return {name: (losses[name], gradients(packed.parameters_of(name))) for name in batches}


CHECKS: dict[str, Callable[[Cell], str]] = {
    check.__name__: check
    for check in (names, logits, exchange, gradient, steps, merge, disable, checkpointing, reentrant, generation, rows,
                  pack)
}  # fmt: skip


@contextmanager
def quietly() -> Iterator[None]:
    import logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
