"""Objects that a program gives where a run file has a name: a loaded model with its tokenizer, a function.

Options hold names alone, so that they can be written down and compared. An object gets a name that follows from what
it is (a function's source, a model's weights), and is found by it as long as it is held.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loraloom.errors import ConfigError, brief, nearest

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

    The hash is that of the source text, or of the bytecode if the source is missing.
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


def load(field: str, spec: str) -> Any:
    """The function that ``"package.module:function"`` names, or one that is held; modules of the working directory too.

    Raises:
        ConfigError: there is no such module or function, or the module cannot be imported. Begins with ``field``.
    """
    if (given := find(spec)) is not None:
        return given
    if spec.startswith(GIVEN):
        raise ConfigError(
            f"{field}: {spec} was given as a function by a program, and is known there alone; other programs and "
            "processes need one that they can import, package.module:function"
        )
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise ConfigError(f"{field}: {spec!r} must have the form package.module:function")
    here = os.getcwd()
    added = [] if {here, ""} & {*sys.path} else [here]
    sys.path[:0] = added
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"{field}: {spec}: there is no module {missing!r} in {here}, and none is installed"
            ) from None
        raise ConfigError(f"{field}: {spec}: importing {module_name} failed: {brief(error)}") from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    function = getattr(module, name, None)
    if function is None:
        raise ConfigError(f"{field}: {module_name} has no {name!r}{nearest(name, vars(module))}")
    if not callable(function):
        raise ConfigError(f"{field}: {spec} is not a function, found {type(function).__name__}")
    return function
