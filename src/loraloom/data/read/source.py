"""One source of rows: files that are read by their suffix, again at each iteration, one row in memory at a time.

``sources`` interprets the user's names of sources; ``readers``, ``jsonfiles`` and ``tables`` read single files.
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

#: Suffix of a file → its reader. All but Parquet may be compressed (``.gz``).
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
    """A file, or the files of a folder or glob, sorted by name. Rows are numbered within each file.

    ``passed_over``: files of a folder that are no data by their suffix. Each iteration reads the files again and raises
    at the first bad row.
    """

    name: str
    files: list[Path] = field(default_factory=list)
    weight: float = 1.0
    text_by: str = "paragraph"
    passed_over: list[Path] = field(default_factory=list)

    def read(self, bad: OnBad | None = None) -> Iterator[Row]:
        """The rows. Each bad row is passed to ``bad``, or raised as ``RowError`` if that is None.

        Raises:
            DataError: a file cannot be read, or there is no row at all.
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
        """The first ``count`` rows, or all if there are fewer; for ``shapes.recognise``."""
        return list(islice(self.read(bad), count))

    def _rows(self, bad: OnBad | None) -> Iterator[Row]:
        for path in self.files:
            reader = READERS[suffix(path)]
            yield from read_text(path, bad, self.text_by) if reader is read_text else reader(path, bad)

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each file's bytes, by its path."""
        return {str(path): _hash(path) for path in self.files}

    def describe(self) -> str:
        """The source in a few words, for a note to the user."""
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
    """The suffix that selects the reader: ``.jsonl`` for ``A.JSONL`` and for ``a.jsonl.gz``."""
    inner = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return inner.suffix.lower()
