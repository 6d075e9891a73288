"""``python -m zoo [TYPES | PIECE] [--write] [--again]``: run cells in worker processes and print the table.

TYPES is a list with commas; PIECE is ``3/8``, the third of eight. Without either everything runs, two processes at a
time. What a run found is kept in ``OUT`` (by default .zoo.jsonl), from which a run that was stopped resumes;
``--again`` begins afresh. ``--write`` makes ``table.json`` and ``docs/models.md`` of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from zoo import table
from zoo.kinds import model_types
from zoo.sweep import cells as every_cell

WORKERS = 2
#: Types for each process: memory that a library keeps does not add up.
CHUNK = 12


def wanted(what: str | None) -> list[str]:
    types = model_types()
    if what is None:
        return types
    if "/" in what:
        number, of = (int(part) for part in what.split("/"))
        return types[number - 1 :: of]
    chosen = what.split(",")
    if unknown := sorted(set(chosen) - set(types)):
        sys.exit(f"zoo: no such model type: {', '.join(unknown)}")
    return chosen


def run(types: list[str], out: Path) -> None:
    """Chunks of types, each in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    waiting = [types[i : i + CHUNK] for i in range(0, len(types), CHUNK)]
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < WORKERS:
            command = [sys.executable, "-m", "zoo.sweep", str(out), ",".join(waiting.pop(0))]
            running.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        running.pop(0).wait()


def kept(out: Path, types: list[str]) -> dict[str, dict[str, str]]:
    """Cell → what was found last."""
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    return {"/".join(line["cell"]): line["found"] for line in lines if line["cell"][0] in types}


def report(cells: table.Cells) -> int:
    for name, found in sorted(cells.items()):
        shown = " ".join(f"{check}:{outcome.split()[0].rstrip(':')}" for check, outcome in found.items())
        print(f"{name:52} {shown}")
        for check, outcome in found.items():
            if outcome.startswith("FAIL"):
                print(f"    {check}: {outcome}")
    counts = table.outcomes(cells)
    missing = [name for name, why in table.unbuilt(cells).items() if why.startswith("FAIL")]
    print(f"{len(table.built(cells))} types built, {len(table.unbuilt(cells))} not; {len(cells)} cells; {dict(counts)}")
    return counts["FAIL"] + len(missing)


def main() -> None:
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="?", help="model types with commas, or a piece such as 3/8")
    parser.add_argument("--out", type=Path, default=Path(".zoo.jsonl"))
    parser.add_argument("--again", action="store_true", help="forget what an earlier run found")
    parser.add_argument("--write", action="store_true", help="make table.json and docs/models.md")
    options = parser.parse_args()
    types = wanted(options.what or None)
    if options.again:
        options.out.unlink(missing_ok=True)
    run(types, options.out)
    cells = kept(options.out, types)
    failed = report(cells)
    if options.write:
        import importlib.metadata

        versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft", "torch")}
        table.write(cells, versions, of=len(list(every_cell(model_types()))))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
