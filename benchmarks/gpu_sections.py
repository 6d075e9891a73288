"""The sections of ``gpu.py``: each takes a ``Setting`` and returns figures, tables, and what was left out."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import common
import contenders
import pack as packs
from contenders import Shape, stepper

ROOT = Path(__file__).resolve().parents[1]
#: Llama 3.2 1B and Llama 3.1 8B, but for their numbers
ONE = {"intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
EIGHT = {"intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = Shape("float32", 32, 1, 2, 8, vocabulary=64, dropout=0.1)
Step = Callable[[], Any]
Found = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    device: str
    small: bool
    repetitions: int
    #: when all has to be over, by ``time.monotonic``
    deadline: float

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def shape(self, shape: Shape) -> Shape:
        if self.small:
            shape = replace(TINY, rows=min(shape.rows, 2), checkpointing=shape.checkpointing)
        return Shared(**{name: getattr(shape, name) for name in Shape.__dataclass_fields__})


class Shared(Shape):
    """Its models have modules of their own and one set of weights, so that all contenders fit into a device."""

    def base(self, device: str) -> nn.Module:
        first = _first(self.width, self.layers, self.vocabulary, self.dtype, tuple(self.more.items()), device)
        kept: dict[int, Any] = {id(parameter): parameter for parameter in first.parameters()}
        return copy.deepcopy(first, kept)


@functools.cache
def _first(width: int, layers: int, vocabulary: int, dtype: str, more: Any, device: str) -> nn.Module:
    """Made where it is used: on a CPU, drawing the numbers of a large model takes minutes."""
    config = Shape(dtype, width, layers, 1, 1, vocabulary, more=dict(more)).config
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def device(kind: str) -> Found:
    if kind != "cuda":
        return {"device": platform.processor() or platform.machine(), "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability(0)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


# -- promises -----------------------------------------------------------------------------------------------------


def tests(setting: Setting) -> Found:
    """Tests marked ``gpu``, by pytest."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", "-o", "junit_logging=no", "--maxfail=20"]
        paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LORALOOM_TEST_DEVICE": setting.device}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=max(setting.left - 3, 1))  # fmt: skip
        if not report.is_file():
            raise RuntimeError(f"pytest wrote no report:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    results: Found = {"passed": [], "failures": {}, "skipped": []}
    for case in cases:
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        name, skip = f"{case.get('classname')}::{case.get('name')}", case.find("skipped")
        if problem is not None:
            results["failures"][name] = (problem.text or problem.get("message") or "")[-3000:]
        elif skip is not None:
            results["skipped"].append(f"{name}: {skip.get('message')}")
        else:
            results["passed"].append(name)
    if results["failures"] or not results["passed"]:
        results["failed"] = f"{len(results['failures'])} tests failed, {len(results['passed'])} passed"
        results["said"] = [f"{name}: {text.splitlines()[-1]}" for name, text in results["failures"].items()]
    rows = [["passed", str(len(results["passed"]))], ["failed", str(len(results["failures"]))]]
    return {**results, "tables": [_table("tests marked gpu", ["", "tests"], rows)]}


# -- steps --------------------------------------------------------------------------------------------------------

STEPS = {"1b": Shape("bfloat16", 2048, 16, 8, 1024, vocabulary=128256, dropout=0.1, more=ONE),
         "8b": Shape("bfloat16", 4096, 32, 2, 4096, vocabulary=128256, dropout=0.1, more=EIGHT)}  # fmt: skip


def step_1b(setting: Setting) -> Found:
    return _steps(setting, STEPS["1b"])


def step_8b(setting: Setting) -> Found:
    """Where one of them has no room, all of them once more with gradient checkpointing."""
    found = _steps(setting, STEPS["8b"])
    if any("memory" in reason for reason in found["skipped"]):
        again = _steps(setting, replace(STEPS["8b"], checkpointing=True))
        for key in ("figures", "tables", "skipped"):
            found[key] += again[key]
    return found


def _steps(setting: Setting, wanted: Shape) -> Found:
    shape = setting.shape(wanted)
    made = {name: functools.partial(stepper, name, shape, setting.device) for name in contenders.NAMES}
    figure, skipped = measured(setting, made)
    seconds = figure["seconds"]
    ours = {name: common.ratio(seconds, name, "floor") for name in seconds if name != "floor" and "floor" in seconds}
    rows = [
        [
            name,
            _milliseconds(seconds[name]),
            _spread(ours[name]) if name in ours else "",
            _size(figure["bytes added"][name]),
        ]
        for name in seconds
    ]
    return {
        "figures": [{"shape": asdict(shape), **figure, "times the floor": ours}],
        "tables": [_table(f"a step: {shape}", ["", "step", "× floor", "memory added"], rows)],
        "skipped": [f"{shape}: {reason}" for reason in skipped],
    }


# -- packs --------------------------------------------------------------------------------------------------------


def pack_1b(setting: Setting) -> Found:
    shape = setting.shape(Shape("bfloat16", 2048, 16, 1, 512, vocabulary=128256, dropout=0.1, more=ONE))
    sizes = [1, 2] if setting.small else [1, 2, 4, 8, 16, 32]
    made: dict[str, Callable[[], Step]] = {"peft": functools.partial(packs.sequential, shape, setting.device)}
    made |= {f"pack of {size}": functools.partial(packs.packed, shape, size, setting.device) for size in sizes}
    made |= {f"floor of {n} rows": functools.partial(packs.floor, shape, n, setting.device) for n in (sizes[0], 8)}
    figure, skipped = measured(setting, made)
    seconds, times, rows = figure["seconds"], {}, []
    for size in sizes:
        mine = seconds.get(f"pack of {size}")
        if mine is None or "peft" not in seconds:
            continue
        ratios = [size * p / q for p, q in zip(seconds["peft"], mine, strict=True)]
        times[str(size)] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        added = figure["bytes added"][f"pack of {size}"]
        rows.append([str(size), _milliseconds(mine), _spread(times[str(size)]), _size(added)])
    rows += [[name, _milliseconds(seconds[name]), "", ""] for name in seconds if not name.startswith("pack")]
    return {
        "figures": [{"shape": asdict(shape), **figure, "throughput over peft": times}],
        "tables": [_table(f"packs: {shape} for each", ["slots", "step of all", "× peft", "memory added"], rows)],
        "skipped": skipped,
    }


# -- waits --------------------------------------------------------------------------------------------------------

#: What makes a program wait for its device: by the profiler's names, on CUDA and for operations that ask for a number
_WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}
_ASKS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::unique"}
_COPIES = {"cudaMemcpyAsync"}
_KERNELS = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"}


def waits(setting: Setting) -> Found:
    """How often a step waits for the device, where, and what it launches: of one adapter, and of a pack."""
    shape = setting.shape(replace(STEPS["1b"], rows=1, tokens=512))
    made: dict[str, Callable[[], Step]] = {
        name: functools.partial(stepper, name, shape, setting.device) for name in ("floor", "peft", "loraloom")
    }
    size = 2 if setting.small else 8
    made[f"pack of {size}"] = functools.partial(packs.packed, shape, size, setting.device)
    figures: Found = {}
    skipped: list[str] = []
    for name, make in made.items():
        if setting.left < 5:
            skipped.append(f"{name}: no time was left")
            continue
        step = make()
        for _ in range(2):
            step()
        figures[name] = {**_counted(step), "places": _places(step) if setting.device == "cuda" else {}}
        del step
        _freed(setting.device)
    if setting.device != "cuda":
        skipped.append("where it waits: torch says so of CUDA alone")
    rows = [[name, *(str(one[key]) for key in ("waits", "numbers asked for", "copies", "kernels"))]
            for name, one in figures.items()]  # fmt: skip
    heads = ["a step of", "waits", "numbers asked for", "copies", "kernels"]
    places = [[name, where, str(times)] for name, one in figures.items() for where, times in one["places"].items()]
    tables = [_table(f"waits for the device: {shape}", heads, rows)]
    if places:
        tables.append(_table("where", ["a step of", "line", "waits"], places))
    return {"figures": figures, "tables": tables, "skipped": skipped}


def _counted(step: Step) -> dict[str, int]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
    counts = collections.Counter({event.key: event.count for event in profile.key_averages()})
    kinds = {"waits": _WAITS, "numbers asked for": _ASKS, "copies": _COPIES, "kernels": _KERNELS}
    return {name: sum(counts[key] for key in keys) for name, keys in kinds.items()}


def _places(step: Step) -> dict[str, int]:
    """file:line → how often a step waits there, as torch's debug mode for synchronisation says."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    said = [one for one in caught if "synchroniz" in str(one.message)]
    places = collections.Counter("/".join(Path(one.filename).parts[-3:]) + f":{one.lineno}" for one in said)
    return dict(places.most_common())


# -- the clock ----------------------------------------------------------------------------------------------------


def measured(setting: Setting, made: Mapping[str, Callable[[], Step]]) -> tuple[Found, list[str]]:
    """Seconds and memory of each contender, in turns, and which were left out, with the reason."""
    steps: dict[str, Step] = {}
    added: dict[str, int | None] = {}
    skipped = []
    for name, make in made.items():
        if setting.left < 5:
            skipped.append(f"{name}: no time was left")
            continue
        reason = ""
        try:
            steps[name], added[name] = _warmed(make, setting.device)
        except torch.OutOfMemoryError as error:
            reason = f"{name}: out of memory ({str(error).split('.')[0]})"
        if reason:
            skipped.append(reason)  # out of the handler, which holds the frames and so their tensors
        _freed(setting.device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    turns = 0
    while steps and turns < setting.repetitions:
        began = time.monotonic()
        gc.collect()
        for name in list(steps)[:: -1 if turns % 2 else 1]:
            seconds[name].append(timed(steps[name], setting.device))
        turns += 1
        if setting.left < 2 * (time.monotonic() - began) + 2 and turns < setting.repetitions:
            skipped.append(f"{setting.repetitions - turns} of {setting.repetitions} repetitions: no time was left")
            break
    return {"seconds": seconds, "bytes added": added}, skipped


def _warmed(make: Callable[[], Step], device: str) -> tuple[Step, int | None]:
    """A step that ran three times, and the bytes at its peak over the loaded model with its adapter and optimizer."""
    step = make()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    step()
    step()
    return step, torch.cuda.max_memory_allocated() - before if device == "cuda" else None


def timed(step: Step, device: str) -> float:
    """Seconds of one step, by the device's own clock where it has one."""
    gc.disable()
    try:
        if device != "cuda":
            started = time.perf_counter()
            step()
            return time.perf_counter() - started
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    finally:
        gc.enable()


def _freed(device: str) -> None:
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _table(title: str, heads: list[str], rows: list[list[str]]) -> Found:
    return {"title": title, "heads": heads, "rows": rows}


def _milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f} ms" if seconds else ""


def _spread(times: Mapping[str, float]) -> str:
    return f"{times['median']:.3f} ({times['min']:.2f} to {times['max']:.2f})"


def _size(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f} MiB"
