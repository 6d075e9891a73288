"""A process that has imported everything and forks for each case: a command that dies, or meets an error of the system,
at its N-th file operation.

One JSON object a line comes in and one goes out. Asked: ``argv`` of the command (or ``["cache", FOLDER]``), ``roots``
(operations elsewhere do not count), ``log`` (a file for what is said), ``at`` (N, from 1; 0 for none) and ``how``:
``die``, or the name of an errno. Answered: ``code`` and, unless it died, the operations: ``taken`` by an error, where
looking counts too, and by a death, where only changes do.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Events of ``sys.addaudithook`` that change something, and those that only look.
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
LOOKS = ("os.listdir", "os.scandir")
DIED = 137


class Faults:
    """Counts operations below ``roots`` and stops at one, before it is done. A death needs no looking to be counted."""

    def __init__(self, roots: list[str], at: int, how: str) -> None:
        self.roots, self.at, self.how = roots, at, how
        self.looks: list[str] = []
        self.changes: list[str] = []
        self.busy = False

    def step(self, what: str, path: Any, place: int = -1, looks: bool = False) -> None:
        where = self._below(path, place)
        done = f"{what} {where}"
        if where is None or self.busy:
            return
        counts = False
        for taken, how in ((self.looks, self.how != "die"), (self.changes, self.how == "die")):
            if taken[-1:] == [done] or (looks and taken is self.changes):  # one write after the other is one
                continue
            taken.append(done)
            counts |= how and len(taken) == self.at
        if not counts:
            return
        if self.how == "die":
            os._exit(DIED)
        code = getattr(errno, self.how)
        if what == "save_file":
            from safetensors import SafetensorError

            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
        raise OSError(code, os.strerror(code), where)

    def _below(self, path: Any, place: int) -> str | None:
        if isinstance(path, int):
            place, path = path, ""
        try:
            text = os.fsdecode(path)
        except TypeError:
            return None
        if not os.path.isabs(text):
            self.busy = True
            text = os.path.join(os.readlink(f"/proc/self/fd/{place}") if place >= 0 else os.getcwd(), text)
            self.busy = False
        return text if any(text == root or text.startswith(root + "/") for root in self.roots) else None

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not (isinstance(mode, str) and isinstance(path, int)):
                self.step("open" if writes else "read", path, looks=not writes)
        elif event in CHANGES:
            self.step(event, args[0], next((a for a in args[1:] if isinstance(a, int) and event != "os.mkdir"), -1))
        elif event in LOOKS:
            self.step(event, args[0], looks=True)

    def install(self) -> None:
        import loraloom.lora.checkpoint as adapters

        sys.addaudithook(self.hear)
        os.fsync = self._counted("fsync", os.fsync)  # type: ignore[assignment]
        adapters.save_file = self._counted("save_file", adapters.save_file, 1)
        opened = io.open

        def wrapped(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            found = opened(file, mode, *args, **kwargs)
            if set(mode) & set("wax+") and not isinstance(file, int) and self._below(file, -1):
                return Written(found, lambda: self.step("write", file))
            return found

        builtins.open = io.open = wrapped  # type: ignore[assignment]

    def _counted(self, what: str, real: Callable[..., Any], place: int = 0) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.step(what, args[place])
            return real(*args, **kwargs)

        return call


class Written:
    """A file, of which each write counts."""

    def __init__(self, file: Any, step: Callable[[], None]) -> None:
        self._file, self._step = file, step

    def write(self, data: Any) -> Any:
        self._step()
        return self._file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


def command(argv: list[str]) -> int:
    from loraloom.cli import _run

    if argv[0] == "cache":
        return _entry(argv[1])
    return _run(argv)


def _entry(folder: str) -> int:
    """An entry of the cache, built or found; what it holds is printed."""
    from loraloom.data.table import cache
    from loraloom.errors import LoraloomError

    def build(draft: cache.Draft) -> dict[str, Any]:
        for name in ("a.bin", "b.bin"):
            file = draft.file(name)
            for part in (b"one", b"two"):
                file.write(part)
        return {"rows": 2}

    os.environ[cache.VARIABLE] = folder
    try:
        found = cache.entry("rows", cache.key_of({"of": "these"}), build, lambda text: print("said:", text))
        print({path.name: path.read_bytes() for path in sorted(found.folder.glob("*.bin"))}, found.info)
    except (LoraloomError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def case(asked: dict[str, Any]) -> dict[str, Any]:
    result = Path(asked["log"] + ".taken")
    result.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        code = 3
        try:
            handle = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            faults = Faults(asked["roots"], asked["at"], asked["how"])
            faults.install()
            code = command(asked["argv"])
            sys.stdout.flush()
            sys.stderr.flush()
            faults.roots = []
            result.write_text(json.dumps([faults.looks, faults.changes]))
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "taken": json.loads(result.read_text()) if result.exists() else [[], []]}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a warm run prints is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        if asked.get("warm"):  # in this process itself: whatever it loads, the others have
            answer = {"code": command(asked["argv"])}
        else:
            answer = case(asked)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
