"""Promises of the run file: written and read it is the same run, and whatever is wrong is one message with its line."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraloom import LoraConfig
from loraloom.config.keys import KEYS, LORA_KEYS
from loraloom.config.lora_checks import split_names
from loraloom.config.names import TASKS
from loraloom.config.runfile import read, with_values, write
from loraloom.config.train import DTYPES, SCHEDULES, TrainConfig
from loraloom.errors import ConfigError

STARTER = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
BASE = """\
task: seq-cls
model: {name: my-model}
data: {train: rows.jsonl}
output: runs/mine
"""


def options(**changes: object) -> TrainConfig:
    given = {"model": "my-model", "data": "rows.jsonl", "task": "seq-cls", "output": "runs/mine", **changes}
    return TrainConfig(**given)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


# -- what a file says ---------------------------------------------------------------------------------------------


def test_a_file_says_what_the_options_say(file: Path) -> None:
    file.write_text(
        "# a run\n"
        "task: causal-lm\n"
        "model:\n  name: m\n  dtype: bfloat16\n"
        "data: {train: d.csv, validation: e.csv, max_length: 99}\n"
        "lora: {r: 16, lora_alpha: 32, target_modules: [q_proj, v_proj], rank_pattern: {q_proj: 4}}\n"
        "train: {learning_rate: 2e-4, batch_size: 4, epochs: 1.5, lr_scheduler_type: cosine, seed: 7}\n"
        "output: o\n"
        "overwrite: true\n"
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 4})
    assert read(file).options == TrainConfig(
        task="causal-lm", model="m", dtype="bfloat16", data="d.csv", eval_split="e.csv", max_length=99, lora=lora,
        learning_rate=2e-4, batch_size=4, epochs=1.5, lr_scheduler_type="cosine", seed=7, output="o", overwrite=True,
    )  # fmt: skip


def test_what_a_file_leaves_out_is_the_options_default(file: Path) -> None:
    file.write_text(BASE + "lora:\ntrain:\n  # learning_rate: 1\n")
    found = read(file)
    assert found.options == options()
    assert found.tune == {}


def test_the_section_of_a_search_is_kept_as_it_stands(file: Path) -> None:
    file.write_text(BASE + "tune:\n  trials: 4\n  memory: [1, {a: b}]\n  space: {lora.r: [1, 2]}\n")
    found = read(file)
    assert found.tune == {"trials": 4, "memory": [1, {"a": "b"}], "space": {"lora.r": [1, 2]}}
    places = [found.places.get(key) for key in ("tune.trials", "tune.space.lora.r", "lora.r")]
    assert places == [f"{file}:6", f"{file}:8", None]


def test_every_option_has_a_key() -> None:
    assert set(KEYS) == {spec.name for spec in fields(TrainConfig)} - {"lora"}
    assert set(LORA_KEYS) == {spec.name for spec in fields(LoraConfig)} - {"task_type", "runtime_config"}
    assert len({*KEYS.values(), *LORA_KEYS.values()}) == len(KEYS) + len(LORA_KEYS)


# -- what is set beside it -------------------------------------------------------------------------------------------


def test_what_is_set_wins_over_the_file_and_a_commands_option_over_both(file: Path) -> None:
    file.write_text(BASE + "lora: {r: 2}\ntrain: {seed: 1, epochs: 2}\n")
    found = read(file, ["lora.r=4", "train.seed=2", "data.validation=5"], {"train.seed": 3}).options
    assert found == options(lora=LoraConfig(r=4), seed=3, epochs=2, eval_split=5)
    assert read(file, {"lora.r": 4}).options.lora.r == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
        ("all-linear", "all-linear"),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("null", None),
        ("", None),
    ],
)
def test_targets_that_are_set_are_names_with_commas_or_an_expression(file: Path, text: str, value: object) -> None:
    assert read(file, [f"lora.target_modules={text}"]).options.lora.target_modules == value


def test_a_search_is_set_by_its_keys_too(file: Path) -> None:
    file.write_text(BASE + "tune: {trials: 4, space: {lora.r: [1, 2]}}\n")
    found = read(file, ["tune.trials=8", "tune.space.lora.r=[4, 8]", "tune.space.lora.bias=none"])
    assert found.tune == {"trials": 8, "space": {"lora.r": [4, 8], "lora.bias": "none"}}


def test_a_run_needs_no_file(file: Path) -> None:
    given = {"task": "seq-cls", "model.name": "my-model", "data.train": "rows.jsonl", "output": "runs/mine"}
    assert read(None, (), given).options == options(lora=LoraConfig(**STARTER))
    with pytest.raises(ConfigError, match=r"^Missing option '--data'\.$"):
        read(None, (), {"model.name": "m", "task": "seq-cls", "output": "o"})
    with pytest.raises(ConfigError, match=r"^Missing options --data, --task, --output; give them, or a run file"):
        read(None, (), {"model.name": "m"})


@pytest.mark.parametrize(
    ("given", "kept", "note"),
    [
        ({}, {}, ""),
        ({"lora.r": 4}, {"r": 4, "lora_alpha": 8}, "lora_alpha is 8 (2 * r)"),
        ({"lora.r": 4, "lora.lora_alpha": 3}, {"r": 4, "lora_alpha": 3}, ""),
        ({"lora.lora_alpha": 8}, {"lora_alpha": 8}, ""),
        ({"lora.use_rslora": True}, {"use_rslora": True, "lora_alpha": 8}, "lora_alpha is 8 (2 * sqrt(r), with use_rs"),
        ({"lora.target_modules": ["q"]}, {"target_modules": ["q"]}, ""),
        ({"lora.target_modules": None}, {"target_modules": None}, ""),
        ({"lora.layers_to_transform": [0]}, {"layers_to_transform": [0], "target_modules": None}, ""),
        ({"lora.target_parameters": ["w"]}, {"target_parameters": ["w"], "target_modules": None}, ""),
    ],
)
def test_without_a_file_what_is_not_set_of_the_adapter_is_as_in_a_starter_file(
    given: dict[str, object], kept: dict[str, object], note: str
) -> None:
    needed = {"task": "seq-cls", "model.name": "my-model", "data.train": "rows.jsonl", "output": "runs/mine"}
    found = read(None, given, needed)
    assert found.options == options(lora=LoraConfig(**{**STARTER, **kept}))
    assert [text[: len(note)] for text in found.notes] == ([note] if note else [])


def test_ranks_that_a_search_varies_alone_get_twice_the_rank_as_alpha() -> None:
    given = {"task": "seq-cls", "model.name": "my-model", "data.train": "rows.jsonl", "output": "runs/mine"}
    found = read(None, {"tune.space.lora.r": [2, 4]}, given)
    assert found.tune == {"space": {"lora.r": [2, 4], "lora.lora_alpha": "2r"}}
    assert found.notes == ["lora_alpha is 2 * r in each trial; lora.lora_alpha in tune.space sets another"]
    for more in ({"tune.space.lora.lora_alpha": [8, 16]}, {"lora.lora_alpha": 8}):
        assert read(None, {"tune.space.lora.r": [2, 4], **more}, given).notes == []


@pytest.mark.parametrize("text", ["", "lora:\n", "lora: {r: 4}\n"])
def test_a_key_that_a_file_leaves_out_means_what_it_meant_when_the_file_was_written(file: Path, text: str) -> None:
    file.write_text(BASE + text)
    found = read(file, ["lora.bias=all"], {"lora.r": 2})
    assert found.options.lora == LoraConfig(r=2, lora_alpha=8, bias="all", task_type="SEQ_CLS")
    assert found.notes == []


# -- resumed ---------------------------------------------------------------------------------------------------------


def test_what_is_not_given_on_a_resume_is_what_the_run_had(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs" / "mine"
    was = options(output=str(output), batch_size=2, save_steps=5, lora=LoraConfig(r=4), max_length=77)
    write(was, output / "run.yaml")
    given = {"output": str(output)}
    for resume, more in ((True, given), (output, {}), (output / "checkpoint-5", {}), (str(output), given)):
        assert read(None, (), more, resume=resume).options == was
    (tmp_path / "moved").mkdir()
    (output / "run.yaml").rename(tmp_path / "moved" / "run.yaml")
    assert read(None, (), {}, resume=tmp_path / "moved").options == replace(was, output=str(tmp_path / "moved"))
    found = read(None, ["train.seed=3"], {**given, "lora.r": 8}, resume=tmp_path / "moved" / "checkpoint-1")
    assert found.options == replace(was, seed=3, lora=was.lora.copy(r=8))
    assert found.notes == [f"what is not given is as in {tmp_path / 'moved' / 'run.yaml'}"]
    with pytest.raises(ConfigError, match="^Missing options --model, --data, --task, --output"):
        read(None, (), {}, resume=tmp_path / "runs")


def test_a_run_file_wins_over_what_the_run_had_and_a_moment_replaces_the_other_moments(tmp_path: Path) -> None:
    output = tmp_path / "mine"
    write(options(output=str(output), batch_size=2, seed=4, eval_steps=5, save_minutes=2), output / "run.yaml")
    file = tmp_path / "mine.yaml"
    file.write_text(BASE.replace("runs/mine", str(output)) + "train: {batch_size: 8, save_strategy: epoch}\n")
    found = read(file, ["eval.minutes=1"], resume=True).options
    assert (found.batch_size, found.seed, found.eval_minutes, found.eval_steps) == (8, 4, 1, None)
    assert (found.save_strategy, found.save_minutes) == ("epoch", None)
    output.joinpath("run.yaml").write_text("train: {sed: 1}\n")
    with pytest.raises(ConfigError, match=r"mine/run\.yaml:1: train\.sed: there is no such key; did you mean 'seed'\?"):
        read(file, resume=True)


# -- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {learning_rat: 1}", "5: train.learning_rat: there is no such key; did you mean 'learning_rate'?"),
        ("train: {lr: 1}", "5: train.lr: there is no such key; did you mean 'train.learning_rate'?"),
        ("train: {r: 1}", "5: train.r: there is no such key; did you mean 'lora.r'?"),
        ("lora: {learning_rate: 1}", "5: lora.learning_rate: there is no such key; did you mean 'train.learning_rate'"),
        ("data: {dtype: float32}", "5: data is given twice, first in line 3"),
        ("train: {dtype: float32}", "5: train.dtype: there is no such key; did you mean 'model.dtype'?"),
        ("train: {zzz: 1}", "5: train.zzz: there is no such key; the keys here are train.epochs, "),
        ("trian: {seed: 1}", "5: trian: there is no such key; did you mean 'train'?"),
        ("seed: 1", "5: seed: there is no such key; did you mean 'train.seed'?"),
        ("lora.r: 4", "5: lora.r: write it below its section: lora: {r: ...}"),
        ("lora: {task_type: SEQ_CLS}", "5: lora.task_type: follows from task; leave it out"),
        ("lora: 16", "5: lora: must be a section such as lora: {r: 16}, found 16"),
        ("tune: quick", "5: tune: must be a section such as tune: {trials: 16}, found 'quick'"),
        ("lora:\n  r: 0", "6: lora.r: must be a whole number of at least 1, found 0"),
        ("lora:\n\n  lora_dropout: 1", "7: lora.lora_dropout: must be a number of at least 0 and below 1, found 1"),
        ("lora: {use_dora: true}", "5: lora.use_dora: not implemented in loraloom yet"),
        ("train: {batch_size: '8'}", "5: train.batch_size: must be a whole number of at least 1, found '8'"),
        ("train: {learning_rate: fast}", "5: train.learning_rate: must be a number above 0, found 'fast'"),
        ("overwrite: yes", "5: overwrite: must be true or false, found 'yes'"),
        ("lora: {r: 4, r: 8}", "5: lora.r is given twice, first in line 5; keep one"),
    ],
)
def test_an_error_names_the_file_the_line_the_key_and_the_nearest(file: Path, text: str, said: str) -> None:
    file.write_text(BASE + text + "\n")
    with pytest.raises(ConfigError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}:{said}")


def test_the_fields_of_a_section_keep_the_line_of_their_own_place(file: Path) -> None:
    file.write_text("task: seq-clas\nmodel: {name: m,\n  dtype: float8}\ndata: {train: d}\noutput: o\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:1: task: must be one of .* did you mean 'seq-cls'\?"):
        read(file)
    with pytest.raises(ConfigError, match=r"run\.yaml:3: model\.dtype: must be one of"):
        read(file, ["task=seq-cls"])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lora.r", "--set: must be key=value, such as lora.r=16, found 'lora.r'"),
        ("=3", "--set: must be key=value"),
        ("lora.r=0", "--set lora.r: lora.r: must be a whole number of at least 1, found 0"),
        ("lora.r=[1", "--set lora.r: not YAML (while parsing a flow sequence"),
        ("lora.rr=1", "--set lora.rr: lora.rr: there is no such key; did you mean 'r'?"),
        ("lora={r: 4}", "--set lora: lora: is a section; set one of its keys, such as lora.r=16"),
        ("lora.target_modules=' ,'", "--set lora.target_modules: holds no name, found ' ,'"),
    ],
)
def test_an_error_of_what_is_set_names_the_setting(file: Path, setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(file, [setting])
    assert str(error.value).startswith(said)


def test_an_error_of_a_commands_option_names_the_field_alone(file: Path) -> None:
    file.write_text(BASE + "lora: {r: 4}\n")
    with pytest.raises(ConfigError, match="^r: must be a whole number of at least 1, found 0$"):
        read(file, (), {"lora.r": 0})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.unlink(), ": no such run file"),
        (lambda p: p.write_text(""), ": is empty; a run file begins with keys such as task: seq-cls"),
        (lambda p: p.write_text("- 1\n"), ": holds no keys"),
        (lambda p: p.write_bytes(b"task: \xff\n"), ": not UTF-8 at byte 6; save the file as UTF-8"),
        (lambda p: (p.unlink(), p.mkdir()), ": cannot be read as a run file (Is a directory)"),
        (
            lambda p: p.write_text("task: seq-cls\n"),
            ": model.name, data.train, output: not given, and a run needs them; add them to",
        ),
    ],
)
def test_a_file_that_is_no_run_file_is_said(file: Path, make: object, said: str) -> None:
    make(file)  # type: ignore[operator]
    with pytest.raises(ConfigError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}{said}")


def test_a_file_that_is_not_there_offers_the_nearest(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"ruN\.yml: no such run file; did you mean 'run.yaml'\?"):
        read(file.with_name("ruN.yml"))


def test_reading_changes_nothing_and_asks_no_network(file: Path) -> None:
    before = file.read_bytes()
    read(file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["run.yaml"]


# -- values by dotted keys -------------------------------------------------------------------------------------------


def test_dotted_keys_replace_values_and_leave_the_options_as_they_were() -> None:
    before = options(lora=LoraConfig(r=2, rank_pattern={"a": 3}))
    found = with_values(
        before, {"lora.r": 8, "train.learning_rate": 1e-3, "data.max_length": 9, "model.dtype": "float16"}
    )
    assert found == replace(before, lora=before.lora.copy(r=8), learning_rate=1e-3, max_length=9, dtype="float16")
    assert before == options(lora=LoraConfig(r=2, rank_pattern={"a": 3}))
    assert found.lora.rank_pattern is not before.lora.rank_pattern


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lora.r": 0}, "lora.r: must be a whole number of at least 1, found 0"),
        ({"train.batch_size": 0}, "train.batch_size: must be a whole number"),
        ({"lora.rr": 1}, "lora.rr: there is no such key; did you mean 'r'?"),
        ({"r": 1}, "r: there is no such key; did you mean 'lora.r'?"),
    ],
)
def test_an_error_of_dotted_keys_begins_with_the_key(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_values(options(), values)
    assert str(error.value).startswith(said)


def test_names_are_a_list_and_other_signs_an_expression() -> None:
    assert split_names("x", "a, b.c ,d-e") == ["a", "b.c", "d-e"]
    assert split_names("x", "All-Linear") == "All-Linear"
    assert split_names("x", "(a|b)") == "(a|b)"
    with pytest.raises(ConfigError, match="^x: holds no name"):
        split_names("x", " ,")


# -- writing ---------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)
POSITIVE = st.floats(1e-12, 1e6)
LORAS = st.builds(
    LoraConfig,
    r=st.integers(1, 256),
    lora_alpha=st.floats(1e-6, 1e6) | st.integers(1, 512),
    lora_dropout=st.floats(0, 0.99),
    target_modules=st.none() | st.lists(WORDS, min_size=1) | st.sampled_from(["all-linear", r".*\.(q|v)_proj", "no"]),
    exclude_modules=st.none() | st.lists(WORDS),
    modules_to_save=st.none() | st.lists(WORDS),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    init_lora_weights=st.sampled_from([True, False, "gaussian"]),
    use_rslora=st.booleans(),
    rank_pattern=st.dictionaries(st.sampled_from(["q_proj", r"^a\.b", "2e-4", "no: #"]), st.integers(1, 9)),
    alpha_pattern=st.dictionaries(st.sampled_from(["q_proj", "null"]), st.floats(0.5, 8)),
    auto_mapping=st.none() | st.dictionaries(WORDS, WORDS | st.lists(st.integers())),
    revision=st.none() | WORDS,
)
RUNS = st.builds(
    TrainConfig,
    model=WORDS,
    data=WORDS,
    task=st.sampled_from([*TASKS]),
    output=WORDS,
    lora=LORAS,
    eval_split=st.floats(0.001, 0.999) | st.integers(1, 100) | st.just("eval.csv"),
    epochs=POSITIVE | st.integers(1, 9),
    max_steps=st.none() | st.integers(1, 10**9),
    batch_size=st.integers(1, 512),
    gradient_accumulation_steps=st.integers(1, 64),
    learning_rate=POSITIVE,
    loraplus_lr_ratio=POSITIVE,
    lr_scheduler_type=st.sampled_from(SCHEDULES),
    weight_decay=st.floats(0, 1),
    warmup_ratio=st.floats(0, 1),
    max_grad_norm=POSITIVE,
    eval_steps=st.none() | st.integers(1, 999),
    max_length=st.none() | st.integers(1, 999),
    seed=st.integers(0, 2**63 - 1),
    dtype=st.sampled_from(DTYPES),
    overwrite=st.booleans(),
)


@given(RUNS, st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_what_is_written_is_read_as_equal_options(run: TrainConfig, title: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write(run, Path(folder) / "best.yaml", title)
        assert read(Path(folder) / "best.yaml").options == run


def test_a_written_file_says_where_it_is_from_and_how_to_use_it(tmp_path: Path) -> None:
    write(options(lora=LoraConfig(r=16)), tmp_path / "new" / "best.yaml", "The best of 16 trials.\nAccuracy 0.9.")
    text = (tmp_path / "new" / "best.yaml").read_text()
    assert text.startswith("# The best of 16 trials.\n# Accuracy 0.9.\n# Train it with: loraloom train best.yaml; ")
    assert "\n  r: 16  # Rank of the update\n" in text
    assert "overwrite" not in text
    assert "megatron" not in text
    assert text.isascii()
