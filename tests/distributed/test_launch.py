"""Promises of the place of a run: how many processes there are is told by torchrun and MPI, and one alone is said."""

from __future__ import annotations

import pytest
import torch

from loraloom.distributed import launch
from loraloom.errors import ConfigError

RANKS = ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"]
NAMES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _nobody_started_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*NAMES, *RANKS, *LAUNCHED, "ACCELERATE_USE_CPU"]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("size", "rank"), zip(NAMES, RANKS, strict=True))
def test_how_many_processes_there_are_and_which_this_is_is_what_the_launcher_says(
    size: str, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (launch.started(), launch.rank()) == (1, 0)
    monkeypatch.setenv(size, "3")
    monkeypatch.setenv(rank, "2")
    assert (launch.started(), launch.rank()) == (3, 2)


def test_one_process_alone_is_said_where_accelerate_left_an_address_for_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert launch.single_process_warning() == ""
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert "--multi_gpu" in launch.single_process_warning()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.single_process_warning() == ""
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("MASTER_ADDR")
    assert launch.single_process_warning() == ""


def test_accelerates_cpu_is_heard_and_a_device_that_is_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_best", lambda: torch.device("meta"))
    assert launch.find(None).device.type == "meta"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert launch.find(None).device.type == "cpu"
    with pytest.raises(ConfigError, match="device: must be cpu"):
        launch.find("nowhere")


def test_processes_of_mpi_without_an_address_do_not_each_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"device: MPI started 2 processes .* set MASTER_ADDR"):
        launch.find("cpu")
