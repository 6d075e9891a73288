"""Promises of a search's options: checked as a whole before anything is loaded, and known again by a fingerprint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraloom import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.errors import ConfigError
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.space import PRESETS, Space

BASE = """\
task: seq-cls
model: {name: my-model}
data: {train: rows.jsonl}
train: {max_steps: 30}
output: runs/search
"""


def base(**changes: object) -> TrainConfig:
    given = {"model": "my-model", "data": "rows.jsonl", "task": "seq-cls", "output": "runs/search", "max_steps": 30}
    return TrainConfig(**{**given, **changes})


def options(**changes: Any) -> TuneConfig:
    train = changes.pop("train", None) or base()
    return TuneConfig(**{"train": train, "space": Space.default(train), **changes})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


# -- fields -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("trials", 0, "must be a whole number of at least 1, found 0"),
        ("trials", True, "must be a whole number of at least 1, found True"),
        ("reduction", 1, "must be a whole number of at least 2, found 1"),
        ("finalists", 0, "must be a whole number of at least 1, found 0"),
        ("finalists", 17, "must be at most trials (16), found 17"),
        ("seeds", -1, "must be a whole number of at least 0, found -1"),
        ("slots", 0, "must be a whole number of at least 1, found 0"),
        ("min_share", 0, "must be a share of the steps above 0 and at most 1, found 0"),
        ("min_share", 1.5, "must be a share of the steps above 0 and at most 1, found 1.5"),
        ("min_share", float("nan"), "must be a share of the steps"),
        ("sampler", "tep", "must be one of tpe, random, grid, found 'tep'; did you mean 'tpe'?"),
        ("metric", "f1", "seq-cls is measured by accuracy, f1_macro or loss, found 'f1'"),
        ("metric", "acuracy", "did you mean 'accuracy'?"),
        ("metric", "perplexity", "seq-cls is measured by accuracy, f1_macro or loss, found 'perplexity'"),
        ("memory", "8 apples", "must be bytes or a size such as 8GiB or 500MB, found '8 apples'"),
        ("memory", 0, "must be above 0, found 0"),
        ("train", {}, "must be TrainConfig, found dict"),
        ("space", {}, "must be Space, found dict"),
    ],
)
def test_a_value_out_of_range_names_its_option_and_what_was_found(name: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        TuneConfig(**{"train": base(), "space": Space.default(base()), name: value})
    assert str(error.value).startswith(f"{name}: ")
    assert said in str(error.value)


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="trails: there is no such option of a search; did you mean 'trials'?"):
        options(trails=3)


def test_the_metric_is_the_tasks_own_unless_it_is_given() -> None:
    assert options().metric == "accuracy"
    assert options(metric="loss").metric == "loss"
    assert options(train=base(task="causal-lm")).metric == "perplexity"


def test_rungs_are_shares_of_the_steps_from_the_first_that_is_given_on() -> None:
    assert options().rungs == pytest.approx([1 / 9, 2 / 9, 1 / 3, 1 / 2, 2 / 3])
    assert options(min_share=0.4).rungs == pytest.approx([0.4, 1 / 2, 2 / 3])
    assert options(min_share=0.05).rungs[:2] == pytest.approx([0.05, 1 / 9])
    assert options(min_share=0.9).rungs == [0.9]
    assert options(min_share=1).rungs == []


@pytest.mark.parametrize(
    ("given", "bytes"),
    [
        (None, None), (5, 5), ("5", 5), ("500MB", 500 * 10**6), ("8GiB", 8 * 2**30), ("1.5 gib", 3 * 2**29),
        ("2KiB", 2048), ("1kB", 1000), ("3 B", 3), ("1TB", 10**12),
    ],
)  # fmt: skip
def test_memory_is_bytes_or_a_size_with_its_unit(given: object, bytes: int | None) -> None:
    assert options(memory=given).memory == bytes


def test_more_trials_than_the_space_has_are_refused() -> None:
    space = Space.parse({"lora.r": [4, 8], "lora.lora_alpha": ["r", "2r"]}, base())
    with pytest.raises(
        ConfigError, match="trials: the space has 4 configurations, found 5; lower it or widen the space"
    ):
        options(space=space, trials=5)
    assert options(space=space, trials=4).trials == 4


def test_a_grid_over_a_continuous_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="space.train.learning_rate: a grid needs choices or a step"):
        options(sampler="grid")


# -- from a run file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_space_trials_finalists_and_seeds(file: Path, preset: str) -> None:
    wanted = PRESETS[preset]
    found = TuneConfig.read(file, [f"tune.preset={preset}"])
    assert (found.trials, found.finalists, found.seeds) == (wanted.trials, wanted.finalists, wanted.seeds)
    assert found.space == Space.parse(wanted.space, base())
    assert found.train == base()


def test_a_file_without_a_section_is_the_standard_search(file: Path) -> None:
    assert TuneConfig.read(file) == options()


def test_the_file_wins_over_the_preset(file: Path) -> None:
    file.write_text(
        BASE + "lora: {r: 4}\ntune:\n  preset: quick\n  trials: 4\n  seeds: 0\n  metric: loss\n  memory: 2GiB\n"
        "  slots: 2\n  reduction: 2\n  min_share: 0.5\n  sampler: random\n"
        "  space:\n    lora.lora_alpha: [r, 2r]\n    train.learning_rate: {log: [1e-4, 1e-3]}\n"
    )
    train = base(lora=LoraConfig(r=4))
    raw = {"lora.lora_alpha": ["r", "2r"], "train.learning_rate": {"log": [1e-4, 1e-3]}}
    assert TuneConfig.read(file) == TuneConfig(
        train=train, space=Space.parse(raw, train), trials=4, finalists=2, seeds=0, metric="loss", memory=2 * 2**30,
        slots=2, reduction=2, min_share=0.5, sampler="random",
    )  # fmt: skip


def test_what_is_set_and_a_commands_options_win(file: Path) -> None:
    found = TuneConfig.read(file, ["tune.trials=4", "tune.seeds=1", "train.seed=3"], {"tune.trials": 5, "output": "x"})
    assert (found.trials, found.seeds, found.train.seed, found.train.output) == (5, 1, 3, "x")


def test_what_the_preset_says_is_lowered_to_what_a_small_space_has(file: Path) -> None:
    file.write_text(BASE + "tune: {space: {lora.r: [4, 8]}}\n")
    found = TuneConfig.read(file)
    assert (found.trials, found.finalists) == (2, 2)
    assert TuneConfig.read(file, ["tune.trials=1"]).finalists == 1


def test_a_grid_takes_all_of_the_space_unless_told_otherwise(file: Path) -> None:
    file.write_text(BASE + "tune: {sampler: grid, space: {lora.r: {range: [1, 32]}}}\n")
    assert TuneConfig.read(file).trials == 32
    assert TuneConfig.read(file, ["tune.trials=4"]).trials == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tune:\n  trails: 4", "7: tune.trails: there is no such key; did you mean 'trials'?"),
        ("tune:\n  zzz: 4", "7: tune.zzz: there is no such key; the keys here are tune.preset, "),
        ("tune:\n  trials: 0", "7: tune.trials: must be a whole number of at least 1, found 0"),
        ("tune:\n  preset: quik", "7: tune.preset: must be one of quick, standard, thorough, found 'quik'; did you"),
        ("tune:\n  preset: [1]", "7: tune.preset: must be one of"),
        ("tune:\n  metric: f1", "7: tune.metric: seq-cls is measured by accuracy, f1_macro or loss, found 'f1'"),
        ("tune:\n  finalists: 20", "7: tune.finalists: must be at most trials (16), found 20"),
        # The default space is not in the file: the section is named.
        ("tune:\n  sampler: grid", "6: tune.space.train.learning_rate: a grid needs choices"),
        ("tune:\n  space:\n    lora.r: [0, 1]", "8: tune.space.lora.r: must be a whole number of at least 1, found 0"),
        ("tune:\n  space: {}", "7: tune.space: must map keys such as lora.r"),
        ("tune:\n  space: quick", "7: tune.space: must map keys such as lora.r"),
        ("tune:\n  space:", "7: tune.space: must map keys such as lora.r"),
        ("tune:\n  space:\n    lora.r: [1, 2]\n    lora.r: [3, 4]", "9: tune.space.lora.r is given twice"),
        ("lora: {r: 0}", "6: lora.r: must be a whole number of at least 1, found 0"),
    ],
)
def test_an_error_names_the_file_the_line_and_the_key(file: Path, text: str, said: str) -> None:
    file.write_text(BASE + text + "\n")
    with pytest.raises(ConfigError) as error:
        TuneConfig.read(file)
    assert str(error.value).startswith(f"{file}:{said}")


def test_an_error_of_a_commands_option_names_the_option_alone(file: Path) -> None:
    with pytest.raises(ConfigError, match="^trials: must be a whole number of at least 1, found 0$"):
        TuneConfig.read(file, (), {"tune.trials": 0})
    with pytest.raises(ConfigError, match="^--set tune.trials: tune.trials: must be a whole number"):
        TuneConfig.read(file, ["tune.trials=0"])


# -- known again ------------------------------------------------------------------------------------------------------


def test_options_are_plain_json() -> None:
    values = options(memory="1GiB").to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["train"] == base().to_dict()
    assert Space.parse(values["space"], base()) == options().space


@pytest.mark.parametrize(
    "changes",
    [
        {"trials": 17}, {"sampler": "random"}, {"reduction": 3}, {"min_share": 0.5}, {"finalists": 2}, {"seeds": 0},
        {"metric": "loss"}, {"space": Space.default(base(), "thorough")}, {"train": base(data="other.jsonl")},
        {"train": base(seed=1)}, {"train": base(lora=LoraConfig(bias="all"))}, {"train": base(max_steps=31)},
    ],
)  # fmt: skip
def test_another_search_has_another_fingerprint(changes: dict[str, Any]) -> None:
    assert options(**changes).fingerprint() != options().fingerprint()


def test_where_a_search_lies_and_how_much_runs_at_once_make_it_no_other() -> None:
    same = options(slots=3, memory="8GiB", train=base(output="elsewhere", overwrite=True))
    assert same.fingerprint() == options().fingerprint() == replace(options()).fingerprint()
    assert len(same.fingerprint()) == 64


def test_the_version_of_peft_whose_files_are_written_makes_a_search_no_other() -> None:
    later = base(lora=LoraConfig(peft_version="9.9"))
    assert options(train=later).fingerprint() == options().fingerprint()


def test_any_metric_of_the_run_can_be_searched_by() -> None:
    assert options(metric="f1_macro").metric == "f1_macro"
    train = base(metrics=["f1_micro", "somebody.metrics:own"])
    assert options(train=train).metric == "f1_micro"
    assert options(train=train, metric="whatever_it_returns").metric == "whatever_it_returns"
    assert options(train=base(problem_type="regression")).metric == "mse"
    assert options(train=base(metrics=["loss"])).metric == "loss"


def test_an_option_that_is_newer_than_the_first_version_says_so() -> None:
    """At its default it then has no part in a search's fingerprint: searches of 0.1 are recognised."""
    from loraloom.config.options import options_of
    from loraloom.config.tune import SearchOptions
    from ondisk.cases import FILES

    first = """
        model data task output overwrite revision dtype attn_implementation device eval_split format columns max_length
        overlong on_bad_row allow_untrained chat_template date stride problem_type data_workers epochs max_steps
        batch_size gradient_accumulation_steps learning_rate loraplus_lr_ratio lr_scheduler_type warmup_ratio
        warmup_steps decay_ratio optim optim_args weight_decay max_grad_norm gradient_checkpointing fsdp seed
        eval_strategy eval_steps eval_minutes eval_batch_size metrics metric_for_best_model load_best_model_at_end
        early_stopping_patience early_stopping_threshold max_new_tokens save_strategy save_steps save_minutes
        save_total_limit report_to"""
    search = "trials sampler reduction min_share finalists seeds metric slots memory workers ray_address"
    adapter = " ".join(json.loads((FILES / "finished/minimal/run.json").read_text())["options"]["lora"])
    for cls, known in ((TrainConfig, first), (SearchOptions, search), (LoraConfig, f"{adapter} runtime_config")):
        newer = {name for name in options_of(cls) if name not in known.split()}
        assert newer == {name for name, option in options_of(cls).items() if option.since}


def test_within_needs_a_metric_and_a_choice(classify: Any) -> None:
    space = {"lora.r": [1, 2, 4, 8]}
    with pytest.raises(ConfigError, match=r"^within: 0.005 .* compares by the loss; give --metric"):
        classify(space, within=0.005, metric="loss")
    with pytest.raises(ConfigError, match=r"^within: does nothing with prefer=quality"):
        classify(space, within=0.005, prefer="quality")
    asked, plain = classify(space, within=0.005, prefer="fast", max_size="5MiB"), classify(space)
    assert (asked.max_size, asked.fingerprint()) == (5 * 2**20, plain.fingerprint())
