"""One source of rows, read afresh each time it is asked: files, of the kinds that are read by their suffix.

What the user's words for it mean is known to ``sources``, how a file is read to ``readers``, ``jsonfiles`` and
``tables``. No more than one row is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from loraloom.data.read.jsonfiles import read_json
from loraloom.data.read.readers import read_text
from loraloom.data.read.tables import read_parquet, read_table
from loraloom.data.rows import BadRow, OnBad, Row
from loraloom.errors import DataError
from loraloom.files.hashing import file_hash

Reader = Callable[[Path, OnBad | None], Iterator[Row]]

#: How each kind of file is read, by its suffix; all but Parquet also with ``.gz`` behind it.
READERS: dict[str, Reader] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_table,
    ".tsv": partial(read_table, delimiter="\t"),
    ".txt": read_text,
    ".parquet": read_parquet,
}


@dataclass
class Source:
    """One thing that the user named: a file, or the files of a folder or glob, in the order of their names.

    ``passed_over`` are the files of a folder that are no data, by their suffix. Rows are numbered by each file
    for itself. Iterating reads afresh each time, and raises at the first bad row.
    """

    name: str
    files: list[Path] = field(default_factory=list)
    weight: float = 1.0
    text_by: str = "paragraph"
    passed_over: list[Path] = field(default_factory=list)

    def read(self, bad: OnBad | None = None) -> Iterator[Row]:
        """The rows; each bad one is told to ``bad``, or raised as ``RowError`` where that is None.

        Raises ``DataError`` for a file that cannot be read, and when there is no row at all.
        """
        some, wrong = False, 0

        def count(row: BadRow) -> None:
            nonlocal wrong
            wrong += 1
            assert bad is not None
            bad(row)

        for row in self._rows(None if bad is None else count):
            some = True
            yield row
        if not some:
            reason = f"all of the {wrong} rows are bad" if wrong else "no rows were found"
            empty = "the file is empty" if len(self.files) == 1 and not wrong else "nothing is left to read"
            raise DataError(f"{self.name}: {empty}: {reason}")

    def __iter__(self) -> Iterator[Row]:
        return self.read()

    def first(self, count: int = 100, bad: OnBad | None = None) -> list[Row]:
        """The first rows, fewer where there are fewer: for ``shapes.recognise``."""
        return list(islice(self.read(bad), count))

    def _rows(self, bad: OnBad | None) -> Iterator[Row]:
        for path in self.files:
            reader = READERS[suffix(path)]
            yield from read_text(path, bad, self.text_by) if reader is read_text else reader(path, bad)

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each file's bytes, by its path."""
        return {str(path): _hash(path) for path in self.files}

    def describe(self) -> str:
        """The source in a few words, for saying aloud what is read."""
        kinds = sorted({suffix(path) for path in self.files})
        said = f"{self.name}" if len(self.files) == 1 else f"{self.name} ({len(self.files)} files: {', '.join(kinds)})"
        if ".txt" in kinds:
            said += f", plain text: each {self.text_by} is a row"
        if self.passed_over:
            others = ", ".join(path.name for path in self.passed_over[:3])
            more = ", ..." if len(self.passed_over) > 3 else ""
            said += f"; passed over, as no data: {others}{more}"
        return said if self.weight == 1 else f"{said}, weight {self.weight:g}"


def _hash(path: Path) -> str:
    try:
        return file_hash(path)
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}") from exc


def suffix(path: Path) -> str:
    """The suffix that says how a file is read: ``.jsonl`` for ``A.JSONL`` and for ``a.jsonl.gz``."""
    inner = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return inner.suffix.lower()
