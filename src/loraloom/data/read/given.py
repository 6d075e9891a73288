"""Rows of a program, written to a file, so that a run from code can be repeated and resumed.

A list of dicts becomes JSON lines, a table of pandas or ``datasets`` Parquet. The file's name follows from its bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraloom.errors import ConfigError, DataError
from loraloom.files.atomic import write_files


def is_rows(data: Any) -> bool:
    """Whether ``data`` is rows, not the name of a source or a list of such names."""
    if _table(data):
        return True
    if isinstance(data, str | Mapping) or not isinstance(data, Sequence):
        return False
    return bool(data) and isinstance(data[0], Mapping) and "path" not in data[0]


def write_rows(name: str, data: Any, folder: Path) -> tuple[Path, bool]:
    """Write rows to ``folder``: the file, whose name begins with ``name``, and whether it is new.

    The same rows give the same file.

    Args:
        data: a list of dicts, a pandas ``DataFrame`` or a ``datasets.Dataset``.

    Raises:
        DataError: a row is no dict, or holds what JSON does not.
        SaveError: the folder cannot be written.
    """
    contents, suffix = _parquet(name, data) if _table(data) else _json(name, data)
    path = folder / f"{name}-{hashlib.sha256(contents).hexdigest()[:12]}{suffix}"
    new = not path.exists()
    if new or path.read_bytes() != contents:
        write_files(folder, {path.name: contents})
    return path, new


def _table(data: Any) -> bool:
    """Whether ``data`` is a table of pandas or datasets. Imports neither."""
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")
    if datasets is not None and isinstance(data, datasets.DatasetDict | datasets.IterableDataset):
        raise ConfigError(
            f"data: a {type(data).__name__}; give one of its splits, such as data['train'], as a datasets.Dataset"
        )
    return (pandas is not None and isinstance(data, pandas.DataFrame)) or (
        datasets is not None and isinstance(data, datasets.Dataset)
    )


def _parquet(name: str, data: Any) -> tuple[bytes, str]:
    if not len(data):
        raise DataError(f"{name}: the table has no rows")
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    try:
        if hasattr(data, "features"):  # its schema keeps the names of classes
            table = data.with_format("arrow")[:].replace_schema_metadata(data.features.arrow_schema.metadata)
        else:
            table = pyarrow.Table.from_pandas(data, preserve_index=False)
        parquet.write_table(table, file)
    except Exception as error:  # of pyarrow: a column whose values are of several types
        raise DataError(f"{name}: the table cannot be written as Parquet ({error}); give a list of dicts") from None
    return file.getvalue(), ".parquet"


def _json(name: str, data: Sequence[Any]) -> tuple[bytes, str]:
    lines = []
    for number, row in enumerate(data):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}[{number}]: a row is a dict of columns, found {type(row).__name__}")
        try:
            for at in row:
                json.dumps(row[at], allow_nan=False)
            lines.append(json.dumps(dict(row), ensure_ascii=False))
        except (TypeError, ValueError) as error:
            raise DataError(f"{name}[{number}][{at!r}]: holds what JSON does not ({error}); convert it first") from None
    return ("\n".join(lines) + "\n").encode(errors="surrogatepass"), ".jsonl"
