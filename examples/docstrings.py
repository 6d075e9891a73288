"""The quickstart's corpus: to which area of the standard library does a docstring belong?

Usage: ``python examples/docstrings.py OUT`` writes ``OUT/train.jsonl`` and ``OUT/eval.jsonl``, ``text`` and
``label`` on each line. The texts are the docstrings of all functions and classes in the standard library of
the Python that runs this, read with ``ast`` and never imported; the labels follow the chapters of the library
reference. It knows nothing of models, and needs nothing but Python: no download, no package. The same Python
gives the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 41  # characters; below that, "Return the name." could be anywhere
HELD_OUT = 800
SEED = 0

#: Area -> its modules and packages. Names with an underscore hold the Python source of a public module
#: (``_pydecimal`` is ``decimal``), or moved there in some version. What is not named here is left out.
AREAS: dict[str, str] = {
    "text": """
        string re sre_compile sre_constants sre_parse difflib textwrap stringprep rlcompleter codecs encodings
        gettext locale""",
    "data types": """
        datetime _pydatetime _strptime zoneinfo calendar collections _collections_abc heapq bisect weakref
        _weakrefset types copy pprint reprlib enum graphlib""",
    "maths": """
        numbers decimal _pydecimal fractions random statistics functools operator""",
    "files": """
        pathlib posixpath ntpath genericpath fileinput stat filecmp tempfile glob fnmatch linecache shutil
        pickle copyreg shelve dbm sqlite3 gzip bz2 lzma zipfile tarfile compression _compression csv
        configparser tomllib netrc plistlib""",
    "concurrency": """
        threading _threading_local multiprocessing concurrent subprocess sched queue contextvars asyncio""",
    "networking": """
        socket ssl selectors socketserver asynchat asyncore http urllib ftplib poplib imaplib nntplib smtplib
        smtpd telnetlib wsgiref xmlrpc ipaddress uuid webbrowser cgi cgitb nturl2path""",
    "email and web data": """
        email json mailbox mailcap mimetypes base64 quopri uu html _markupbase xml""",
    "operating system": """
        os io _pyio logging argparse optparse getopt getpass curses platform ctypes signal pty tty pipes""",
    "graphical interfaces": """
        tkinter turtle turtledemo cmd shlex""",
    "development tools": """
        typing pydoc doctest unittest bdb pdb cProfile profile pstats timeit trace tracemalloc venv ensurepip
        zipapp""",
    "runtime": """
        sysconfig warnings _py_warnings dataclasses contextlib abc _py_abc traceback annotationlib inspect
        site _sitebuiltins code codeop imp zipimport pkgutil modulefinder runpy importlib ast symtable token
        keyword tokenize tabnanny pyclbr py_compile compileall dis opcode pickletools __future__""",
}


def collect() -> list[dict[str, str]]:
    """All rows, ``{"text": docstring on one line, "label": area}``, in the order of area, module and line.

    A docstring that occurs more than once is kept where it comes first.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    rows: dict[str, str] = {}
    for area, modules in AREAS.items():
        for module in modules.split():
            for path in _sources(library, module):
                for text in _docstrings(path):
                    rows.setdefault(text, area)
    return [{"text": text, "label": area} for text, area in rows.items()]


def _sources(library: Path, module: str) -> list[Path]:
    """The module's file, or the files of the package without its tests."""
    single = library / f"{module}.py"
    if single.is_file():
        return [single]
    package = sorted(path.relative_to(library).parts for path in (library / module).rglob("*.py"))
    return [library.joinpath(*parts) for parts in package if not {"test", "tests"} & set(parts)]


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some old modules hold invalid escapes
        tree = ast.parse(path.read_bytes())
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    for node in sorted(nodes, key=lambda node: node.lineno):
        text = " ".join((ast.get_docstring(node) or "").split())
        if len(text) >= SHORTEST:
            yield text


def write(folder: str | Path) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``eval.jsonl`` into ``folder``, made where it is missing; return their paths.

    ``HELD_OUT`` rows drawn at random with a fixed seed go to the second. Exits with a message where this
    Python comes without the sources of its library.
    """
    rows = collect()
    if len(rows) <= HELD_OUT:
        library = sysconfig.get_paths()["stdlib"]
        raise SystemExit(
            f"{library}: only {len(rows)} docstrings found, more than {HELD_OUT} are needed; "
            f"use a Python that has its library as .py files"
        )
    held = set(random.Random(SEED).sample(range(len(rows)), HELD_OUT))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train, evaluation = folder / "train.jsonl", folder / "eval.jsonl"
    for path, wanted in ((train, False), (evaluation, True)):
        lines = [json.dumps(row, ensure_ascii=False) for i, row in enumerate(rows) if (i in held) is wanted]
        path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8"))
    return train, evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", metavar="OUT", help="folder to write train.jsonl and eval.jsonl into")
    paths = write(parser.parse_args().folder)
    rows = [[json.loads(line) for line in path.open(encoding="utf-8")] for path in paths]
    for path, part in zip(paths, rows, strict=True):
        print(f"{path}: {len(part)} rows")
    for area, count in Counter(row["label"] for part in rows for row in part).most_common():
        print(f"{count:6d}  {area}")


if __name__ == "__main__":
    main()
