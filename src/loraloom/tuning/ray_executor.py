"""An executor over Ray: each worker is a process, here or on a cluster, with its own rows, model and pack.

This process alone writes: tensors and the files of finished adapters travel to it, and the folder of a search need not
be shared.
"""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loraloom.errors import ConfigError, DataError, LoraloomError, TrainingError, first_line
from loraloom.files.atomic import write_files
from loraloom.tuning.bar import Bar
from loraloom.tuning.concurrency import Slots
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.executor import Enter, OnTrials, measure_bar, measure_step, plan
from loraloom.tuning.state import TRIALS
from loraloom.tuning.trial import Trial
from loraloom.tuning.worker import Report, TrialFactory, Worker, name_of

#: Seconds between two looks at how the workers are doing, and whether to stop.
LOOK = 0.5
#: Deaths of a worker without a report in between, after which the search gives up.
DEATHS = 3
#: Seconds in which a cluster must answer; Ray itself would try for minutes.
ANSWER = 10.0


def need_ray() -> Any:
    """Ray's module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("workers: several workers need Ray; pip install 'loraloom[ray]'") from None
    return ray


class Placement(NamedTuple):
    """The machine and the process of a worker."""

    node: str
    pid: int


class RemoteWorker:
    """A ``Worker`` in its own process. ``look`` and ``stop`` are called while ``run`` runs.

    Args:
        hashes: of the files with the rows, sorted.
        threads: of torch; None for an even share of the machine's cores.
    """

    def __init__(self, options: TuneConfig, folder: str, hashes: Sequence[str], threads: int | None) -> None:
        self._options, self._folder, self._hashes, self._threads = options, folder, list(hashes), threads
        self._worker: Worker | None = None
        self._stop = threading.Event()
        self._seen: tuple[float, list[Trial], float] = (0.0, [], 0.0)

    def open(self) -> Placement:
        """Load rows and model, unless they are there.

        Raises:
            InputError: they cannot be used here, or the rows are others than those of the search.
        """
        import ray

        self._opened()
        return Placement(ray.get_runtime_context().get_node_id(), os.getpid())

    def call(self, task: Callable[..., Any], neighbours: int, *arguments: Any) -> Any:
        """``task`` of the worker, one of ``neighbours`` on this machine."""
        return task(self._opened(neighbours), *arguments)

    def run(self, enter: Enter, leave: Sequence[int], neighbours: int, bar: Bar) -> tuple[Report, dict[str, Any]]:
        """The report, and the files of the adapters that are finished: name → file → bytes."""
        worker = self._opened(neighbours)
        worker.bar = bar
        self._stop.clear()
        with tempfile.TemporaryDirectory(prefix="loraloom-worker-") as folder:
            worker.options = replace(self._options, train=replace(self._options.train, output=folder))
            report = worker.run(enter, leave, self._on_trials, self._stop.is_set)
            adapters = {
                path.name: {file.name: file.read_bytes() for file in path.iterdir()}
                for trial in report.trials
                if (path := Path(folder) / TRIALS / name_of(trial.number)).is_dir()
            }
        return replace(report, states={number: state.copy() for number, state in report.states.items()}), adapters

    def look(self) -> tuple[list[Trial], float]:
        """Its trials, not older than a moment, and the tokens of a second."""
        return self._seen[1:]

    def stop(self) -> None:
        """Report after the step under way."""
        self._stop.set()

    def _on_trials(self, trials: list[Trial], tokens_per_second: float) -> None:
        if time.monotonic() - self._seen[0] > LOOK:  # a copy, for it is sent while training continues
            self._seen = time.monotonic(), copy.deepcopy(trials), tokens_per_second

    def _opened(self, neighbours: int = 1) -> Worker:
        if self._worker is None:
            from loraloom.training.setup import load

            with contextlib.suppress(OSError):  # relative paths start there; reading names what is missing
                os.chdir(self._folder)
            setup = load(self._options.train)
            if sorted(setup.data.hashes.values()) != self._hashes:
                raise DataError(f"{self._options.train.data}: holds other rows than where the search was started")
            self._worker = Worker(self._options, setup, TrialFactory(self._options, setup))
        torch.set_num_threads(self._threads or max(1, (os.cpu_count() or 1) // neighbours))
        return self._worker


class RayExecutor:
    """``options.workers`` workers, on this machine or on the cluster at ``options.ray_address``.

    Args:
        hashes: of the files with the rows, as the search knows them.
        stop: asked now and then; once it is true, the workers report what they have.

    Raises:
        ConfigError: no Ray, no cluster at the address, or not enough in it.
        InputError: a worker cannot use the rows or the model.
    """

    def __init__(
        self, options: TuneConfig, hashes: Sequence[str], on_trials: OnTrials, stop: Callable[[], bool]
    ) -> None:
        self.count = options.workers
        self._options, self._hashes, self._on_trials, self._stop = options, sorted(hashes), on_trials, stop
        self._ray = need_ray()
        #: what runs → the worker that runs it
        self._under_way: dict[Any, int] = {}
        self._deaths: Counter[int] = Counter()
        self._bar = Bar(0)
        self._seen: dict[int, tuple[list[Trial], float]] = {}
        self._workers: list[Any] = []
        self._connected = _connect(self._ray, options)
        try:
            self._wants = _wants(self._ray, self.count)
            self._workers = [self._hire() for _ in range(self.count)]
            opening = [worker.open.remote() for worker in self._workers]
            self.places: list[Placement] = [self._begun(worker, ref) for worker, ref in enumerate(opening)]
        except BaseException:
            self.close()
            raise
        on = Counter(place.node for place in self.places)
        self._neighbours = [on[place.node] for place in self.places]

    def plan(self, most: int) -> Slots:
        """Measured by the first worker, where it is."""
        planned: Slots = self._first(plan, most, self._neighbours[0])
        return planned

    def seconds_of_step(self) -> float:
        """Measured by the first worker."""
        measured: float = self._first(measure_step)
        return measured

    def set_bar(self, known: Bar | None) -> Bar:
        """Measured by the first worker, unless it is known; all have it with their trials."""
        self._bar = known or self._first(measure_bar)
        return self._bar

    def start(self, worker: int, enter: Enter, leave: Sequence[int]) -> None:
        ref = self._workers[worker].run.remote(list(enter), list(leave), self._neighbours[worker], self._bar)
        self._under_way[ref] = worker

    def wait(self) -> tuple[int, Report | None]:
        while True:
            ready, _ = self._ray.wait(list(self._under_way), num_returns=1, timeout=LOOK)
            if ready:
                break
            if self._stop():
                for busy in self._under_way.values():
                    self._workers[busy].stop.remote()
            self._look()
        worker = self._under_way.pop(ready[0])
        report: Report
        try:
            report, adapters = self._get(worker, ready[0])
        except self._ray.exceptions.RayError as error:
            self._replace(worker, error)
            return worker, None
        self._deaths[worker] = 0
        for name, files in adapters.items():
            write_files(Path(self._options.train.output) / TRIALS / name, files)
        self._see(worker, report.trials, report.tokens / max(report.seconds, 1e-9))
        return worker, report

    def close(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(Exception):
                self._ray.kill(worker)
        self._workers = []
        if self._connected:
            self._ray.shutdown()

    def _hire(self) -> Any:
        # Threads: one that trains, one for what is asked meanwhile. Spread: a pack wants a machine's cores to itself.
        settings = {"max_concurrency": 2, "max_restarts": 0, "scheduling_strategy": "SPREAD", **self._wants}
        threads = None if self._options.ray_address else max(1, torch.get_num_threads() // self.count)
        return self._ray.remote(**settings)(RemoteWorker).remote(self._options, os.getcwd(), self._hashes, threads)

    def _replace(self, worker: int, error: Exception) -> None:
        self._deaths[worker] += 1
        self._seen.pop(worker, None)
        if self._deaths[worker] >= DEATHS:
            raise TrainingError(
                f"worker {worker} died {DEATHS} times in a row ({first_line(error)}); what was trained before is "
                f"saved, and the same command resumes the search in {self._options.train.output}"
            )
        self._workers[worker] = self._hire()

    def _get(self, worker: int, ref: Any) -> Any:
        """The result. An error of the worker is raised as itself; RayError: the worker died."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, LoraloomError):
                raise type(cause)(f"worker {worker}: {cause}") from None
            raise cause from None

    def _begun(self, worker: int, ref: Any) -> Any:
        try:
            return self._get(worker, ref)
        except self._ray.exceptions.RayError as error:
            raise TrainingError(f"a worker died before it began: {first_line(error)}") from None

    def _first(self, task: Callable[..., Any], *arguments: Any) -> Any:
        """``task`` of the first worker, before any trial."""
        return self._begun(0, self._workers[0].call.remote(task, self._neighbours[0], *arguments))

    def _look(self) -> None:
        for worker in self._under_way.values():
            with contextlib.suppress(self._ray.exceptions.RayError):  # dead or busy: its report says it
                self._see(worker, *self._ray.get(self._workers[worker].look.remote(), timeout=LOOK))

    def _see(self, worker: int, trials: list[Trial], tokens_per_second: float) -> None:
        self._seen[worker] = trials, tokens_per_second
        running = [trial for seen, _ in self._seen.values() for trial in seen]
        self._on_trials(running, sum(rate for _, rate in self._seen.values()))


def _connect(ray: Any, options: TuneConfig) -> bool:
    """True if Ray was started or connected to here, and so is to be shut down here."""
    if ray.is_initialized():
        return False
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no report to Ray's makers
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    address = options.ray_address
    if address is None:
        # "local" says: not the cluster that some variable of the environment names.
        ray.init(address="local", num_cpus=options.workers, include_dashboard=False, **quiet)
        return True
    try:
        host, sign, port = address.rpartition("://")[2].rpartition(":")
        if sign and port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
        ray.init(address=address, **quiet)
    except Exception as error:  # Ray has many for this
        raise ConfigError(
            f"ray_address: no Ray cluster answers at {address} ({first_line(error)}); give host:port of its head "
            "node, or auto for one on this machine; where it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from None
    return True


def _wants(ray: Any, count: int) -> dict[str, int]:
    """What each worker takes of the cluster: a GPU if the cluster has any, else a core.

    Raises:
        ConfigError: there is not enough for all; Ray would wait for ever.
    """
    there = ray.cluster_resources()
    kind, words = ("GPU", "GPUs") if there.get("GPU", 0) else ("CPU", "cores")
    if there.get(kind, 0) < count:
        raise ConfigError(
            f"workers: {count} workers need {count} {words}, and Ray has {there.get(kind, 0):g}; lower workers"
        )
    return {"num_cpus": 0, "num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
