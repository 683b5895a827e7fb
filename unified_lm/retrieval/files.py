"""Documents from files: rows with a text, pages, or the built-in data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from unified_lm.config.streams import BUILTIN_PREFIX, SourceConfig
from unified_lm.core.errors import DataError, did_you_mean
from unified_lm.core.user_files import user_path
from unified_lm.data.rows.readers import FORMATS, extension
from unified_lm.data.rows.records import PairRecord, RecordKind
from unified_lm.data.rows.texts import open_rows
from unified_lm.data.sources import open_source
from unified_lm.retrieval.documents import Document, text_id

PAGES = (".md", ".rst")
"""Files that are one document as a whole; rows of other files are one each."""


def read_documents(named: str, column: str = "text") -> Iterator[Document]:
    """The documents that a command line names.

    Args:
        named: a file of rows (jsonl, csv, parquet; txt: a document per line), a page, a folder of such, ``hub:NAME``, or
            ``builtin:pydocs`` (the documents of its pairs, train and test).
        column: the column of a row that holds the text. Columns "id" and "title" are read too, where there are any.

    Raises:
        DataError: nothing there, or a row without a text.
    """
    if named.startswith(BUILTIN_PREFIX):
        yield from _built_in(named)
        return
    path = user_path(named)
    inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    files = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    pages = [file for file in files if file.is_file() and file.suffix in PAGES]
    for page in pages:
        try:
            yield Document(str(page), page.read_text(encoding="utf-8-sig"), str(page))
        except UnicodeDecodeError as error:
            raise DataError(f"{page} is not UTF-8 ({error.reason} at byte {error.start}).") from error
    if not pages or any(extension(file) in FORMATS for file in files):  # without either it says what was found and expected
        for rows in open_rows(named):
            for location, row in rows.rows():
                yield _document(row, f"{rows.name}, {location}", column)


def _document(row: Any, origin: str, column: str) -> Document:
    if not isinstance(row, Mapping) or not isinstance(row.get(column), str):
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        hint = did_you_mean(column, row) if isinstance(row, Mapping) else ""
        raise DataError(f"{origin}: no text under '{column}' among [{found}].{hint} Name the column that holds it (--column).")
    text = row[column]
    if isinstance(title := row.get("title"), str) and title.strip():
        text = f"{title.strip()}\n{text}"
    given = row.get("id", row.get("_id"))
    return Document(text_id(text) if given is None else str(given), text, origin)


def _built_in(named: str) -> Iterator[Document]:
    seen = set[str]()
    for split in ("train", "test"):
        config = SourceConfig.from_text(named)
        source = open_source(SourceConfig(builtin=config.builtin, subset=config.subset, split=split), RecordKind.PAIR, 0)
        for record in source:
            assert isinstance(record, PairRecord), "pairs were asked for"
            for text in record.positives:
                if (id := text_id(text.text)) not in seen:
                    seen.add(id)
                    yield Document(id, text.text, f"{named}, {split}")
