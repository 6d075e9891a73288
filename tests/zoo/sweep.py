"""Runs the checks of cells one after another, each with an alarm, and keeps what came out."""

from __future__ import annotations

import json
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from zoo.cell import Cell
from zoo.checks import CHECKS, NotHere, quietly
from zoo.compare import Differs, outputs
from zoo.fields import FLOAT32
from zoo.kinds import kinds_of, model_types
from zoo.reasons import UNBUILT, UNTRIED, reason

TARGETS = ("default", "all-linear")
SECONDS = 60


class TooLong(BaseException):
    """The alarm: no ``except Exception`` of a library may swallow it."""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise TooLong(f"over {SECONDS} s")


def one(model_type: str, kind: str, targets: str, wanted: Iterable[str] = CHECKS) -> dict[str, str]:
    """check → ``ok`` and a figure, ``n/a: why``, or ``FAIL: what``. ``build`` alone where there is no model."""
    signal.signal(signal.SIGALRM, _alarm)
    found: dict[str, str] = {}
    if model_type in UNBUILT:
        return {"build": f"skip: {UNBUILT[model_type]}"}
    with quietly():
        cell, why = _cell(model_type, kind, targets)
        if cell is None:
            return {"build": why}
        for name in wanted:
            if untried := UNTRIED.get((model_type, name)):
                found[name] = f"skip: {untried}"
                continue
            outcome = _outcome(name, cell)
            why = reason(f"{model_type}/{kind}/{targets}", name, outcome) if outcome.startswith("FAIL") else None
            found[name] = outcome if why is None else f"skip: {why}"
    if cell.dtype is not torch.float64:
        found["dtype"] = "float32"
    return found


def failures(cell: str) -> list[str]:
    """What fails in ``type/kind/targets``."""
    found = one(*cell.split("/"))
    return [f"{check}: {outcome}" for check, outcome in found.items() if outcome.startswith("FAIL")]


def _cell(model_type: str, kind: str, targets: str) -> tuple[Cell | None, str]:
    why = ""
    for dtype in (torch.float32,) if model_type in FLOAT32 else (torch.float64, torch.float32):
        signal.alarm(SECONDS)
        cell = Cell(model_type, kind, targets, dtype)
        try:
            if not outputs(cell._base, cell.batch).isfinite().any():
                raise Differs("the model answers with NaN")
            return cell, ""
        except (Exception, TooLong) as error:
            why = why or f"FAIL: {_described(error)}"
        finally:
            signal.alarm(0)
    return None, why


def _outcome(name: str, cell: Cell) -> str:
    signal.alarm(SECONDS)
    try:
        return f"ok {CHECKS[name](cell)}".strip()
    except NotHere as reason:
        return f"n/a: {reason}"
    except (Exception, TooLong) as error:
        return f"FAIL: {_described(error)}"
    finally:
        signal.alarm(0)


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())[:220]
    if isinstance(error, Differs):
        return text
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__}: {text} @ {' '.join(places[-3:])}"


def cells(types: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    for model_type in types:
        for kind in kinds_of(model_type):
            for targets in TARGETS:
                yield model_type, kind, targets


def main(arguments: list[str]) -> None:
    """``OUT.jsonl [types] [--first | --second] [--failed]``: appends what is not there yet.

    ``--first``: each type's first kind; ``--second``: the others; ``--failed``: what failed as well."""
    out = Path(arguments[0])
    only = arguments[1].split(",") if len(arguments) > 1 and not arguments[1].startswith("-") else model_types()
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    kept = {tuple(line["cell"]): line["found"] for line in lines}
    again = "--failed" in arguments
    seen = {cell for cell, found in kept.items() if not again or "FAIL" not in str(found)}
    for cell in cells(only):
        if cell in seen or ("--first" in arguments and cell[1] != kinds_of(cell[0])[0]):
            continue
        if "--second" in arguments and cell[1] == kinds_of(cell[0])[0]:
            continue
        start = time.monotonic()
        found: dict[str, Any] = {"cell": cell, "found": one(*cell), "seconds": round(time.monotonic() - start, 1)}
        with out.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1:])
