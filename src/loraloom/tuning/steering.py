"""What the user decides while a search runs: trials to stop, and trials to keep at the rungs.

A request is an empty file in the folder of the search, whose name says it; another process leaves it there. The search
takes it up after the step under way, or when it is resumed: it becomes an event of the state, which is written before
it acts.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from loraloom.errors import ConfigError, SaveError
from loraloom.files.jsonio import MALFORMED
from loraloom.messages import Message
from loraloom.tuning.state import State, glance

#: The folder of requests, in that of the search.
REQUESTS = "requests"
#: What can be asked of a trial.
KINDS = ("stop", "keep")
LIVE = ("running", "waiting")


def ask(folder: Path, wishes: Sequence[tuple[str, int]]) -> None:
    """Leave a request for each kind and trial.

    Raises:
        ConfigError: there is no search, it has ended, or a trial does not train; nothing was asked for.
        SaveError: the folder cannot be written.
    """
    for kind, number in wishes:
        _check(folder, kind, number)
    try:
        (folder / REQUESTS).mkdir(exist_ok=True)
        for kind, number in wishes:
            (folder / REQUESTS / f"{time.time_ns():020}-{kind}-{number}").touch()
    except OSError as error:
        raise SaveError(f"{folder / REQUESTS}: cannot be written ({error.strerror})") from None


def _check(folder: Path, kind: str, number: int) -> None:
    found = glance(folder)
    try:
        states = {trial["number"]: (trial["state"], trial["reason"]) for trial in found["trials"]}
        ended = found["finished"]
    except MALFORMED:
        raise ConfigError(f"--{kind} {number}: {folder} holds no search") from None
    live = ", ".join(str(one) for one, (state, _) in states.items() if state in LIVE)
    if ended:
        raise ConfigError(f"--{kind} {number}: the search in {folder} has ended; nothing trains there")
    if number not in states:
        raise ConfigError(f"--{kind} {number}: there is no such trial; those that train or wait are {live}")
    state, reason = states[number]
    if state not in LIVE:
        why = f" ({reason})" if reason else ""
        raise ConfigError(
            f"--{kind} {number}: that trial has {_ENDED[state]}{why}; those that train or wait are {live}"
        )


_ENDED = {"finished": "finished", "stopped": "been stopped", "failed": "failed"}


def pending(folder: Path) -> bool:
    """Whether there are requests; cheap enough to ask after every step."""
    try:
        with os.scandir(folder / REQUESTS) as found:
            return next(found, None) is not None
    except OSError:
        return False


def take_up(folder: Path, state: State) -> tuple[list[Path], list[Message]]:
    """Make events of the requests. Returns their files, to be deleted once the state is written, and what to report."""
    paths, messages = sorted((folder / REQUESTS).glob("*")), []
    for path in paths:
        found = re.fullmatch(rf"\d+-({'|'.join(KINDS)})-(\d+)", path.name)
        if found is None:
            continue
        kind, number = found[1], int(found[2])
        if number >= len(state.trials) or state.trials[number].state not in LIVE:
            messages.append(Message("request_late", request=kind, trial=number))
            continue
        state.events.append({"kind": kind, "trial": number, "step": state.trials[number].step})
        messages.append(Message("asked", request=kind, trial=number))
    obey(state)
    return paths, messages


def obey(state: State) -> None:
    """Stop the trials that the user stopped, also if a worker reports them as running."""
    for event in state.of_kind("stop"):
        trial = state.trials[event["trial"]]
        if trial.state in LIVE:
            trial.state, trial.reason = "stopped", f"by the user, at step {trial.step}"


def kept(state: State) -> set[int]:
    """Trials that are not paused at rungs."""
    return {event["trial"] for event in state.of_kind("keep")}


def forget(paths: Collection[Path]) -> None:
    """Delete requests that became events."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def close(folder: Path) -> None:
    """Delete the folder of requests, once nothing trains. Until then it stays: another process may be writing there."""
    with contextlib.suppress(OSError):
        (folder / REQUESTS).rmdir()


def notes(state: State) -> list[Message]:
    """What the verdict owes to the clock or the user, so that another run may differ."""
    stopped = sorted({event["trial"] for event in state.of_kind("stop")})
    kept_ones = sorted(kept(state))
    found = [Message("steered", stopped=stopped, kept=kept_ones)] if stopped or kept_ones else []
    over = state.of_kind("clock")
    return [*found, *([Message("clock_ended", seconds=over[-1]["seconds"], steps=over[-1]["steps"])] if over else [])]
