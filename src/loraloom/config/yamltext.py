"""YAML as run files use it: text → plain values and the line of each key; a value → text.

Scalars are YAML 1.2's: ``2e-4`` is a number, and ``no`` and ``off`` are text. A key given twice, an alias or a tag of
one's own is an error: none has a good meaning in a run file. Knows nothing of options.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from loraloom.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
#: Scalars of YAML 1.2: what they look like, and what they are.
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower())),
    ),
}


def parse(text: str, source: str) -> tuple[Any, dict[str, int]]:
    """The value, and the line (from 1) of each key of its mappings, named from the top: ``"lora.r"``.

    Raises:
        ConfigError: ``source`` and the line, and what is wrong there.
    """
    import yaml

    try:
        node = yaml.compose(text, Loader=_kinds()[0])
        lines: dict[str, int] = {}
        value = None if node is None else _value(node, source, "", lines, set())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}:{mark.line + 1 if mark else 1}: not YAML ({said})") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{source}:{line}: a character that YAML does not allow ({error.character!r})") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply to be read") from None
    return value, lines


def _value(node: Any, source: str, path: str, lines: dict[str, int], seen: set[int]) -> Any:
    import yaml

    where = f"{source}:{node.start_mark.line + 1}"
    if id(node) in seen:  # the same node again is how the parser gives an alias
        raise ConfigError(f"{where}: an alias (*name) is not read in a run file; write the value out")
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        out: dict[str, Any] = {}
        for key, value in node.value:
            at = f"{source}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{at}: a key must be a name, found a {key.id}")
            if key.value in out:
                first = lines[path + key.value]
                raise ConfigError(f"{at}: {path}{key.value} is given twice, first in line {first}; keep one")
            lines[path + key.value] = key.start_mark.line + 1
            out[key.value] = _value(value, source, f"{path}{key.value}.", lines, seen)
        return out
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [_value(entry, source, f"{path}{i}.", lines, seen) for i, entry in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, where)
    raise ConfigError(f"{where}: the tag {node.tag!r} is not read in a run file; leave it out")


def _scalar(node: Any, where: str) -> Any:
    kind = node.tag.removeprefix(_TAG)
    if kind == "str":
        return node.value
    looks, read = _SCALARS.get(kind, ("(?!)", str))
    if not re.fullmatch(looks, node.value):
        raise ConfigError(f"{where}: the tag {node.tag!r} does not fit {node.value!r}; leave it out")
    try:
        return read(node.value)
    except ValueError:  # Python refuses to read integers of thousands of digits
        raise ConfigError(f"{where}: a number of {len(node.value)} digits cannot be read") from None


def write(value: Any) -> str:
    """``value`` on one line, as it may stand behind ``key: ``; ``parse`` gives it back."""
    import yaml

    if isinstance(value, float):
        value = float(value)  # YAML's writer knows no subclass of it
    text = yaml.dump(
        value, Dumper=_kinds()[1], default_flow_style=True, allow_unicode=True, width=2**31 - 1, sort_keys=False
    )
    return str(text).removesuffix("...\n").removesuffix("\n")  # "..." ends a document that is one scalar


@cache
def _kinds() -> tuple[Any, Any]:
    """YAML's safe reader and writer, with the scalars of YAML 1.2 in place of 1.1's."""
    import yaml

    own: dict[str, Any] = {"yaml_implicit_resolvers": {}}
    reader: Any = type("Reader", (yaml.SafeLoader,), own)
    writer: Any = type("Writer", (yaml.SafeDumper,), {**own, "ignore_aliases": lambda self, data: True})
    # Line breaks and the like are escaped, which keeps a text on one line.
    text = f"{_TAG}str"
    writer.add_representer(
        str, lambda to, value: to.represent_scalar(text, value, style=None if value.isprintable() else '"')
    )
    for kind in (reader, writer):
        for name, (looks, _) in _SCALARS.items():
            kind.add_implicit_resolver(f"{_TAG}{name}", re.compile(rf"(?:{looks})$"), None)
    return reader, writer
