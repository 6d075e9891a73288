"""Promises of the terminal: what a run says is what it does, in 80 columns, and a text of the user's stays a text."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from torch import nn

from loraloom import LoraConfig, get_peft_model
from loraloom.config.train import TrainConfig
from loraloom.engine.loop import StepEvent
from loraloom.files.sizes import size
from loraloom.lora.inspection import inspect
from loraloom.messages import Warn
from loraloom.report.sentences import sentence
from loraloom.report.session import train_run
from loraloom.report.terminal import (
    Meter,
    _still_falling,
    expectations,
    inspection,
    memory_table,
    overview,
    predictions,
    reading,
)
from loraloom.training.preflight.estimate import ResourceEstimate
from loraloom.training.preflight.memory import Memory
from loraloom.training.run import prepare


def shown(what: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def progress(
    step: int, loss: float, evaluations: list[dict[str, float]], tokens: int = 1000, steps: int = 10_000
) -> StepEvent:
    found = evaluations[-1] if evaluations and evaluations[-1]["step"] == step else {}
    evaluation = {key: value for key, value in found.items() if key != "step"} or None
    return StepEvent("default", step, steps, loss, 0.00025, tokens, 2.0, evaluation)


# Before ---------------------------------------------------------------------------------------------------


def test_the_overview_counts_rows_parameters_steps_and_padding(
    encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    options = TrainConfig(model=encoder_folder, data=reviews, task="seq-cls", output=tmp_path / "o", eval_split=50)
    job = prepare(options)
    text = shown(overview(job), width=200)
    trained = sum(p.numel() for p in job.model.adapter_parameters("default").values())
    total = trained + job.plan.base_parameters
    tokens = sum(job.data.train.lengths)
    assert "150 rows to train on, 50 held out" in text
    assert f"{tokens:,} tokens an epoch, padding {job.data.padding:.1%}" in text
    assert f"{trained:,} of {total:,} parameters train: LoRA in 4 modules, in full classifier" in text
    assert "30 steps, 10 an epoch" in text
    assert f"{reviews}: text-label" in text
    assert [line for line in text.splitlines() if "warning" in line] == [
        f"warning: {warning}" for warning in job.data.warnings
    ]


def test_what_training_takes_and_what_the_doctor_says_is_told() -> None:
    memory = Memory(base=2**20, adapter=2**10, gradients=2**10, optimizer=2**11, activations=2**20)
    findings = [Warn("rate", rate=1.0, optim="adamw", lowest=2e-5, highest=5e-3)]
    text = shown(
        expectations(findings, ResourceEstimate(memory, free=2**30, seconds=5000, logits="logits in parts")), width=200
    )
    assert "memory 2.0 MiB (the frozen model 1.0 MiB, and 1.0 MiB more, of 1.00 GiB free), time about 83 min" in text
    assert "warning: a learning rate of 1 is high for LoRA with adamw (usual: 2e-05 to 0.005): training may div" in text
    assert "more than there is" not in text
    assert "more than there is: lower batch_size" in shown(
        expectations([], ResourceEstimate(memory, 2**10, 30)), width=400
    )


def test_rows_that_were_cut_are_counted_aloud(encoder_folder: Path, reviews: Path, tmp_path: Path) -> None:
    options = TrainConfig(
        model=encoder_folder, data=reviews, task="seq-cls", output=tmp_path / "o", max_length=6, eval_split=50
    )
    job = prepare(options)
    cut = job.data.train.truncated
    assert cut > 0
    assert f"warning: {cut} training rows are over max_length=6 tokens and cut" in shown(overview(job), width=400)


def test_reading_many_rows_says_how_far_it_is_now_and_then() -> None:
    console, times = Console(file=io.StringIO(), width=80), iter([0.0, 1.0, 20.0, 20.0, 21.0])
    with reading(console, lambda: next(times)) as progress:
        progress("rows read", 10_000, None)
        progress("rows tokenised", 20_000, 30_000)
        progress("rows tokenised", 30_000, 30_000)
    assert console.file.getvalue() == "20,000 of 30,000 rows tokenised\n"  # type: ignore[attr-defined]


# During ---------------------------------------------------------------------------------------------------


def test_the_bar_has_loss_metric_speed_and_time_left_in_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    evaluations = [{"step": 9_998, "loss": 12.345, "perplexity": 123.456}]
    with Meter(console, 10_000) as meter:
        for step in (9_998, 9_999):
            meter(progress(step, 1.5, evaluations, tokens=246_912))  # the last one measured stays
        meter.bar.refresh()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    last = text.replace("\n", "\r").rstrip("\r").split("\r")[-1].rstrip()
    for part in ("9999/10000", "loss 1.500", "perplexity 123.456", "123,456 tokens/s", "left"):
        assert part in last
    assert re.search(r"[0-9-]+:[0-9-]{2} left", last)
    assert len(last) <= 80


def test_a_log_without_a_terminal_has_a_line_for_each_evaluation_with_the_steps_and_the_time_left() -> None:
    console = Console(file=io.StringIO(), width=80)
    first = {"step": 1, "loss": 0.5, "accuracy": 0.75}
    times = iter([0.0, 1.0, 3.0, 5.0])
    with Meter(console, 5, lambda: next(times)) as meter:
        meter(progress(1, 2.0, [first], steps=5))
        meter(progress(2, 1.0, [first], steps=5))
        meter(progress(3, 1.0, [first, {"step": 3, "loss": 0.25, "accuracy": 0.875}], steps=5))
    memory = r"[0-9.]+ [KMG]iB"
    for line, said in zip(
        console.file.getvalue().splitlines(),  # type: ignore[attr-defined]
        [
            "step 1 of 5: training loss 2.000, held-out loss 0.500, accuracy 0.750, rate 0.00025, MEMORY, 500 tokens/s",
            "step 3 of 5: training loss 1.810, held-out loss 0.250, accuracy 0.875, rate 0.00025, MEMORY, "
            "500 tokens/s, 4 s left",
        ],
        strict=True,
    ):
        assert re.fullmatch(re.escape(said).replace("MEMORY", memory), line)


def test_a_log_without_a_terminal_is_not_silent_for_long_between_evaluations() -> None:
    console = Console(file=io.StringIO(), width=200)
    times = iter([0.0, 10.0, 20.0, 22.0])
    with Meter(console, 100, lambda: next(times)) as meter:
        for step in (17, 18, 19):
            meter(progress(step, 2.0, [], steps=100))
    (line,) = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert line.startswith("step 18 of 100: training loss 2.000, rate 0.00025, ")
    assert line.endswith("500 tokens/s, 13:40 left")


def test_a_wide_terminal_has_the_rate_and_the_memory_as_well() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with Meter(console, 10_000) as meter:
        meter(progress(9_999, 1.5, [{"step": 9_999, "loss": 12.345, "perplexity": 123.456}], tokens=246_912))
        meter.bar.refresh()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    last = text.replace("\n", "\r").rstrip("\r").split("\r")[-1].rstrip()
    assert re.search(r"rate 0.00025  [0-9.]+ [KMG]iB  123,456 tokens/s", last)
    assert len(last) <= 120


# After ----------------------------------------------------------------------------------------------------


def test_a_run_as_a_function_says_what_it_did_and_where_it_is(
    encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    options = TrainConfig(model=encoder_folder, data=reviews, task="seq-cls", output=tmp_path / "run", max_steps=2)
    console = Console(file=io.StringIO(), width=60)
    result = train_run(options, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    figures = result.record["result"]
    said = ", ".join(f"{name.replace('loss', 'held-out loss')} {value:.3f}" for name, value in figures.items())
    assert f"{said} after 2 steps in" in text
    assert list(figures)[:2] == ["loss", "accuracy"]
    for name in ("", "/run.json", "/curves.png"):
        assert f" {tmp_path / 'run'}{name}\n" in text  # whole, however long: paths are there to be copied
        assert (tmp_path / f"run{name}").exists()
    assert text.count("blame (") + text.count("praise (") == 3


def test_a_text_that_looks_like_markup_is_shown_as_it_is() -> None:
    row = {"input": "see [bold]this[/] and [/nothing]", "expected": "[red]", "predicted": "a\nb"}
    text = shown(predictions([row]))
    for part in ("see [bold]this[/] and [/nothing]", "[red]", "a b"):
        assert part in text


def test_long_texts_are_cut() -> None:
    text = shown(predictions([{"input": "x" * 500, "expected": "y", "predicted": "z"}]), width=200)
    assert "x" * 99 + "…" in text
    assert "x" * 100 not in text


# Memory and adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (3 * 2**29, "1.50 GiB"),
        (2**41, "2048.00 GiB"),
    ],
)
def test_sizes_are_in_the_unit_that_suits(count: int, words: str) -> None:
    assert size(count) == words


def test_the_parts_of_memory_and_their_sum_are_listed() -> None:
    text = memory_table(Memory(base=4096, adapter=1024, gradients=1024, optimizer=2048, activations=8192))
    assert [line.split()[-2:] for line in text.splitlines()] == [
        [number, "KiB"] for number in ("4.0", "1.0", "1.0", "2.0", "8.0", "16.0")
    ]
    open_end = memory_table(Memory(base=4096, adapter=1024, gradients=1024, optimizer=2048, activations=None))
    assert open_end.splitlines()[-1].endswith("8.0 KiB and activation memory, which could not be estimated")


def test_an_adapter_shows_whole_names_aligned_and_only_what_is_not_the_default(
    encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    lora = LoraConfig(r=3, use_rslora=True, init_lora_weights=False, target_modules="all-linear")
    options = TrainConfig(
        model=encoder_folder, data=reviews, task="seq-cls", output=tmp_path / "run", max_steps=1, lora=lora
    )
    train_run(options, Console(file=io.StringIO()))
    found = inspect(tmp_path / "run")
    lines = inspection("run", found).splitlines()
    assert lines[0].startswith(f"run: {found.parameters:,} parameters, ")
    assert "  use_rslora: True" in lines
    assert not any(line.startswith("  bias:") for line in lines)
    rows = [line for line in lines if line.startswith("bert.")]
    assert [row.split()[0] for row in rows] == [update.name for update in found.updates]
    assert [row.split()[1:5] for row in rows] == [
        [str(u.r), f"{u.scale:g}", f"{u.norm:.4g}", str(u.used_rank)] for u in found.updates
    ]
    assert len({len(row) - len(row.lstrip()) for row in rows}) == 1
    header = next(line for line in lines if line.startswith("module"))
    assert all(row[header.index("rank used") + 8] != " " for row in rows)  # numbers end under their heading


def test_an_adapter_says_what_of_its_config_was_left_out(tmp_path: Path) -> None:
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "eva"}))
    lines = inspection("folder", inspect(tmp_path)).splitlines()
    assert [line for line in lines if line.startswith("note: init_lora_weights")]


def test_a_run_whose_loss_still_falls_says_what_to_do() -> None:
    evaluations = [{"step": 1, "loss": 0.9}, {"step": 2, "loss": 0.6}]
    options = {"max_steps": None, "epochs": 3, "learning_rate": 2e-4}
    record: dict[str, Any] = {"curve": {"evaluations": evaluations}, "options": options}
    wanted = "still falling at the end (0.900 to 0.600): train longer (--epochs 6), or at a higher rate (--lr 0.0004)"
    (message,) = _still_falling(record)
    assert sentence(message).endswith(wanted)
    assert list(_still_falling(record | {"curve": {"evaluations": evaluations[:1]}})) == []
