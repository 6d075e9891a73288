"""Commands that look at what training left."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from loraloom.report.screen import log


def inspect(
    given: dict[str, Any],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="An adapter folder")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with every singular value")] = False,
) -> None:
    """Show an adapter: its config, size, norms, and the rank that each module really uses."""
    from dataclasses import asdict

    from loraloom.lora.inspection import inspect as read
    from loraloom.report.terminal import inspection

    found = read(folder)
    if as_json:
        fields = asdict(found) | {"config": found.config.to_dict(), "notes": found.config.notes}
        print(json.dumps(fields, indent=2, sort_keys=True))
    else:
        log(inspection(folder, found))
