"""Write the measured figures into the pages, from ``benchmarks/results/*.json``.

Usage: ``python docs/figures.py``. Only the text between two markers (``<!-- name -->``, ``<!-- /name -->``) is
replaced. A table whose file is missing is left out; the blocks of the quickstart and of ``lifecycle`` stay as they are.
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

#: language → the words of the blocks that pages of both languages have; the figures are the same
WORDS: dict[str, Record] = {
    "en": {
        "answers": (
            "",
            "accuracy on {test_rows:,} docstrings that nothing had seen (95 %)",
            "the best LoRA is better by",
            "parameters",
        ),
        "names": {},
        "to": "to",
        "search took": "Differences are on the same rows. The search over {trials} configurations, on {search_rows:,} "
        "of the docstrings, took {search_seconds:.0f} s on two cores, the whole program {seconds:.0f} s. "
        "In full, both LoRAs were trained {epochs:g} times through all of the docstrings. ",
        "crowded": "(Measured beside other work, with this number set by hand: by default it is chosen so that all of "
        "it takes less than five minutes on two cores.) ",
        "advice": {
            True: "The search ends with this advice:",
            False: "The search alone is too short to show that LoRA beats a new head, and says so:",
        },
        "figures": ("", "peft", "loraloom", ""),
        "search": "search over {trials} configurations by the stopping rule of 0.1; peft trains them one after another",
        "full": "accuracy after full training: the best of the {trials}, the one that the search chose",
        "memory": "memory added by a training step ({dtype}, width {width}, {layers} layers, {rows}×{tokens} tokens, "
        "dropout {dropout:g})",
        "load": "load an adapter from its folder ({layers} Llama layers)",
        "faster": "{:.1f} times faster",
        "below": "{:.4f} below",
        "share": "{:.2f} times",
        "advice of the quickstart": "The advice at the end of the search of `make quickstart`:",
        "prepared": "Preparing {rows:,} {what} ({megabytes:,.0f} MB of JSONL, {tokens:,} tokens) on {cores} cores:",
        "causal-lm": "chats",
        "seq-cls": "labelled texts",
        "first": "the first time",
        "cached": "again, from the cache",
        "prepared columns": ("", "time", "peak memory of all processes"),
        "prepared note": "That is {rate:,.0f} rows per second the first time. The cache took {cache:,.0f} MB. "
        "Command: `{command}`. Machine: {processor}; Python {python}, transformers {transformers}; {date}.",
        "missed": "Goals were set for {goals} figures of training, and {missed} of them were missed.",
        "machine": "Machine: {processor}, {threads} threads; Python {python}, torch {torch}, "
        "transformers {transformers}, peft {peft}; {date}.",
    },
    "zh": {
        "answers": (
            "",
            "在 {test_rows:,} 条从未用过的 docstring 上的准确率（95 % 区间）",
            "最好的 LoRA 高出",
            "参数量",
        ),
        "names": {
            "always the most common area": "永远猜最常见的领域",
            "a new head on the frozen encoder": "冻结编码器，只训练新的分类头",
            "the usual LoRA: r=8, alpha=16, q and v, 2e-4": "常用的 LoRA 配置：r=8、alpha=16、q 和 v、2e-4",
            "the best LoRA of {trials} searched": "搜索的 {trials} 组中最好的 LoRA",
        },
        "to": "到",
        "search took": "差值都在相同的数据上计算。搜索 {trials} 组配置用了其中 {search_rows:,} 条 docstring，"
        "在两个核上花了 {search_seconds:.0f} s，整个程序 {seconds:.0f} s。完整训练时，两个 LoRA 各在"
        "全部 docstring 上训练 {epochs:g} 遍。",
        "crowded": "（测量时机器上还有别的任务，遍数是手工设定的；默认会按机器速度选择，"
        "使全部在两个核上不超过五分钟。）",
        "advice": {
            True: "搜索最后给出的建议是：",
            False: "单靠这么短的搜索还看不出 LoRA 胜过新的分类头，它自己也这样说：",
        },
        "figures": ("", "peft", "loraloom", ""),
        "search": "搜索 {trials} 组配置（用 0.1 的停止规则）；peft 一组一组地训练",
        "full": "完整训练后的准确率：{trials} 组里最好的，和搜索选中的",
        "memory": "一个训练步增加的内存（{dtype}，宽度 {width}，{layers} 层，{rows}×{tokens} 个 token，"
        "dropout {dropout:g}）",
        "load": "从目录加载适配器（{layers} 层 Llama）",
        "faster": "快 {:.1f} 倍",
        "below": "低 {:.4f}",
        "share": "{:.2f} 倍",
        "advice of the quickstart": "`make quickstart` 的搜索最后给出的建议：",
        "prepared": "在 {cores} 个核上准备 {rows:,} 条{what}（JSONL {megabytes:,.0f} MB，{tokens:,} 个 token）：",
        "causal-lm": "对话",
        "seq-cls": "带标签的文本",
        "first": "第一次",
        "cached": "再次运行，读缓存",
        "prepared columns": ("", "耗时", "所有进程的内存峰值"),
        "prepared note": "第一次相当于每秒 {rate:,.0f} 行。缓存占用 {cache:,.0f} MB。命令：`{command}`。"
        "机器：{processor}；Python {python}，transformers {transformers}；{date}。",
        "missed": "训练方面有 {goals} 项数据设了目标，其中 {missed} 项未达到。",
        "machine": "机器：{processor}，{threads} 线程；Python {python}，torch {torch}，transformers {transformers}，"
        "peft {peft}；{date}。",
    },
}
ENGLISH = WORDS["en"]
MISSED = ", missed"

#: How far the configuration that a search chose may be below the best of all, trained in full.
NEAR = 0.01


# -- both READMEs --------------------------------------------------------------------------------------------------


def four(words: Record, results: Path) -> str:
    """The four figures that matter most, and how many goals were missed."""
    rows: list[list[str]] = []
    used: list[Record] = []
    parts: dict[str, Callable[[Record, Record], Iterable[list[str]]]] = {
        "sweep": _short_sweep,
        "memory": _short_memory,
        "lifecycle": _short_load,
    }
    for name, lines in parts.items():
        record = _read(results, name)
        if record is not None:
            rows += lines(words, record)
            used.append(record)
    goals = [row[-1] for _, row in _goals(results) if _has_goal(row[-1])]
    out = [*_table(words["figures"], rows), ""] if rows else []
    if goals:
        missed = sum(goal.endswith(MISSED) for goal in goals)
        out += [words["missed"].format(goals=len(goals), missed=missed), ""]
    machines = dict.fromkeys(_machine(words, record) for record in used)
    return "\n".join([*out, *machines, ""]) if out else ""


def _short_sweep(words: Record, record: Record) -> Iterable[list[str]]:
    trials, full = len(record["search"]["configurations"]), record.get("full")
    found = [f"{record[name]['seconds']:,.0f} s" for name in ("peft", "search")]
    yield [words["search"].format(trials=trials), *found, words["faster"].format(record["speedup"])]
    if full:
        best, chosen = full["best_accuracy"], full["chosen_accuracy"]
        found = [f"{one:.4f}" for one in (best, chosen)]
        yield [words["full"].format(trials=trials), *found, words["below"].format(best - chosen)]


def _short_memory(words: Record, record: Record) -> Iterable[list[str]]:
    figure = record["figures"][0]
    found = [_mib(statistics.median(figure["bytes"][name])) for name in (PEFT, OURS)]
    yield [words["memory"].format(**figure["shape"]), *found, words["share"].format(figure["of peft"])]


def _short_load(words: Record, record: Record) -> Iterable[list[str]]:
    figure = record["figures"]["load"]
    found = [_ms(figure["seconds"][name], 2) for name in (PEFT, OURS)]
    yield [
        words["load"].format(**record["shape"]),
        *found,
        words["faster"].format(figure["times faster"]["median"]),
    ]


def quickstart(words: Record, results: Path) -> str | None:
    """The answers side by side on rows that nothing had seen, and the recommendation as the command prints it."""
    record = _read(results, "quickstart")
    if record is None:
        return None
    names = {name.format(**record): own for name, own in words["names"].items()}

    def interval(found: Record) -> str:
        return f"{found['value']:.3f} ({found['low']:.3f} {words['to']} {found['high']:.3f})"

    rows = []
    for entry in record["answers"]:
        name, better = names.get(entry["name"], entry["name"]).format(**record), entry["better"]
        cells = [interval(entry["accuracy"]), interval(better) if better else "", f"{entry['parameters']:,}"]
        rows.append([name, *cells] if better else [f"**{cell}**" if cell else "" for cell in (name, *cells)])
    table = _table([name.format(**record) for name in words["answers"]], rows)
    took = words["search took"].format(**record) + (words["crowded"] if record.get("crowded") else "")
    return "\n".join([*table, "", took + words["advice"][record["recommended"]], "", *_advice(record), ""])


def _advice(record: Record) -> list[str]:
    return ["```text", *(line.rstrip() for line in record["recommendation"].strip("\n").splitlines()), "```"]


# -- docs/tune.md --------------------------------------------------------------------------------------------------


def example(words: Record, results: Path) -> str:
    """The advice at the end of the quickstart's search."""
    record = _read(results, "quickstart")
    if record is None:
        return ""
    return "\n".join([words["advice of the quickstart"], "", *_advice(record), ""])


# -- docs/performance.md: beside peft, with goals --------------------------------------------------------------------


def lifecycle(words: Record, results: Path) -> str | None:
    """The life of an adapter beside peft's, and the lines under it."""
    record = _read(results, "lifecycle")
    if record is None:
        return None
    figures, shape = record["figures"], record["shape"]
    operations = {
        "inject": "put a new adapter on the model",
        "load": "load an adapter from its folder",
        "switch": "switch to another adapter",
        "save": "save an adapter",
    }
    rows = []
    for operation, what in operations.items():
        figure = figures[operation]
        times = figure["times faster"]
        medians = [_ms(figure["seconds"][name], 2) for name in (PEFT, OURS)]
        rows.append([what, *medians, f"{times['median']:.1f}", _spread(times, 1)])
    seconds = dict(figures["import"]["seconds"])
    torch = statistics.median(seconds.pop("import torch"))
    (ours,) = map(statistics.median, seconds.values())
    head = [f"{shape['layers']} Llama layers", PEFT, OURS, "times faster", "spread"]
    notes = [
        f"Medians of {shape['repetitions']} turns, both libraries in one process, {shape['layers']} Llama layers of "
        f"width {shape['width']}, r={shape['rank']} on all seven projections. Importing the library's names takes "
        f"{figures['import']['times torch']['median']:.2f} times as long as `import torch` ({ours:.2f} s, "
        f"{torch:.2f} s).",
        "",
        f"Command: `{record['command']}`. {_machine(words, record)}",
    ]
    return "\n".join([*_table(head, rows), "", *notes, ""])


def speed(words: Record, results: Path) -> str:
    """One table of the training figures, each with its goal."""
    rows = _goals(results)
    if not rows:
        return ""
    used = list({record["command"]: record for record, _ in rows}.values())
    note = (
        "The floor is the frozen model's own forward and backward. In the rows about the loss, the column peft is the "
        "plain loss. Commands: " + ", ".join(f"`{record['command']}`" for record in used) + "."
    )
    for record in used:
        if "steps_measured" in record.get("peft", {}):
            note += (
                f" PEFT's time for {len(record['peft']['runs'])} runs is calculated from "
                f"{record['peft']['steps_measured']} measured steps of each."
            )
    machines = dict.fromkeys(_machine(words, record) for record in used)
    return "\n".join([*_table(["training", PEFT, OURS, "goal"], [row for _, row in rows]), "", note, "", *machines, ""])


def _goals(results: Path) -> list[tuple[Record, list[str]]]:
    parts: dict[str, Callable[[Record], Iterable[list[str]]]] = {
        "pack": _packs,
        "sweep": _sweeps,
        "step": _steps,
        "memory": _memories,
        "loss": _losses,
        "end_to_end": _ends,
    }
    found = [(_read(results, name), lines) for name, lines in parts.items()]
    return [(record, row) for record, lines in found if record is not None for row in lines(record)]


def _packs(record: Record) -> Iterable[list[str]]:
    for figure in record["figures"]:
        size, times = _best_size(figure)
        what = f"throughput of {size} adapters together: {_llama(figure['shape'])}"
        yield [what, *_throughput(figure, size), _at_least(figure["goal"], times["median"])]


def _sweeps(record: Record) -> Iterable[list[str]]:
    trials, full = len(record["search"]["configurations"]), record.get("full")
    found = [f"{record[name]['seconds']:,.0f} s" for name in ("peft", "search")]
    what = f"a search over {trials} configurations, beside training them one after another"
    yield [what, *found, _at_least(record["goal"], record["speedup"])]
    if full:
        best, chosen = full["best_accuracy"], full["chosen_accuracy"]
        below = _goal(f"≤ {NEAR:g} below: {best - chosen:.4f}", best - chosen <= NEAR)
        what = f"accuracy after full training: the best of the {trials}, and the one that the search chose"
        yield [what, f"{best:.4f}", f"{chosen:.4f}", below]


def _best_size(figure: Record) -> tuple[str, dict[str, float]]:
    """The size of a pack with the greatest throughput, and how many times PEFT's that is."""
    sizes: dict[str, dict[str, float]] = figure["throughput over peft"]
    return max(sizes.items(), key=lambda pair: pair[1]["median"])


def _throughput(figure: Record, size: str) -> list[str]:
    """Rows per second of PEFT, which trains one adapter after another, and of a pack."""
    rows, seconds = figure["shape"]["rows"], figure["seconds"]
    rates = [rows / statistics.median(seconds[PEFT]), int(size) * rows / statistics.median(seconds[f"pack of {size}"])]
    return [f"{rate:.1f} rows/s" for rate in rates]


def _steps(record: Record) -> Iterable[list[str]]:
    for figure in record["figures"]:
        times, goal = figure["times the floor"], figure["goal"]
        found = [f"{times[name]['median']:.3f}" for name in (PEFT, OURS)]
        met = _goal(f"≤ {goal:.2f}", times[OURS]["median"] <= goal)
        yield [f"step, as a multiple of the floor: {_llama(figure['shape'])}", *found, met]


def _memories(record: Record) -> Iterable[list[str]]:
    for figure in record["figures"]:
        found = [_mib(statistics.median(figure["bytes"][name])) for name in (PEFT, OURS)]
        yield [f"memory that a step adds: {_llama(figure['shape'])}", *found, _of_peft(figure)]


def _losses(record: Record) -> Iterable[list[str]]:
    tokens, vocabulary = record["shape"]["tokens"], record["shape"]["vocabulary"]
    for dtype, figure in record["figures"].items():
        found = [_mib(figure["extra bytes"][name]) for name in ("plain", OURS)]
        what = f"memory that the loss takes: {dtype}, {tokens:,} tokens, vocabulary {vocabulary:,}"
        yield [what, *found, _of_logits(figure)]


def _ends(record: Record) -> Iterable[list[str]]:
    figures = record["figures"]
    parts = {
        TRAINER: "the quickstart's training, beside transformers' Trainer",
        GROUPED: "the same, with the Trainer's `group_by_length`",
    }
    for name, what in parts.items():
        if name in figures and OURS in figures:
            found = [f"{figures[one]['rows_per_second']:.1f} rows/s" for one in (name, OURS)]
            yield [what, *found, _times_faster(record, name)]


# -- docs/data.md ---------------------------------------------------------------------------------------------------


def many_rows(words: Record, results: Path) -> str:
    """What preparing many rows costs."""
    record = _read(results, "data")
    if record is None:
        return ""
    found, machine = record["figures"], record["machine"]
    first = found["first"]
    rows = [
        [words[name], f"{found[name]['seconds']:,.0f} s", f"{found[name]['peak bytes'] / 1e6:,.0f} MB"]
        for name in ("first", "cached")
    ]
    head = words["prepared"].format(
        rows=found["rows"],
        what=words[found["task"]],
        megabytes=found["file bytes"] / 1e6,
        tokens=first["tokens"],
        cores=machine["cores"],
    )
    note = words["prepared note"].format(
        rate=found["rows per second"],
        cache=found["cache bytes"] / 1e6,
        command=record["command"],
        date=record["date"],
        **machine,
    )
    return "\n".join([head, "", *_table(words["prepared columns"], rows), "", note, ""])


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
            goal = _at_least(figure["goal"], times["median"]) if size == best else ""
            rows.append(
                [
                    _llama(figure["shape"]),
                    size,
                    *_throughput(figure, size),
                    f"{times['median']:.2f}",
                    _spread(times, 2),
                    _nothing_added(figure) if size == "8" else "",
                    goal,
                ]
            )
    turns = len(record["figures"][0]["seconds"][PEFT])
    return [
        "Adapters of r=16 on all seven projections, with AdamW and clipped gradients; the shape is that of each "
        "adapter's own rows. PEFT trains one adapter after another, loraloom all together. Both run in one "
        f"process, in turns; medians of the ratios of {turns} turns. The limit is the ratio if a pack took no "
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
    listed = ", ".join(f"{name} {_plainly(value)}" for name, value in settings.items())
    longest = statistics.median(run["step"] for run in peft["runs"])
    lines = [
        f"{len(search['configurations'])} configurations of the quickstart's data and model ({listed}), by the "
        "stopping rule of 0.1; it was not measured with today's. The search is measured from start to end; its trials "
        f"took {search['steps']:,} steps of the {peft['steps']:,} that all "
        f"would take. PEFT's time is calculated: of each of its {len(peft['runs'])} runs, loading, "
        f"{peft['steps_measured']} steps and an evaluation were measured (a step is {1e3 * longest:.0f} ms in the "
        "median).",
        "",
    ]
    head = ["", "peft, one after another", "loraloom's search", "goal"]
    lines += _table(head, list(_sweeps(record)))
    if not record.get("full"):
        lines += ["", "Not all configurations have been trained in full yet."]
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
        aim = "" if goal is None else _goal(f"≤ {goal:.2f}", times <= goal)
        found = [f"{figure['floor']:,.1f} ms", *shares, f"{times:.3f}", f"{figure['limit']:.3f}", aim]
        rows.append([_llama(figure["shape"]), *found])
    return [
        "Each part is measured separately, with the shapes and the number of calls of a step, as time and as a share "
        "of the floor. The limit is a step that adds only the thin products, with `A` and with `B`, to "
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
        met = _goal(f"≤ {goal:.2f}", times[OURS]["median"] <= goal)
        mine = [f"{times[OURS]['median']:.3f}", _spread(times[OURS], 2), met]
        rows.append([_llama(figure["shape"]), _ms(figure["seconds"][FLOOR]), *others, *mine])
    turns = len(figures[0]["seconds"][OURS])
    return [
        "Multiples of the floor, which is the frozen model's own forward and backward with gradients to its input. "
        "loraloom runs as in its own loop, the others as transformers runs them. "
        f"All run in one process, in turns; medians of the ratios of {turns} turns. The spread is that of loraloom's, "
        "and includes the noise of the machine.",
        "",
        *_table(["", FLOOR, *names, OURS, "spread", "goal"], rows),
    ]


def _memory_table(record: Record) -> list[str]:
    names = _ordered(record["figures"][0]["bytes"])
    rows = []
    for figure in record["figures"]:
        found = [_mib(statistics.median(figure["bytes"][name])) for name in names]
        rows.append([_llama(figure["shape"]), *found, _of_peft(figure)])
    runs = len(record["figures"][0]["bytes"][OURS])
    return [
        "The peak within two steps, minus the loaded model with its adapter. Each runs in its own process; "
        f"medians of {runs}.",
        "",
        *_table(["", *names, "goal"], rows),
    ]


def _loss_table(record: Record) -> list[str]:
    rows = []
    for dtype, figure in record["figures"].items():
        for name in sorted(figure["extra bytes"], key=lambda name: (name == OURS, name)):
            extra = figure["extra bytes"][name]
            goal = _of_logits(figure).replace(" of the logits in float32", "") if name == OURS else ""
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
        f"float32 are {logits}. Forward and backward; extra memory is the peak minus the head and its input.",
        "",
        *_table(["", "extra memory", "of the logits", "goal", "time", "the loss"], rows),
    ]


def _end_table(record: Record) -> list[str]:
    rows = []
    for name in sorted(record["figures"], key=lambda name: (name == OURS, name)):
        figure = record["figures"][name]
        ours = "" if name == OURS or OURS not in record["figures"] else _times_faster(record, name)
        found = [f"{figure['rows_per_second']:.1f}", f"{figure['seconds']:.0f} s", f"{figure['accuracy']:.4f}"]
        rows.append([name, *found, ours])
    settings = record["settings"]
    return [
        f"The quickstart's rows, model and adapter in {settings['dtype']}, {settings['batch_size']} rows in a step, "
        f"{_epochs(settings)}, one evaluation at the end; the same rate and schedule, everything else at its default: "
        "the Trainer uses the frozen model's dropout and pads random batches.",
        "",
        *_table(["", "rows a second", "time", "accuracy", "loraloom is faster by"], rows),
    ]


def _epochs(settings: Record) -> str:
    if settings.get("max_steps"):
        return f"{settings['max_steps']} steps"
    return "one epoch" if settings["epochs"] == 1 else f"{settings['epochs']:g} epochs"


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
        "Torch's fused and plain attention, forward and backward, causal. loraloom uses the plain one for rows of up "
        "to 128 tokens in half precision.",
        "",
        *_table(["", "fused", "plain", "fused / plain", "spread"], rows),
    ]


def _half_table(record: Record) -> list[str]:
    rows = []
    for figure in record["figures"]:
        for name, times in figure["bfloat16 over float32"].items():
            shape = {**figure["shape"], "dtype": name}
            medians = [_ms(figure["seconds"][f"{name}, {dtype}"], 1) for dtype in ("float32", "bfloat16")]
            rows.append([_llama(shape), *medians, f"{times['median']:.2f}", _spread(times, 2)])
    return [
        "A training step over a frozen model in float32, and in bfloat16.",
        "",
        *_table(["", "float32", "bfloat16", "times as long", "spread"], rows),
    ]


# -- cells ---------------------------------------------------------------------------------------------------------


def _goal(text: str, met: bool) -> str:
    return text if met else f"{text}{MISSED}"


def _has_goal(cell: str) -> bool:
    return cell.startswith(("≤", "≥"))


def _at_least(goal: float, found: float) -> str:
    return _goal(f"≥ {goal:g} times: {found:.2f}", found >= goal)


def _of_peft(figure: Record) -> str:
    found, goal = figure["of peft"], figure["goal"]
    if goal is None:
        return f"{found:.3f} of peft's"
    return _goal(f"≤ {goal:g} of peft's: {found:.3f}", found <= goal)


def _of_logits(figure: Record, goal: float = 1 / 8) -> str:
    found = figure["extra bytes"][OURS] / figure["logits in float32"]
    return _goal(f"≤ {goal:g} of the logits in float32: {found:.3f}", found <= goal)


def _times_faster(record: Record, name: str) -> str:
    figures, goal = record["figures"], record["goal"]
    found = figures[OURS]["rows_per_second"] / figures[name]["rows_per_second"]
    if name != TRAINER:  # the goal is against the Trainer's defaults
        return f"{found:.2f} times"
    return _at_least(goal, found)


def _llama(shape: Record) -> str:
    dropout = f", dropout {shape['dropout']:g}" if shape["dropout"] else ""
    return (
        f"{shape['dtype']}, width {shape['width']}, {shape['layers']} layers, {shape['rows']}×{shape['tokens']}"
        + dropout
    )


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


def _table(head: Iterable[str], rows: list[list[str]], last: str = "---:|") -> list[str]:
    head = list(head)
    return [_row(head), "|---|" + "---:|" * (len(head) - 2) + last, *map(_row, rows)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# -- pages ---------------------------------------------------------------------------------------------------------

#: page → marker → what stands between its two ends; None leaves it as it is
Block = Callable[[Record, Path], str | None]
README_BLOCKS: dict[str, Block] = {"quickstart": quickstart, "figures": four}
BLOCKS: dict[str, dict[str, Block]] = {
    "README.md": README_BLOCKS,
    "README.zh-CN.md": README_BLOCKS,
    "docs/performance.md": {"goals": speed, "lifecycle": lifecycle, "measured": measured},
    "docs/tune.md": {"searched": example},
    "docs/zh/tune.md": {"searched": example},
    "docs/data.md": {"rows": many_rows},
    "docs/zh/data.md": {"rows": many_rows},
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
        new = block(WORDS["zh" if "zh" in page else "en"], results)
        if new is not None:
            text = before + start + new + rest[rest.index(end) :]
    return text


if __name__ == "__main__":
    for page in BLOCKS:
        (ROOT / page).write_text(refreshed(page), encoding="utf-8")
        print(f"{page}: figures written")
