"""``import loraloom`` is cheap, its names are there, and each floor of the house stands on those below it."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import loraloom

HEAVY = [
    "transformers",
    "tokenizers",
    "peft",
    "datasets",
    "accelerate",
    "matplotlib",
    "rich",
    "typer",
    "optuna",
    "jinja2",
]
SOURCE = Path(loraloom.__file__).parent
#: docs/design.md, "Layout". Each package imports only from packages with lower numbers.
FLOORS = {
    "errors": 0,
    "files": 1,
    "config": 2,
    "distributed": 2,
    "messages": 2,
    "lora": 3,
    "data": 4,
    "models": 4,
    "tasks": 5,
    "engine": 6,
    "inference": 7,
    "training": 8,
    "tuning": 9,
    "report": 10,
    "serve": 10,
    "api": 11,
    "cli": 11,
}


def loaded_after(statement: str) -> list[str]:
    code = f"import sys, json; {statement}; print(json.dumps([n for n in {HEAVY!r} + ['torch'] if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout)
    return found


def test_the_bare_import_loads_nothing_heavy_not_even_torch() -> None:
    assert loaded_after("import loraloom") == []


def test_the_names_of_the_library_load_torch_alone() -> None:
    assert loaded_after("from loraloom import LoraConfig, PeftModel, get_peft_model, plan") == ["torch"]


def test_a_config_needs_no_torch() -> None:
    assert loaded_after("from loraloom import LoraConfig; LoraConfig(r=4).to_json()") == []


def test_an_adapters_life_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import torch, loraloom; from loraloom import *; net = torch.nn.Sequential(torch.nn.Linear(2, 2)); "
        "config = LoraConfig(target_modules=['0'], r=1); "
        f"get_peft_model(net, config).save_pretrained({str(tmp_path)!r}); "
        f"PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(2, 2)), {str(tmp_path)!r}).merge_and_unload()"
    )
    assert loaded_after(code) == ["torch"]


@pytest.mark.parametrize("name", loraloom.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(loraloom, name) is not None
    assert name in dir(loraloom)


def test_every_public_name_is_known_to_type_checkers() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    typed = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == loraloom._WHERE


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'loraloom' has no attribute 'LoraConfg'"):
        loraloom.LoraConfg  # noqa: B018


@cache
def modules() -> dict[str, Path]:
    """Dotted name below ``loraloom`` → file."""
    files = sorted(SOURCE.rglob("*.py"))
    return {".".join(f.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imports(file: Path) -> Iterator[str]:
    """The modules of loraloom that a file imports, wherever in it, for type checkers alone too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "loraloom")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the floor"
            if node.module == "loraloom":
                yield from (f"loraloom.{loraloom._WHERE.get(a.name, f'loraloom.{a.name}')[9:]}" for a in node.names)
            elif node.module and node.module.startswith("loraloom."):
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name if name.removeprefix("loraloom.") in modules() else node.module for name in inner)


def floor(module: str) -> int:
    return FLOORS[module.split(".")[1]]


FILES = {name: file for name, file in modules().items() if name not in ("__init__", "__main__", "")}


def test_every_package_has_a_floor() -> None:
    assert {name.split(".")[0] for name in FILES} <= FLOORS.keys()
    assert {m.name for m in pkgutil.iter_modules([str(SOURCE)])} <= FLOORS.keys() | {"__main__"}


@pytest.mark.parametrize("name", FILES)
def test_a_floor_imports_only_from_floors_below_or_its_own_package(name: str) -> None:
    package, mine = name.split(".")[0], floor(f"loraloom.{name}")
    for module in imports(FILES[name]):
        if module == "loraloom" or module.split(".")[1].startswith("__"):  # its version
            continue
        other = module.split(".")[1]
        allowed = other == package or floor(module) < mine
        assert allowed, f"{name} (floor {mine}) imports {module} (floor {floor(module)})"


def layout() -> list[str]:
    """The files that docs/design.md lists under "Layout", from top to bottom, as modules below ``loraloom``."""
    page = (Path(__file__).parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    lines = page.partition("## Layout")[2].partition("```text\n")[2].partition("```")[0].splitlines()
    found: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in lines[1:]:
        indent, first = len(line) - len(line.lstrip()), line.split()[0]
        folders = [(depth, name) for depth, name in folders if depth < indent]
        inside = folders[-1][1] if folders else ""
        found += [inside + file for file in re.findall(r"([\w/]+)\.py\b", line)]
        if first.endswith("/"):
            folders.append((indent, inside + first))
    return [file.replace("/", ".") for file in found]


def test_the_layout_lists_every_file_once() -> None:
    packages = {name for name, file in FILES.items() if file.name in ("__init__.py", "__main__.py")}
    assert sorted(layout()) == sorted(["__init__", *(FILES.keys() - packages)])


def test_a_file_imports_only_from_files_below_it_in_the_layout() -> None:
    place = {name: number for number, name in enumerate(layout())}
    up = [
        f"{name} imports {other}, which docs/design.md lists above it"
        for name in layout()[1:]
        for other in {module.removeprefix("loraloom.") for module in imports(FILES[name])}
        if place.get(other, len(place)) < place[name]
    ]
    assert not up


def test_no_imports_go_in_a_circle() -> None:
    graph = {name: {m.removeprefix("loraloom.") for m in imports(file)} & FILES.keys() for name, file in FILES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", FILES)
def test_heavy_imports_happen_inside_the_function_that_needs_them(name: str) -> None:
    """Below the command line, at the top of a file there is the standard library, torch, numpy and safetensors."""
    if name.split(".")[0] in ("api", "cli", "report", "serve"):
        return
    light = {*sys.stdlib_module_names, "torch", "numpy", "safetensors", "loraloom"}  # torch loads numpy
    if name.split(".")[0] in ("errors", "files", "config"):
        light -= {"torch", "numpy", "safetensors"}
    top = []
    for node in ast.parse(FILES[name].read_text()).body:
        if isinstance(node, ast.Import):
            top += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            top.append(node.module.split(".")[0])
    assert sorted(set(top) - light) == []


@pytest.mark.parametrize("name", FILES)
def test_every_module_imports_by_itself(name: str) -> None:
    importlib.import_module(f"loraloom.{name}")
