"""Regular expressions from a file that would never end: they are found before they are used.

``re`` cannot be stopped, so an expression that might take exponential time is tried in a process that can.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

from loraloom.config.lora import LoraConfig
from loraloom.errors import TargetError, short

#: Seconds for all names of a model: what ends takes milliseconds.
_SECONDS = 5.0
_TRY = "import json, re, sys\ne, names = json.load(sys.stdin)\nm = re.compile(e).match\nfor n in names: m(n)"
#: A group that repeats may hold another repeat. (Escaped ones count too: the check is cheap.)
_NESTED = re.compile(r"\)[*+{]")
_REPEATS = re.compile(r"[*+]|\{\d*,\d*\}")
#: Repeats beside each other take time to the power of their number, and what may be left out doubles it.
_MOST_REPEATS, _MOST_OPTIONAL = 4, 15


def check_expressions(config: LoraConfig, names: Iterable[str]) -> None:
    """Whether every regular expression of ``config`` comes to an end on every one of ``names``.

    Raises:
        TargetError: one does not within seconds.
    """
    found = [(field, expression) for field, expression in _expressions(config) if may_explode(expression)]
    if not found:
        return
    listed = list(names)
    for field, expression in found:
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", _TRY],
                input=json.dumps([expression, listed]).encode(),
                timeout=_SECONDS,
                check=False,
                capture_output=True,
            )
        except subprocess.TimeoutExpired:
            raise TargetError(
                f"{field}: the regular expression {short(expression)} does not come to an end on this model's names; "
                "write it without a repeat inside a repeat"
            ) from None


def may_explode(expression: str) -> bool:
    """Whether matching might take exponential time, or a high power of a name's length."""
    many = len(_REPEATS.findall(expression)) > _MOST_REPEATS or expression.count("?") > _MOST_OPTIONAL
    return many or bool(_NESTED.search(expression))


def _expressions(config: LoraConfig) -> Iterator[tuple[str, str]]:
    """Each as it is matched from a name's start, with the end that makes it try everything."""
    for field in ("target_modules", "exclude_modules"):
        value = getattr(config, field)
        if isinstance(value, str):
            yield field, rf"(?:{value})\Z"
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            yield field, rf"(.*\.)?(?:{key})$"
    patterns = config.layers_pattern
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        yield "layers_pattern", rf"(?:^|.*?\.){pattern}\.(\d+)\."
