"""What came out of a whole run: ``table.json``, and the page ``docs/models.md`` that is made from it.

Knows no model and loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("table.json")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FORMAT = 1
#: A share of checks that may be skipped; more would say that the table is not what it seems.
SKIPS = 0.10

#: ``type/kind/targets`` → check → ``ok``, ``n/a: why``, ``skip: why`` or ``FAIL: what``
Cells = Mapping[str, Mapping[str, str]]

CHECKS = {
    "names": "the same modules, tensors and number of trainable parameters as in PEFT",
    "logits": "the same outputs with an adapter that changes them by over 1 %",
    "exchange": "adapter folders read by the other library, in both directions",
    "gradient": "the same gradients",
    "steps": "three AdamW steps to the same weights",
    "merge": "merged; unmerged, bit for bit; `merge_and_unload`",
    "disable": "a disabled adapter gives the frozen model's outputs, bit for bit",
    "checkpointing": "gradient checkpointing, two steps, the same gradients",
    "reentrant": "the same with `use_reentrant=True`",
    "generation": "tokens and scores of generation with a cache, as in PEFT",
    "rows": "rows of two adapters and of the frozen model in one batch, each as in a batch of its own",
    "pack": "a `Pack` of three adapters (different ranks, dropout, row lengths), each as if trained by itself",
}


def plain(outcome: str) -> str:
    """Without the figure of one machine."""
    return "ok" if outcome.startswith("ok") else outcome


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def write(cells: Cells, versions: Mapping[str, str], of: int) -> None:
    """``table.json`` and the page. ``of``: how many cells there would be if all were run."""
    sorted_cells = {
        name: {check: plain(outcome) for check, outcome in found.items()} for name, found in sorted(cells.items())
    }
    record = {"format": FORMAT, "versions": dict(versions), "of": of, "cells": sorted_cells}
    TABLE.write_text(json.dumps(record, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")


def outcomes(cells: Cells) -> Counter[str]:
    """``ok``, ``n/a``, ``skip``, ``FAIL`` → how many checks."""
    return Counter(re.split(r"[: ]", outcome)[0] for found in cells.values() for outcome in _checks(found).values())


def _checks(found: Mapping[str, str]) -> dict[str, str]:
    return {check: outcome for check, outcome in found.items() if check in CHECKS}


def unbuilt(cells: Cells) -> dict[str, str]:
    """Type → why there is no small model of it."""
    return {name.split("/")[0]: found["build"] for name, found in cells.items() if "build" in found}


def built(cells: Cells) -> set[str]:
    return {name.split("/")[0] for name, found in cells.items() if "build" not in found}


def page(record: Mapping[str, Any]) -> str:
    cells: Cells = record["cells"]
    counts, versions = outcomes(cells), record["versions"]
    asked = counts["ok"] + counts["skip"] + counts["FAIL"]
    reasons = _numbered(cells)
    lines = [
        "# Models",
        "",
        f"Small models of {len(built(cells))} model types of transformers {versions['transformers']} are built from",
        f"configs and compared with PEFT {versions['peft']}, each with the kinds of model that it has, with default",
        f"targets and with `all-linear`: {len(cells):,} of {record['of']:,} cells, {asked:,} checks,"
        f" {counts['ok']:,} passed, {counts['skip']:,} skipped"
        f" ({counts['skip'] / max(asked, 1):.1%}), {counts['FAIL']:,} failed.",
        "`make zoo` runs all of them, `make zoo ZOO=llama,bert` only these types, `make zoo ZOO=3/8` an eighth;",
        "`make zoo-page` writes this page from `tests/zoo/table.json`.",
        "",
        "| check | comparison |",
        "|---|---|",
        *(f"| {name} | {what} |" for name, what in CHECKS.items()),
        "",
        "Models compute in float64 if they can, and the adapter's weights are large enough to change the outputs by",
        "over 1 %. A check that does not apply (generation of a classifier) is not counted. If a type has no default",
        "in PEFT, the default targets are [those that loraloom finds](coming-from-peft.md), given to PEFT by name.",
        "",
        "| model type | kinds | default targets | all-linear |",
        "|---|---|---|---|",
        *(_row(name, cells, reasons) for name in sorted(built(cells))),
        "",
    ]
    if reasons:
        lines += ["## Skipped", "", *(f"{number}. {_escaped(why)}" for why, number in reasons.items()), ""]
    if missing := unbuilt(cells):
        lines += ["## Not built", "", "| model type | reason |", "|---|---|"]
        lines += [f"| {name} | {_escaped(why.partition(': ')[2])} |" for name, why in sorted(missing.items())] + [""]
    return "\n".join(lines)


def _numbered(cells: Cells) -> dict[str, int]:
    """Reason of a skip or what failed → its number on the page."""
    whys = [
        outcome
        for found in cells.values()
        for outcome in _checks(found).values()
        if outcome.startswith(("skip: ", "FAIL: "))
    ]
    return {why: number for number, why in enumerate(dict.fromkeys(_why(w) for w in whys), 1)}


def _why(outcome: str) -> str:
    return outcome.removeprefix("skip: ")


def _row(model_type: str, cells: Cells, reasons: Mapping[str, int]) -> str:
    mine = {tuple(name.split("/")[1:]): found for name, found in cells.items() if name.split("/")[0] == model_type}
    kinds = list(dict.fromkeys(kind for kind, _ in mine))
    columns = [
        _summary([found for (_, t), found in mine.items() if t == targets], reasons)
        for targets in ("default", "all-linear")
    ]
    return f"| {model_type} | {', '.join(kinds)} | {columns[0]} | {columns[1]} |"


def _summary(cells: Iterable[Mapping[str, str]], reasons: Mapping[str, int]) -> str:
    found = [(check, outcome) for cell in cells for check, outcome in _checks(cell).items()]
    passed = sum(outcome.startswith("ok") for _, outcome in found)
    other: dict[str, list[str]] = {}
    for check, outcome in found:
        if outcome.startswith(("skip", "FAIL")):
            word = f"{'failed' if outcome.startswith('FAIL') else 'skipped'} ({reasons[_why(outcome)]})"
            other.setdefault(word, []).append(check)
    notes = [f"{', '.join(dict.fromkeys(checks))} {word}" for word, checks in other.items()]
    return "; ".join([f"{passed} ok", *notes])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
