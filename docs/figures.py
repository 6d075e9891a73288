"""Write the measured figures into the pages, from ``benchmarks/results/*.json``.

Usage: ``python docs/figures.py``. Only what stands between two markers (``<!-- name -->``, ``<!-- /name -->``) is
replaced. A table whose file is not there is left out; the quickstart's block and the life of an adapter then stay.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Record = dict[str, Any]

FLOOR, PEFT, HALF, OURS = "floor", "peft", "peft, adapters in the base's dtype", "loraloom"
TRAINER, GROUPED = "Trainer and peft", "Trainer and peft, group_by_length"

#: README → the words of its tables; the figures are the same
WORDS: dict[str, dict[str, Any]] = {
    "README.md": {
        "head": ("on {layers} Llama layers", "peft", "loraloom", "times faster", "spread"),
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
        "speed": ("training", "peft", "loraloom", "goal"),
        "llama": "{dtype}, width {width}, {layers} layers, {rows}×{tokens}",
        "dropout": ", dropout {dropout:g}",
        "step": "step, as a multiple of the floor: ",
        "memory": "memory that a step adds: ",
        "loss": "memory that the loss takes: {dtype}, {tokens:,} tokens, vocabulary {vocabulary:,}",
        "end to end": "the quickstart's job, beside transformers' Trainer",
        "grouped": "the same, with the Trainer's `group_by_length`",
        "rows a second": "{:.1f} rows/s",
        "of peft": "≤ {goal:g} of peft's: {found:.3f}",
        "of peft, no goal": "{found:.3f} of peft's",
        "of the logits": "≤ {goal:g} of the logits in float32: {found:.3f}",
        "times": "≥ {goal:g} times: {found:.2f}",
        "times, no goal": "{found:.2f} times",
        "missed": ", missed",
        "floor": "The floor is the frozen model's own forward and backward. For the loss, the column peft is the plain "
        "loss. Commands: {commands}.",
        "and": ", ",
        "common": "always the most common area",
        "new head": "a new head on the frozen encoder",
        "searched": ("accuracy", "trained parameters", ""),
        "held out": "{held_out:,} docstrings never seen",
        "one of many": "LoRA, {config}",
        "steps": "{state}, {steps:,} steps",
        "search took": "The search over all {count} took {search_seconds:.0f} s on two cores, everything "
        "{seconds:.0f} s. The accuracy of a stopped one is that of the step at which it was stopped. What it says in "
        "the end:",
        "pack": "throughput of {size} adapters together: {shape}",
        "search": "a search over {trials} configurations, beside training them one after another",
        "full": "accuracy in full: the best of the {trials}, and the one that the search chose",
        "below": "≤ {goal:g} below: {found:.4f}",
        "counted": " PEFT's time for {runs} runs is counted from {steps_measured} measured steps of each.",
    },
    "README.zh-CN.md": {
        "head": ("{layers} 层 Llama", "peft", "loraloom", "快多少倍", "波动范围"),
        "shape": "{layers} 层、宽度 {width} 的 Llama，七个投影全部 r={rank}",
        "inject": "给模型装上新适配器",
        "load": "从目录加载适配器",
        "switch": "切换到另一个适配器",
        "save": "保存适配器",
        "import": "导入本库的名字，耗时是 `import torch` 的 {times:.2f} 倍（{ours:.2f} s，{torch:.2f} s）。",
        "note": "{n} 轮的中位数，两个库在同一进程中轮流运行，{shape}。命令：`{command}`。",
        "machine": "机器：{processor}，{threads} 线程；Python {python}，torch {torch}，transformers {transformers}，"
        "peft {peft}；{date}。",
        "speed": ("训练", "peft", "loraloom", "目标"),
        "llama": "{dtype}，宽度 {width}，{layers} 层，{rows}×{tokens}",
        "dropout": "，dropout {dropout:g}",
        "step": "一步是下限的多少倍：",
        "memory": "一步增加的内存：",
        "loss": "损失占用的内存：{dtype}，{tokens:,} 个 token，词表 {vocabulary:,}",
        "end to end": "quickstart 的任务，对比 transformers 的 Trainer",
        "grouped": "同上，Trainer 打开 `group_by_length`",
        "rows a second": "{:.1f} 行/s",
        "of peft": "≤ {goal:g} 倍 peft：{found:.3f}",
        "of peft, no goal": "{found:.3f} 倍 peft",
        "of the logits": "≤ {goal:g} 倍 float32 logits：{found:.3f}",
        "times": "≥ {goal:g} 倍：{found:.2f}",
        "times, no goal": "{found:.2f} 倍",
        "missed": "，未达到",
        "floor": "下限是冻结模型自己的一次前向和反向。损失那几行里，peft 一列是普通算法。命令：{commands}。",
        "and": "、",
        "common": "永远猜最常见的领域",
        "new head": "冻结编码器，只训新的分类头",
        "searched": ("准确率", "训练的参数", ""),
        "held out": "{held_out:,} 条没见过的 docstring",
        "one of many": "LoRA，{config}",
        "steps": "{state}，{steps:,} 步",
        "search took": "搜索全部 {count} 组在两个核上用了 {search_seconds:.0f} s，连同其余一共 {seconds:.0f} s。"
        "被停掉的，准确率是停下那一步的。最后它这样说：",
        "pack": "{size} 个适配器一起训练的吞吐：{shape}",
        "search": "搜索 {trials} 组配置，对比一组一组地训练",
        "full": "完整训练的准确率：{trials} 组里最好的，和搜索选中的",
        "below": "最多低 {goal:g}：{found:.4f}",
        "counted": "PEFT 跑 {runs} 次的时间，是由每次实测的 {steps_measured} 步算出来的。",
    },
}
ENGLISH = WORDS["README.md"]

#: How far the configuration that a search chose may be below the best of all, trained in full.
NEAR = 0.01


# -- both READMEs --------------------------------------------------------------------------------------------------


def lifecycle(words: Record, results: Path) -> str | None:
    """The life of an adapter beside peft's, and the lines under it."""
    record = _read(results, "lifecycle")
    if record is None:
        return None
    figures, shape = record["figures"], record["shape"]
    rows = []
    for operation in ("inject", "load", "switch", "save"):
        figure = figures[operation]
        times = figure["times faster"]
        medians = [_ms(figure["seconds"][name], 2) for name in (PEFT, OURS)]
        rows.append([words[operation], *medians, f"{times['median']:.1f}", _spread(times, 1)])
    seconds = dict(figures["import"]["seconds"])
    torch = statistics.median(seconds.pop("import torch"))
    (ours,) = map(statistics.median, seconds.values())
    note = words["note"].format(n=shape["repetitions"], shape=words["shape"].format(**shape), command=record["command"])
    imports = words["import"].format(times=figures["import"]["times torch"]["median"], ours=ours, torch=torch)
    head = [words["head"][0].format(**shape), *words["head"][1:]]
    return "\n".join([*_table(head, rows), "", note, imports, "", _machine(words, record), ""])


def speed(words: Record, results: Path) -> str:
    """One short table of what training costs, each figure beside its goal."""
    rows: list[list[str]] = []
    used: list[Record] = []
    parts: dict[str, Callable[[Record, Record], Iterable[list[str]]]] = {
        "pack": _packs,
        "sweep": _sweeps,
        "step": _steps,
        "memory": _memories,
        "loss": _losses,
        "end_to_end": _ends,
    }
    for name, lines in parts.items():
        record = _read(results, name)
        if record is not None:
            rows += lines(words, record)
            used.append(record)
    if not rows:
        return ""
    note = words["floor"].format(commands=words["and"].join(f"`{record['command']}`" for record in used))
    note += "".join(
        words["counted"].format(runs=len(record["peft"]["runs"]), steps_measured=record["peft"]["steps_measured"])
        for record in used
        if "steps_measured" in record.get("peft", {})
    )
    machines = dict.fromkeys(_machine(words, record) for record in used)
    return "\n".join([*_table(words["speed"], rows), "", note, "", *machines, ""])


def _packs(words: Record, record: Record) -> Iterable[list[str]]:
    for figure in record["figures"]:
        size, times = _best_size(figure)
        what = words["pack"].format(size=size, shape=_llama(words, figure["shape"]))
        yield [what, *_throughput(words, figure, size), _at_least(words, figure["goal"], times["median"])]


def _sweeps(words: Record, record: Record) -> Iterable[list[str]]:
    search, full = {"trials": len(record["search"]["configurations"]), **record["search"]}, record.get("full")
    found = [f"{record[name]['seconds']:,.0f} s" for name in ("peft", "search")]
    yield [words["search"].format(**search), *found, _at_least(words, record["goal"], record["speedup"])]
    if full:
        best, chosen = full["best_accuracy"], full["chosen_accuracy"]
        below = _goal(words, words["below"].format(goal=NEAR, found=best - chosen), best - chosen <= NEAR)
        yield [words["full"].format(**search), f"{best:.4f}", f"{chosen:.4f}", below]


def _best_size(figure: Record) -> tuple[str, dict[str, float]]:
    """The size of a pack with the greatest throughput, and how many times PEFT's that is."""
    sizes: dict[str, dict[str, float]] = figure["throughput over peft"]
    return max(sizes.items(), key=lambda pair: pair[1]["median"])


def _throughput(words: Record, figure: Record, size: str) -> list[str]:
    """Rows a second of PEFT, which trains one adapter after another, and of a pack."""
    rows, seconds = figure["shape"]["rows"], figure["seconds"]
    rates = [rows / statistics.median(seconds[PEFT]), int(size) * rows / statistics.median(seconds[f"pack of {size}"])]
    return [words["rows a second"].format(rate) for rate in rates]


def _steps(words: Record, record: Record) -> Iterable[list[str]]:
    for figure in record["figures"]:
        times, goal = figure["times the floor"], figure["goal"]
        found = [f"{times[name]['median']:.3f}" for name in (PEFT, OURS)]
        met = _goal(words, f"≤ {goal:.2f}", times[OURS]["median"] <= goal)
        yield [words["step"] + _llama(words, figure["shape"]), *found, met]


def _memories(words: Record, record: Record) -> Iterable[list[str]]:
    for figure in record["figures"]:
        found = [_mib(statistics.median(figure["bytes"][name])) for name in (PEFT, OURS)]
        yield [words["memory"] + _llama(words, figure["shape"]), *found, _of_peft(words, figure)]


def _losses(words: Record, record: Record) -> Iterable[list[str]]:
    for dtype, figure in record["figures"].items():
        found = [_mib(figure["extra bytes"][name]) for name in ("plain", OURS)]
        yield [words["loss"].format(dtype=dtype, **record["shape"]), *found, _of_logits(words, figure)]


def _ends(words: Record, record: Record) -> Iterable[list[str]]:
    figures = record["figures"]
    for name, what in ((TRAINER, "end to end"), (GROUPED, "grouped")):
        if name in figures and OURS in figures:
            found = [words["rows a second"].format(figures[one]["rows_per_second"]) for one in (name, OURS)]
            yield [words[what], *found, _times_faster(words, record, name)]


def quickstart(words: Record, results: Path) -> str | None:
    """Two answers without LoRA, the leaderboard, and the recommendation as the command prints it."""
    record = _read(results, "quickstart")
    if record is None:
        return None
    head = f"{record['head']:.3f}", f"{record['head_parameters']:,}"
    rows = [[words["common"], f"{record['common']:.3f}", "0", ""], [words["new head"], *head, ""]]
    for entry in record["leaderboard"]:
        accuracy = "–" if entry["accuracy"] is None else f"{entry['accuracy']:.3f}"
        noise = f" ± {entry['noise']:.3f}" if entry["noise"] is not None else ""
        what = words["one of many"].format(config=entry["config"])
        rows.append([what, f"{accuracy}{noise}", f"{entry['parameters']:,}", words["steps"].format(**entry)])
    took = words["search took"].format(count=len(record["leaderboard"]), **record)
    table = _table([words["held out"].format(**record), *words["searched"]], rows)
    return "\n".join([*table, "", took, "", *_said(record), ""])


def _said(record: Record) -> list[str]:
    return ["```text", *(line.rstrip() for line in record["recommendation"].strip("\n").splitlines()), "```"]


def example(words: Record, results: Path) -> str:
    """What the quickstart's search says in the end."""
    record = _read(results, "quickstart")
    if record is None:
        return ""
    return "\n".join(["This is what the search of `make quickstart` says in the end:", "", *_said(record), ""])


# -- docs/data.md ---------------------------------------------------------------------------------------------------


def many_rows(words: Record, results: Path) -> str:
    """What preparing many rows cost."""
    record = _read(results, "data")
    if record is None:
        return ""
    found, machine = record["figures"], record["machine"]
    first, again = found["first"], found["cached"]
    rows = [
        [what, f"{part['seconds']:,.0f} s", f"{part['peak bytes'] / 1e6:,.0f} MB"]
        for what, part in (("the first time", first), ("again, from the cache", again))
    ]
    what = {"causal-lm": "chats", "seq-cls": "texts with labels"}[found["task"]]
    return "\n".join(
        [
            f"Preparing {found['rows']:,} {what} ({found['file bytes'] / 1e6:,.0f} MB of JSONL, {first['tokens']:,} "
            f"tokens) on {machine['cores']} cores:",
            "",
            *_table(["", "time", "memory of all processes, at the peak"], rows),
            "",
            f"That is {found['rows per second']:,.0f} rows a second the first time. The cache took "
            f"{found['cache bytes'] / 1e6:,.0f} MB. Command: `{record['command']}`. Machine: {machine['processor']}; "
            f"Python {machine['python']}, transformers {machine['transformers']}; {record['date']}.",
            "",
        ]
    )


# -- docs/performance.md -------------------------------------------------------------------------------------------


def measured(words: Record, results: Path) -> str:
    """Every table of the page on performance, each with its heading, command and machine."""
    parts: dict[str, tuple[str, Callable[[Record], list[str]]]] = {
        "A pack": ("pack", _pack_table),
        "A pack on a GPU": ("pack-cuda", _pack_table),
        "A whole search": ("sweep", _sweep_table),
        "A step": ("step", _step_table),
        "Where the time of a step goes": ("profile", _profile_table),
        "A step on a GPU": ("step-cuda", _step_table),
        "Memory of a step": ("memory", _memory_table),
        "Memory of a step on a GPU": ("memory-cuda", _memory_table),
        "The loss": ("loss", _loss_table),
        "From end to end": ("end_to_end", _end_table),
        "Attention of short rows": ("attention", _attention_table),
        "Half precision": ("half", _half_table),
        "Half precision on a processor without instructions for it": ("half-without-instructions", _half_table),
    }
    out: list[str] = []
    for title, (name, lines) in parts.items():
        record = _read(results, name)
        if record is not None:
            command = f"Command: `{record['command']}`."
            out += ["", f"### {title}", "", *lines(record), "", f"{command} {_machine(words, record)}"]
    if _read(results, "step-cuda") is None:
        out += ["", "No step has been measured on a GPU yet."]
    return "\n".join([*out[1:], ""])


def _pack_table(record: Record) -> list[str]:
    rows = []
    for figure in record["figures"]:
        best, _ = _best_size(figure)
        for size, times in figure["throughput over peft"].items():
            goal = _at_least(ENGLISH, figure["goal"], times["median"]) if size == best else ""
            rows.append(
                [
                    _llama(ENGLISH, figure["shape"]),
                    size,
                    *_throughput(ENGLISH, figure, size),
                    f"{times['median']:.2f}",
                    _spread(times, 2),
                    _nothing_added(figure) if size == "8" else "",
                    goal,
                ]
            )
    turns = len(record["figures"][0]["seconds"][PEFT])
    return [
        "Adapters of r=16 on all seven projections, with AdamW and clipped gradients; the shape is that of each "
        "adapter's own rows. PEFT takes a step of one adapter after another, loraloom one of all together. All in one "
        f"process, in turns; medians of {turns} turns' own ratios. The limit is what it would be if a pack took no "
        "longer than the frozen model's own forward and backward on its rows.",
        "",
        *_table(["", "adapters", "peft", "loraloom", "times", "spread", "limit", "goal"], rows),
    ]


def _nothing_added(figure: Record) -> str:
    """PEFT's eight steps over the frozen model's own on the rows of all eight."""
    peft, floor = figure["seconds"][PEFT], figure["seconds"]["floor of 8 rows"]
    return f"{statistics.median(8 * p / f for p, f in zip(peft, floor, strict=True)):.2f}"


def _sweep_table(record: Record) -> list[str]:
    search, peft, settings = record["search"], record["peft"], record["settings"]
    said = ", ".join(f"{name} {_plainly(value)}" for name, value in settings.items())
    longest = statistics.median(run["step"] for run in peft["runs"])
    lines = [
        f"{len(search['configurations'])} configurations of the quickstart's data and model ({said}). The search is "
        f"measured from beginning to end; its trials took {search['steps']:,} steps of the {peft['steps']:,} that all "
        f"would take. PEFT's time is counted: of each of its {len(peft['runs'])} runs, loading, "
        f"{peft['steps_measured']} steps and an evaluation were measured (a step is {1e3 * longest:.0f} ms in the "
        "median).",
        "",
    ]
    head = ["", "peft, one after another", "loraloom's search", "goal"]
    lines += _table(head, list(_sweeps(ENGLISH, record)))
    if not record.get("full"):
        lines += ["", "The configurations have not all been trained in full yet."]
    return lines


def _plainly(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _profile_table(record: Record) -> list[str]:
    figures = record["figures"]
    parts = list(dict.fromkeys(name for figure in figures for name in figure["parts"]))
    parts.sort(key=lambda name: name not in figures[0]["calls"])  # those with calls first
    parts.sort(key=lambda name: name.startswith("calls"))  # and last what is left over
    rows = []
    for figure in figures:
        shares = [
            f"{figure['parts'][name]:,.1f} ms, {figure['parts'][name] / figure['floor']:.1%}"
            + (f", {figure['calls'][name]} calls" if name in figure["calls"] else "")
            if name in figure["parts"]
            else ""
            for name in parts
        ]
        times, goal = figure.get("times the floor", figure["step"] / figure["floor"]), figure.get("goal")
        aim = "" if goal is None else _goal(ENGLISH, f"≤ {goal:.2f}", times <= goal)
        found = [f"{figure['floor']:,.1f} ms", *shares, f"{times:.3f}", f"{figure['limit']:.3f}", aim]
        rows.append([_llama(ENGLISH, figure["shape"]), *found])
    return [
        "Each part measured by itself, with the shapes and the number of calls of a step, as time and as a share of "
        "the floor. The limit is a step in which the thin products, with `A` and with `B`, are all that is added to "
        "the frozen model.",
        "",
        *_table(["", FLOOR, *parts, "times the floor", "limit", "goal"], rows),
    ]


def _step_table(record: Record) -> list[str]:
    figures = record["figures"]
    names = [name for name in _ordered(figures[0]["times the floor"]) if name != OURS]
    rows = []
    for figure in figures:
        times, goal = figure["times the floor"], figure["goal"]
        others = [f"{times[name]['median']:.3f}" for name in names]
        met = _goal(ENGLISH, f"≤ {goal:.2f}", times[OURS]["median"] <= goal)
        mine = [f"{times[OURS]['median']:.3f}", _spread(times[OURS], 2), met]
        rows.append([_llama(ENGLISH, figure["shape"]), _ms(figure["seconds"][FLOOR]), *others, *mine])
    turns = len(figures[0]["seconds"][OURS])
    return [
        "Multiples of the floor, which is the frozen model's own forward and backward with gradients to its input. "
        "loraloom runs as its own loop does, the others as transformers runs them. "
        f"All in one process, in turns; medians of {turns} turns' own ratios, and the spread of loraloom's, which also "
        "shows how much the machine wavered.",
        "",
        *_table(["", FLOOR, *names, OURS, "spread", "goal"], rows),
    ]


def _memory_table(record: Record) -> list[str]:
    names = _ordered(record["figures"][0]["bytes"])
    rows = []
    for figure in record["figures"]:
        found = [_mib(statistics.median(figure["bytes"][name])) for name in names]
        rows.append([_llama(ENGLISH, figure["shape"]), *found, _of_peft(ENGLISH, figure)])
    runs = len(record["figures"][0]["bytes"][OURS])
    return [
        "The peak within two steps over the loaded model with its adapter. Each in a process of its own; "
        f"medians of {runs}.",
        "",
        *_table(["", *names, "goal"], rows),
    ]


def _loss_table(record: Record) -> list[str]:
    rows = []
    for dtype, figure in record["figures"].items():
        for name in sorted(figure["extra bytes"], key=lambda name: (name == OURS, name)):
            extra = figure["extra bytes"][name]
            goal = _of_logits(ENGLISH, figure).replace(" of the logits in float32", "") if name == OURS else ""
            share = f"{extra / figure['logits in float32']:.3f}"
            rows.append(
                [
                    f"{dtype}, {name}",
                    _mib(extra),
                    share,
                    goal,
                    _ms(figure["seconds"][name]),
                    f"{figure['value'][name]:.5f}",
                ]
            )
    shape = record["shape"]
    logits = _mib(next(iter(record["figures"].values()))["logits in float32"])
    return [
        f"{shape['tokens']:,} tokens, vocabulary {shape['vocabulary']:,}, width {shape['width']:,}; the logits in "
        f"float32 are {logits}. Forward and backward; extra memory is the peak over the head and its input.",
        "",
        *_table(["", "extra memory", "of the logits", "goal", "time", "the loss"], rows),
    ]


def _end_table(record: Record) -> list[str]:
    rows = []
    for name in sorted(record["figures"], key=lambda name: (name == OURS, name)):
        figure = record["figures"][name]
        ours = "" if name == OURS or OURS not in record["figures"] else _times_faster(ENGLISH, record, name)
        found = [f"{figure['rows_per_second']:.1f}", f"{figure['seconds']:.0f} s", f"{figure['accuracy']:.4f}"]
        rows.append([name, *found, ours])
    settings = record["settings"]
    return [
        f"The quickstart's rows, model and adapter in {settings['dtype']}, {settings['batch_size']} rows in a step, "
        f"{_epochs(settings)}, one evaluation at the end; the same rate and schedule, all else at each one's defaults: "
        "the Trainer keeps the frozen model's dropout and pads random batches.",
        "",
        *_table(["", "rows a second", "time", "accuracy", "loraloom is faster by"], rows),
    ]


def _epochs(settings: Record) -> str:
    if settings.get("max_steps"):
        return f"{settings['max_steps']} steps"
    return "once through" if settings["epochs"] == 1 else f"{settings['epochs']:g} times through"


def _attention_table(record: Record) -> list[str]:
    rows, last = [], {}
    for key, figure in record["figures"].items():
        dtype, shape = key.split(", ")
        batch, heads, tokens, width = map(int, shape.split("×"))
        medians = [_ms(figure["seconds"][name], 2) for name in ("fused", "plain")]
        times = figure["fused over plain"]
        row = [f"{dtype}, {batch}×{tokens} tokens, {heads} heads of {width}", *medians, f"{times['median']:.2f}"]
        last[dtype, tokens, batch] = [*row, _spread(times, 2)]
    rows = [last[order] for order in sorted(last)]
    return [
        "Torch's fused attention beside the plain one, forward and backward, causal. loraloom takes the plain one for "
        "rows of up to 128 tokens in half precision.",
        "",
        *_table(["", "fused", "plain", "fused / plain", "spread"], rows),
    ]


def _half_table(record: Record) -> list[str]:
    rows = []
    for figure in record["figures"]:
        for name, times in figure["bfloat16 over float32"].items():
            shape = {**figure["shape"], "dtype": name}
            medians = [_ms(figure["seconds"][f"{name}, {dtype}"], 1) for dtype in ("float32", "bfloat16")]
            rows.append([_llama(ENGLISH, shape), *medians, f"{times['median']:.2f}", _spread(times, 2)])
    return [
        "A training step over a frozen model that is held in float32, and in bfloat16.",
        "",
        *_table(["", "float32", "bfloat16", "times as long", "spread"], rows),
    ]


# -- cells ---------------------------------------------------------------------------------------------------------


def _goal(words: Record, text: str, met: bool) -> str:
    return text if met else f"{text}{words['missed']}"


def _at_least(words: Record, goal: float, found: float) -> str:
    return _goal(words, words["times"].format(goal=goal, found=found), found >= goal)


def _of_peft(words: Record, figure: Record) -> str:
    found, goal = figure["of peft"], figure["goal"]
    if goal is None:
        return str(words["of peft, no goal"].format(found=found))
    return _goal(words, words["of peft"].format(goal=goal, found=found), found <= goal)


def _of_logits(words: Record, figure: Record, goal: float = 1 / 8) -> str:
    found = figure["extra bytes"][OURS] / figure["logits in float32"]
    return _goal(words, words["of the logits"].format(goal=goal, found=found), found <= goal)


def _times_faster(words: Record, record: Record, name: str) -> str:
    figures, goal = record["figures"], record["goal"]
    found = figures[OURS]["rows_per_second"] / figures[name]["rows_per_second"]
    if name != TRAINER:  # the goal is against the Trainer's defaults
        return str(words["times, no goal"].format(found=found))
    return _at_least(words, goal, found)


def _llama(words: Record, shape: Record) -> str:
    return str(words["llama"].format(**shape)) + (words["dropout"].format(**shape) if shape["dropout"] else "")


def _machine(words: Record, record: Record) -> str:
    machine = dict(record["machine"])
    if machine.get("device"):
        machine["processor"] += f", {machine['device']}"
    return str(words["machine"].format(**machine, date=record["date"]))


def _ordered(names: Iterable[str]) -> list[str]:
    """Contenders in a fixed order, loraloom last."""
    order = [FLOOR, PEFT, HALF]
    return sorted(names, key=lambda name: (name == OURS, order.index(name) if name in order else len(order), name))


def _ms(seconds: list[float], digits: int = 1) -> str:
    return f"{1e3 * statistics.median(seconds):,.{digits}f} ms"


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _spread(times: dict[str, float], digits: int) -> str:
    return f"{times['min']:.{digits}f} – {times['max']:.{digits}f}"


def _table(head: Iterable[str], rows: list[list[str]]) -> list[str]:
    head = list(head)
    return [_row(head), "|---" + "|---:" * (len(head) - 1) + "|", *map(_row, rows)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# -- pages ---------------------------------------------------------------------------------------------------------

#: page → marker → what stands between its two ends; None leaves it as it is
Block = Callable[[Record, Path], str | None]
README_BLOCKS: dict[str, Block] = {"quickstart": quickstart, "figures": lifecycle, "speed": speed}
BLOCKS: dict[str, dict[str, Block]] = {
    **dict.fromkeys(WORDS, README_BLOCKS),
    "docs/performance.md": {"measured": measured},
    "docs/tune.md": {"searched": example},
    "docs/data.md": {"rows": many_rows},
}


def _read(results: Path, name: str) -> Record | None:
    path = results / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def refreshed(page: str, results: Path = RESULTS) -> str:
    """The text of ``page`` with its figures as they are in the results."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, block in BLOCKS[page].items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = text.partition(start)
        if not found or end not in rest:
            raise ValueError(f"{page}: the markers {start.strip()} and {end} are missing")
        new = block(WORDS.get(page, ENGLISH), results)
        if new is not None:
            text = before + start + new + rest[rest.index(end) :]
    return text


if __name__ == "__main__":
    for page in BLOCKS:
        (ROOT / page).write_text(refreshed(page), encoding="utf-8")
        print(f"{page}: figures written")
