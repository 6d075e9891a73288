"""Everything that is to be known of a GPU, within minutes: do the promises hold on it, and what does a step cost?

Usage: ``python benchmarks/gpu.py [--only SECTION ...] [--minutes 8] [--results FOLDER]``. Needs torch, transformers,
peft, safetensors and pytest; loraloom need not be installed. Nothing is fetched. Sections run in order of priority,
each in its own process: a section that hangs or breaks the device does not affect the others. ``gpu.json`` is written
after each section, with its device, versions and date. What a section left out, and why, is under its ``skipped``.

On a CPU, to see that all of it runs: ``--device cpu --small``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "src"
for folder in (HERE, SOURCE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import common  # noqa: E402
import gpu_sections as sections  # noqa: E402

#: name → what it measures, the seconds below which it is not begun, and those after which it is stopped
SECTIONS: dict[str, tuple[Callable[[sections.Setting], dict[str, Any]], float, float]] = {
    "tests": (sections.tests, 30, 150),
    "step-1b": (sections.step_1b, 30, 90),
    "pack-1b": (sections.pack_1b, 40, 120),
    "waits": (sections.waits, 25, 60),
    "step-8b": (sections.step_8b, 60, 180),
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = read(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if options.section:  # the process of one section
        found = alone(options.section, options)
        options.into.write_text(json.dumps(found))
        return found
    deadline = time.monotonic() + 60 * options.minutes
    name = "gpu" if options.device == "cuda" else "gpu-on-cpu"
    record = earlier(options.results / f"{name}.json", options)
    for section in options.only or SECTIONS:
        seconds = deadline - time.monotonic()
        record["sections"][section] = found = begun(section, seconds, options)
        path = common.write(name, record, options.results)
        print(f"\n{section}: {found['seconds']:.0f} s")
        show(found)
    print(f"\nwritten to {path}")
    return record


def read(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--minutes", type=float, default=8.0, help="no section begins or lasts beyond (8)")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--together", action="store_true", help="all sections in this process, which none can outlast")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def earlier(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The sections of an earlier run on such a machine, which ``--only`` leaves as they are."""
    if options.only and path.is_file():
        found = json.loads(path.read_text())
        if found.get("machine") == common.machine():
            return {"sections": found["sections"]}
    return {"sections": {}}


def begun(section: str, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """The section's figures, or why there are none; with the seconds it took and its date."""
    started = time.monotonic()
    _, least, most = SECTIONS[section]
    if seconds < least:
        found: dict[str, Any] = {"skipped": [f"all: {seconds:.0f} s were left, and it needs {least} s"]}
    elif options.together:
        options.seconds = min(seconds, most)
        found = alone(section, options)
    else:
        found = apart(section, min(seconds, most), options)
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "seconds": time.monotonic() - started,
            **found}  # fmt: skip


def apart(section: str, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "found.json"
        command = [sys.executable, str(HERE / "gpu.py"), "--section", section, "--seconds", str(seconds)]
        command += ["--into", str(into), "--device", options.device, "--repetitions", str(options.repetitions)]
        command += ["--small"] * options.small
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            return {"failed": f"stopped after {seconds:g} s", "said": _end(error.stderr)}
        if into.is_file():
            found: dict[str, Any] = json.loads(into.read_text())
            return found
        return {"failed": f"the process ended with {done.returncode}", "said": _end(done.stderr)}


def alone(section: str, options: argparse.Namespace) -> dict[str, Any]:
    setting = sections.Setting(options.device, options.small, options.repetitions, time.monotonic() + options.seconds)
    try:
        return {"machine": sections.device(options.device), **SECTIONS[section][0](setting)}
    except Exception as error:
        import traceback

        return {"failed": f"{type(error).__name__}: {error}"[:2000], "said": _end(traceback.format_exc())}


def _end(text: str | bytes | None) -> list[str]:
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    return (text or "").splitlines()[-40:]


def show(found: dict[str, Any]) -> None:
    if "failed" in found:
        print("\n".join([f"FAILED: {found['failed']}", *found.get("said", [])[-12:]]))
    for table in found.get("tables", []):
        print(f"\n{table['title']}")
        common.print_table(table["rows"], table["heads"])
    for reason in found.get("skipped", []):
        print(f"left out: {reason}")


if __name__ == "__main__":
    if "--section" not in sys.argv:
        print(f"Python {platform.python_version()} on {platform.node()}")
    everything = main()
    failed = everything.get("failed") or any("failed" in one for one in everything.get("sections", {}).values())
    sys.exit(1 if failed else 0)
