"""Promises of what commands print of rows, names and foreign adapters: it is shown, and no terminal obeys it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVIL = "\x1b[31mred\x1b]0;t\x07 \x9b2J \u202eback\u202c"
SEEN = r"\x1b[31mred\x1b]0;t\x07 \x9b2J \u202eback\u202c"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def test_rows_labels_and_names_of_files_are_shown_and_not_obeyed(
    call: Callable[..., Any], encoder_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / f"{EVIL}.jsonl"
    rows = [{"text": f"the film {n}", "label": [f"a{EVIL}", f"b{EVIL}"][n % 2]} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = call("data", data, "--model", encoder_folder, "--eval-split", 2)
    assert (shown.code, shown.err) == (0, "")
    flat = re.sub(r"\s", "", shown.out)  # in lines as wide as the terminal
    for part in (f"labels a{SEEN}, b{SEEN}", f"{SEEN}.jsonl: text-label"):
        assert re.sub(r"\s", "", part) in flat
    refused = call("data", data, "--model", encoder_folder, "--task", "causal-lm", "--columns", '{"text": "no"}')
    assert refused.code == 2
    assert f"{SEEN}.jsonl, line 1: no column 'no'" in refused.err
    assert not RAW.search(shown.out + refused.err)


def test_what_a_foreign_adapter_names_is_shown_and_not_obeyed(
    call: Callable[..., Any], trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "foreign")
    path = tmp_path / "foreign" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": EVIL}))
    for options in ([], ["--json"]):
        shown = call("inspect", path.parent, *options)
        assert (shown.code, shown.err) == (0, "")
        assert r"\x1b[31mred" in shown.out or r"\u001b[31mred" in shown.out
        assert not RAW.search(shown.out)
