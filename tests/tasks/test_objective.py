"""Promises of the objective: a causal model is run up to its head, also one that scales or caps its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loraloom import LoraConfig, TaskType, get_peft_model, tasks
from loraloom.tasks.head_split import Split, Whole, split
from loraloom.tasks.objective import Objective

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 60, "head_dim": 8}
#: model type → (config, what it makes of its head's output)
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (SIZES, ""),
    "qwen2": ({**SIZES, "tie_word_embeddings": True}, ""),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 1}, ""),
    "opt": ({"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "vocab_size": 60}, ""),
    "gpt_neox": (SIZES, ""),
    "gemma2": ({**SIZES, "final_logit_softcapping": 3.0, "initializer_range": 0.5}, "capped at 3"),
    "gemma3_text": (SIZES, ""),
    "cohere": ({**SIZES, "logit_scale": 0.0625}, "scaled by 0.0625"),
    "granite": ({**SIZES, "logits_scaling": 8.0}, "scaled by 0.125"),
}  # fmt: skip
TARGETS = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]}


ALL = {"": slice(None)}


def adapted(family: str, **fields: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family][0])
    base = AutoModelForCausalLM.from_config(config).double()
    fields = {"target_modules": TARGETS.get(family, ["q_proj", "v_proj"]), "init_lora_weights": False, **fields}
    return get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **fields)).eval()


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (3, 9), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_models_own_on_every_family(family: str) -> None:
    model = adapted(family)
    inputs, labels = batch()
    objective = Objective(model, tasks.get("causal-lm"))
    assert isinstance(objective.way, Split)
    assert str(objective.way.logits) == FAMILIES[family][1]
    with model.base_model.lora_routed(["default"] * 3):
        out = objective.forward(inputs)
        found = objective.loss(out, labels)
        by_row = objective.row_losses(out, labels, ALL)
    logits = model(**inputs).logits
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-9, atol=1e-9)
    count = int((labels[:, 1:] != -100).sum())
    assert float(by_row.sum()) / count == pytest.approx(float(wanted), rel=1e-9)
    # transformers' own, which shifts and averages by itself
    torch.testing.assert_close(found.float(), model(**inputs, labels=labels).loss.float(), rtol=1e-5, atol=1e-5)

    parameters = list(model.adapter_parameters("default").values())
    a, b = (torch.autograd.grad(value, parameters) for value in (found, wanted))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("fields", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_with_an_adapter_or_a_copy_of_its_own_trains(fields: dict[str, Any]) -> None:
    model = adapted("llama", **fields)
    inputs, labels = batch()
    objective = Objective(model, tasks.get("causal-lm"))
    parameters = model.adapter_parameters("default")
    with model.base_model.lora_routed(["default"] * 3):
        found = torch.autograd.grad(objective.loss(objective.forward(inputs), labels), list(parameters.values()))
    logits = model(**inputs).logits
    wanted = torch.autograd.grad(
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), list(parameters.values())
    )
    assert any("lm_head" in key for key in parameters)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_looking_leaves_the_model_as_it_was() -> None:
    model = adapted("llama").train()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    split(model)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert {module.training for module in model.modules()} == {True}


def test_a_model_that_is_none_of_transformers_is_taken_whole() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, input_ids: torch.Tensor) -> Any:
            return type("Out", (), {"logits": self.out(self.embed(input_ids))})

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["out"]))
    assert isinstance(split(model), Whole)
    objective = Objective(model, tasks.get("causal-lm"))
    ids = torch.tensor([[1, 2, 3]])
    assert float(objective.loss(objective.forward({"input_ids": ids}), ids)) > 0


# Other tasks ----------------------------------------------------------------------------------------------

BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 60}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32}
HEAD = {"num_labels": 3}
CLASSES, TAGS, ANSWERS, SEQ2SEQ = TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS, TaskType.SEQ_2_SEQ_LM
AUTO = {CLASSES: "SequenceClassification", TAGS: "TokenClassification", ANSWERS: "QuestionAnswering"}
AUTO |= {SEQ2SEQ: "Seq2SeqLM"}
#: name → model type, its config, task, labels of three rows of nine tokens
OTHERS: dict[str, tuple[str, dict[str, Any], TaskType, Any]] = {
    "one class": ("bert", {**BERT, **HEAD, "problem_type": "single_label_classification"}, CLASSES, [2, 0, 1]),
    "one class, not said": ("bert", {**BERT, **HEAD}, CLASSES, [2, 0, 1]),
    "several classes": (
        "bert", {**BERT, **HEAD, "problem_type": "multi_label_classification"}, CLASSES,
        [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]],
    ),
    "several classes, not said": ("bert", {**BERT, **HEAD}, CLASSES, [[0.0, 1.0, 1.0], [0.0] * 3, [1.0] * 3]),
    "a number": ("bert", {**BERT, "num_labels": 1, "problem_type": "regression"}, CLASSES, [0.5, -2.0, 3.25]),
    "a number, not said": ("bert", {**BERT, "num_labels": 1}, CLASSES, [0.5, -2.0, 3.25]),
    "several numbers": ("bert", {**BERT, **HEAD, "problem_type": "regression"}, CLASSES, [[0.5, -2.0, 1.0]] * 3),
    "a decoder's class": ("llama", {**SIZES, **HEAD, "pad_token_id": 0}, CLASSES, [2, 0, 1]),
    "tags": ("bert", {**BERT, **HEAD}, TAGS, [[-100, 0, 1, -100, 2, 2, 0, 1, -100]] * 3),
    "a decoder's tags": ("llama", {**SIZES, **HEAD}, TAGS, [[1, 0, 1, -100, 2, 2, 0, 1, -100]] * 3),
    "an answer": ("bert", BERT, ANSWERS, [[3, 5], [0, 0], [8, 8]]),
    "t5": ("t5", T5, SEQ2SEQ, [[5, 6, 7, 1], [8, 1, -100, -100], [9, 9, 1, -100]]),
    "t5, head of its own": ("t5", {**T5, "tie_word_embeddings": False}, SEQ2SEQ, [[5, 6, 7, 1]] * 3),
    "bart": ("bart", BART, SEQ2SEQ, [[5, 6, 7, 2], [8, 2, -100, -100], [9, 9, 2, -100]]),
}  # fmt: skip


def other(name: str, **fields: Any) -> Any:
    import transformers

    kind, config, task, _ = OTHERS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **config)
    base = getattr(transformers, f"AutoModelFor{AUTO[task]}").from_config(config).double()
    return get_peft_model(
        base, LoraConfig(r=2, task_type=task, target_modules="all-linear", init_lora_weights=False, **fields)
    ).eval()


def labelled(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    labels = torch.tensor(OTHERS[name][3])
    ids = torch.randint(3, 60, (len(labels), 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if OTHERS[name][2] is not ANSWERS:  # where transformers lets padding be an answer
        mask[0, 8:] = 0
        ids[0, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}, labels


@pytest.mark.parametrize("name", OTHERS)
def test_the_loss_of_every_task_is_transformers_own(name: str) -> None:
    model, task = other(name), OTHERS[name][2]
    inputs, labels = labelled(name)
    objective = Objective(model, tasks.get(task))
    with model.base_model.lora_routed(["default"] * len(labels)):
        out = objective.forward(inputs, labels)
        found = objective.loss(out, labels)
        by_row = objective.row_losses(out, labels, ALL)
    told = {"start_positions": labels[:, 0], "end_positions": labels[:, 1]} if task is ANSWERS else {"labels": labels}
    if labels.is_floating_point():
        told = {"labels": labels.double()}
    wanted = model(**inputs, **told).loss
    torch.testing.assert_close(found, wanted.double(), rtol=1e-6, atol=1e-7)
    assert by_row.shape == labels.shape[:1]
    count = int((labels != -100).sum()) if tasks.get(task).layout != "row" else len(labels)
    assert float(by_row.sum()) / count == pytest.approx(float(found), rel=1e-9)
    parameters = [p for p in model.adapter_parameters("default").values() if p.requires_grad]
    a, b = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (found, wanted))
    assert any(x is not None for x in a)
    for x, y in zip(a, b, strict=True):
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_padding_is_no_answer_so_a_rows_loss_does_not_depend_on_its_neighbours() -> None:
    model = other("an answer")
    objective = Objective(model, tasks.get(ANSWERS))
    inputs, labels = labelled("an answer")
    wide = {
        "input_ids": F.pad(inputs["input_ids"], (0, 5)),
        "attention_mask": F.pad(inputs["attention_mask"], (0, 5)),
    }
    with model.base_model.lora_routed(["default"] * 3):
        short, long = (objective.loss(objective.forward(x, labels), labels) for x in (inputs, wide))
        unmasked = objective.forward({"input_ids": inputs["input_ids"]})
    torch.testing.assert_close(short, long, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(unmasked, objective.forward(inputs))
    parameters = list(model.adapter_parameters("default").values())
    assert all(g.isfinite().all() for g in torch.autograd.grad(long, parameters))


def test_segments_reach_a_model_that_tells_them_apart_and_no_other() -> None:
    inputs, _ = labelled("one class")
    types = torch.zeros_like(inputs["input_ids"])
    types[:, 5:] = 1
    outs = {}
    for name in ("one class", "a decoder's class"):
        model = other(name)
        objective = Objective(model, tasks.get(CLASSES))
        with model.base_model.lora_routed(["default"] * 3):
            outs[name] = [objective.forward(x) for x in (inputs, {**inputs, "token_type_ids": types})]
    assert not torch.allclose(*outs["one class"])
    assert torch.equal(*outs["a decoder's class"])


def test_a_decoder_begins_from_the_labels_where_only_the_models_forward_shifts_them() -> None:
    """M2M100 and NLLB have no method for it."""
    from transformers import LlamaConfig, LlamaForCausalLM, M2M100Config, M2M100ForConditionalGeneration

    from loraloom.errors import ModelError
    from loraloom.tasks.seq2seq_lm import decoder_inputs

    config = M2M100Config(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1, decoder_start_token_id=2,
    )  # fmt: skip
    model = M2M100ForConditionalGeneration(config).eval()
    ids, labels = torch.randint(4, 32, (2, 5)), torch.tensor([[5, 6, 7], [8, 9, -100]])
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=labels).logits
        found = model(input_ids=ids, decoder_input_ids=decoder_inputs(model, labels)).logits
    assert torch.equal(found, wanted)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2))  # fmt: skip
    with pytest.raises(ModelError, match="LlamaForCausalLM is a decoder alone"):
        decoder_inputs(llama, labels)


@pytest.mark.parametrize(
    ("kind", "task", "changes"),
    [
        ("gpt2", TaskType.QUESTION_ANS, FAMILIES["gpt2"][0]),  # its forward has no argument for it
        ("rembert", TaskType.CAUSAL_LM, {**SIZES, "input_embedding_size": 8, "output_embedding_size": 8,
                                         "is_decoder": True}),
        ("granitemoe", TaskType.CAUSAL_LM, {**SIZES, "num_local_experts": 2}),
    ],
)  # fmt: skip
def test_no_forward_fills_a_cache_whatever_its_arguments_are(
    kind: str, task: TaskType, changes: dict[str, Any]
) -> None:
    import transformers
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **changes)
    auto = "AutoModelForQuestionAnswering" if task is TaskType.QUESTION_ANS else "AutoModelForCausalLM"
    base = getattr(transformers, auto).from_config(config)
    model = get_peft_model(base, LoraConfig(task_type=task, target_modules="all-linear"))
    seen: list[Any] = []

    def note(module: nn.Module, inputs: Any, out: Any) -> None:
        seen.append(out.get("past_key_values"))

    getattr(base, base.base_model_prefix).register_forward_hook(note)
    objective = Objective(model, tasks.get(task))
    seen.clear()
    ids = torch.ones(2, 5, dtype=torch.long)
    objective.forward({"input_ids": ids, "attention_mask": ids})
    assert seen == [None]
    assert config.use_cache is True
