"""Rows of a sweep: their columns, and the CSV and Parquet files that they are written to block by block."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from refimpl.errors import ConfigError, MissingDependencyError

POINT = {
    "point": "int", "model": "text", "layers": "int", "d_model": "int", "heads": "int", "kv_heads": "int",
    "d_ff": "int", "vocab": "int", "method": "text", "params": "text", "phase": "text", "seq": "int", "kv_len": "int",
    "steps": "int", "batch": "int", "dtype": "text", "causal": "bool", "hardware": "text", "level": "text",
    "device": "text", "engine": "text", "threads": "int",
}  # fmt: skip
PREDICTED = {
    "predicted_s": "float", "predicted_low_s": "float", "predicted_high_s": "float", "bound": "text",
    "speedup_dense": "float", "speedup_flash": "float", "matmul_flops": "int", "vector_flops": "int",
    "bytes_read": "int", "bytes_written": "int", "params_bytes": "int", "cache_bytes": "int", "peak_bytes": "int",
}  # fmt: skip
MEASURED = {
    "measured_median_s": "float", "measured_p10_s": "float", "measured_p90_s": "float", "measured_n": "int",
    "rel_error": "float", "measured_speedup_dense": "float", "measured_speedup_flash": "float", "reference": "text",
    "rel_l2": "float", "cosine": "float", "max_abs": "float", "host": "text", "cpu": "text", "gpu": "text",
    "date": "text", "notes": "text",
}  # fmt: skip
PASSES = {"l2": "text", "graph": "bool", "fuse": "bool"}
ESTIMATE_COLUMNS = POINT | PREDICTED
MEASURE_COLUMNS = ESTIMATE_COLUMNS | MEASURED | PASSES
FORMS = {"int": "%d", "float": "%r", "text": "%s"}
LARGEST = 2**63 - 1
ROW_GROUP = 1 << 17  # rows of a Parquet file that are written together


@dataclass(frozen=True)
class Rows:
    """Some rows: what they have in common, and what differs.

    Attributes
    ----------
    shared : mapping
        Column -> its value in all rows; None, or a column left out, is an empty cell.
    columns : mapping
        Column -> array of shape (n,); of objects where a figure exceeds 64 bits.
    text : str
        The rows as CSV, where they were written down already.
    """

    shared: Mapping[str, Any]
    columns: Mapping[str, Any]
    text: str = ""

    def __len__(self) -> int:
        return len(self.columns["point"])

    def dicts(self) -> Iterator[dict[str, Any]]:
        """Row by row, columns in order."""
        names = [name for name in ESTIMATE_COLUMNS if name in self.columns or name in self.shared]
        lists = {name: values.tolist() for name, values in self.columns.items()}
        for index in range(len(self)):
            yield {name: lists[name][index] if name in lists else self.shared[name] for name in names}

    def written_down(self, needed: Sequence[str]) -> Rows:
        """The text, and of the columns those that are needed beside it."""
        return Rows(self.shared, {name: self.columns[name] for name in ("point", *needed)}, self.as_csv())

    def as_csv(self) -> str:
        """A line for each row, without a header."""
        if self.text:
            return self.text
        cells = [
            FORMS[kind] if name in self.columns else cell(self.shared.get(name)).replace("%", "%%")
            for name, kind in ESTIMATE_COLUMNS.items()
        ]
        lists = [self.columns[name].tolist() for name in ESTIMATE_COLUMNS if name in self.columns]
        return "".join(map((",".join(cells) + "\n").__mod__, zip(*lists, strict=True)))


def cell(value: Any) -> str:
    """A value as CSV has it, quoted where it must be; numbers in full precision."""
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    stream = io.StringIO()
    csv.writer(stream, lineterminator="").writerow([" ".join(str(value).split("\n"))])
    return stream.getvalue() if value else '""'


def line(row: Mapping[str, Any], columns: Sequence[str] | Mapping[str, str]) -> str:
    """A row as a line of CSV."""
    return ",".join(cell(row.get(name)) for name in columns) + "\n"


def parsed(name: str, text: str) -> Any:
    """A cell of CSV as a value; raises ValueError where it is none."""
    if not text:
        return None
    kind = MEASURE_COLUMNS[name]
    if kind == "bool":
        return {"true": True, "false": False}[text]
    return {"int": int, "float": float, "text": str}[kind](text)


class Writer(Protocol):
    """Takes rows, block by block; `is_text` where it writes what `Rows.as_csv` gives."""

    is_text: bool

    def write(self, rows: Rows) -> None: ...

    def close(self) -> None: ...


class CSVWriter:
    """CSV into an open text file; nothing before the first rows."""

    is_text = True

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.begun = False

    def write(self, rows: Rows) -> None:
        self._begin()
        self.stream.write(rows.as_csv())

    def close(self) -> None:
        self._begin()
        self.stream.flush()

    def _begin(self) -> None:
        if not self.begun:
            self.stream.write(",".join(ESTIMATE_COLUMNS) + "\n")
        self.begun = True


class ParquetWriter:
    """Parquet into a new file, in groups of many rows."""

    is_text = False

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        pyarrow = require_pyarrow()
        from pyarrow import parquet

        types = {
            "int": pyarrow.int64(),
            "float": pyarrow.float64(),
            "bool": pyarrow.bool_(),
            "text": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        }
        self.arrow = pyarrow
        self.schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
        self.writer = parquet.ParquetWriter(path, self.schema)
        self.waiting: list[Any] = []

    def write(self, rows: Rows) -> None:
        arrays = [self._array(rows, field) for field in self.schema]
        self._add(self.arrow.Table.from_arrays(arrays, schema=self.schema))

    def write_dicts(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of which each has its own values."""
        arrays = [self.arrow.array([row.get(field.name) for row in rows], field.type) for field in self.schema]
        self._add(self.arrow.Table.from_arrays(arrays, schema=self.schema))

    def close(self) -> None:
        self._flush()
        self.writer.close()

    def _array(self, rows: Rows, field: Any) -> Any:
        if field.name not in rows.columns:
            return self.arrow.repeat(self.arrow.scalar(rows.shared.get(field.name), field.type), len(rows))
        values = rows.columns[field.name]
        try:
            return self.arrow.array(values.tolist() if values.dtype == object else values).cast(field.type)
        except (OverflowError, self.arrow.ArrowInvalid) as error:
            raise ConfigError(
                f"{field.name} of point {rows.columns['point'][0]} or one behind it exceeds the 64 bits of a Parquet "
                "column: write a .csv"
            ) from error

    def _add(self, table: Any) -> None:
        self.waiting.append(table)
        if sum(map(len, self.waiting)) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self.waiting:
            together = self.arrow.concat_tables(self.waiting).unify_dictionaries()
            self.writer.write_table(together, row_group_size=ROW_GROUP)
            self.waiting = []


def require_pyarrow() -> Any:
    """The package pyarrow, or an error that says how to get it."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingDependencyError("Parquet needs the package pyarrow: pip install 'effref[sweep]'") from error
    return pyarrow
