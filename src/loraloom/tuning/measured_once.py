"""What is measured of the best adapter when a search has ended: kept in the state, and never measured again.

Rows of a test that were looked at before are no longer rows that chose nothing: a second look is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from loraloom.files.hashing import value_hash
from loraloom.messages import Message
from loraloom.training.setup import Setup
from loraloom.tuning.final_test import FinalTest
from loraloom.tuning.smaller import Cuts
from loraloom.tuning.state import State, save_state
from loraloom.tuning.verdict import Verdict


def measured_once(
    found: Verdict, setup: Setup, state: State, source: Path, folder: Path, measure: Callable[[], Verdict]
) -> Verdict:
    """``found`` with its test and its cuts: those in ``state``, or those of ``measure()``, which ``state`` then keeps.

    Args:
        source: the folder of the best adapter.
        folder: of the search.
    """
    rows = _hash_of_rows(setup)
    others = [found.metric, rows, found.best.number, found.runner_up and found.runner_up.number, source.name]
    key = value_hash([*others, [[trial.number, trial.state, trial.files] for trial in state.trials]])
    kept = state.tested or {}
    if kept.get("key") != key or not _there(kept):
        again = rows is not None and kept.get("rows") == rows and (bool(kept["again"]) or kept["key"] != key)
        done = measure()
        test, cuts = (one and asdict(one) for one in (done.test, done.cuts))
        kept = {"key": key, "rows": rows, "again": again, "test": test, "cuts": cuts}
        state.tested = kept
        save_state(folder, state, {})
    notes = [Message("test_used_before")] if kept["again"] else []
    test = None if kept["test"] is None else of_plain(FinalTest, kept["test"])
    cuts = None if kept["cuts"] is None else of_plain(Cuts, kept["cuts"])
    return replace(found, test=test, cuts=cuts, notes=[*found.notes, *notes])


def _there(kept: Mapping[str, Any]) -> bool:
    """Whether the adapters that were written are still in the folder."""
    cuts = kept["cuts"] or {}
    return all(Path(path).exists() for name in ("adapter", "scaled_adapter") if (path := cuts.get(name)))


def _hash_of_rows(setup: Setup) -> str | None:
    """Of the test's rows as the model sees them; None without a test."""
    if setup.data.test is None:
        return None
    return value_hash([[list(one.input_ids), repr(one.labels)] for one in setup.data.test.examples])


def of_plain(kind: Any, value: Any) -> Any:
    """The inverse of ``dataclasses.asdict``, by the types of the fields."""
    if get_origin(kind) in (Union, UnionType):
        return None if value is None else of_plain(next(one for one in get_args(kind) if one is not type(None)), value)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        known = {spec.name for spec in fields(kind)}
        made: Any = kind
        return made(**{name: of_plain(hints[name], one) for name, one in value.items() if name in known})
    if get_origin(kind) is list:
        return [of_plain(get_args(kind)[0], one) for one in value]
    return value
