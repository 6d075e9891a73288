"""Promises of loading: the right model for the task, what is new in it is named, and nothing is made up in silence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from loraloom import LoraConfig, get_peft_model
from loraloom.errors import ConfigError, ModelError
from loraloom.models.configs import tokens_at_most
from loraloom.models.load import build_empty, length_within, load_base, load_limit, load_tokenizer
from loraloom.tasks import TASKS
from loraloom.tasks.base import Task

CLASSES, LM = TASKS["seq-cls"], TASKS["causal-lm"]


def test_a_new_head_is_named_and_knows_its_labels(encoder_folder: Path) -> None:
    model, new = load_base(str(encoder_folder), CLASSES, "float32", ["blame", "praise", "neither"])
    assert new == ["classifier"]
    assert model.classifier.weight.shape == (3, 32)  # type: ignore[union-attr]
    assert model.config.id2label == {0: "blame", 1: "praise", 2: "neither"}  # type: ignore[union-attr]


def test_a_decoder_needs_nothing_new_for_its_own_task(decoder_folder: Path) -> None:
    _, new = load_base(str(decoder_folder), LM, "float32")
    assert new == []


def test_a_decoder_without_padding_token_can_classify_a_batch(decoder_folder: Path) -> None:
    model, new = load_base(str(decoder_folder), CLASSES, "float32", ["a", "b"])
    assert new == ["score"]
    assert model(torch.full((3, 5), 4)).logits.shape == (3, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_is_held_in_the_dtype_asked_for(encoder_folder: Path, dtype: str) -> None:
    model, _ = load_base(str(encoder_folder), CLASSES, dtype, ["a", "b"])
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_a_head_for_other_labels_makes_way_for_a_new_one(encoder_folder: Path, tmp_path: Path) -> None:
    first, _ = load_base(str(encoder_folder), CLASSES, "float32", ["a", "b", "c"])
    first.save_pretrained(tmp_path)  # type: ignore[operator]
    same, new = load_base(str(tmp_path), CLASSES, "float32", ["A", "b", "c"])
    assert new == []
    assert torch.equal(same.classifier.weight, first.classifier.weight)  # type: ignore[union-attr, arg-type]
    for labels in (["x", "y", "z"], ["c", "b", "a"], ["0", "1", "2"]):
        said: list[str] = []
        fresh, new = load_base(str(tmp_path), CLASSES, "float32", labels, log=said.append)
        assert new == ["classifier"]
        assert not torch.equal(fresh.classifier.weight, first.classifier.weight)  # type: ignore[union-attr, arg-type]
        assert f"{tmp_path} has a head for other classes (a, b, c): a new one is trained" in said[0]
    other, new = load_base(str(tmp_path), CLASSES, "float32", ["a", "b"])
    assert new == ["classifier"]
    assert other.classifier.weight.shape == (2, 32)  # type: ignore[union-attr]


def test_an_encoder_published_without_its_pooler_gets_a_new_one(encoder_folder: Path, tmp_path: Path) -> None:
    from transformers import BertModel

    folder = shutil.copytree(encoder_folder, tmp_path / "model")
    BertModel.from_pretrained(encoder_folder, add_pooling_layer=False).save_pretrained(folder)
    _, new = load_base(str(folder), CLASSES, "float32", ["a", "b"])
    assert new == ["bert.pooler.dense", "classifier"]


def test_what_transformers_prints_is_as_loud_afterwards_as_before(encoder_folder: Path) -> None:
    logging.set_verbosity_info()
    try:
        load_base(str(encoder_folder), CLASSES, "float32", ["a", "b"])
        build_empty(str(encoder_folder), CLASSES)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


def test_a_model_of_several_files_with_one_cut_off_names_the_file(decoder_folder: Path, tmp_path: Path) -> None:
    model, _ = load_base(str(decoder_folder), LM, "float32")
    model.save_pretrained(tmp_path, max_shard_size="40KB")  # type: ignore[operator]
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert len(parts) > 1
    parts[1].write_bytes(parts[1].read_bytes()[:-8])
    with pytest.raises(ModelError, match=f"{parts[1].name}: cut off or damaged"):
        load_base(str(tmp_path), LM, "float32")


# Tokenizers -----------------------------------------------------------------------------------------------


def test_a_tokenizer_without_padding_pads_with_the_end(decoder_folder: Path, encoder_folder: Path) -> None:
    assert load_tokenizer(str(decoder_folder)).pad_token == "</s>"
    assert load_tokenizer(str(encoder_folder)).pad_token == "[PAD]"


def test_a_tokenizer_without_padding_and_end_is_refused(decoder_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(decoder_folder, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"eos_token": None}))
    with pytest.raises(ModelError, match="neither a pad nor an end-of-text token; set pad_token"):
        load_tokenizer(str(folder))


# Lengths --------------------------------------------------------------------------------------------------


def test_a_model_reads_what_its_config_says_and_robertas_count_from_behind_the_padding(encoder_folder: Path) -> None:
    from transformers import BertConfig, GPT2Config, RobertaConfig, T5Config

    assert load_limit(str(encoder_folder)) == 64
    assert tokens_at_most(BertConfig()) == 512
    assert tokens_at_most(GPT2Config()) == 1024
    assert tokens_at_most(RobertaConfig(max_position_embeddings=514)) == 512
    assert tokens_at_most(T5Config()) is None


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "camembert", "mpnet", "distilbert", "albert"])
def test_an_encoder_reads_as_many_tokens_as_it_is_said_to_and_no_more(kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        kind, vocab_size=20, hidden_size=8, dim=8, embedding_size=8, intermediate_size=8, hidden_dim=8, n_layers=1,
        num_hidden_layers=1, num_attention_heads=1, n_heads=1, max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    limit = tokens_at_most(config)
    assert limit is not None
    model = AutoModel.from_config(config)
    model(torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, limit + 1), 5))


@pytest.mark.parametrize(
    ("limit", "wanted", "length"),
    [(None, None, 512), (64, None, 64), (2048, None, 512), (64, 64, 64), (None, 9999, 9999)],
)
def test_a_length_that_is_not_given_is_what_the_model_reads_and_at_most_512(
    limit: int | None, wanted: int | None, length: int
) -> None:
    assert length_within(limit, wanted, "m") == length


def test_a_length_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_length: m reads at most 64 tokens, found 65"):
        length_within(64, 65, "m")


# Planning -------------------------------------------------------------------------------------------------


def test_an_empty_model_has_the_shapes_of_the_loaded_one_and_no_bytes(encoder_folder: Path) -> None:
    loaded, _ = load_base(str(encoder_folder), CLASSES, "float32", ["a", "b", "c"])
    empty = build_empty(str(encoder_folder), CLASSES, 3)
    assert {name: p.shape for name, p in empty.named_parameters()} == {
        name: p.shape for name, p in loaded.named_parameters()
    }
    assert {p.device.type for p in empty.parameters()} == {"meta"}


# Names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./nothing", "/nothing/at/all", "~/nothing", "a/b/c"])
@pytest.mark.parametrize("load", [load_tokenizer, load_limit, lambda name: load_base(name, LM, "float32")])
def test_a_path_that_is_not_there_is_never_taken_for_a_name(name: str, load: Any) -> None:
    with pytest.raises(ModelError, match=f"^{name}: no such folder$"):
        load(name)


def test_a_name_that_was_fetched_before_loads_without_a_network(decoder_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "hub" / "models--somebody--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("a" * 40)
    shutil.copytree(decoder_folder, model / "snapshots" / ("a" * 40))
    done = subprocess.run(
        [sys.executable, "-m", "loraloom.cli", "plan", "--model", "somebody/tiny", "--task", "causal-lm"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "model.layers.1.self_attn.v_proj" in done.stdout


# Other tasks ----------------------------------------------------------------------------------------------

TAGS, ANSWERS, SEQ2SEQ = TASKS["token-cls"], TASKS["question-answering"], TASKS["seq2seq-lm"]


def test_tags_and_answers_get_new_heads_that_train_in_full(encoder_folder: Path) -> None:
    for task, labels, head, size in ((TAGS, ["B-X", "I-X", "O"], "classifier", 3), (ANSWERS, [], "qa_outputs", 2)):
        model, new = load_base(str(encoder_folder), task, "float32", labels)
        assert new == [head]
        assert getattr(model, head).weight.shape == (size, 32)
        if labels:
            assert model.config.id2label == dict(enumerate(labels))  # type: ignore[union-attr]
            assert model.config.label2id == {label: i for i, label in enumerate(labels)}  # type: ignore[union-attr]
        adapted = get_peft_model(model, LoraConfig(task_type=task.task_type, target_modules=["query"]))
        assert any(f"{head}.weight" in name for name in adapted.adapter_parameters("default"))


@pytest.mark.parametrize(
    ("problem", "labels", "size"),
    [("regression", [], 1), ("multi_label_classification", ["a", "b", "c"], 3), (None, ["a", "b"], 2)],
)
def test_what_a_label_is_is_written_in_the_config(
    encoder_folder: Path, problem: str | None, labels: list[str], size: int
) -> None:
    model, new = load_base(str(encoder_folder), CLASSES, "float32", labels, problem)
    assert new == ["classifier"]
    assert model.classifier.weight.shape[0] == size  # type: ignore[union-attr]
    assert model.config.problem_type == (problem or "single_label_classification")  # type: ignore[union-attr]
    assert build_empty(str(encoder_folder), CLASSES, len(labels), problem).classifier.weight.shape[0] == size  # type: ignore[union-attr]


def test_a_translator_needs_nothing_new(translator_folder: Path) -> None:
    model, new = load_base(str(translator_folder), SEQ2SEQ, "float32")
    assert new == []
    assert type(model).__name__ == "T5ForConditionalGeneration"


def test_a_decoder_can_learn_classes_tags_and_answers(decoder_folder: Path) -> None:
    whole, _ = load_base(str(decoder_folder), LM, "float32")
    for task, head in ((CLASSES, "score"), (TAGS, "score"), (ANSWERS, "qa_outputs")):
        model, new = load_base(str(decoder_folder), task, "float32", ["a", "b"])
        assert new == [head]
        assert torch.equal(
            model.get_input_embeddings().weight,  # type: ignore[operator]
            whole.get_input_embeddings().weight,  # type: ignore[operator]
        )


def test_a_folder_with_a_head_for_classes_gets_one_for_answers(encoder_folder: Path, tmp_path: Path) -> None:
    first, _ = load_base(str(encoder_folder), CLASSES, "float32", ["a", "b", "c"])
    first.save_pretrained(tmp_path)  # type: ignore[operator]
    model, new = load_base(str(tmp_path), ANSWERS, "float32")
    assert new == ["qa_outputs"]
    assert model.qa_outputs.weight.shape == (2, 32)  # type: ignore[union-attr]
    _, new = load_base(str(tmp_path), TAGS, "float32", ["x", "y"])
    assert new == ["classifier"]


@pytest.mark.parametrize("load", [lambda name, task: load_base(name, task, "float32", ["a", "b"]), build_empty])
def test_a_model_of_the_wrong_direction_is_refused_with_the_task_that_fits(
    encoder_folder: Path, decoder_folder: Path, translator_folder: Path, load: Any
) -> None:
    with pytest.raises(ModelError, match="t5 has an encoder and a decoder, .*; choose .*, or the task seq2seq-lm"):
        load(str(translator_folder), LM)
    with pytest.raises(ModelError, match="llama has no encoder and decoder, .* or the task causal-lm"):
        load(str(decoder_folder), SEQ2SEQ)
    with pytest.raises(ModelError, match="bert has no encoder and decoder, .* or the task seq-cls or token-cls"):
        load(str(encoder_folder), SEQ2SEQ)
    with pytest.raises(ModelError, match="bert reads a text in both directions"):
        load(str(encoder_folder), LM)


def test_the_decoder_of_a_bart_is_no_causal_model(tmp_path: Path) -> None:
    from transformers import BartConfig

    BartConfig(d_model=8, vocab_size=20).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="bart has an encoder and a decoder"):
        build_empty(str(tmp_path), LM)


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "opt", "bloom", "phi", "qwen2", "mistral", "gemma2", "falcon"])
def test_a_decoder_is_none_that_reads_in_both_directions_whatever_its_config_leaves_out(
    kind: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(kind, vocab_size=20).save_pretrained(tmp_path)
    assert build_empty(str(tmp_path), LM)


@pytest.mark.parametrize("task", [CLASSES, TAGS, ANSWERS, SEQ2SEQ])
def test_an_empty_model_of_every_task_has_the_shapes_of_the_loaded_one(
    encoder_folder: Path, translator_folder: Path, task: Task
) -> None:
    name = str(translator_folder if task is SEQ2SEQ else encoder_folder)
    loaded, _ = load_base(name, task, "float32", ["a", "b", "c"])
    empty = build_empty(name, task, 3)
    assert {name: p.shape for name, p in empty.named_parameters()} == {
        name: p.shape for name, p in loaded.named_parameters()
    }


def test_the_attention_asked_for_is_the_one_used(encoder_folder: Path) -> None:
    model, _ = load_base(str(encoder_folder), CLASSES, "float32", ["a", "b"], attn_implementation="eager")
    assert model.config._attn_implementation == "eager"  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="cannot be loaded as a model for seq-cls .*nonsense"):
        load_base(str(encoder_folder), CLASSES, "float32", ["a", "b"], attn_implementation="nonsense")


def test_a_kind_of_model_that_has_none_for_the_task_says_so(tmp_path: Path) -> None:
    from transformers import BartConfig

    BartConfig(d_model=8, vocab_size=20).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no such class of bart\); it can be trained for seq-cls"):
        build_empty(str(tmp_path), TAGS)
    with pytest.raises(ModelError, match=r"cannot be loaded as a model for token-cls \(transformers has no such"):
        load_base(str(tmp_path), TAGS, "float32", ["a", "b"])
