"""Size of a source tree: code lines (no blanks, comments, docstrings), files, longest function, import circles.

python benchmarks/code_size.py [FOLDER ...]      (default: src/loraloom)
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

SKIPPED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def docstring_lines(tree: ast.AST) -> set[int]:
    """The lines of a module's, its classes' and its functions' docstrings."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                found |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


def code_lines(text: str, tree: ast.AST) -> set[int]:
    """The numbers of the lines that hold code."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for t in tokens if t.type not in SKIPPED for line in range(t.start[0], t.end[0] + 1)}
    return lines - docstring_lines(tree)


def imports(tree: ast.AST, modules: set[str], package: str) -> set[str]:
    """The package's own modules that a file imports, for type checkers alone too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith(f"{package}."):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & modules or {node.module} & modules
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def measure(folder: Path) -> None:
    """Print the figures of one package."""
    files = sorted(folder.rglob("*.py"))
    names = {".".join(f.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    sizes: dict[str, int] = {}
    functions: list[tuple[int, str]] = []
    graph: dict[str, set[str]] = {}
    for name, file in names.items():
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines = code_lines(text, tree)
        sizes[name] = len(lines)
        graph[name] = imports(tree, names.keys() - {folder.name, name}, folder.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own = lines & set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
                functions.append((len(own), f"{name}.{node.name}"))
    whole = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in names.items()}
    print(f"{folder}: {sum(sizes.values()):,} code lines in {len(files)} files ({sum(whole.values()):,} lines in all)")
    for part in sorted({name.split(".")[1] for name in names if "." in name}):
        count = sum(size for name, size in sizes.items() if (*name.split("."), "")[1] == part)
        print(f"  {part:<12} {count:>6,}")
    print(f"  files above 450 lines: {', '.join(f'{n} {c}' for n, c in whole.items() if c > 450) or 'none'}")
    long = sorted((f for f in functions if f[0] > 60), reverse=True)
    print(f"  longest function: {max(functions)}; above 60 lines: {', '.join(f'{n} {c}' for c, n in long) or 'none'}")
    print(f"  import circles: {circles(graph) or 'none'}")


if __name__ == "__main__":
    for argument in sys.argv[1:] or [str(Path(__file__).parents[1] / "src" / "loraloom")]:
        measure(Path(argument))
