"""Sentences with tagged words, from files in CoNLL columns, CoNLL-U files and Hub data sets.

Every task is a column: "pos" (one tag per word), "chunk" and "ner" (spans as B-, I- and O tags).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from unified_lm.config.schema import SourceConfig
from unified_lm.core.errors import ConfigError, DataError, did_you_mean
from unified_lm.core.user_files import user_path
from unified_lm.data.rows.hub_datasets import hub_label_names, hub_rows

TASKS = ("pos", "chunk", "ner")
"""Word-level tasks; the last two are scored by span."""
SPAN_TASKS = ("chunk", "ner")
WORD = "word"
"""The column of the words themselves."""

_SPAN_TAG = re.compile(r"O|[BI]-\S+")
_DOCUMENT = "-DOCSTART-"
# Number of columns -> column indices in the known layouts; CoNLL-2003 has all four columns, CoNLL-2000 the first three.
_CONLL_COLUMNS = {3: {WORD: 0, "pos": 1, "chunk": 2}, 4: {WORD: 0, "pos": 1, "chunk": 2, "ner": 3}}
_CONLLU_COLUMNS = {WORD: 1, "pos": 3}
_CONLLU_WORD = re.compile(r"\d+")
_HUB_COLUMNS = {
    WORD: ("tokens", "words", "form"),
    "pos": ("pos_tags", "upos", "pos"),
    "chunk": ("chunk_tags", "chunks"),
    "ner": ("ner_tags", "ner"),
}


@dataclass(frozen=True)
class Sentence:
    """Words with their tags.

    Attributes:
        words: at least one; no word is empty or contains white space.
        tags: task -> one tag per word.
        breaks: indices of the words that begin a new line; all other words follow a space.
    """

    words: tuple[str, ...]
    tags: Mapping[str, tuple[str, ...]]
    breaks: frozenset[int] = frozenset()

    def text(self) -> tuple[str, list[tuple[int, int]]]:
        """The sentence as one string, and the character span `[start, stop)` of each word in it."""
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        length = 0
        for index, word in enumerate(self.words):
            if index:
                parts.append("\n" if index in self.breaks else " ")
                length += 1
            parts.append(word)
            spans.append((length, length + len(word)))
            length += len(word)
        return "".join(parts), spans


@dataclass(frozen=True)
class WordData:
    """A tagged data set.

    Attributes:
        name: its name in tables and results.
        train: sentences that a probe is trained on.
        test: sentences that a probe is scored on.
        tasks: tasks for which every sentence has tags.
        about: further information for the reader of a score.
    """

    name: str
    train: tuple[Sentence, ...]
    test: tuple[Sentence, ...]
    tasks: tuple[str, ...]
    about: str = ""
    key: str = field(init=False)
    """Hash of words and tags."""

    def __post_init__(self) -> None:
        digest = blake2b(digest_size=16)
        for sentence in (*self.train, *self.test):
            digest.update(repr((sentence.words, sorted(sentence.tags.items()), sorted(sentence.breaks))).encode())
        object.__setattr__(self, "key", digest.hexdigest())

    def limited(self, num_sentences: int) -> WordData:
        """The same data with at most this many training sentences, evenly spaced."""
        if num_sentences >= len(self.train):
            return self
        chosen = tuple(self.train[i * len(self.train) // num_sentences] for i in range(num_sentences))
        return WordData(self.name, chosen, self.test, self.tasks, self.about)


def require_tasks(tasks: Sequence[str], data: WordData) -> tuple[str, ...]:
    """The requested tasks, or all tasks of the data if none is named.

    Raises:
        ConfigError: an unknown task, or one for which the data has no tags.
    """
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"unknown word-level task '{task}'.{did_you_mean(task, TASKS)}")
        if task not in data.tasks:
            raise ConfigError(f"{data.name} has no tags for '{task}': it has {', '.join(data.tasks)}. Say where: --columns.")
    return tuple(tasks) or data.tasks


def read_conll(
    train: Path, test: Path, columns: Mapping[str, int] | None = None, *, comment: str = "", name: str = ""
) -> WordData:
    """Read a training and a test file in columns.

    Args:
        train, test: one word per line, blank lines between sentences. ``.conllu`` is CoNLL-U; other files have columns
            separated by white space, and lines that begin with ``-DOCSTART-`` are skipped.
        columns: indices of "word" and of each task, counted from 0, or backwards from -1. None means CoNLL-2003's order
            (word, pos, chunk, ner) for files of four or three columns, FORM and UPOS for CoNLL-U.
        comment: prefix of comment lines, "" for none, since a word may be "#". CoNLL-U has its own.
        name: its name in tables; by default that of the training file.

    Raises:
        DataError: an unreadable file, a missing column or an invalid tag; the message names file, line and field.
    """
    train_columns, test_columns = (dict(columns) if columns else _columns_of(path, comment) for path in (train, test))
    if train_columns != test_columns:
        raise DataError(f"{train} has columns for {', '.join(train_columns)}, {test} for {', '.join(test_columns)}. Say which.")
    sides = [tuple(_sentences(path, train_columns, comment)) for path in (train, test)]
    for path, sentences in zip((train, test), sides, strict=True):
        if not sentences:
            raise DataError(f"{path} holds no sentence.")
    tasks = tuple(task for task in TASKS if task in train_columns)
    return WordData(name or train.name, sides[0], sides[1], tasks)


def find_conll(location: str) -> tuple[Path, Path]:
    """Find the two files of ``TRAIN,TEST``, or of a folder with one file named after each split.

    Raises:
        DataError: no such files, or several candidates.
    """
    if "," in location:
        train, _, test = location.partition(",")
        return user_path(train), user_path(test)
    folder = user_path(location)
    if not folder.is_dir():
        raise DataError(f"{location} is not a folder with a train and a test file. Two files are given as TRAIN,TEST.")
    names = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = []
    for split in ("train", "test"):
        fitting = [path for path in names if split in path.name.lower()]
        if len(fitting) != 1:
            there = ", ".join(path.name for path in (fitting or names)) or "nothing"
            raise DataError(f"{folder}: expected one file with '{split}' in its name, found {there}. Give TRAIN,TEST instead.")
        found.append(fitting[0])
    return found[0], found[1]


def read_hub(name: str, columns: Mapping[str, str] | None = None, *, subset: str = "", revision: str | None = None) -> WordData:
    """Read the train and test splits of a Hub data set (or of a local folder in the Hub's layout).

    Args:
        name: Hub name.
        columns: names of the column of words and of each task's tags; None looks for the usual names.
        subset: subset of the data set, "" for its only one.
        revision: branch, tag or commit.

    Raises:
        DataError: the data set is not reachable, lacks a column, or has an invalid row.
    """
    sides = []
    for split in ("train", "test"):
        config = SourceConfig(hub=name, subset=subset or None, split=split, revision=revision)
        shown, _, rows = hub_rows(config)
        names = hub_label_names(config)
        sides.append(tuple(_hub_sentence(row, f"{shown}, {location}", columns, names) for location, row in rows()))
        if not sides[-1]:
            raise DataError(f"{shown} holds no sentence.")
    tasks = tuple(task for task in TASKS if all(task in sentence.tags for side in sides for sentence in side))
    if not tasks:
        raise DataError(f"{name} has no column of tags among {', '.join(n for names in _HUB_COLUMNS.values() for n in names)}.")
    return WordData(name, sides[0], sides[1], tasks)


# -- columns ----------------------------------------------------------------------------------------------------------


def _is_conllu(path: Path) -> bool:
    return path.suffix == ".conllu"


def _columns_of(path: Path, comment: str) -> dict[str, int]:
    """The column layout of a file, from its extension or from the number of its columns."""
    if _is_conllu(path):
        return dict(_CONLLU_COLUMNS)
    for _, line in _lines(path):
        if line.strip() and not _is_comment(line, path, comment) and not line.startswith(_DOCUMENT):
            width = len(line.split())
            if width not in _CONLL_COLUMNS:
                raise DataError(
                    f"{path} has {width} columns, so their meaning is not known. Specify it: --columns word=0 pos=1 "
                    "(from 0; -1 is the last)."
                )
            return dict(_CONLL_COLUMNS[width])
    raise DataError(f"{path} holds no sentence.")


def _is_comment(line: str, path: Path, comment: str) -> bool:
    if _is_conllu(path):
        return line.startswith("#") and "\t" not in line
    return bool(comment) and line.startswith(comment)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without line ends, decoded one by one so that an invalid byte has a line number."""
    try:
        with open(path, "rb") as handle:
            for number, raw in enumerate(handle, 1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line).") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _sentences(path: Path, columns: Mapping[str, int], comment: str) -> Iterator[Sentence]:
    rows: list[dict[str, str]] = []
    for number, line in _lines(path):
        if _is_comment(line, path, comment):
            continue
        if not line.strip() or line.startswith(_DOCUMENT):
            if rows:
                yield _sentence(rows, columns)
            rows = []
            continue
        cells = line.split("\t") if _is_conllu(path) else line.split()
        if _is_conllu(path) and not _CONLLU_WORD.fullmatch(cells[0]):
            continue  # "3-4" is the surface form of two words that follow, "8.1" an empty node: neither is a word
        rows.append(_row(cells, columns, f"{path}, line {number}"))
    if rows:
        yield _sentence(rows, columns)


def _row(cells: Sequence[str], columns: Mapping[str, int], location: str) -> dict[str, str]:
    row = {}
    for name, position in columns.items():
        if not -len(cells) <= position < len(cells):
            raise DataError(f"{location}: field '{name}' is column {position}, but the line has {len(cells)} columns.")
        row[name] = _checked(name, cells[position], location)
    return row


def _checked(name: str, value: str, location: str) -> str:
    if name == WORD and not value.strip():
        raise DataError(f"{location}: field '{WORD}': got {value!r}, expected a word.")
    if name == WORD and len(value.split()) > 1:
        return re.sub(r"\s+", "\u00a0", value.strip())  # CoNLL-U allows spaces in words; here a space separates words
    if name in SPAN_TASKS and not _SPAN_TAG.fullmatch(value):
        raise DataError(f"{location}: field '{name}': got {value!r}, expected O, B-TYPE or I-TYPE.")
    if not value.strip():
        raise DataError(f"{location}: field '{name}': got {value!r}, expected a tag.")
    return value


def _sentence(rows: Sequence[Mapping[str, str]], columns: Mapping[str, int]) -> Sentence:
    tags = {task: tuple(row[task] for row in rows) for task in TASKS if task in columns}
    return _made(tuple(row[WORD] for row in rows), tags)


def _made(words: tuple[str, ...], tags: Mapping[str, tuple[str, ...]]) -> Sentence:
    return Sentence(words, {task: iob2(row) if task in SPAN_TASKS else row for task, row in tags.items()})


def iob2(tags: Sequence[str]) -> tuple[str, ...]:
    """Convert tags to IOB2, in which the first word of every span is tagged B-.

    CoNLL-2003's own files are in IOB1, where I- begins a span unless one of the same type ends directly before it.
    """
    result = []
    for index, tag in enumerate(tags):
        before = tags[index - 1] if index else "O"
        starts = tag.startswith("I-") and (before == "O" or before[2:] != tag[2:])
        result.append(f"B-{tag[2:]}" if starts else tag)
    return tuple(result)


# -- Hub --------------------------------------------------------------------------------------------------------------


def _hub_sentence(
    row: Mapping[str, Any], location: str, columns: Mapping[str, str] | None, names: Mapping[str, Sequence[str]]
) -> Sentence:
    found = {}
    for field_name, usual in _HUB_COLUMNS.items():
        wanted = (columns[field_name],) if columns and field_name in columns else () if columns else usual
        column = next((name for name in wanted if name in row), None)
        if column is not None:
            found[field_name] = (column, row[column])
        elif wanted and (columns or field_name == WORD):
            raise DataError(
                f"{location}: no column {' or '.join(wanted)} among {', '.join(row)}. Say which: --columns {WORD}=NAME."
            )
    if WORD not in found:
        raise DataError(f"{location}: --columns must say where the words are: {WORD}=NAME.")
    column, values = found.pop(WORD)
    words = tuple(_checked(WORD, str(word), f"{location}, {column}[{i}]") for i, word in enumerate(values))
    tags = {}
    for task, (column, values) in found.items():
        if len(values) != len(words):
            raise DataError(f"{location}: field '{column}': got {len(values)} tags, expected {len(words)}, one a word.")
        known = names.get(column)
        texts = [known[value] if known is not None and isinstance(value, int) else str(value) for value in values]
        tags[task] = tuple(_checked(task, text, f"{location}, {column}[{i}]") for i, text in enumerate(texts))
    if not words:
        raise DataError(f"{location}: a sentence without words.")
    return _made(words, tags)
