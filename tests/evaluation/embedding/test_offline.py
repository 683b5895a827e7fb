"""Task folders: every kind is read, and every mistake names file, line and field."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.evaluation.embedding import task_folders
from tests.evaluation.embedding.task_folders import describe
from unified_lm.core.errors import DataError
from unified_lm.evaluation.embedding.offline import Kind, find_tasks, read_task


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (task_folders.sts, Kind.STS),
        (task_folders.classification, Kind.CLASSIFICATION),
        (task_folders.clustering, Kind.CLUSTERING),
        (task_folders.pairs, Kind.PAIR_CLASSIFICATION),
        (task_folders.reranking, Kind.RERANKING),
        (task_folders.retrieval, Kind.RETRIEVAL),
    ],
)
def test_every_kind(tmp_path: Path, write: Callable[[Path], Path], kind: Kind) -> None:
    folder = write(tmp_path)
    task = read_task(folder)
    assert task.kind is kind
    assert len(task.revision) == 32
    assert find_tasks(tmp_path) == [folder]
    assert (task.ranking is None) == (kind not in (Kind.RERANKING, Kind.RETRIEVAL))


def test_values(tmp_path: Path) -> None:
    classification = read_task(task_folders.classification(tmp_path))
    assert classification.splits["test"] == {"text": ["a ship, far out", "warm dough"], "label": ["sea", "bread"]}
    ranking = read_task(task_folders.reranking(tmp_path)).ranking
    assert ranking is not None
    assert ranking.candidates is not None
    assert ranking.relevant["q1"] == {"q1-d1": 1, **{f"q1-d{i}": 0 for i in range(2, 7)}}
    assert ranking.candidates["q2"] == [f"q2-d{i}" for i in range(1, 7)]


def test_queries_without_judgment_are_told(tmp_path: Path) -> None:
    task = read_task(task_folders.retrieval(tmp_path))
    assert task.ranking is not None
    assert len(task.ranking.queries["id"]) == 10
    assert task.notices == ("1 of 11 queries have no relevant document and are left out",)
    assert task.ranking.corpus["text"][-1] == ""


def test_a_table_without_header(tmp_path: Path, shared_dir: Path) -> None:
    task = read_task(task_folders.stsb(tmp_path, shared_dir))
    assert task.name == "STSBenchmark"
    columns = task.splits["test"]
    assert len(columns["score"]) == 1500
    assert columns["sentence1"][0] == "A man with a hard hat is dancing."
    assert columns["score"][0] == 5.0


def test_the_revision_follows_the_data(tmp_path: Path) -> None:
    folder = task_folders.sts(tmp_path)
    before = read_task(folder).revision
    assert read_task(folder).revision == before
    path = folder / "test.tsv"
    path.write_text(path.read_text().replace("0.5", "0.6", 1))
    assert read_task(folder).revision != before


@pytest.mark.parametrize(
    ("description", "rows", "expected"),
    [
        ("name: x", "", "has no `type`"),
        ("type: stss", "", "unknown type 'stss'. Did you mean 'sts'"),
        ("type: sts\nfile: {test: a}", "", "unknown field 'file'. Did you mean 'files'"),
        ("type: sts\nfiles: test.tsv", "", r"files: got 'test.tsv' \(str\), expected keys and values"),
        ("type: sts\nfiles: {tset: a}", "", "files.tset is not part of a sts task. Did you mean 'test'"),
        ("type: sts\nfiles: {test: gone.tsv}", "", "there is no file .*gone.tsv"),
        ("- sts", "", "Expected keys such as"),
        ("type: sts\ntype: retrieval", "", "has the key 'type' more than once"),
        ("type: sts\nfiles: {test: a, test: b}", "", "has the key 'test' more than once"),
        ("type: sts\nlanguages: eng-Latn", "", r"languages: got 'eng-Latn' \(str\), expected a list of text"),
        ("type: sts\ndelimiter: 7", "", "delimiter: got 7"),
        *((f"type: sts\ndelimiter: '{mark}'", "", "expected one character, no quote and no line end") for mark in (";;", '"')),
        ('type: sts\ndelimiter: "\\n"', "", r"delimiter is '\\n', expected one character"),
        ('type: sts\ndelimiter: "\\r"', "", r"delimiter is '\\r', expected one character"),
        ("type: sts\ninstruction: {query: a}", "sentence1\tsentence2\tscore\na\tb\t1\na\tb\t2\n", "expected a text"),
        ("type: sts", "sentence1\tsentence2\tscore\na\tb\t1\na\tb\n", "line 3: got 2 cells, expected 3"),
        (
            "type: sts",
            "sentence1\tsentence2\tscore\na\tb\t1\na\tb\tfour\n",
            "line 3, field 'score': got 'four', expected a number",
        ),
        ("type: sts", "sentence1\tsentence2\tscore\na\tb\tnan\n", "field 'score': got 'nan'"),
        (
            "type: sts\nfiles: {test: test.jsonl}",
            f'{{"sentence1": "a", "sentence2": "b", "score": {"9" * 400}}}\n',
            "expected a number",
        ),
        ("type: sts", "sentence1\tsentence2\tscore\na\t \t1\n", "line 2, field 'sentence2': got ' ', expected a text"),
        ("type: sts", "sentence1\tsentence3\tscore\na\tb\t1\n", "field 'sentence2': missing. .*Did you mean"),
        ("type: sts", "sentence1\tsentence2\tscore\n", "has no rows"),
        ("type: sts", "sentence1\tsentence2\tscore\na\tb\t1\n", "has one row"),
        ("type: sts", "sentence1\tsentence2\tscore\na\tb\t1\nc\td\t1\n", "every row has 1.0"),
        ("type: pair_classification", "sentence1\tsentence2\tlabel\na\tb\tyes\n", "field 'label': got 'yes', expected 0 or 1"),
        ("type: classification", "text\tlabel\na\tb\n", "no file for 'train'"),
        (
            "type: sts\ncolumns: {scor: x}",
            "sentence1\tsentence2\tscore\na\tb\t1\n",
            "columns.scor is no field .*Did you mean 'score'",
        ),
        ("type: reranking", "query\tpositive\tnegative\na\tb\t\n", "line 2, field 'negative': got ''"),
    ],
)
def test_mistakes(tmp_path: Path, description: str, rows: str, expected: str) -> None:
    folder = describe(tmp_path / "task", description)
    if rows:
        (folder / ("test.jsonl" if rows.startswith("{") else "test.tsv")).write_text(rows)
    with pytest.raises(DataError, match=expected):
        read_task(folder)


def test_mistakes_of_rankings(tmp_path: Path) -> None:
    folder = task_folders.retrieval(tmp_path)
    qrels = folder / "qrels" / "test.tsv"
    right = qrels.read_text()
    qrels.write_text(right + "q1\td77\t1\n")
    with pytest.raises(DataError, match=r"line 12, field 'corpus-id': 'd77' is not in corpus.jsonl"):
        read_task(folder)
    qrels.write_text(right.replace("\t1\n", "\t0\n"))
    with pytest.raises(DataError, match="no query has a relevant document"):
        read_task(folder)
    qrels.write_text(right)
    corpus = folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text() + '{"_id": "d0", "text": "twice"}\n')
    with pytest.raises(DataError, match=r"corpus.jsonl, line 12, field 'id': 'd0' occurs in an earlier row"):
        read_task(folder)


@pytest.mark.parametrize("name", ["title", "score"])
def test_a_column_of_a_field_that_rows_may_lack_is_one_that_rows_have(tmp_path: Path, name: str) -> None:
    folder = task_folders.retrieval(tmp_path)
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(line for line in corpus.read_text().splitlines(keepends=True) if "only a title" not in line))
    before = read_task(folder)
    describe(folder, f"type: retrieval\ncolumns: {{{name}: elsewhere}}\n")
    with pytest.raises(DataError, match=f"columns.{name} names 'elsewhere', which no row has"):
        read_task(folder)
    file = corpus if name == "title" else folder / "qrels" / "test.tsv"
    file.write_text(file.read_text().replace(f'"{name}"', '"elsewhere"').replace("\tscore\n", "\telsewhere\n"))
    assert read_task(folder).ranking == before.ranking


def test_folders_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        find_tasks(tmp_path / "gone")
    with pytest.raises(DataError, match=r"found nothing, expected a task\.yaml"):
        find_tasks(tmp_path)
    two = describe(tmp_path / "task", "type: sts")
    for name in ("test.tsv", "test.jsonl"):
        (two / name).write_text("")
    with pytest.raises(DataError, match="2 files for 'test'"):
        read_task(two)
