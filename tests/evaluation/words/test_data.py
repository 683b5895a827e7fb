"""Tagged files: columns, documents, comments, IOB1; every mistake names file, line and field."""

from pathlib import Path

import datasets
import pytest

from tests.evaluation.words.word_files import CONLL, CONLLU, write
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.evaluation.words.data import Sentence, find_conll, iob2, read_conll, read_hub, require_tasks


def test_conll_2003_layout_and_iob1(tmp_path: Path) -> None:
    write(tmp_path / "eng.train", CONLL)
    write(tmp_path / "eng.test", CONLL)
    data = read_conll(*find_conll(str(tmp_path)))
    assert data.tasks == ("pos", "chunk", "ner")
    first, second = data.train
    assert first.words == ("EU", "rejects", "German", "call")
    assert first.tags["ner"] == ("B-ORG", "O", "B-MISC", "O")
    assert first.tags["chunk"] == ("B-NP", "B-VP", "B-NP", "I-NP")
    assert second.tags["ner"] == ("B-PER", "I-PER")


def test_iob2_keeps_iob2_and_splits_only_where_iob1_means_it() -> None:
    tags = ("B-A", "I-A", "B-A", "I-B", "O", "I-A")
    assert iob2(tags) == ("B-A", "I-A", "B-A", "B-B", "O", "B-A")
    assert iob2(iob2(tags)) == iob2(tags)


def test_conllu_leaves_out_comments_ranges_and_empty_nodes(tmp_path: Path) -> None:
    path = write(tmp_path / "en.conllu", CONLLU)
    data = read_conll(path, path)
    assert data.tasks == ("pos",)
    assert data.train[0].words == ("Do", "n't", "#")
    assert data.train[0].tags["pos"] == ("AUX", "PART", "SYM")


def test_columns_by_position_and_comments(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "% made by hand\nthe x y DET\ncat x y NOUN\n")
    data = read_conll(path, path, {"word": 0, "pos": -1}, comment="%")
    assert data.train[0].tags == {"pos": ("DET", "NOUN")}
    hashes = write(tmp_path / "b.txt", "# # I-NP\n")  # without a comment prefix "#" is a word, as in CoNLL-2000
    assert read_conll(hashes, hashes).train[0].words == ("#",)


@pytest.mark.parametrize(
    ("content", "columns", "expected"),
    [
        ("EU NNP B-NP B-ORG\nrejects VBZ\n", None, r"a\.txt, line 2: field 'chunk' is column 2, but the line has 2 columns"),
        ("EU NNP B-NP ORG\n", None, r"a\.txt, line 1: field 'ner': got 'ORG', expected O, B-TYPE or I-TYPE"),
        ("EU NNP\n", None, r"a\.txt has 2 columns, so their meaning is not known"),
        ("\n\n", None, r"a\.txt holds no sentence"),
        ("EU NNP\n", {"word": 0, "pos": 5}, r"line 1: field 'pos' is column 5"),
    ],
)
def test_mistakes_name_file_line_and_field(tmp_path: Path, content: str, columns: dict[str, int] | None, expected: str) -> None:
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(DataError, match=expected):
        read_conll(path, path, columns)


def test_a_wrong_byte_has_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"EU NNP B-NP B-ORG\ncaf\xe9 NN B-NP O\n")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_conll(path, path)


def test_finding_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder with a train and a test file"):
        find_conll(str(tmp_path / "gone"))
    write(tmp_path / "train.txt", CONLL)
    with pytest.raises(DataError, match=r"expected one file with 'test' in its name, found train\.txt"):
        find_conll(str(tmp_path))
    assert find_conll("a.txt,b.txt") == (Path("a.txt"), Path("b.txt"))


def test_hub_layout_with_class_labels(tmp_path: Path) -> None:
    labels = datasets.ClassLabel(names=["O", "B-PER", "I-PER"])
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(labels), "id": datasets.Value("string")}
    )
    rows = {"tokens": [["Peter", "Blackburn", "ran"]], "ner_tags": [[1, 2, 0]], "id": ["0"]}
    table = datasets.Dataset.from_dict(rows, features=features)
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    data = read_hub(str(tmp_path))
    assert data.tasks == ("ner",)
    assert data.test[0].tags["ner"] == ("B-PER", "I-PER", "O")
    with pytest.raises(DataError, match=r"row 1: no column pos_tagz among tokens, ner_tags, id"):
        read_hub(str(tmp_path), {"word": "tokens", "pos": "pos_tagz"})


def test_key_sees_words_and_tags_and_tasks_are_checked(tmp_path: Path) -> None:
    one = read_conll(*[write(tmp_path / "a.txt", CONLL)] * 2)
    other = read_conll(*[write(tmp_path / "b.txt", CONLL.replace("German JJ", "German NN"))] * 2)
    assert one.key != other.key
    assert one.key == read_conll(*[tmp_path / "a.txt"] * 2).key
    assert len(one.limited(1).train) == 1
    with pytest.raises(ConfigError, match=r"unknown word-level task 'poss'\. Did you mean 'pos'"):
        require_tasks(["poss"], one)


def test_text_of_a_sentence() -> None:
    text, spans = Sentence(("a", "bc", "d"), {}, frozenset({2})).text()
    assert text == "a bc\nd"
    assert [text[start:stop] for start, stop in spans] == ["a", "bc", "d"]
