"""Overlap of training rows with evaluation texts."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from unified_lm.core.errors import ConfigError, DataError
from unified_lm.data.rows.texts import RowFile, open_rows, row_texts
from unified_lm.mining.overlap import OverlapConfig, OverlapKind, OverlapReport, build_index, find_overlap

LONG = "the quick brown fox jumps over the lazy dog while seven wizards quietly mix a potion of amber light at noon"
EVALUATION = [
    {"sentence1": "A man is playing the large flute.", "sentence2": LONG, "score": 3.2, "label": "yes"},
    {"sentence1": "how do I sort a list of words in python", "sentence2": "A woman rides a brown horse.", "score": 1.0},
]
TRAIN = [
    {"query": ["Find it", "a fully new question about tea"], "pos": [["", "A man is playing the large flute."]], "neg": []},
    {"query": ["Find it", "HOW do I   sort a list of words, in Python?"], "pos": [["", "Use sorted of that list."]], "neg": []},
    {"query": ["Find it", "before: " + " ".join(LONG.split()[2:17]) + " and after"], "pos": [["", "nothing at all there"]]},
    {"query": ["Find it", "a clean row about cheese and bread"], "pos": [["", "cheese goes well with fresh bread"]], "neg": []},
    {"query": ["Find it", "yes"], "pos": [["", "another clean row about the sea"]], "neg": []},
]


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compare(train: Path, evaluation: Path, out: Path | None = None, **settings) -> OverlapReport:
    index = build_index([("sts", file) for file in open_rows(str(evaluation))], OverlapConfig(**settings))
    return find_overlap(open_rows(str(train)), index, write=out)


def test_each_kind_is_found_once_and_clean_rows_are_not(tmp_path: Path) -> None:
    train, evaluation = write(tmp_path / "train.jsonl", TRAIN), write(tmp_path / "eval.jsonl", EVALUATION)
    report = compare(train, evaluation, tmp_path / "clean.jsonl")
    assert report.counts == {"exact": 1, "normalized": 1, "ngram": 1}
    assert report.num_rows == 5
    assert dict(report.by_field) == {"pos": 1, "query": 2}
    assert [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()] == TRAIN[3:]
    assert report.examples["exact"][0]["train"] == "train.jsonl, line 1, pos[0]"
    assert "eval.jsonl, line 1, sentence1" in report.examples["exact"][0]["evaluation"]
    assert len(report.examples["ngram"][0]["shared"].split()) == 13
    assert yaml.safe_load(yaml.safe_dump(report.as_dict()))["kinds"] == {"exact": 1, "normalized": 1, "ngram": 1, "near": 0}
    cleaned = compare(tmp_path / "clean.jsonl", evaluation)
    assert cleaned.num_overlapping == 0


def test_an_ngram_needs_all_its_words(tmp_path: Path) -> None:
    words = LONG.split()
    evaluation = write(tmp_path / "eval.jsonl", [{"text": LONG}])
    for length, found in ((12, 0), (13, 1)):
        train = write(tmp_path / "train.jsonl", [{"text": "x y z " + " ".join(words[1 : 1 + length]) + " u v w"}])
        assert compare(train, evaluation, kinds=(OverlapKind.NGRAM,)).num_overlapping == found


def test_near_duplicates_are_verified(tmp_path: Path) -> None:
    """Scattered edits hide from the n-gram test; the reported similarity is the true one, whatever the sketch says."""
    words = [f"word{i}" for i in range(60)]
    near = [("other" if i in (20, 40) else word) for i, word in enumerate(words)]
    evaluation = write(tmp_path / "eval.jsonl", [{"text": " ".join(words)}])
    train = write(tmp_path / "train.jsonl", [{"text": " ".join(near)}])
    kinds = (OverlapKind.NEAR,)
    report = compare(train, evaluation, kinds=kinds, near_threshold=0.8)
    assert report.counts == {"near": 1}
    assert report.examples["near"][0]["shared"] == "Jaccard similarity 0.81"  # 58 shingles of 3: 6 differ, 52 / 64
    assert compare(train, evaluation, kinds=kinds, near_threshold=0.85).num_overlapping == 0


def test_near_recall_on_many_planted_texts(tmp_path: Path) -> None:
    """MinHash may miss some; at a similarity well above the threshold it must find nearly all."""
    evaluation = [[f"w{row}x{i}" for i in range(40)] for row in range(60)]
    planted = [[*words[:39], "changed"] for words in evaluation]  # Jaccard 37 / 39
    report = compare(
        write(tmp_path / "train.jsonl", [{"text": " ".join(words)} for words in planted]),
        write(tmp_path / "eval.jsonl", [{"text": " ".join(words)} for words in evaluation]),
        kinds=(OverlapKind.NEAR,),
    )
    assert report.num_overlapping >= 58


def test_shared_instructions_and_system_turns_are_no_overlap(tmp_path: Path) -> None:
    shared = "Given a web search query, retrieve relevant passages that answer the query"
    system = {"role": "system", "content": "You are a helpful assistant and answer briefly."}
    evaluation = write(
        tmp_path / "eval.jsonl",
        [
            {"query": [shared, "where do storks go in winter"], "pos": [[shared, "storks fly to the south of Africa"]]},
            {"messages": [system, {"role": "user", "content": "tell me about storks in winter"}]},
        ],
    )
    train = write(
        tmp_path / "train.jsonl",
        [
            {"query": [shared, "where do geese go in winter"], "pos": [[shared, "geese fly to the coast of Spain"]]},
            {"messages": [system, {"role": "user", "content": "tell me about geese in winter"}]},
        ],
    )
    assert compare(train, evaluation).num_overlapping == 0


def test_places_of_texts() -> None:
    row = {"query": ["i", "q"], "pos": ["a", "b"], "neg": [["i", "n"]], "other": {"x": [1, "t"]}, "none": None}
    found = dict(row_texts(row))
    assert found == {"query": "q", "pos[0]": "a", "pos[1]": "b", "neg[0]": "n", "other.x[1]": "t"}


def test_a_folder_is_cleaned_file_by_file(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.jsonl", TRAIN[:1] + TRAIN[3:4])
    write(tmp_path / "train" / "b.jsonl", TRAIN[4:])
    evaluation = write(tmp_path / "eval.jsonl", EVALUATION)
    report = compare(tmp_path / "train", evaluation, tmp_path / "clean")
    assert report.num_overlapping == 1
    assert sorted(path.name for path in (tmp_path / "clean").glob("[!.]*")) == ["a.jsonl", "b.jsonl"]
    assert (tmp_path / "clean" / "b.jsonl").read_text() == (tmp_path / "train" / "b.jsonl").read_text()


@pytest.mark.parametrize("which", ["train", "eval"])
@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "some words and half of \ud800 more"}, r"line 2, field 'text': got half of a surrogate pair at character 23"),
        ({"a\udc00": "some words of a text"}, r"line 2, field 'a\\udc00': got such a name"),
    ],
)
def test_what_is_no_unicode_is_refused_where_it_is_read(row: dict, told: str, which: str, tmp_path: Path) -> None:
    files = {name: write(tmp_path / f"{name}.jsonl", [{"text": LONG}]) for name in ("train", "eval")}
    write(files[which], [{"text": LONG}, row])
    with pytest.raises(DataError, match=rf"{which}\.jsonl, {told}"):
        compare(files["train"], files["eval"])


def test_a_row_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    nested: list = []
    for _ in range(2000):
        nested = [nested]
    file = RowFile("train.jsonl", lambda: iter([("line 1", {"text": nested})]))
    index = build_index(
        [("sts", each) for each in open_rows(str(write(tmp_path / "eval.jsonl", [{"text": LONG}])))], OverlapConfig()
    )
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: nested too deeply"):
        find_overlap([file], index)


def test_columns_limit_the_evaluation_set(tmp_path: Path) -> None:
    train, evaluation = write(tmp_path / "train.jsonl", TRAIN), write(tmp_path / "eval.jsonl", EVALUATION)
    assert compare(train, evaluation, columns=("sentence2",)).counts == {"ngram": 1}
    with pytest.raises(DataError, match="none of the columns sentence3"):
        compare(train, evaluation, columns=("sentence3",))


def test_mistakes(tmp_path: Path) -> None:
    evaluation = write(tmp_path / "eval.jsonl", EVALUATION)
    with pytest.raises(ConfigError, match=r"3 problems(?s:.*)ngram_words: got 0(?s:.*)near_threshold: got 0"):
        OverlapConfig(ngram_words=0, near_threshold=0, num_examples=-1)
    with pytest.raises(DataError, match="lower --min-words"):
        compare(evaluation, write(tmp_path / "short.jsonl", [{"text": "too short"}]))
    with pytest.raises(DataError, match="every row overlaps"):
        compare(evaluation, evaluation, tmp_path / "clean.jsonl")
    assert not (tmp_path / "clean.jsonl").exists()
    with pytest.raises(DataError, match="no such file"):
        open_rows(str(tmp_path / "nothing"))


def test_without_datasketch_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    evaluation = write(tmp_path / "eval.jsonl", EVALUATION)
    with pytest.raises(DataError, match=r"pip install 'unified_lm\[data\]', or leave them out with --kinds"):
        compare(evaluation, evaluation)
    assert compare(evaluation, evaluation, kinds=(OverlapKind.EXACT,)).counts == {"exact": 2}


def test_outputs_that_meet_are_refused_before_the_work(tmp_path: Path) -> None:
    evaluation = write(tmp_path / "eval.jsonl", EVALUATION)
    write(tmp_path / "train" / "a.jsonl", TRAIN[3:])
    (tmp_path / "train" / "a.csv").write_text("query,positive\none two three four,five six seven\n")
    with pytest.raises(DataError, match="would both be written"):
        compare(tmp_path / "train", evaluation, tmp_path / "clean")
    assert not (tmp_path / "clean").exists()
    (tmp_path / "train" / "sub").mkdir()
    (tmp_path / "train" / "a.csv").rename(tmp_path / "train" / "sub" / "a.csv")
    compare(tmp_path / "train", evaluation, tmp_path / "clean")
    assert sorted(str(path.relative_to(tmp_path / "clean")) for path in (tmp_path / "clean").rglob("*.jsonl")) == [
        "a.jsonl",
        "sub/a.jsonl",
    ]
