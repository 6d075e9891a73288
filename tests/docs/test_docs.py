"""What the pages say runs: snippets, commands and links; and both READMEs say the same.

The blocks of one page run in order, in a folder that holds a small model ``my-model`` and the files that the page
shows (a block opened by ```` ```jsonl NAME ````, with any kind of file).
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loraloom import cli
from loraloom.config.lora import LoraConfig

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh-CN.md")
MEASURED = (
    *READMES,
    "docs/performance.md",
    *(f"docs/{name}" for name in ("tune.md", "zh/tune.md", "data.md", "zh/data.md")),
)
ENGLISH = [*READMES, "CHANGELOG.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
CHINESE = [f"docs/zh/{path.name}" for path in (ROOT / "docs" / "zh").glob("*.md")]
PAGES = [*ENGLISH, *CHINESE]
FENCE = re.compile(r"^```(\w*) ?([\w.-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    kind: str
    name: str
    text: str
    line: int


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    text = text_of(page)
    return [Block(m[1], m[2], m[3], text.count("\n", 0, m.start()) + 2) for m in FENCE.finditer(text)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama with two layers, and a tokenizer that knows every byte and no more."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(words),
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in ENGLISH if any(b.kind in ("python", "jsonl") for b in blocks(page))])
def test_what_a_page_shows_runs(
    page: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(model_folder)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        where = f"{page}, line {block.line}"
        if block.name:
            Path(block.name).write_text(block.text, encoding="utf-8")
        elif block.kind == "python":
            # Blank lines in front, so that a traceback names the line of the page.
            exec(compile("\n" * (block.line - 1) + block.text, ROOT / page, "exec"), names)
        elif block.kind == "console":
            for command in re.findall(r"^\$ loraloom (.*)$", block.text, re.MULTILINE):
                with pytest.raises(SystemExit) as exit:
                    cli.main(shlex.split(command))
                assert exit.value.code == 0, f"{where}: loraloom {command}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if re.match(r"https?:", target):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if heading:
            assert heading in {name for _, name in titles(file)}, target


def english_of(path: Path) -> Path:
    """The English page of a Chinese one; any other path as it is."""
    return path.parents[1] / path.name if path.parent.name == "zh" else path.with_name(path.name.replace(".zh-CN", ""))


def titles(path: Path) -> list[tuple[int, str]]:
    """Each heading's level, and the name under which links find it."""
    found = re.findall(r"^(#+) (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return [(len(marks), re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")) for marks, title in found]


def links(page: str) -> list[tuple[str, int | None]]:
    """Where each link leads: the English page of its target, and the number of the heading there."""
    found: list[tuple[str, int | None]] = []
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", text_of(page))):
        path, _, heading = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        place = [name for _, name in titles(file)].index(heading) if heading else None
        found.append((target if "://" in target else str(english_of(file).relative_to(ROOT)), place))
    return sorted(found, key=str)


def first_codes(text: str) -> list[list[str]]:
    """The code in the first cell of each row of the tables."""
    return [
        sorted(re.findall(r"`([^`\n]+)`", row.split("|")[1])) for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)
    ]


@pytest.mark.parametrize(("first", "second"), [READMES, *((str(english_of(Path(page))), page) for page in CHINESE)])
def test_a_page_has_the_same_headings_code_links_and_figures_in_both_languages(first: str, second: str) -> None:
    assert [(b.kind, b.name, b.text) for b in blocks(first)] == [(b.kind, b.name, b.text) for b in blocks(second)]
    assert [level for level, _ in titles(ROOT / first)] == [level for level, _ in titles(ROOT / second)]
    assert links(first) == links(second)
    english, chinese = (FENCE.sub("", text_of(page)) for page in (first, second))
    assert first_codes(english) == first_codes(chinese)
    for what, pattern in {"list entries": r"^(-) ", "code": r"(?<!`)`([^`\n]+)`(?!`)"}.items():
        found = [sorted(re.findall(pattern, text, re.MULTILINE)) for text in (english, chinese)]
        assert found[0] == found[1], what
    tables = [re.findall(r"^\|.*\|$", text, re.MULTILINE) for text in (english, chinese)]
    figures = [[re.findall(r"\d+(?:[.,]\d+)*(?: ms| MiB)?", row) for row in table] for table in tables]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("page", MEASURED)
def test_the_figures_are_those_of_the_results(page: str) -> None:
    assert text_of(page) == _figures().refreshed(page), "run python docs/figures.py"


@pytest.mark.parametrize("page", MEASURED)
def test_without_results_tables_are_left_out_and_the_text_around_them_stays(page: str, tmp_path: Path) -> None:
    made = _figures().refreshed(page, tmp_path)
    between = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
    assert between.sub("", made) == between.sub("", text_of(page))
    tables = {found[2]: "|---" in found[0] for found in between.finditer(made)}
    assert not any(tables[name] for name in ("figures", "goals", "measured", "rows") if name in tables)
    assert all(tables[name] for name in ("quickstart", "lifecycle") if name in tables)


def test_every_missed_goal_is_marked_on_the_page_of_figures_and_counted_in_the_readmes(tmp_path: Path) -> None:
    shape = {"dtype": "bfloat16", "width": 64, "layers": 2, "rows": 3, "tokens": 16, "dropout": 0.1}
    times = {name: {"median": 1.5, "min": 1.4, "max": 1.6} for name in ("peft", "loraloom")}
    seconds = {name: [0.25] for name in ("floor", "peft", "loraloom")}
    figures = [{"shape": shape, "goal": goal, "times the floor": times, "seconds": seconds} for goal in (1.49, 1.5)]
    machine = {"processor": "A", "threads": 1, "python": "3", "torch": "2", "transformers": "5", "peft": "0"}
    record = {"command": "python step.py", "date": "2026-01-01", "machine": machine, "figures": figures}
    (tmp_path / "step.json").write_text(json.dumps(record))
    page = _figures().refreshed("docs/performance.md", tmp_path)
    rows = [row for row in page.splitlines() if "64" in row and "3×16" in row]
    assert len(rows) == 4  # in the table of goals, and in that of the steps
    for row in rows:
        assert "1.500" in row
        assert ("≤ 1.49, missed" in row) != ("≤ 1.50 |" in row)
    counts = [re.findall(r"\d+", line) for line in map(_goals_line, READMES)]
    assert [_goals_line(name, tmp_path) for name in READMES] == [
        "Goals were set for 2 figures of training, and 1 of them were missed.",
        "训练方面有 2 项数据设了目标，其中 1 项未达到。",
    ]
    marked = text_of("docs/performance.md").partition("<!-- /goals -->")[0]
    assert counts == [[str(len(re.findall(r"\| [≤≥].* \|$", marked, re.MULTILINE))), str(marked.count(", missed"))]] * 2


def _goals_line(readme: str, results: Path | None = None) -> str:
    text = _figures().refreshed(readme, results) if results else text_of(readme)
    (line,) = (line for line in text.splitlines() if line.startswith(("Goals were set", "训练方面有")))
    return line


MACHINE = {"processor": "A", "threads": 1, "python": "3", "torch": "2", "transformers": "5", "peft": "0"}
SHAPE = {"dtype": "bfloat16", "width": 64, "layers": 2, "rows": 2, "tokens": 16, "dropout": 0.0}


def written(folder: Path, name: str, record: dict[str, object]) -> None:
    whole = {"command": f"python {name}.py", "date": "2026-01-01", "machine": MACHINE, **record}
    (folder / f"{name}.json").write_text(json.dumps(whole))


def test_a_pack_and_a_search_are_shown_beside_peft_with_their_goals(tmp_path: Path) -> None:
    ratios = {"4": {"median": 2.0, "min": 1.9, "max": 2.1}, "8": {"median": 3.2, "min": 3.1, "max": 3.3}}
    seconds = {"peft": [0.5], "pack of 4": [1.0], "pack of 8": [1.25], "floor of 8 rows": [1.0]}
    figures = [
        {"shape": SHAPE, "goal": goal, "seconds": seconds, "throughput over peft": ratios} for goal in (3.0, 4.0)
    ]
    written(tmp_path, "pack", {"figures": figures})
    sweep = {
        "settings": {"reduction": 4, "min_share": 0.0625},
        "search": {"seconds": 100.0, "chosen": {}, "accuracy": 0.8, "configurations": [{}] * 16, "steps": 1500},
        "peft": {"steps_measured": 60, "runs": [{"step": 0.1}] * 16, "seconds": 850.0, "steps": 14112},
        "full": {"best_accuracy": 0.8211, "chosen_accuracy": 0.8011, "accuracies": [0.8211, 0.8011]},
        "speedup": 8.5,
        "goal": 8.0,
    }
    written(tmp_path, "sweep", sweep)
    for page in (*READMES, "docs/performance.md"):
        text = _figures().refreshed(page, tmp_path)
        search = [row for row in text.splitlines() if "850 s" in row]
        full = [row for row in text.splitlines() if "0.8211" in row]
        assert len(search) == len(full) == (1 if page in READMES else 2)
        assert all("100 s" in row and "8.5" in row and "missed" not in row for row in search)
        assert all("0.0200" in row for row in full)
        if page not in READMES:
            assert all("missed" in row for row in full)
            packs = [row for row in text.splitlines() if "3.20" in row]
            assert [("4.0" in row and "12.8" in row, "missed" in row) for row in packs] == [
                (True, False),
                (True, True),
            ] * 2
            assert "calculated from 60 measured steps" in text
        written(tmp_path, "sweep", {**sweep, "full": None})
        assert "0.8211" not in _figures().refreshed(page, tmp_path)
        written(tmp_path, "sweep", sweep)


def test_the_readmes_show_the_four_figures_that_matter_and_no_more() -> None:
    from itertools import takewhile

    for page in READMES:
        lines = text_of(page).partition("<!-- figures -->\n")[2].splitlines()
        rows = list(takewhile(lambda line: line.startswith("|"), lines))[2:]
        assert len(rows) == 4
        results = {
            name: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in ("sweep", "lifecycle")
        }
        assert f"{results['sweep']['speedup']:.1f}" in rows[0]
        assert f"{results['lifecycle']['figures']['load']['times faster']['median']:.1f}" in rows[3]


def test_the_profile_of_a_step_says_how_far_it_could_come(tmp_path: Path) -> None:
    parts = {"thin products": 10.0, "optimizer": 2.0, "calls, casts, autograd, Python": 8.0}
    figure = {"shape": SHAPE, "floor": 100.0, "step": 120.0, "parts": parts, "calls": {"thin products": 36}}
    dropped = {**figure, "shape": {**SHAPE, "dropout": 0.1}, "parts": {**parts, "dropout": 5.0}}
    written(tmp_path, "profile", {"figures": [{**one, "limit": 1.1, "goal": 1.1} for one in (figure, dropped)]})
    text = _figures().refreshed("docs/performance.md", tmp_path)
    first, second = (row for row in text.splitlines() if "2×16" in row)
    for words in ("10.0 ms, 10.0%, 36 calls", "1.200", "1.100", "≤ 1.10, missed"):
        assert words in first
    assert "5.0 ms, 5.0%" in second


@pytest.mark.parametrize("page", [*READMES, "docs/tune.md", "docs/zh/tune.md"])
def test_the_quickstarts_search_is_shown_with_what_it_recommends(page: str, tmp_path: Path) -> None:
    def answer(name: str, value: float, better: float | None, parameters: int) -> dict[str, Any]:
        def interval(found: float) -> dict[str, float]:
            return {"value": found, "low": found - 0.02, "high": found + 0.02}

        figures = {"accuracy": interval(value), "better": None if better is None else interval(better)}
        return {"name": name, "parameters": parameters, "seconds": 20.0, **figures}

    record = {
        "answers": [
            answer("a new head on the frozen encoder", 0.731, 0.04, 4235),
            answer("the best LoRA of 8 searched", 0.771, None, 680075),
        ],
        "test_rows": 1000,
        "search_rows": 1600,
        "trials": 8,
        "epochs": 3.1,
        "recommended": True,
        "seconds": 284.0,
        "search_seconds": 67.0,
        "recommendation": "\nuse r=8, alpha=16   \nwhy: it is the best",
    }
    written(tmp_path, "quickstart", record)
    text = _figures().refreshed(page, tmp_path)
    assert "```text\nuse r=8, alpha=16\nwhy: it is the best\n```" in text
    if page in READMES:
        rows = [line for line in text.splitlines() if line.startswith("|")]
        to = "到" if "zh" in page else "to"
        best = "搜索的 8 组中最好的 LoRA" if "zh" in page else "the best LoRA of 8 searched"
        for words in (
            f"0.731 (0.711 {to} 0.751) | 0.040 (0.020 {to} 0.060) | 4,235 |",
            f"| **{best}** | **0.771 (0.751",
        ):
            assert any(words in row for row in rows), words
        assert all(figure in text for figure in ("284 s", "67 s", "1,600", "3.1"))


def _figures() -> ModuleType:
    return _script("figures")


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["docs/train.md", "docs/tune.md", "docs/zh/train.md", "docs/zh/tune.md"])
def test_the_tables_of_options_are_those_of_the_config_classes(page: str) -> None:
    options = _script("options")
    assert page in options.PAGES
    assert text_of(page) == options.refreshed(page), "run python docs/options.py"


def test_the_page_on_the_command_line_names_every_option() -> None:
    import typer

    command = typer.main.get_command(cli.app).commands["train"]
    options = {o for parameter in command.params for o in parameter.opts if o.startswith("-")} - {"--learning-rate"}
    page = text_of("docs/train.md")
    assert {option for option in options if f"`{option}`" not in page} == set()


def test_the_page_on_the_command_line_has_every_option_of_a_run_with_its_key_and_default() -> None:
    from dataclasses import MISSING, fields

    from loraloom.config.keys import KEYS, OPTIONS
    from loraloom.config.names import TASKS
    from loraloom.config.train import TrainConfig

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text_of("docs/train.md").splitlines()]
    said = {row[1].strip("`"): row for row in rows if len(row) == 4 and re.fullmatch(r"`[\w.]+`", row[1])}
    adapter = {key for key, one in OPTIONS.items() if one.section == "lora" and one.help}
    assert said.keys() == {*KEYS.values(), *adapter}
    decided = {**dict.fromkeys(("optim_args", "columns"), "none"), "report_to": "tensorboard"}
    for spec in fields(TrainConfig):
        if spec.name == "lora":
            continue
        option, _, default, meaning = said[KEYS[spec.name]]
        assert f"--{spec.name.replace('_', '-')}`" in option, spec.name
        assert meaning, spec.name
        wanted = spec.default
        if spec.name in decided:
            assert default == decided[spec.name]
        elif wanted is MISSING:
            assert default == "required", spec.name
        elif wanted is None:
            assert not re.fullmatch(r"[\d.e-]+|true|false", default), spec.name
        elif isinstance(wanted, bool | str):
            assert default == str(wanted).lower(), spec.name
        else:
            assert float(default) == wanted, spec.name
    assert all(f"`{task}`" in said["task"][3] for task in TASKS)


def test_the_page_on_the_command_line_names_every_metric_and_schedule() -> None:
    from loraloom.config.train import SCHEDULES
    from loraloom.tasks import TASKS
    from loraloom.tasks.metrics.registry import known_metrics

    page = text_of("docs/train.md")
    problems = (None, "regression", "multi_label_classification")
    words = {*SCHEDULES, *(n for task in TASKS.values() for p in problems for n in known_metrics(task.kinds(p)))}
    assert {word for word in words if f"`{word}`" not in page} == set()


def test_the_page_on_data_names_every_shape_in_order_and_shows_the_default_template() -> None:
    from loraloom.config.names import TASKS as NAMES
    from loraloom.data.tokenize.templates import PLAIN_FILE
    from loraloom.tasks import TASKS

    page = text_of("docs/data.md")
    assert PLAIN_FILE.read_text(encoding="utf-8") in {block.text for block in blocks("docs/data.md")}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    head = rows.index(["task", "`format`", "columns", "optional columns"])
    wanted = []
    order = [name for row in rows[head:] if (name := row[0].strip("`")) in NAMES]
    assert sorted(order) == sorted(TASKS) == sorted(NAMES)
    for name in order:
        for number, form in enumerate(TASKS[name].forms):
            task = "" if number else f"`{name}`"
            columns = [", ".join(f"`{name}`" for name in part) for part in (form.needs, form.may)]
            wanted.append([task, f"`{form.name}`", *columns])
    assert rows[head + 1 : head + 1 + len(wanted)] == wanted


def test_the_page_on_the_search_names_every_option_key_preset_and_advice() -> None:
    from dataclasses import fields

    import typer

    from loraloom.tuning import diagnostics
    from loraloom.tuning.config import TuneConfig
    from loraloom.tuning.space import _VARY, PRESETS

    page = text_of("docs/tune.md")
    command = typer.main.get_command(cli.app).commands["tune"]
    words = {o for parameter in command.params for o in parameter.opts if o.startswith("-")}
    words |= {"tune.preset", *(f"tune.{spec.name}" for spec in fields(TuneConfig) if spec.name != "train")}
    words |= {key.partition(".")[2] for key in _VARY}
    for file in Path(diagnostics.__file__).parent.glob("*.py"):
        words |= set(re.findall(r'Advice\(\s*"(\w+)"', file.read_text(encoding="utf-8")))
    missing = [word for word in sorted(words) if f"`{word}`" not in page]
    assert missing == []
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    head = next(row for row in rows if row[1:] == list(PRESETS))
    for place, name in enumerate(head[1:], 1):
        said = {row[0].strip("`"): row[place] for row in rows if len(row) == len(head)}
        preset = PRESETS[name]
        assert said["trials"] == str(preset.trials)
        assert said["finalists, with other seeds each"] == f"{preset.finalists}, {preset.seeds}"
        for key, value in preset.space.items():
            if isinstance(value, dict):
                assert [float(end) for end in said[key].split(" to ")] == value["log"]
            else:
                wanted = [f"{one:g}" if isinstance(one, float) else str(one) for one in value]
                assert said[key].split(", ") == wanted


def test_the_page_on_peft_names_every_field_that_is_not_there_yet() -> None:
    _, section = text_of("docs/coming-from-peft.md").split("## Fields that are not there yet")
    listed = {name for name in re.findall(r"`(\w+)`", section) if hasattr(LoraConfig(), name)}
    assert listed - {"init_lora_weights"} == {
        field.name for field in fields(LoraConfig) if not field.metadata.get("supported", True)
    }
