"""``run.json``: the options of a run, its curves and its result."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import loraloom
from loraloom.engine.slot import Curve, Slot
from loraloom.errors import ConfigError
from loraloom.files import jsonio
from loraloom.training import early_stopping
from loraloom.training.setup import TrainJob

RUN_NAME = "run.json"
#: Files without a format are of loraloom 0.1.
FORMAT = 1
#: ``run.json``'s hash of its own contents without this key.
_OWN_HASH = "record_sha256"


def versions() -> dict[str, str]:
    import transformers

    return {
        "python": platform.python_version(),
        "loraloom": loraloom.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine() -> dict[str, Any]:
    return {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}


@dataclass(frozen=True)
class RunRecord:
    """A run. ``adapter_step`` is the step of the adapter in the folder, ``result`` its evaluation."""

    #: ``finished``, ``interrupted`` or ``failed``
    state: str
    steps: int
    adapter_step: int
    #: why training stopped before its last step
    ended_early: str | None
    #: the steps at which the run was resumed
    resumed_at: list[int]
    seconds: float
    tokens: int
    tokens_per_second: float
    metric: str
    result: dict[str, float]
    #: step, metric and value of the best evaluation
    best: dict[str, Any] | None
    options: dict[str, Any]
    #: hashes by which a later run knows whether it is the same
    identity: dict[str, Any]
    trainable_parameters: int
    base_parameters: int
    unadapted_experts: str | None
    trained_in_full: list[str]
    data: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    curve: Curve
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def record(
    job: TrainJob,
    slot: Slot,
    *,
    state: str,
    tokens: int,
    seconds: float,
    identity: Mapping[str, Any],
    resumed_at: list[int],
    adapter_step: int | None = None,
) -> RunRecord:
    """The record of a run at the current step of ``slot``; see ``RunRecord`` for the arguments."""
    data, evaluations = job.data, slot.curve.evaluations
    adapter_step = slot.step if adapter_step is None else adapter_step
    result = next((one for one in reversed(evaluations) if one["step"] <= adapter_step), {})
    best = early_stopping.best(evaluations, job.options.metric_for_best_model)
    return RunRecord(
        state=state,
        steps=slot.step,
        adapter_step=adapter_step,
        ended_early=slot.stop_reason or None,
        resumed_at=resumed_at,
        seconds=seconds,
        tokens=tokens,
        tokens_per_second=tokens / max(seconds, 1e-9),
        metric=early_stopping.watched(result, None) if result else job.metrics.first,
        result={key: value for key, value in result.items() if key != "step"},
        best=None if best is None else dict(zip(("step", "metric", "value"), best, strict=True)),
        options=job.options.to_dict(),
        identity={key: identity[key] for key in ("data", "examples", "base")},
        trainable_parameters=job.plan.parameters,
        base_parameters=job.plan.base_parameters,
        unadapted_experts=str(job.plan.experts) if job.plan.experts.weights else None,
        trained_in_full=[extra.name for extra in job.plan.saved],
        data={
            "sha256": data.hashes,
            "rows": len(data.train.examples),
            "evaluation_rows": len(data.validation.examples),
            "truncated": data.train.truncated,
            "labels": data.names,
            "padding_share": data.padding,
        },
        versions=versions(),
        machine=machine(),
        curve=slot.curve,
    )


def sealed(found: Mapping[str, Any]) -> dict[str, Any]:
    """``found`` in JSON's types and in its order, with its own hash."""
    plain = {key: value for key, value in jsonio.plain(found).items() if key != _OWN_HASH}
    return plain | {_OWN_HASH: _hash(plain)}


def as_json(found: Mapping[str, Any]) -> bytes:
    """The contents of ``run.json``."""
    return _text(sealed(found))


def read(path: Path) -> dict[str, Any] | None:
    """The record in ``path``; None if there is no file. Records of 0.1 have no hash of their own.

    Raises:
        ConfigError: it is damaged, not what loraloom writes, or of a later version.
    """
    try:
        found = json.loads(path.read_bytes())
        jsonio.check_format(found.get("format", 0), FORMAT, f"{path}:")
        parts = [found, *(found[key] for key in ("options", "identity", "versions", "machine"))]
        parts += [found["options"]["lora"], found.get("files", {})]
        whole = all(isinstance(part, dict) for part in parts) and isinstance(found["steps"], int)
        plain = {key: value for key, value in found.items() if key != _OWN_HASH}
        early = _OWN_HASH not in found and "files" not in found  # earlier versions knew no hashes
        if whole and (early or found[_OWN_HASH] == _hash(plain)):
            return found  # type: ignore[no-any-return]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ConfigError:
        raise
    except jsonio.MALFORMED:
        pass
    raise ConfigError(f"{path}: damaged, or not what loraloom writes")


def _text(plain: Mapping[str, Any]) -> bytes:
    return json.dumps(plain, indent=2, sort_keys=True, allow_nan=False).encode()


def _hash(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(plain)).hexdigest()
