"""What is compared, one small function for each check.

A check returns a short note (a figure, or "") where all is well, raises ``Differs`` where loraloom and its reference
do not agree, and ``NotHere`` where the question does not arise; any other error is a failure too.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoo.cell import EFFECT, Cell, fill
from zoo.compare import Differs, distance, gradients, live, live_theirs, loss_of, outputs, same, same_all
from zoo.inputs import ROWS, batch_of
from zoo.kinds import KINDS
from zoo.packs import PACKED, ignores_padding, packed_batch, trained

#: Shares of the larger figure: models compute parts in float32 even where their weights are float64.
LOGITS, GRADIENTS, STEPS = 1e-5, 1e-4, 1e-3
RATE = 1e-3


class NotHere(Exception):
    """The question does not arise for this model; the message says why."""


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
    loss_of(ours, cell.step).backward()
    loss_of(theirs, cell.step).backward()
    return f"{same_all('gradient', gradients(live(ours)), gradients(live_theirs(theirs)), GRADIENTS):.0e}"


def steps(cell: Cell) -> str:
    """Three AdamW steps end at the same weights."""
    ended = []
    eps = 1.0
    for model, tensors_of in ((cell.theirs(), live_theirs), (cell.ours(), live)):
        tensors = tensors_of(model)
        start = {k: t.detach().clone() for k, t in tensors.items()}
        if not ended:  # gradients that are rounding alone must not become steps
            loss_of(model, cell.step).backward()
            eps = max(0.1 * max(float(g.abs().max()) for g in gradients(tensors).values()), 1e-12)
            model.zero_grad()
        optimizer = torch.optim.AdamW(list(tensors.values()), lr=RATE, eps=eps)
        for _ in range(3):
            loss_of(model, cell.step).backward()
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
        batch = cell.step
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
    if any(hasattr(module, "_requires_grad") for module in model.modules()):  # wav2vec2's kin do it themselves
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _generated(base, batch)
        except Exception as error:  # from pictures, in a form that only its processor knows
            batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
            if not batch:
                raise NotHere(f"the plain model does not: {type(error).__name__}: {error}"[:200]) from error
        theirs, ours = (_generated(model, batch) for model in (cell.peft, cell.ours()))
    worst = [same(f"token {i}", a, b, LOGITS) for i, (a, b) in enumerate(zip(ours.scores, theirs.scores, strict=True))]
    if not torch.equal(ours.sequences, theirs.sequences):
        raise Differs("other tokens")
    return f"{max(worst):.0e}"


def _generated(model: Any, batch: Mapping[str, Tensor]) -> Any:
    return model.generate(
        **batch,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        use_cache=True,
        num_beams=1,
        output_scores=True,
        return_dict_in_generate=True,
    )


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


def pack(cell: Cell) -> str:
    """Three adapters of unlike rank, dropout and row lengths train in a pack as each alone."""
    kind = KINDS[cell.kind]
    if not kind.packs:
        raise NotHere("a pack is for models of text")
    if cell.kind == "seq2seq" and not getattr(cell._base.config, "is_encoder_decoder", False):
        raise NotHere("a decoder alone, of sound and text")
    even = "bbox" in cell.batch or not ignores_padding(cell)
    batches = {name: packed_batch(cell, name, even) for name in PACKED}
    together = trained(cell, batches)
    worst = 0.0
    for name in PACKED:
        ((loss, grads),) = trained(cell, {name: batches[name]}).values()
        worst = max(worst, same(f"loss of {name}", *map(torch.tensor, (together[name][0], loss)), LOGITS))
        worst = max(worst, same_all(f"gradient of {name}", together[name][1], grads, GRADIENTS))
    return f"{worst:.0e}" + (
        " (rows of one length: a longer row changes the answer of the model itself)" if even else ""
    )


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
