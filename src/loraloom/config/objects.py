"""Objects that a program gives where a run file has a name: a loaded model with its tokenizer, a function of its own.

Options hold names alone, so that they can be written down and compared. An object gets a name that follows from what
it is (a function's source, a model's weights), and is found by it as long as it is held.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

#: How the name of an object begins that no other process can import.
GIVEN = "given:"

_HELD: dict[str, Any] = {}


@contextlib.contextmanager
def held(objects: Mapping[str, Any]) -> Iterator[None]:
    """Within it ``find`` returns these objects by their names."""
    before = {name: _HELD[name] for name in objects if name in _HELD}
    _HELD.update(objects)
    try:
        yield
    finally:
        for name in objects:
            _HELD.pop(name, None)
        _HELD.update(before)


def find(name: str) -> Any:
    """The object that is held under ``name``, or None."""
    return _HELD.get(name)


def name_of(function: Callable[..., Any]) -> str:
    """``"package.module:function"`` for one that can be imported; else ``"given:NAME-HASH"``, by its source.

    The hash is that of the source text, or of the bytecode where there is no source.
    """
    module, qualname = getattr(function, "__module__", None) or "", getattr(function, "__qualname__", "")
    if module not in ("", "__main__") and qualname.isidentifier():
        with contextlib.suppress(ImportError):
            if getattr(importlib.import_module(module), qualname, None) is function:
                return f"{module}:{qualname}"
    try:
        text = inspect.getsource(function).encode()
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        text = code.co_code + repr(code.co_consts).encode() if code else repr(type(function)).encode()
    label = getattr(function, "__name__", type(function).__name__).strip("<>")
    return f"{GIVEN}{label}-{hashlib.sha256(text).hexdigest()[:12]}"
