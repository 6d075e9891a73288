"""Promises to who has files of an earlier loraloom on disk: they are read, resumed and shown as they were.

``files`` was written by loraloom 0.1.0 (``make`` says how). Each test works on a copy, by commands and public names
alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from loraloom import PeftModel
from ondisk.cases import (
    FILES,
    FINISHED,
    KINDS,
    NEAR,
    RUNS,
    STARTERS,
    WEIGHTS,
    Kind,
    base,
    loraloom,
    many_rows,
    near,
    outputs,
    processor,
)

MADE = json.loads((FILES / "made.json").read_text())
#: On another processor the last bits differ.
SAME = processor() == MADE["processor"]


@pytest.fixture(autouse=True)
def _a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are where the test runs."""
    monkeypatch.chdir(shutil.copytree(FILES, tmp_path / "disk"))


# -- adapters ---------------------------------------------------------------------------------------------------------


def check_answers(model: torch.nn.Module, name: str, kind: Kind) -> None:
    wanted = load_file("adapters/logits.safetensors")[name]
    if SAME:
        assert torch.equal(outputs(model), wanted)
    tolerance = 1e-5 if kind.dtype is torch.float32 else 2e-2
    torch.testing.assert_close(outputs(model), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_gives_the_logits_that_it_gave_and_is_written_as_it_was(name: str) -> None:
    kind, folder = KINDS[name], Path("adapters") / name
    model = PeftModel.from_pretrained(base(kind, Path()), folder)
    check_answers(model.eval(), name, kind)
    model.save_pretrained("again")
    assert Path("again", WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    then, now = (json.loads((one / "adapter_config.json").read_text()) for one in (folder, Path("again")))
    assert {key: now.get(key) for key in then} == then


def test_two_adapters_that_were_saved_together_are_read_apart_and_together() -> None:
    kind = KINDS["linear"]
    model = PeftModel.from_pretrained(base(kind, Path()), "adapters/two")
    check_answers(model.eval(), "first", kind)
    model.load_adapter("adapters/two/second", "second")
    model.set_adapter("second")
    check_answers(model.eval(), "second", kind)


def test_an_adapter_whose_save_was_killed_half_way_through_its_files_is_the_new_one() -> None:
    left = [path.name for path in Path("adapters/interrupted").iterdir() if path.name.startswith(".")]
    assert len(left) == 2, "a journal, and a file that it names"
    model = PeftModel.from_pretrained(base(KINDS["rslora"], Path()), "adapters/interrupted")
    check_answers(model.eval(), "rslora", KINDS["rslora"])
    config = json.loads(Path("adapters/interrupted/adapter_config.json").read_text())
    assert config["use_rslora"] is True


# -- runs -------------------------------------------------------------------------------------------------------------

#: Run → the step after which it is resumed, where that is not 6; none where nothing is left to train.
RESUMED: dict[str, list[int]] = {"within": [7], "stopped": [7], "best": [8], "saved": []}


def record(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "run.json").read_text())
    return found


def settings(path: str) -> dict[str, Any]:
    """The keys of a run file with their values."""
    found: dict[str, Any] = {}
    for key, value in yaml.safe_load(Path(path).read_text()).items():
        found |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return found


def stamps(*paths: str | Path) -> list[tuple[int, int]]:
    """By which it is known whether files were written again."""
    found = [Path(path).stat() for path in paths]
    return [(one.st_ino, one.st_mtime_ns) for one in found]


def check_end(folder: str, name: str) -> None:
    """The adapter in ``folder`` is the one that the run ``name`` came to when nobody killed it."""
    found, wanted = Path(folder, WEIGHTS), Path("ends", f"{name}.safetensors")
    if SAME:
        assert found.read_bytes() == wanted.read_bytes()
    near(found, wanted, NEAR.get(name, 1e-6))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_killed_comes_to_the_adapter_of_one_that_was_not(name: str) -> None:
    folder = f"train/{name}"
    day = settings(f"{folder}/run.yaml").get("data.date")  # on which the run began, where a template writes it
    assert loraloom(["train", f"{folder}.yaml", "--resume"]) == 0
    check_end(folder, name)
    assert settings(f"{folder}/run.yaml").get("data.date") == day
    found = record(folder)
    assert (found["state"], found["resumed_at"]) == ("finished", RESUMED.get(name, [6]))
    assert [path.name for path in Path(folder).rglob(".*")] == [], "nothing is left of what was killed"


def test_a_run_is_resumed_by_the_run_file_in_its_own_folder_and_only_where_that_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["train", "train/within/run.yaml"]
    assert loraloom(command) == 2
    assert "checkpoint-7" in capsys.readouterr().err
    assert loraloom([*command, "--resume"]) == 0
    check_end("train/within", "within")
    before = stamps(f"train/within/{WEIGHTS}")
    assert loraloom([*command, "--resume"]) == 0
    assert stamps(f"train/within/{WEIGHTS}") == before, "it had come to its end"


def test_a_run_is_never_mixed_with_one_of_other_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert loraloom(["train", "train/checkpoint.yaml", "--resume", "--set", "train.learning_rate=0.02"]) == 2
    assert "learning_rate is 0.02 and was 0.01" in capsys.readouterr().err
    assert loraloom(["train", "train/checkpoint.yaml", "--resume", "--set", "data.train=stars.jsonl"]) == 2


def test_a_run_is_resumed_in_a_folder_that_was_moved() -> None:
    moved = Path("elsewhere/deep")
    shutil.copytree("train/checkpoint", moved)
    assert loraloom(["train", "train/checkpoint.yaml", "--resume", "--output", str(moved)]) == 0
    check_end(str(moved), "checkpoint")


# -- run files, and runs that came to their end -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_is_known_by_its_run_file_and_never_trained_again(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With any key read otherwise than it was, it would be another run."""
    folder = f"finished/{name}"
    then, before = settings(f"{folder}/run.yaml"), stamps(f"{folder}/{WEIGHTS}")
    assert loraloom(["train", f"{folder}.yaml"]) == 2
    assert "holds an adapter" in capsys.readouterr().err
    for file in (f"{folder}.yaml", f"{folder}/run.yaml"):
        assert loraloom(["train", file, "--resume"]) == 0
        assert "finished" in capsys.readouterr().out
        assert stamps(f"{folder}/{WEIGHTS}") == before
        now = settings(f"{folder}/run.yaml")
        assert {key: now[key] for key in then if key in now} == {key: then[key] for key in then if key in now}
    assert record(folder)["state"] == "finished"
    assert loraloom(["train", f"{folder}.yaml", "--resume", "--set", "train.seed=5"]) == 2
    assert "seed is 5 and was " in capsys.readouterr().err


@pytest.mark.parametrize("name", STARTERS)
def test_a_run_file_that_was_begun_with_trains_with_the_options_that_it_had(name: str) -> None:
    more = ["--max-steps", "1", "--output", "aside"]
    assert loraloom(["train", f"starters/{name}.yaml", *more]) == 0
    before = stamps(f"aside/{WEIGHTS}")
    # With all options written out, as they were then, it is the same run: it is at its end.
    assert loraloom(["train", f"starters/{name}.run.yaml", *more, "--resume"]) == 0
    assert stamps(f"aside/{WEIGHTS}") == before


def test_an_adapter_that_a_run_wrote_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert loraloom(["inspect", "finished/every", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["alpha_pattern"] == {"query": 1.5}


# -- searches ---------------------------------------------------------------------------------------------------------


#: Trials that had not begun when the search was killed.
BEGUN_LATER = [("tune/interrupted", "trial-6"), ("tune/interrupted", "trial-7")]


def check_search(folder: str, wanted: str) -> None:
    """The search in ``folder`` came to the trials, the adapters and the best one of the search in ``wanted``."""
    ours, theirs = (json.loads(Path(one, "result.json").read_text()) for one in (folder, wanted))
    found, known = (
        [[trial[key] for key in ("number", "config", "state", "steps", "repeats", "seed")] for trial in one["trials"]]
        for one in (ours, theirs)
    )
    assert found == known
    assert (ours["learned"], (ours["best"] or {}).get("config")) == (
        theirs["learned"],
        (theirs["best"] or {}).get("config"),
    )
    for path in Path(wanted).rglob(WEIGHTS):
        mine = Path(folder, path.relative_to(wanted))
        if SAME:
            assert mine.read_bytes() == path.read_bytes()
        # On another processor AdamW makes something of the last bits of a gradient that is 0, in 18 steps.
        near(mine, path, 1e-2 if (folder, path.parent.name) in BEGUN_LATER else 1e-6)
    assert [path.name for path in Path(folder).rglob(".*")] == [], "nothing is left of what was killed"
    assert not Path(folder, "under-way").exists()


#: Folder of a search → its run file, and the same search that nobody killed.
KILLED = {
    "tune/killed": ("search", "tune/finished"),  # with trials running, paused and finished
    "tune/interrupted": ("search", "tune/finished"),  # before the finalists' repeats, while it wrote down where it was
    "tune/stopped": ("stopped", "ends/stopped"),  # by SIGTERM within a step, after a trial had failed
}


@pytest.mark.parametrize("folder", KILLED)
def test_a_search_that_was_killed_comes_to_the_end_of_one_that_was_not(folder: str) -> None:
    file, wanted = KILLED[folder]
    known = json.loads(Path(folder, "search.json").read_text())["trials"]
    trials = [f"{folder}/trials/trial-{one['number']}/{WEIGHTS}" for one in known if one["state"] == "finished"]
    before = stamps(*trials)
    assert loraloom(["tune", f"tune/{file}.yaml", "--output", folder]) == 0
    check_search(folder, wanted)
    assert stamps(*trials) == before, "trials that had come to their end were not trained again"


def test_a_finished_search_says_its_verdict_again_and_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """With any key read otherwise than it was, it would be another search."""
    shutil.copytree("tune/finished", "before")
    trials = list(Path("tune/finished/trials").rglob(WEIGHTS))
    before = stamps(*trials)
    assert loraloom(["tune", "tune/search.yaml"]) == 0
    best = json.loads(Path("before/result.json").read_text())["best"]
    assert f"use r={best['config']['lora.r']}" in capsys.readouterr().out
    check_search("tune/finished", "before")
    assert stamps(*trials) == before
    assert loraloom(["tune", "tune/search.yaml", "--set", "train.seed=5"]) == 2
    assert "another search" in capsys.readouterr().err


def test_a_finished_search_is_extended_and_from_then_on_known_by_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert loraloom(["tune", "tune/finished", "--add-trials", "1"]) == 2
    assert "kept no options (loraloom 0.2 and before); give the run file" in capsys.readouterr().err
    before = json.loads(Path("tune/finished/result.json").read_text())["trials"]
    assert loraloom(["tune", "tune/search.yaml", "--add-trials", "1"]) == 0
    after = json.loads(Path("tune/finished/result.json").read_text())["trials"]
    assert [trial["curve"] for trial in after[: len(before)]] == [trial["curve"] for trial in before]
    assert after[len(before)]["repeats"] is None
    assert loraloom(["tune", "tune/finished"]) == 0
    assert "trials have ended" in capsys.readouterr().out


def test_the_run_file_of_the_best_trial_trains_it_again() -> None:
    assert loraloom(["train", "tune/finished/best.yaml"]) == 0
    found = json.loads(Path("tune/finished/result.json").read_text())
    best = found["trials"][found["best"]["number"]]
    again = record("tune/finished/full")
    assert again["curve"]["loss"] == pytest.approx(best["curve"]["loss"], rel=1e-3)
    assert again["result"]["perplexity"] == pytest.approx(best["metric"], rel=1e-3)


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_cache_of_rows_is_no_obstacle_and_the_tokens_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tokenises is part of an entry's name, so another loraloom makes its own. A cache can be moved."""
    monkeypatch.setenv("LORALOOM_CACHE", "cache")
    many_rows(Path("many.jsonl"))
    assert loraloom(["train", "many.yaml"]) == 0
    then, now = json.loads(Path("ends/cache.json").read_text()), record("aside")
    assert {key: now["identity"][key] for key in then["identity"]} == then["identity"]
    check_end("aside", "cache")
    for path in (FILES / "cache").rglob("*.*"):  # an entry is whole, or it is not there
        mine = Path(path.relative_to(FILES))
        assert not mine.parent.exists() or mine.read_bytes() == path.read_bytes()
    entries = sorted(Path("cache").glob("*/*"))
    shutil.rmtree("aside")
    monkeypatch.chdir(shutil.copytree(".", tmp_path / "moved"))
    assert loraloom(["train", "many.yaml"]) == 0
    assert sorted(Path("cache").glob("*/*")) == entries
    check_end("aside", "cache")
