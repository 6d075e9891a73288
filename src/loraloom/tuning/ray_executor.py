"""A crew over Ray: each worker is a process of its own, here or on a cluster, with rows, model and pack of its own.

Numbers and adapters travel as safetensors, and this process alone writes: the folder of a search need not be shared.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from loraloom.errors import ConfigError, DataError, LoraloomError, TrainingError, first_line
from loraloom.files.atomic import write_files
from loraloom.training.preflight.estimate import free_memory
from loraloom.tuning.bar import Bar, set_bar
from loraloom.tuning.concurrency import SHARE, Slots, one_slot, plan_slots
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.state import TRIALS
from loraloom.tuning.trial import Trial
from loraloom.tuning.worker import Report, TensorState, TrialFactory, Worker, name_of

#: Seconds between two looks at how the workers are doing, and whether to stop.
LOOK = 0.5
#: A worker that died so often without a report in between will not do better the next time.
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


@dataclass(frozen=True)
class Placement:
    """Where a worker is."""

    node: str
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass
class Parcel:
    """A report as it travels: numbers as the bytes of safetensors files, and the files of adapters that are done."""

    report: Report
    numbers: dict[int, bytes]
    adapters: dict[str, dict[str, bytes]]


class RemoteWorker:
    """A ``Worker`` in a process of its own. ``look`` and ``stop`` are called while ``run`` runs."""

    def __init__(self, options: TuneConfig, folder: str, hashes: Sequence[str]) -> None:
        self._options, self._folder, self._hashes = options, folder, list(hashes)
        self._worker: Worker | None = None
        self._stop = threading.Event()
        self._seen: tuple[float, list[Trial], float] = (0.0, [], 0.0)

    def open(self) -> Placement:
        """Load rows and model; once is enough.

        Raises:
            InputError: they cannot be used here, or the rows are others than those of the search.
        """
        if self._worker is None:
            from loraloom.training.setup import load as load_all

            with contextlib.suppress(OSError):  # paths are as from there; what is not found is said when it is read
                os.chdir(self._folder)
            setup = load_all(self._options.train)
            if sorted(setup.data.hashes.values()) != self._hashes:
                raise DataError(f"{self._options.train.data}: holds other rows than where the search was started")
            self._worker = Worker(self._options, setup, TrialFactory(self._options, setup))
        return _here()

    def plan(self, most: int, threads: int | None, neighbours: int) -> Slots:
        """How many slots pay, and fit beside as many ``neighbours`` on this machine as there are, itself included."""
        self._use(threads, neighbours)
        worker = self._opened()
        largest = max(worker.factory.largest(), key=lambda one: worker.factory.plan(one).parameters)
        memory = self._options.memory and self._options.memory // self._options.workers
        if memory is None and neighbours > 1 and not torch.cuda.is_available():
            free = int(SHARE * free_memory() / neighbours)
            memory = free + one_slot(worker.factory.widest(), largest).base  # the models of all are there already
        return plan_slots(worker.pack, worker.factory.widest(), largest, most, memory, self._options.slots)

    def set_bar(self, threads: int | None, neighbours: int) -> Bar:
        """Measure what trials have to beat."""
        self._use(threads, neighbours)
        worker = self._opened()
        return set_bar(worker.setup, worker.model)

    def run(
        self,
        enter: Sequence[tuple[Trial, bytes]],
        leave: Sequence[int],
        threads: int | None,
        neighbours: int,
        bar: Bar,
    ) -> Parcel:
        self._use(threads, neighbours)
        worker = self._opened()
        worker.bar = bar
        with tempfile.TemporaryDirectory(prefix="loraloom-worker-") as folder:
            worker.options = replace(self._options, train=replace(self._options.train, output=folder))
            opened = [(trial, load(numbers) if numbers else {}) for trial, numbers in enter]
            report = worker.run(opened, leave, self._tell, self._stop.is_set)
            done = [name_of(trial.number) for trial in report.trials]
            adapters = {name: _files(Path(folder) / TRIALS / name) for name in done}
        numbers = {number: _packed(tensors) for number, tensors in report.numbers.items()}
        return Parcel(replace(report, numbers={}), numbers, {name: files for name, files in adapters.items() if files})

    def look(self) -> tuple[list[Trial], float]:
        """Its trials, not older than a moment, and the tokens of a second."""
        return self._seen[1:]

    def stop(self) -> None:
        """Hand over after the step under way."""
        self._stop.set()

    def _tell(self, trials: list[Trial], tokens_per_second: float) -> None:
        if time.monotonic() - self._seen[0] > LOOK:  # a copy, for it is sent while training goes on
            self._seen = time.monotonic(), copy.deepcopy(trials), tokens_per_second

    def _opened(self) -> Worker:
        self.open()
        assert self._worker is not None
        return self._worker

    def _use(self, threads: int | None, neighbours: int) -> None:
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // neighbours))


class RayExecutor:
    """``options.workers`` workers, on this machine or on the cluster at ``options.ray_address``.

    Args:
        hashes: of the files with the rows, as the search knows them.
        tell: told of the trials under way and of the tokens of a second.
        stop: asked now and then; once it is true, the workers hand over what they have.

    Raises:
        ConfigError: no Ray, no cluster at the address, or not enough in it.
        InputError: a worker cannot use the rows or the model.
    """

    def __init__(
        self,
        options: TuneConfig,
        hashes: Sequence[str],
        tell: Callable[[list[Trial], float], None],
        stop: Callable[[], bool],
    ) -> None:
        self.count = options.workers
        self._options, self._hashes, self._tell, self._stop = options, sorted(hashes), tell, stop
        self._ray = need_ray()
        #: of each worker; None leaves it to the machine that it is on
        self._threads = None if options.ray_address else max(1, torch.get_num_threads() // self.count)
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
            self.places: list[Placement] = [self._get(worker, ref) for worker, ref in enumerate(opening)]
        except self._ray.exceptions.RayError as error:
            self.close()
            raise TrainingError(f"a worker died before it began: {first_line(error)}") from None
        except BaseException:
            self.close()
            raise
        on = Counter(place.node for place in self.places)
        self._neighbours = [on[place.node] for place in self.places]

    def plan(self, most: int) -> Slots:
        """Measured by the first worker, where it is."""
        try:
            ref = self._workers[0].plan.remote(most, self._threads, self._neighbours[0])
            planned: Slots = self._get(0, ref)
            return planned
        except self._ray.exceptions.RayError as error:
            raise TrainingError(f"a worker died before it began: {first_line(error)}") from None

    def set_bar(self, known: Bar | None) -> Bar:
        """Measured by the first worker, unless it is known; all have it with their trials."""
        try:
            self._bar = known or self._get(0, self._workers[0].set_bar.remote(self._threads, self._neighbours[0]))
        except self._ray.exceptions.RayError as error:
            raise TrainingError(f"a worker died before it began: {first_line(error)}") from None
        return self._bar

    def start(self, worker: int, enter: Sequence[tuple[Trial, TensorState]], leave: Sequence[int]) -> None:
        packed = [(trial, _packed(numbers) if numbers else b"") for trial, numbers in enter]
        run = self._workers[worker].run.remote
        self._under_way[run(packed, list(leave), self._threads, self._neighbours[worker], self._bar)] = worker

    def wait(self) -> tuple[int, Report | None]:
        asked = False
        while True:
            ready, _ = self._ray.wait(list(self._under_way), num_returns=1, timeout=LOOK)
            if ready:
                break
            if self._stop() and not asked:
                asked = True
                for busy in self._under_way.values():
                    self._workers[busy].stop.remote()
            self._look()
        worker = self._under_way.pop(ready[0])
        try:
            parcel: Parcel = self._get(worker, ready[0])
        except self._ray.exceptions.RayError as error:
            self._replace(worker, error)
            return worker, None
        self._deaths[worker] = 0
        for name, files in parcel.adapters.items():
            write_files(Path(self._options.train.output) / TRIALS / name, files)
        report = replace(parcel.report, numbers={number: load(data) for number, data in parcel.numbers.items()})
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
        return self._ray.remote(**settings)(RemoteWorker).remote(self._options, os.getcwd(), self._hashes)

    def _replace(self, worker: int, error: Exception) -> None:
        self._deaths[worker] += 1
        self._seen.pop(worker, None)
        if self._deaths[worker] >= DEATHS:
            raise TrainingError(
                f"worker {worker} died {DEATHS} times in a row ({first_line(error)}); what was trained before is "
                f"saved, and the same command goes on with the search in {self._options.train.output}"
            )
        self._workers[worker] = self._hire()

    def _get(self, worker: int, ref: Any) -> Any:
        """What came of it. An error that the worker met is raised as itself, one of Ray's is as Ray says it."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, LoraloomError):
                raise type(cause)(f"worker {worker}: {cause}") from None
            raise cause from None

    def _look(self) -> None:
        for worker in self._under_way.values():
            with contextlib.suppress(self._ray.exceptions.RayError):  # dead or busy: its report says it
                self._see(worker, *self._ray.get(self._workers[worker].look.remote(), timeout=LOOK))

    def _see(self, worker: int, trials: list[Trial], tokens_per_second: float) -> None:
        self._seen[worker] = trials, tokens_per_second
        running = [trial for seen, _ in self._seen.values() for trial in seen]
        self._tell(running, sum(rate for _, rate in self._seen.values()))


def _connect(ray: Any, options: TuneConfig) -> bool:
    """Whether Ray was started or connected to here, and so is to be let go here."""
    if ray.is_initialized():
        return False
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nobody is told that this runs
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
    """What each worker takes of the cluster: a GPU where there are any, else a core.

    Raises:
        ConfigError: there is not enough for all; Ray would wait for ever.
    """
    there = ray.cluster_resources()
    kind, words = ("GPU", "GPUs") if there.get("GPU", 0) else ("CPU", "cores")
    if there.get(kind, 0) < count:
        raise ConfigError(f"workers: {count} need as many {words}, and Ray has {there.get(kind, 0):g}; lower workers")
    return {"num_cpus": 0, "num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}


def _here() -> Placement:
    import ray

    return Placement(ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid())


def _packed(numbers: Mapping[str, torch.Tensor]) -> bytes:
    data: bytes = save({key: tensor.detach().cpu().contiguous() for key, tensor in numbers.items()})
    return data


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
