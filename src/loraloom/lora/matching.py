"""How patterns match names: PEFT's grammar, over names alone.

A list holds exact names or suffixes after a dot, a string is a regular expression over whole names, and the keys of
``rank_pattern`` and ``alpha_pattern`` match the end of a name. Expressions come from users' files: ``re`` cannot be
interrupted, so one that might take exponential time is tried in a process that can.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

from loraloom.config.lora import LoraConfig
from loraloom.errors import TargetError, short

#: Time limit in seconds for all names of a model; a harmless expression takes milliseconds.
_SECONDS = 5.0
_TRY = "import json, re, sys\ne, names = json.load(sys.stdin)\nm = re.compile(e).match\nfor n in names: m(n)"
#: A repeated group, which may hold another repeat. (Escaped ones count too: the trial is cheap.)
_NESTED = re.compile(r"\)[*+{]")
_REPEATS = re.compile(r"[*+]|\{\d*,\d*\}")
#: Adjacent repeats take time to the power of their number, and each optional part doubles it.
_MOST_REPEATS, _MOST_OPTIONAL = 4, 15


def matches_name(pattern: str, name: str) -> bool:
    """A list's entry: the whole name, or its end after a dot."""
    return name == pattern or name.endswith("." + pattern)


def ends_as(patterns: Iterable[str], name: str) -> bool:
    """``modules_to_save`` and heads: a bare ending, as in PEFT, so that "classifier" takes "pre_classifier" along."""
    return any(name.endswith(pattern) for pattern in patterns)


def lies_in(name: str, modules: Iterable[str]) -> bool:
    """Whether it is the name of one of ``modules``, or of a part of one."""
    return any(name == one or name.startswith(one + ".") for one in modules)


def matches_any(patterns: Iterable[str] | str | None, name: str) -> bool:
    if not patterns:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return f".{name}".endswith(tuple([f".{pattern}" for pattern in patterns]))  # ``matches_name`` of any, in one call


def each(patterns: list[str] | str | None) -> list[tuple[str, list[str] | str]]:
    """Every pattern as an error quotes it, and as ``matches_any`` takes it."""
    return [(patterns, patterns)] if isinstance(patterns, str) else [(one, [one]) for one in patterns or ()]


def suffixes(names: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """The shortest list of suffixes that matches exactly ``names`` among ``modules``; an expression where none does."""
    modules, chosen = list(modules), set(names)
    others = {tail for name in modules if name not in chosen for tail in _tails(name)}
    out: set[str] = set()
    for name in chosen:
        # A number is a place in a list, which says nothing by itself.
        out.add(next((tail for tail in _tails(name) if not tail[0].isdigit() and tail not in others), name))
        if name in out and name in others:  # a whole name that is another's end
            return "|".join(re.escape(name) for name in modules if name in chosen)
    return sorted(out)


def _tails(name: str) -> list[str]:
    """What ``matches_name`` finds it by, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def in_layers(name: str, config: LoraConfig) -> bool:
    wanted = config.layers_to_transform
    return wanted is None or layer_number(name, config) in ([wanted] if isinstance(wanted, int) else wanted)


def layer_number(name: str, config: LoraConfig) -> int | None:
    """The number of the layer that a module lies in."""
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    # The first number is the layer's; later ones count experts and the like.
    expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns or ()] or [r"(?:.*?\.)?[^.]*\.(\d+)\."]
    found = next((m for e in expressions if (m := re.match(e, name))), None)
    return None if found is None else int(found[1])


def pattern_key(patterns: dict[str, int] | dict[str, float], name: str) -> str | None:
    if not patterns:
        return None
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def rank_and_alpha(config: LoraConfig, name: str) -> tuple[int, float]:
    """What ``config`` gives the target ``name``: by the first pattern that matches, else its ``r`` and alpha."""
    r, alpha = pattern_key(config.rank_pattern, name), pattern_key(config.alpha_pattern, name)
    return (
        config.r if r is None else config.rank_pattern[r],
        config.lora_alpha if alpha is None else config.alpha_pattern[alpha],
    )


def check_expressions(config: LoraConfig, names: Iterable[str]) -> None:
    """Raise TargetError if a regular expression of ``config`` does not finish on ``names`` within seconds."""
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
    """Field and expression, anchored at the end so that matching has to try every alternative."""
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
