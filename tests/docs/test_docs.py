"""What the pages say runs: snippets, commands and links; and both READMEs say the same.

The blocks of one page run in order, in a folder that holds a small model ``my-model`` and the data files that the
page shows (a block opened by ```` ```jsonl NAME ```` or ```` ```yaml NAME ````).
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from loraloom import cli
from loraloom.config import LoraConfig, _not_implemented

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh-CN.md")
MEASURED = (*READMES, "docs/performance.md")
PAGES = [*READMES, "CHANGELOG.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
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
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.kind in ("python", "jsonl") for b in blocks(page))])
def test_what_a_page_shows_runs(
    page: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(model_folder)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        where = f"{page}, line {block.line}"
        if block.kind in ("jsonl", "yaml"):
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
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_two_readmes_have_the_same_headings_code_links_and_figures() -> None:
    english, chinese = (text_of(page) for page in READMES)
    first, second = (blocks(page) for page in READMES)
    assert [(b.kind, b.name, b.text) for b in first] == [(b.kind, b.name, b.text) for b in second]
    parts = {
        "headings": r"^(#+) ",
        "list entries": r"^(-) ",
        "links": r"\]\(([^)]+)\)",
        "code": r"(?<!`)`([^`\n]+)`(?!`)",
    }
    for what, pattern in parts.items():
        found = [sorted(re.findall(pattern, FENCE.sub("", text), re.MULTILINE)) for text in (english, chinese)]
        assert found[0] == found[1], what
    tables = [re.findall(r"^\|.*\|$", text, re.MULTILINE) for text in (english, chinese)]
    figures = [[re.findall(r"\d+(?:[.,]\d+)*(?: ms| MiB)?", row) for row in table] for table in tables]
    assert len(figures[0]) > 5
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
    assert not any(tables[name] for name in ("speed", "measured") if name in tables)
    assert all(tables[name] for name in ("quickstart", "figures") if name in tables)


@pytest.mark.parametrize("page", MEASURED)
def test_a_missed_goal_is_said_and_a_met_one_is_not(page: str, tmp_path: Path) -> None:
    shape = {"dtype": "bfloat16", "width": 64, "layers": 2, "rows": 3, "tokens": 16, "dropout": 0.1}
    times = {name: {"median": 1.5, "min": 1.4, "max": 1.6} for name in ("peft", "loraloom")}
    seconds = {name: [0.25] for name in ("floor", "peft", "loraloom")}
    figures = [{"shape": shape, "goal": goal, "times the floor": times, "seconds": seconds} for goal in (1.49, 1.5)]
    machine = {"processor": "A", "threads": 1, "python": "3", "torch": "2", "transformers": "5", "peft": "0"}
    record = {"command": "python step.py", "date": "2026-01-01", "machine": machine, "figures": figures}
    (tmp_path / "step.json").write_text(json.dumps(record))
    first, second = (row for row in _figures().refreshed(page, tmp_path).splitlines() if "64" in row and "3×16" in row)
    missed = "未达到" if "zh" in page else "missed"
    assert "1.500" in first
    assert "≤ 1.49" in first
    assert missed in first
    assert "≤ 1.50" in second
    assert missed not in second


def _figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_on_the_command_line_names_every_option() -> None:
    import typer

    command = typer.main.get_command(cli.app).commands["train"]
    options = {o for parameter in command.params for o in parameter.opts if o.startswith("-")} - {"--learning-rate"}
    page = text_of("docs/train.md")
    assert {option for option in options if f"`{option}`" not in page} == set()


def test_the_page_on_peft_names_every_field_that_is_not_there_yet() -> None:
    _, section = text_of("docs/coming-from-peft.md").split("## Fields that are not there yet")
    listed = {name for name in re.findall(r"`(\w+)`", section) if hasattr(LoraConfig(), name)}
    assert listed - {"init_lora_weights"} == set(_not_implemented())
