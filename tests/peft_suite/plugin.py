"""A pytest plugin that runs PEFT's LoRA tests on loraloom: ``make peft-suite``.

``PEFT_SOURCE`` names a checkout of PEFT. Tests of other methods are deselected. The hub's models are tiny random ones,
see ``hub``; a test that needs another is skipped. A test that fails because a feature is refused by name, or that is
listed in ``differences``, counts as an expected failure; whatever else fails is a fault. ``PEFT_SUITE_PART=2/5`` runs
the second fifth.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_suite import hub

CACHE = hub.serve()

import huggingface_hub.utils._http  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402, F401  (whole, before a test's import of transformers looks for peft)
from huggingface_hub.errors import OfflineModeIsEnabled  # noqa: E402

from peft_suite.alias import Missing, MissingName, install  # noqa: E402
from peft_suite.differences import DIFFERENCES, FILES, OTHER_METHODS, REFUSED  # noqa: E402

SOURCE = Path(os.environ["PEFT_SOURCE"])
_HUB = re.compile(
    r"OfflineModeIsEnabled|LocalEntryNotFound|outgoing traffic has been disabled|couldn't connect|offline mode|"
    r"is not a local folder|ConnectionError|We couldn't|Cannot find an appropriate cached snapshot|"
    r"adapter model file not found in peft-internal-testing/"
)
_reasons: Counter[str] = Counter()
_outcomes: dict[str, tuple[str, str]] = {}

install(SOURCE)


def _no_hub(*args: Any, **kwargs: Any) -> Any:
    raise OfflineModeIsEnabled("PEFT's tests run without the hub here")


# The tests go online for each model, whatever HF_HUB_OFFLINE says, and would wait a minute for it.
huggingface_hub.utils._http._http_backoff_base = _no_hub


def pytest_configure() -> None:
    hub.fill(CACHE)


def _about_lora(item: Any) -> bool:
    from loraloom import LoraConfig

    values = [*_flat(getattr(item, "callspec", None) and list(item.callspec.params.values()))]
    if any(isinstance(kind, Missing) for value in values for kind in (value, type(value))):
        return False
    if any(value is LoraConfig or isinstance(value, LoraConfig) for value in values):
        return True
    return item.path.name in FILES and not re.search(OTHER_METHODS, item.nodeid)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _flat(entry)
    else:
        yield value


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    kept = [item for item in items if _about_lora(item)]
    part, parts = map(int, os.environ.get("PEFT_SUITE_PART", "1/1").split("/"))
    kept = kept[part - 1 :: parts]
    chosen = set(map(id, kept))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = kept


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if call.excinfo is None and report.outcome == "failed":  # a fault that PEFT knows it has, and that is not here
        report.outcome, report.longrepr = "passed", None
    if call.excinfo is None or report.outcome != "failed":
        if report.when == "call":
            _outcomes.setdefault(item.nodeid, (report.outcome, ""))
        return
    chain, error = [], call.excinfo.value
    while error is not None and len(chain) < 9:
        chain.append(error)
        error = error.__cause__ or error.__context__
    text = "\n".join(f"{type(one).__name__}: {one}" for one in chain)
    if any(_HUB.search(f"{type(one).__name__}: {one}") for one in chain):
        report.outcome, report.longrepr = "skipped", (str(item.path), item.location[1], "Skipped: needs the hub")
        _outcomes[item.nodeid] = ("hub", text)
        return
    reason = "a name that loraloom does not have" if any(isinstance(one, MissingName) for one in chain) else None
    reason = reason or next((why for words, why in REFUSED.items() if re.search(words, text)), None)
    reason = reason or next(
        (
            why
            for (where, words), why in DIFFERENCES.items()
            if re.search(where, item.nodeid) and re.search(words, text)
        ),
        None,
    )
    if reason is not None:
        report.outcome, report.wasxfail = "skipped", reason
        _reasons[reason] += 1
    _outcomes[item.nodeid] = ("failed" if reason is None else f"expected: {reason}", text)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("why tests failed as expected")
    for reason, count in _reasons.most_common():
        terminalreporter.write_line(f"{count:6d}  {reason}")
    if path := os.environ.get("PEFT_SUITE_OUT"):
        Path(path).write_text(json.dumps(_outcomes, indent=1, sort_keys=True), encoding="utf-8")
