"""Promises of the output folder: what an adapter needs to be used as it was trained lies beside it, and no more."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from loraloom import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.data.tokenize.templates import TEMPLATE_NAME
from loraloom.errors import ConfigError
from loraloom.models.load import load_tokenizer
from loraloom.training.run import prepare
from loraloom.training.trainer import Trainer

TALK = [{"role": "user", "content": "say now : good"}, {"role": "assistant", "content": "good film"}]
GIVEN = "{% for m in messages %}{{ m.role }} : {{ m.content }}{{ '</s>' }}{% endfor %}"


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(20)), encoding="utf-8")
    return path


def train(model: Path, data: Path, output: Path, **changes: Any) -> list[str]:
    """Train two steps. Returns what was said of the data."""
    options = TrainConfig(
        model=model,
        data=data,
        task="causal-lm",
        output=output,
        max_steps=2,
        lora=LoraConfig(target_modules="all-linear"),
        **changes,
    )
    job = prepare(options)
    Trainer(job).fit()
    return job.data.notes


def test_the_plain_template_is_kept_and_a_tokenizer_with_it_writes_the_same(
    decoder_folder: Path, talks: Path, tmp_path: Path
) -> None:
    notes = train(decoder_folder, talks, tmp_path / "run")
    assert f"loraloom-plain is kept with the adapter, as {TEMPLATE_NAME}" in notes
    # A folder with the tokenizer and the template beside it is how transformers finds both.
    both = Path(shutil.copytree(decoder_folder, tmp_path / "both"))
    shutil.copy(tmp_path / "run" / TEMPLATE_NAME, both)
    written = load_tokenizer(str(both)).apply_chat_template(TALK, tokenize=False)
    assert written == "<s>### User:\nsay now : good\n\n### Assistant:\ngood film</s>"
    prompt = load_tokenizer(str(both)).apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    assert written.startswith(prompt)


def test_a_template_that_was_given_is_kept_as_text_wherever_it_came_from(
    decoder_folder: Path, talks: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.jinja").write_text(GIVEN, encoding="utf-8")
    train(decoder_folder, talks, tmp_path / "a", chat_template=GIVEN)
    notes = train(decoder_folder, talks, tmp_path / "b", chat_template=str(tmp_path / "mine.jinja"))
    assert any(note.startswith("chat_template ") and note.endswith(f"as {TEMPLATE_NAME}") for note in notes)
    for name in ("a", "b"):
        assert (tmp_path / name / TEMPLATE_NAME).read_text(encoding="utf-8") == GIVEN


def test_the_tokenizers_own_template_is_not_kept_and_that_of_an_earlier_run_goes(
    decoder_folder: Path, talks: Path, tmp_path: Path
) -> None:
    train(decoder_folder, talks, tmp_path / "run")
    own = Path(shutil.copytree(decoder_folder, tmp_path / "own"))
    (own / TEMPLATE_NAME).write_text(GIVEN, encoding="utf-8")
    notes = train(own, talks, tmp_path / "run", overwrite=True)
    assert TEMPLATE_NAME not in os.listdir(tmp_path / "run")
    assert not any("kept with the adapter" in note for note in notes)


def test_where_nobody_talks_no_template_is_kept_and_one_that_is_given_is_an_error(
    decoder_folder: Path, chats: Path, talks: Path, tmp_path: Path
) -> None:
    train(decoder_folder, chats, tmp_path / "run")
    assert TEMPLATE_NAME not in os.listdir(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"chat_template: .* no conversations \(prompt-completion\)"):
        train(decoder_folder, chats, tmp_path / "other", chat_template=GIVEN)
    lists = tmp_path / "lists.jsonl"
    rows = [{"prompt": TALK[:1], "completion": TALK[1:]}] * 20
    lists.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train(decoder_folder, lists, tmp_path / "lists", chat_template=GIVEN)
    assert (tmp_path / "lists" / TEMPLATE_NAME).exists()


@pytest.mark.parametrize("name", ["run.json", "adapter_model.safetensors", "curves.png", "run.yaml"])
def test_a_folder_where_a_file_will_be_is_said_before_training(
    decoder_folder: Path, talks: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"output: .*{name} is a folder, and a file of this name is to be written"):
        train(decoder_folder, talks, tmp_path / "out", overwrite=True)


def test_the_classes_lie_beside_the_adapter(encoder_folder: Path, reviews: Path, tmp_path: Path) -> None:
    options = TrainConfig(model=encoder_folder, data=reviews, task="seq-cls", output=tmp_path / "out", max_steps=1)
    Trainer(prepare(options)).fit()
    found = json.loads((tmp_path / "out" / "usage.json").read_bytes())
    assert found["id2label"] == {"0": "blame", "1": "praise"}
    assert (found["task"], found["base_model"]) == ("seq-cls", str(encoder_folder))
