"""Write the measured figures into both READMEs, from ``benchmarks/results/*.json``.

Usage: ``python docs/figures.py``. Only what stands between the two markers of a README is replaced.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]
BETWEEN = re.compile(r"(<!-- figures -->\n).*?(<!-- /figures -->)", re.DOTALL)

#: page → the words of its table; the figures are the same
WORDS = {
    "README.md": {
        "head": ("on 24 Llama layers", "peft", "loraloom", "times faster", "spread"),
        "shape": "{layers} Llama layers of width {width}, r={rank} on all seven projections",
        "inject": "put a new adapter on the model",
        "load": "load an adapter from its folder",
        "switch": "switch to another adapter",
        "save": "save an adapter",
        "import": "Importing the library's names takes {times:.2f} times as long as `import torch` "
        "({ours:.2f} s, {torch:.2f} s).",
        "note": "Medians of {n} turns, both libraries in one process, {shape}. Command: `{command}`.",
        "machine": "Machine: {processor}, {threads} threads; Python {python}, torch {torch}, "
        "transformers {transformers}, peft {peft}; {date}.",
    },
    "README.zh-CN.md": {
        "head": ("24 层 Llama", "peft", "loraloom", "快多少倍", "波动范围"),
        "shape": "{layers} 层、宽度 {width} 的 Llama，七个投影全部 r={rank}",
        "inject": "给模型装上新适配器",
        "load": "从目录加载适配器",
        "switch": "切换到另一个适配器",
        "save": "保存适配器",
        "import": "导入本库的名字，耗时是 `import torch` 的 {times:.2f} 倍（{ours:.2f} s，{torch:.2f} s）。",
        "note": "{n} 轮的中位数，两个库在同一进程中轮流运行，{shape}。命令：`{command}`。",
        "machine": "机器：{processor}，{threads} 线程；Python {python}，torch {torch}，transformers {transformers}，"
        "peft {peft}；{date}。",
    },
}


def table(page: str, results: Path = ROOT / "benchmarks" / "results") -> str:
    """The table of ``page`` and the lines under it."""
    words = WORDS[page]
    record = json.loads((results / "lifecycle.json").read_text(encoding="utf-8"))
    figures, shape = record["figures"], record["shape"]
    head = [words["head"][0].replace("24", str(shape["layers"])), *words["head"][1:]]
    lines = [_row(head), "|---" + "|---:" * (len(head) - 1) + "|"]
    for operation in ("inject", "load", "switch", "save"):
        figure = figures[operation]
        times = figure["times faster"]
        medians = [f"{1e3 * statistics.median(figure['seconds'][name]):.2f} ms" for name in ("peft", "loraloom")]
        spread = f"{times['min']:.1f} – {times['max']:.1f}"
        lines.append(_row([words[operation], *medians, f"{times['median']:.1f}", spread]))
    torch, ours = (statistics.median(values) for values in _imports(figures["import"]["seconds"]))
    note = words["note"].format(n=shape["repetitions"], shape=words["shape"].format(**shape), command=record["command"])
    imports = words["import"].format(times=figures["import"]["times torch"]["median"], ours=ours, torch=torch)
    machine = words["machine"].format(**record["machine"], date=record["date"])
    return "\n".join([*lines, "", note, imports, "", machine, ""])


def _imports(seconds: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    ours = next(values for statement, values in seconds.items() if statement != "import torch")
    return seconds["import torch"], ours


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def refreshed(page: str) -> str:
    """The text of ``page`` with its figures as they are in the results."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return BETWEEN.sub(lambda found: found[1] + table(page) + found[2], text)


if __name__ == "__main__":
    for page in WORDS:
        (ROOT / page).write_text(refreshed(page), encoding="utf-8")
        print(f"{page}: figures written")
