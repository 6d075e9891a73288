"""A search that is extended: more trials, another space, more seeds, after it ended or while it is stopped.

The number of trials, the space, the seeds and the finalists may change (``extent``). The model, the rows and what
``TuneConfig.fixed`` hashes may not. An extension is an event in the state. Its trials compete at the rungs among
themselves; the sampler and the ranking know all trials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraloom.errors import ConfigError
from loraloom.files.hashing import value_hash
from loraloom.files.jsonio import MALFORMED
from loraloom.messages import Message
from loraloom.training.setup import Setup
from loraloom.tuning.config import EXTENT, TuneConfig
from loraloom.tuning.space import Space
from loraloom.tuning.state import State, glance, run_file


@dataclass(frozen=True)
class Identity:
    """By what a search is known: a hash of all that determines its result, and one of what no extension may change.

    Rows of a test may change, so that a later verdict can have new ones.
    """

    fingerprint: str
    fixed: str

    @classmethod
    def of(cls, options: TuneConfig, setup: Setup) -> Identity:
        data = setup.data
        rows = [value for name, value in data.hashes.items() if name not in data.only_test]
        counts = [len(data.train.examples), len(data.validation.examples)]
        return cls(
            value_hash([options.fingerprint(), sorted(data.hashes.values()), setup.weights]),
            value_hash([options.fixed(), sorted(rows), counts, setup.weights]),
        )


def read(
    source: str | Path | None, overrides: Mapping[str, Any] | Sequence[str] = (), given: Mapping[str, Any] | None = None
) -> TuneConfig:
    """The search of a run file, or that in a folder, by the options that it kept; arguments as of ``TuneConfig.read``.

    Raises:
        ConfigError: as ``TuneConfig.read``, or the folder holds no search, or one of 0.2, which kept no options.
    """
    if source is None or not Path(source).is_dir():
        return TuneConfig.read(source, overrides, given)
    return TuneConfig.read(run_file(source), overrides, {"output": str(source), **(given or {})})


def extent(options: TuneConfig) -> dict[str, Any]:
    """What an extension may change, and the trials that the search began with."""
    values = options.to_dict()
    return {name: values[name] for name in EXTENT}


def with_extent(options: TuneConfig, there: Mapping[str, Any]) -> TuneConfig:
    return replace(options, **{**there, "space": Space.parse(there["space"], options.train)})


def known(options: TuneConfig, setup: Setup, folder: Path, extend: bool) -> tuple[TuneConfig, Identity]:
    """The options as extensions of the search in ``folder`` left them, and what that search is known by.

    What ``options`` are known by, if the folder holds no search, or another one, or one that is overwritten.

    Args:
        extend: the search is extended now: ``options`` may have another extent, which is theirs.

    Raises:
        ConfigError: the search could be extended to ``options``, but that was not asked for.
    """
    mine, found = Identity.of(options, setup), {} if options.train.overwrite else glance(folder)
    if found.get("fingerprint") != mine.fingerprint and found.get("fixed") != mine.fixed:
        return options, mine
    try:
        theirs = Identity(str(found["fingerprint"]), mine.fixed)
        there = found.get("extent") or extent(options)
        before = [event["before"] for event in found.get("events", []) if event["kind"] == "extend"]
        asked = replace(options, trials=there["trials"]) if extend else options
    except MALFORMED:
        return options, mine
    if extent(asked) in [there, *before]:
        return with_extent(options, there), theirs
    if extend:
        return asked, theirs
    raise ConfigError(
        f"output: {folder} holds another search, of another space or number of trials, finalists or seeds; to extend "
        "that search give --add-trials and how many, else choose another folder, or give --overwrite to start over"
    )


def extend(state: State, options: TuneConfig, added: int, tried: Sequence[Mapping[str, Any]]) -> Message:
    """Write the event of ``added`` further trials into ``state``.

    Args:
        options: those of the search from now on.
        tried: the configurations of the space that there are trials of.

    Raises:
        ConfigError: there would be nothing to train, or more than the limit; or the search has not ended, and more
            changes than the number of its trials.
    """
    now = extent(options)
    changed = [name for name in EXTENT if now[name] != state.extent[name]]
    if changed and not state.finished:
        raise ConfigError(
            f"{changed[0]}: can change once the search has ended; resume it first, or give --add-trials alone"
        )
    more_seeds = now["seeds"] > state.extent["seeds"] or now["finalists"] > state.extent["finalists"]
    if added < 0 or (not added and not more_seeds):
        raise ConfigError(f"add_trials: must be at least 1, or 0 with more seeds or finalists, found {added}")
    if options.space.size is not None:
        left = sum(values not in tried for values in options.space.grid())
        if added > left:
            raise ConfigError(
                f"add_trials: the space has {left} configurations that were not tried, found {added}; lower it or "
                "widen the space"
            )
    most = options.max_trials
    if most is not None and wanted(state) + added > most:
        raise ConfigError(
            f"max_trials: the search has {wanted(state)} trials, and with {added} more it would have more than {most}; "
            "raise it, or add fewer"
        )
    state.events.append(
        {"kind": "extend", "trials": added, "before": state.extent, "first": None, "seconds": state.seconds}
    )
    state.extent, state.finished = now, False
    return Message("extended", added=added, trials=wanted(state), changed=changed)


def wanted(state: State) -> int:
    """Configurations of the search, with those of all extensions."""
    return sum((int(event["trials"]) for event in state.of_kind("extend")), int(state.extent["trials"]))
