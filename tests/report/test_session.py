"""Promises of a search with a terminal: it shows what was found, where it is, and how to use it."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from loraloom import LoraConfig
from loraloom.config import runfile
from loraloom.config.train import TrainConfig
from loraloom.errors import SaveError
from loraloom.report import session
from loraloom.report.session import data_run, train_run, tune_run
from loraloom.report.tune import conclusion
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.space import Space


def options(model: Path, data: Path, output: Path, **changes: Any) -> TuneConfig:
    lora = LoraConfig(target_modules="all-linear")
    train = TrainConfig(
        model=model, data=data, task="seq-cls", output=output, max_steps=72, batch_size=16, eval_split=40, lora=lora,
        **changes,
    )  # fmt: skip
    space = Space.parse({"lora.r": [2, 4], "train.learning_rate": [1e-2, 1.5e-2]}, train)
    return TuneConfig(train=train, space=space, trials=4, finalists=2, seeds=1, slots=2)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=100)


def text(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def searched(encoder_folder: Path, reviews: Path, tmp_path: Path) -> tuple[TuneConfig, session.SearchResult, str]:
    given = options(encoder_folder, reviews, tmp_path / "a search")
    console = terminal()
    return given, tune_run(given, console), text(console)


def test_the_terminal_shows_events_the_leaderboard_and_the_recommendation(
    searched: tuple[TuneConfig, session.SearchResult, str],
) -> None:
    _, result, said = searched
    for event in ("slots: 2 trials train together (2 as given)", "trial 3 starts", "1 more seed of each beside them"):
        assert event in said
    for name in ("rate", "accuracy", "params", "state"):
        assert name in said
    console = terminal()
    console.print(conclusion(result.verdict))
    assert text(console) in said


def test_the_terminal_names_what_was_written_and_the_command_that_uses_it(
    searched: tuple[TuneConfig, session.SearchResult, str],
) -> None:
    given, result, said = searched
    folder = Path(given.train.output)
    assert f"loraloom train {shlex.quote(str(folder / 'best.yaml'))}" in said
    for name in ("best", "result.json", "search.png", "tradeoff.png"):
        assert f"{folder / name}" in said
        assert (folder / name).exists()
    for name in ("search.png", "tradeoff.png"):
        with Image.open(folder / name) as picture:
            picture.verify()
            assert min(picture.size) > 200
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result.record))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_kept_run_file_gives_the_same_run_again_and_a_dry_run_trains_nothing(
    dtype: str, encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    given = TrainConfig(
        model=encoder_folder, data=reviews, task="seq-cls", output=tmp_path / "a", max_steps=4, dtype=dtype,
        lora=LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"), lr_scheduler_type="cosine",
        learning_rate=0.01, warmup_steps=1, eval_steps=2, save_steps=2, report_to=[], overwrite=True,
    )  # fmt: skip
    console = terminal()
    assert train_run(given, console, dry_run=True) is None
    assert "nothing was trained" in text(console)
    assert not (tmp_path / "a").exists()
    first = train_run(given, terminal())
    assert first is not None
    assert first.record["curve"]["loss"][-1] < first.record["curve"]["loss"][0]
    kept = runfile.read(tmp_path / "a" / "run.yaml", {"output": str(tmp_path / "b")}).options
    assert not kept.overwrite
    train_run(kept, terminal())
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_data_is_shown_as_the_model_sees_it_and_nothing_is_written(
    decoder_folder: Path, chats: Path, tmp_path: Path
) -> None:
    given = TrainConfig(model=decoder_folder, data=chats, task="causal-lm", output=tmp_path / "o")
    console = terminal()
    data_run(given, console, rows=2)
    said = text(console)
    for part in (f"{chats}, line", "prompt-completion", "trained on)", "tokens of a row", "padding", "memory", "time"):
        assert part in said
    assert not (tmp_path / "o").exists()


def test_a_finished_search_is_said_again_and_pictures_that_were_deleted_are_drawn_again(
    searched: tuple[TuneConfig, session.SearchResult, str],
) -> None:
    given, result, said = searched
    folder = Path(given.train.output)
    (folder / "search.png").unlink()
    console = terminal()
    assert tune_run(given, console).record == result.record
    assert (folder / "search.png").exists()
    ending = said[said.index("adapter  ") :]
    assert text(console).endswith(ending)
    assert "starts" not in text(console)


def test_a_picture_that_cannot_be_written_is_said_with_where_the_adapter_is(
    encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    class Meanwhile(io.StringIO):
        """What was free before the search is taken once its last rung is decided."""

        def write(self, said: str) -> int:
            if "beside them" in said:
                (tmp_path / "search" / "tradeoff.png").mkdir(exist_ok=True)
            return super().write(said)

    with pytest.raises(SaveError) as error:
        console = Console(file=Meanwhile(), width=100)
        tune_run(options(encoder_folder, reviews, tmp_path / "search"), console)
    assert str(error.value).startswith(f"{tmp_path / 'search' / 'tradeoff.png'}: cannot be written (")
    assert f"the best adapter and result.json are saved in {tmp_path / 'search'}" in str(error.value)
    assert (tmp_path / "search" / "best" / "adapter_model.safetensors").exists()
