"""Offline tasks: a folder with a `task.yaml` and data files is an evaluation task, without network access or registration.

This module reads and validates; `mteb_adapter` turns the result into a task of mteb's own classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from pathlib import Path
from typing import Any

from unified_lm.core.errors import DataError, did_you_mean
from unified_lm.core.typed import require_typed, show_briefly
from unified_lm.core.user_files import parse_yaml
from unified_lm.evaluation.embedding.offline_files import Layout, Row, find_file, read_fields

DESCRIPTION = "task.yaml"
"""The file that marks a folder as an offline task."""


@dataclass(frozen=True, kw_only=True)
class _Description:
    """The content of a description."""

    type: str = ""
    name: str | None = None
    description: str | None = None
    files: Mapping[str, str] | None = None
    columns: Mapping[str, str | int] | None = None
    header: bool = True
    delimiter: str | None = None
    instruction: str | Mapping[str, str] | None = None
    languages: tuple[str, ...] = ("eng-Latn",)


Columns = dict[str, list[Any]]
"""Field -> one value per row."""


class Kind(Enum):
    """What an offline task measures."""

    STS = "sts"
    CLASSIFICATION = "classification"
    CLUSTERING = "clustering"
    PAIR_CLASSIFICATION = "pair_classification"
    RERANKING = "reranking"
    RETRIEVAL = "retrieval"


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The data of a retrieval or reranking task.

    Attributes:
        queries: columns "id" and "text".
        corpus: columns "id", "title" and "text".
        relevant: query id -> document id -> relevance judgment, 0 for judged irrelevant.
        candidates: query id -> ids of the documents to rank; None ranks the whole corpus.
    """

    queries: Columns
    corpus: Columns
    relevant: Mapping[str, Mapping[str, int]]
    candidates: Mapping[str, list[str]] | None = None


@dataclass(frozen=True, kw_only=True)
class OfflineTask:
    """A task folder, read and validated.

    Attributes:
        kind: what the task measures.
        name: its name in results.
        folder: the folder.
        revision: hash of its files, which distinguishes results for different data.
        splits: split ("test", for classification also "train") -> columns; empty for rankings.
        ranking: data of retrieval and reranking, else None.
        prompt: its instruction: one for all texts, or one per role; None if it has none.
        languages: codes such as "eng-Latn".
        description: one line.
        notices: messages for the user, such as the number of excluded rows.
    """

    kind: Kind
    name: str
    folder: Path
    revision: str
    splits: Mapping[str, Columns] = field(default_factory=dict)
    ranking: Ranking | None = None
    prompt: str | Mapping[str, str] | None = None
    languages: tuple[str, ...] = ("eng-Latn",)
    description: str = ""
    notices: tuple[str, ...] = ()


def find_tasks(folder: Path) -> list[Path]:
    """The task folders of a folder: the folder itself, or those directly below it.

    Raises:
        DataError: no such folder, or no task in it.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}. An offline task is a folder with a {DESCRIPTION}.")
    if (folder / DESCRIPTION).is_file():
        return [folder]
    below = sorted(path.parent for path in folder.glob(f"*/{DESCRIPTION}"))
    if not below:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        kinds = ", ".join(kind.value for kind in Kind)
        raise DataError(
            f"{folder} holds no offline task: found {there}, expected a {DESCRIPTION} in it or in folders below it. "
            f"Its least content is one line, `type: KIND` with KIND one of {kinds}."
        )
    return below


def read_task(folder: Path) -> OfflineTask:
    """Read and validate a task folder.

    Raises:
        DataError: the description or a data file is invalid; the message names file, line and field.
    """
    path = folder / DESCRIPTION
    options = _description(path)
    kind = _kind(options, path)
    columns, files = options.columns or {}, options.files or {}
    if options.delimiter is not None and (len(options.delimiter) != 1 or options.delimiter in '\r\n"'):
        raise DataError(f"{path}: delimiter is {options.delimiter!r}, expected one character, no quote and no line end.")
    layout = Layout(columns, header=options.header, delimiter=options.delimiter)
    needed = _FILES[kind]
    unknown = sorted(set(files) - set(needed))
    if unknown:
        raise DataError(f"{path}: files.{unknown[0]} is not part of a {kind.value} task.{did_you_mean(unknown[0], needed)}")
    if unknown := sorted(set(columns) - set(_NAMES[kind])):
        hint = did_you_mean(unknown[0], _NAMES[kind])
        raise DataError(f"{path}: columns.{unknown[0]} is no field of a {kind.value} task.{hint}")
    found = {name: find_file(folder, name, files.get(name)) for name in needed}
    splits: dict[str, Columns] = {}
    ranking: Ranking | None = None
    notices: list[str] = []
    if kind is Kind.RETRIEVAL:
        ranking, notices = _read_retrieval(found, layout)
    elif kind is Kind.RERANKING:
        ranking = _read_reranking(found["test"], layout)
    else:
        splits = {name: _read_split(file, _FIELDS[kind], layout) for name, file in found.items()}
    if absent := [name for name, column in columns.items() if column not in layout.seen]:
        hint = did_you_mean(columns[absent[0]], layout.seen)
        raise DataError(f"{path}: columns.{absent[0]} names '{columns[absent[0]]}', which no row has.{hint}")
    return OfflineTask(
        kind=kind,
        name=options.name or folder.resolve().name,
        folder=folder,
        revision=_hash([path, *found.values()]),
        splits=splits,
        ranking=ranking,
        prompt=_prompt(options.instruction, kind, path),
        languages=options.languages,
        description=options.description or f"offline {kind.value} task",
        notices=tuple(notices),
    )


_FILES: Mapping[Kind, tuple[str, ...]] = {
    Kind.STS: ("test",),
    Kind.CLASSIFICATION: ("train", "test"),
    Kind.CLUSTERING: ("test",),
    Kind.PAIR_CLASSIFICATION: ("test",),
    Kind.RERANKING: ("test",),
    Kind.RETRIEVAL: ("corpus", "queries", "qrels"),
}

_FIELDS: Mapping[Kind, Mapping[str, Callable[[Row, str], Any]]] = {
    Kind.STS: {"sentence1": Row.text, "sentence2": Row.text, "score": Row.number},
    Kind.CLASSIFICATION: {"text": Row.text, "label": Row.label},
    Kind.CLUSTERING: {"text": Row.text, "label": Row.label},
    Kind.PAIR_CLASSIFICATION: {"sentence1": Row.text, "sentence2": Row.text, "label": Row.truth},
}

_NAMES: Mapping[Kind, tuple[str, ...]] = {
    **{kind: tuple(fields) for kind, fields in _FIELDS.items()},
    Kind.RERANKING: ("query", "positive", "negative"),
    Kind.RETRIEVAL: ("id", "text", "title", "query-id", "corpus-id", "score"),
}
"""The fields whose columns a description may name."""


def _description(path: Path) -> _Description:
    try:
        options = parse_yaml(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return require_typed(
        _Description, options, path, DataError, fix="Expected keys such as `type: sts`; see docs/evaluation.md."
    )


def _kind(options: _Description, path: Path) -> Kind:
    known = [kind.value for kind in Kind]
    if options.type not in known:
        problem = f"has the unknown type '{options.type}'" if options.type else "has no `type`"
        hint = did_you_mean(options.type, known)
        raise DataError(f"{path} {problem}.{hint if 'Did you' in hint else ''} Expected one of {', '.join(known)}.")
    return Kind(options.type)


def _prompt(value: str | Mapping[str, str] | None, kind: Kind, path: Path) -> str | Mapping[str, str] | None:
    """The task's instruction; a single one applies to the queries if the task has queries."""
    ranks = kind in (Kind.RERANKING, Kind.RETRIEVAL)
    if value is None or isinstance(value, str):
        return {"query": value} if ranks and value is not None else value
    if not ranks or not set(value) <= {"query", "document"}:
        expected = "a text, or {query: ..., document: ...}" if ranks else "a text"
        raise DataError(f"{path}: `instruction` is {show_briefly(value)}, expected {expected}.")
    return value


def _read_split(path: Path, fields: Mapping[str, Callable[[Row, str], Any]], layout: Layout) -> Columns:
    columns: Columns = {name: [] for name in fields}
    for row in read_fields(path, layout):
        for name, read in fields.items():
            columns[name].append(read(row, name))
    if len(columns[next(iter(fields))]) < 2:
        raise DataError(f"{path} has one row; a score needs at least two.")
    for name in ("label", "score"):
        if name in columns and len(set(columns[name])) < 2:
            raise DataError(f"{path}, field '{name}': every row has {columns[name][0]!r}; a score needs at least two values.")
    return columns


def _read_reranking(path: Path, layout: Layout) -> Ranking:
    queries: Columns = {"id": [], "text": []}
    corpus: Columns = {"id": [], "title": [], "text": []}
    relevant: dict[str, dict[str, int]] = {}
    candidates: dict[str, list[str]] = {}
    for number, row in enumerate(read_fields(path, layout), 1):
        query = f"q{number}"
        queries["id"].append(query)
        queries["text"].append(row.text("query"))
        relevant[query], candidates[query] = {}, []
        for judgment, field_name in ((1, "positive"), (0, "negative")):
            for text in row.texts(field_name):
                document = f"{query}-d{len(candidates[query]) + 1}"
                corpus["id"].append(document)
                corpus["title"].append("")
                corpus["text"].append(text)
                relevant[query][document] = judgment
                candidates[query].append(document)
    return Ranking(queries=queries, corpus=corpus, relevant=relevant, candidates=candidates)


def _read_retrieval(files: Mapping[str, Path], layout: Layout) -> tuple[Ranking, list[str]]:
    corpus = _read_texts(files["corpus"], layout, titles=True)
    queries = _read_texts(files["queries"], layout, titles=False)
    known = {"query-id": set(queries["id"]), "corpus-id": set(corpus["id"])}
    relevant: dict[str, dict[str, int]] = {}
    for row in read_fields(files["qrels"], layout):
        query, document = (row.identifier(name, name.replace("-", "_")) for name in known)
        for name, identifier in (("query-id", query), ("corpus-id", document)):
            if identifier not in known[name]:
                holder = files["queries" if name == "query-id" else "corpus"]
                raise row.error(name, f"'{identifier}' is not in {holder.name}.")
        relevant.setdefault(query, {})[document] = row.relevance("score")
    judged = {query for query, documents in relevant.items() if any(value > 0 for value in documents.values())}
    keep = [index for index, query in enumerate(queries["id"]) if query in judged]
    if not keep:
        raise DataError(f"{files['qrels']}: no query has a relevant document (score above 0).")
    left_out = len(queries["id"]) - len(keep)
    notices = [f"{left_out} of {len(queries['id'])} queries have no relevant document and are left out"] if left_out else []
    queries = {name: [values[index] for index in keep] for name, values in queries.items()}
    return Ranking(queries=queries, corpus=corpus, relevant={query: relevant[query] for query in queries["id"]}), notices


def _read_texts(path: Path, layout: Layout, titles: bool) -> Columns:
    """Read ids and texts. A document with a title may have an empty text."""
    columns: Columns = {"id": [], "text": [], **({"title": []} if titles else {})}
    seen: set[str] = set()
    for row in read_fields(path, layout):
        identifier = row.identifier("id", "_id")
        if identifier in seen:
            raise row.error("id", f"'{identifier}' occurs in an earlier row already.")
        seen.add(identifier)
        columns["id"].append(identifier)
        title = str(row.optional("title", "")) if titles else ""
        if titles:
            columns["title"].append(title)
        columns["text"].append(str(row.optional("text", "")) if title.strip() else row.text("text"))
    return columns


def _hash(paths: list[Path]) -> str:
    digest = blake2b(digest_size=16)
    for path in paths:
        content = path.read_bytes()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()
