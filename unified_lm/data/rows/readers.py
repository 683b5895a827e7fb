"""Readers of files, one per format, which yield rows with their locations. Errors name the file and the line.

jsonl is parsed here and not by `datasets`, whose loader infers one type per column: rows that mix texts with
[instruction, text] would fail with an error that names neither line nor field.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unified_lm.core.errors import DataError, did_you_mean
from unified_lm.core.user_files import RepeatedKeyError, single_keys

# Location of each row ("line 3", counted from 1), and its content.
Rows = Iterator[tuple[str, Any]]


def _open(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _decoded(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, decoded one by one so that an invalid byte has a line number."""
    with _open(path) as handle:
        for number, raw in enumerate(handle, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line)."
                ) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines that are not blank, stripped."""
    return ((number, line) for number, raw in _decoded(path) if (line := raw.strip()))


def _json(text: str, path: Path, first_line: int, expected: str) -> Any:
    where = path if expected.startswith("an array") else f"{path}, line {first_line}"
    try:
        return json.loads(text, object_pairs_hook=single_keys)
    except RepeatedKeyError as error:
        raise DataError(f"{where}: an object has the key '{error.key}' more than once. Keep one of them.") from error
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}, line {line}: malformed JSON: {error.msg} at column {error.colno}, near {_near(text, error.pos)}. "
            f"Expected {expected}."
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply to be read. Expected {expected}.") from error
    except ValueError as error:  # a whole number of more digits than Python reads
        raise DataError(f"{where}: {error}. Write such a number as a text.") from error


def _near(text: str, position: int, reach: int = 20) -> str:
    return repr(text[max(0, position - reach) : position + reach])


def read_text_lines(path: Path) -> list[str]:
    """The lines of a text file, without their ends. A line ends at \\n (or \\r\\n) and nowhere else: a text may hold any other
    separator (U+2028, form feed). A byte-order mark at the start is no part of the first line.

    Raises:
        DataError: the file cannot be read, or is not UTF-8 (the message names the line).
    """
    with _explained(path):
        return [line.removesuffix("\n").removesuffix("\r") for _, line in _decoded(path)]


def _read_jsonl(path: Path) -> Rows:
    for number, line in _lines(path):
        yield f"line {number}", _json(line, path, number, "one JSON object per line")


def _read_json(path: Path) -> Rows:
    """Read a JSON array of objects, or one object per line in a .json file (as `datasets` writes them)."""
    first = next(_lines(path), (0, ""))[1]
    if not first.startswith("["):
        yield from _read_jsonl(path)
        return
    items = _json("".join(line for _, line in _decoded(path)), path, 1, "an array of objects")
    yield from ((f"item {number}", item) for number, item in enumerate(items, 1))


def _read_txt(path: Path) -> Rows:
    for number, line in _lines(path):
        yield f"line {number}", {"text": line}


def _read_table(path: Path, delimiter: str) -> Rows:
    """Read the rows below the header line. Empty cells become null, since a table expresses "no third negative" in this way."""
    csv.field_size_limit(sys.maxsize)  # the default limit refuses texts above 128 KiB
    reader = csv.DictReader((line for _, line in _decoded(path)), delimiter=delimiter, strict=True)
    checked = False
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The inner reader knows the line that failed; DictReader's own counter still has the last valid row.
            raise DataError(f"{path}, line {reader.reader.line_num}: malformed table: {error}.") from error
        if not checked:
            refuse_repeated_columns(path, reader.fieldnames or ())
            checked = True
        if None in row or None in row.values():
            got = len(row[None]) + len(row) - 1 if None in row else sum(cell is not None for cell in row.values())
            expected = f"{len(reader.fieldnames or ())} as in the header"
            raise DataError(f"{path}, line {reader.line_num}: got {got} cells, expected {expected}.")
        yield f"line {reader.line_num}", {name: cell or None for name, cell in row.items()}


def refuse_repeated_columns(path: Path, names: Sequence[str]) -> None:
    """Raise where two columns have one name: of each row only the last of their cells would be read.

    Raises:
        DataError: names the columns.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        listed = ", ".join(map(repr, twice))
        raise DataError(f"{path}: more than one column is called {listed}. Rename or remove all but one.")


def _read_csv(path: Path) -> Rows:
    return _read_table(path, ",")


def _read_tsv(path: Path) -> Rows:
    return _read_table(path, "\t")


def _read_parquet(path: Path) -> Rows:
    try:
        with pq.ParquetFile(path) as parquet:
            refuse_repeated_columns(path, parquet.schema_arrow.names)
            number = 0
            for batch in parquet.iter_batches(batch_size=1024):
                for index in range(len(batch)):
                    number += 1
                    yield f"row {number}", _plain_row(batch, index, f"{path}, row {number}")
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter from names of columns, which nothing has checked
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _plain_row(batch: pa.RecordBatch, index: int, where: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:  # parquet's texts are bytes, which nothing has checked
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start} of a text).") from error
    except (ValueError, OverflowError, KeyError) as error:  # a date beyond the years of Python or in an unknown time zone, say
        raise DataError(f"{where}: {str(error).rstrip('.')}.") from error
    return found


FORMATS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_txt,
}
_COMPRESSIBLE = (".jsonl", ".json", ".csv", ".tsv", ".txt")


def extension(path: Path) -> str:
    """The extension that decides the format: ".jsonl" for both rows.jsonl and rows.jsonl.gz; "" if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in _COMPRESSIBLE else ".gz"
    return suffixes[-1] if suffixes else ""


def reader_of(path: Path) -> Callable[[Path], Rows]:
    """The reader of a file, by its extension.

    Raises:
        DataError: an unknown extension.
    """
    ending = extension(path)
    if ending not in FORMATS:
        known = ", ".join((*FORMATS, ".jsonl.gz"))
        hint = did_you_mean(ending, FORMATS)
        hint = hint if "Did you" in hint else ""
        raise DataError(f"{path}: unknown file type '{ending}', expected one of {known}.{hint}")
    return FORMATS[ending]


def read_rows(path: Path) -> Rows:
    """Yield the location and content of every row of a file.

    Raises:
        DataError: the file is unreadable or malformed (the message names the line).
    """
    reader = reader_of(path)
    with _explained(path):
        yield from reader(path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the compressed file is cut short or damaged: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def data_files(path: Path) -> list[Path]:
    """The data files of a path: the file itself, or all files under a folder in sorted order, except hidden ones.

    Raises:
        DataError: no such path, an unknown file type, or a folder without data files.
    """
    if path.is_file():
        reader_of(path)
        return [path]
    if not path.is_dir():
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings)
        where = hint if "Did you" in hint else f" Paths are relative to the working directory, {Path.cwd()}."
        where += " A Hub data set is hub:NAME." if len(path.parts) == 2 and not path.suffix and "Did you" not in hint else ""
        raise DataError(f"no such file or folder: {path}.{where}")
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        raise DataError(
            f"{path} was written by datasets' save_to_disk. Write parquet instead: dataset.to_parquet('rows.parquet')."
        )
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    visible = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = [file for file in visible if extension(file) in FORMATS]
    if not files:
        there = ", ".join(file.name for file in visible[:5]) or "nothing"
        raise DataError(f"the folder {path} has no data files: found {there}, expected {', '.join((*FORMATS, '.jsonl.gz'))}.")
    return files
