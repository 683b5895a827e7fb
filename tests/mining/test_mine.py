"""Mining with a bag-of-words encoder: harder than random, resumable, and the same however the work is shared."""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import yaml

from tests.processes import CONTEXT
from unified_lm.config.schema import SourceConfig
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.data.rows.records import PairRecord, RecordKind, Text
from unified_lm.data.sources import RecordSource, open_source
from unified_lm.mining.mine import Mining, WorkShard
from unified_lm.mining.negatives import Filter, Given, MiningConfig, Sampling
from unified_lm.mining.text_match import normalized_words
from unified_lm.mining.vector_cache import VectorCache

DIMENSIONS = 256
TOPICS = ("river", "engine", "violin", "planet", "garden")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))


@dataclass(frozen=True)
class FunctionEmbedder:
    """An `Embedder` made of two functions, `key` naming them in caches."""

    key: str
    queries: Callable[[Sequence[Text]], np.ndarray]
    documents: Callable[[Sequence[Text]], np.ndarray]


def bag_of_words(texts: Sequence[Text]) -> np.ndarray:
    """Counts of hashed words, of length 1: texts are similar as far as they share words."""
    vectors = np.zeros((len(texts), DIMENSIONS), np.float32)
    for row, text in enumerate(texts):
        for word in normalized_words(text.text):
            vectors[row, crc32(word.encode()) % DIMENSIONS] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


EMBEDDER = FunctionEmbedder("bag-of-words", bag_of_words, bag_of_words)


def rows(count: int = 60) -> list[dict]:
    """Five topics; a query shares its topic's words with a fifth of the documents and its own words with one."""
    result = []
    for i in range(count):
        topic = TOPICS[i % len(TOPICS)]
        words = f"{topic} {topic}s about{i % 7} detail{i} item{i}"
        result.append({"query": ["Find it", f"{words} question"], "pos": [["", f"{words} answer of page {i}"]], "neg": []})
    return result


def source_of(path: Path, content: list[dict]) -> RecordSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return open_source(SourceConfig(path=str(path)), RecordKind.PAIR, 0)


def job(source: RecordSource, out: Path, embedder=EMBEDDER, cache: str = "vectors", **settings) -> Mining:
    config = MiningConfig(**{"num_negatives": 4, "depth": 20, **settings})
    return Mining(source, embedder, config, out, cache=out.parent / cache, block_rows=8, chunk=16)


def read(path: Path) -> list[PairRecord]:
    source = open_source(SourceConfig(path=str(path)), RecordKind.PAIR, 0)
    return [record for record in source if isinstance(record, PairRecord)]


def test_mined_negatives_are_harder_than_random(tmp_path: Path) -> None:
    source = source_of(tmp_path / "rows.jsonl", rows())
    report = job(source, tmp_path / "mined.jsonl").run()
    assert report is not None
    similarity = report["mean_similarity"]
    assert similarity["random"] + 0.1 < similarity["mined"] < similarity["positives"]
    mined = read(tmp_path / "mined.jsonl")
    assert [(record.query, record.positives) for record in mined] == [(r.query, r.positives) for r in source]
    assert mined[0].query.instruction == "Find it"
    assert all(len(record.negatives) == 4 for record in mined)
    means = {"mined": [], "random": []}
    for i, record in enumerate(mined):
        query = bag_of_words([record.query])[0]
        means["mined"].extend(bag_of_words(record.negatives) @ query)
        means["random"].extend(bag_of_words([mined[(i + 7) % 60].positives[0]]) @ query)
    assert np.mean(means["mined"]) == pytest.approx(similarity["mined"], abs=1e-5)
    assert np.mean(means["mined"]) > np.mean(means["random"]) + 0.1
    assert yaml.safe_load((tmp_path / "mined.report.yaml").read_text()) == report


def test_planted_duplicates_are_never_mined(tmp_path: Path) -> None:
    """Row 60 repeats row 0's answer in capitals, row 61 changes one word of it; without filters both would be mined first."""
    answer = " ".join(f"{TOPICS[0]}{i}" for i in range(30))
    plain = [{"query": f"{answer} question", "pos": [answer]}, *rows()]
    planted = answer.replace(f"{TOPICS[0]}15", "changed")
    plain += [{"query": "first other thing", "pos": [answer.upper() + "!"]}, {"query": "second other thing", "pos": [planted]}]
    source = source_of(tmp_path / "rows.jsonl", plain)
    report = job(source, tmp_path / "mined.jsonl", max_fraction=None).run()
    assert report is not None
    negatives = {text.text for text in read(tmp_path / "mined.jsonl")[0].negatives}
    assert not negatives & {answer, answer.upper() + "!", planted}
    assert report["filtered"][Filter.SAME_TEXT.value] >= 1
    assert report["filtered"][Filter.NEAR_DUPLICATE.value] >= 1
    job(source, tmp_path / "careless.jsonl", max_fraction=None, near_duplicate=None).run()
    assert read(tmp_path / "careless.jsonl")[0].negatives[0].text == planted  # the negative case: the filter is what does it


def test_the_margin_alone_also_finds_the_near_duplicate(tmp_path: Path) -> None:
    answer = " ".join(f"word{i}" for i in range(30))
    content = [{"query": answer, "pos": [answer + " indeed"]}, {"query": "x y", "pos": [answer + " truly"]}, *rows()]
    source = source_of(tmp_path / "rows.jsonl", content)
    report = job(source, tmp_path / "mined.jsonl", near_duplicate=None, max_fraction=0.95).run()
    assert report is not None
    assert answer + " truly" not in {text.text for text in read(tmp_path / "mined.jsonl")[0].negatives}
    assert report["filtered"][Filter.FRACTION.value] >= 1


@pytest.mark.parametrize("sampling", list(Sampling))
def test_shards_equal_the_whole(tmp_path: Path, sampling: Sampling) -> None:
    """Byte for byte, whatever the number of shards and their order; each with a cache of its own or a shared one."""
    source = source_of(tmp_path / "rows.jsonl", rows())
    assert job(source, tmp_path / "whole.jsonl", sampling=sampling).run() is not None
    for count, order in ((3, (1, 2, 0)), (2, (0, 1)), (8, range(8))):
        out = tmp_path / f"shards{count}.jsonl"
        reports = [
            job(source, out, sampling=sampling, cache=f"cache{count}-{index % 2}").run(WorkShard(index, count))
            for index in order
        ]
        assert [report is None for report in reports] == [True] * (count - 1) + [False]
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        whole, shards = (yaml.safe_load(p.with_suffix(".report.yaml").read_text()) for p in (tmp_path / "whole.jsonl", out))
        assert whole == shards
        assert not list(tmp_path.glob(".*parts"))
        assert (
            job(source, out, FunctionEmbedder("bag-of-words", _never, _never), sampling=sampling).run(WorkShard(8, 9)) == whole
        )


class Interrupted(Exception):
    pass


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Killed at every call of the encoder in turn, nothing is embedded twice, and the result is that of one clean run."""
    source = source_of(tmp_path / "rows.jsonl", rows())
    job(source, tmp_path / "clean.jsonl").run()
    embedded: list[str] = []
    budget = [0]

    def encode(texts: Sequence[Text]) -> np.ndarray:
        if not budget[0]:
            raise Interrupted
        budget[0] -= 1
        embedded.extend(text.text for text in texts)
        return bag_of_words(texts)

    embedder, out, runs = FunctionEmbedder("bag-of-words", encode, encode), tmp_path / "resumed.jsonl", 0
    report = None
    while report is None:
        budget[0] = 1
        runs += 1
        try:
            report = job(source, out, embedder, cache="resumed").run()
        except Interrupted:
            assert not out.exists()
    assert runs == 12  # 4 chunks of documents and 8 blocks of queries, one call each
    assert len(embedded) == len(set(embedded)) == 120
    assert out.read_bytes() == (tmp_path / "clean.jsonl").read_bytes()
    assert job(source, out, FunctionEmbedder("bag-of-words", _never, _never)).run() == report


def _never(texts: Sequence[Text]) -> np.ndarray:
    raise AssertionError("nothing is left to embed")


def _slow(texts: Sequence[Text]) -> np.ndarray:
    time.sleep(0.15)
    return bag_of_words(texts)


def _mine(path: str, out: str, share: tuple[int, int]) -> None:
    source = open_source(SourceConfig(path=path), RecordKind.PAIR, 0)
    job(source, Path(out), FunctionEmbedder("bag-of-words", _slow, _slow)).run(WorkShard(*share))


def test_processes_side_by_side_and_one_killed(tmp_path: Path) -> None:
    """One of two real processes is killed; run again, the two leave the same file as one alone."""
    source_of(tmp_path / "rows.jsonl", rows())
    arguments = (str(tmp_path / "rows.jsonl"), str(tmp_path / "out" / "mined.jsonl"))
    (tmp_path / "out").mkdir()
    processes = [CONTEXT.Process(target=_mine, args=(*arguments, (index, 2))) for index in range(2)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out" / "vectors").glob("*.npy")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes[0].pid is not None
    os.kill(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0]
    assert not (tmp_path / "out" / "mined.jsonl").exists()
    _mine(*arguments, (0, 2))
    source = open_source(SourceConfig(path=arguments[0]), RecordKind.PAIR, 0)
    job(source, tmp_path / "alone.jsonl", cache="alone").run()
    assert (tmp_path / "out" / "mined.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_given_negatives_are_kept_or_replaced(tmp_path: Path) -> None:
    content = rows(20)
    content[0]["neg"] = [["", content[5]["pos"][0][1]]]  # the same topic: it would be mined as well
    source = source_of(tmp_path / "rows.jsonl", content)
    for given, count in ((Given.KEEP, 5), (Given.REPLACE, 4)):
        out = tmp_path / f"{given.value}.jsonl"
        job(source, out, given=given).run()
        negatives = [text.text for text in read(out)[0].negatives]
        assert len(negatives) == len(set(negatives)) == count
        assert (negatives[0] == content[5]["pos"][0][1]) or given is Given.REPLACE


def test_rows_without_enough_negatives_are_kept_and_counted(tmp_path: Path) -> None:
    source = source_of(tmp_path / "rows.jsonl", rows(20))
    report = job(source, tmp_path / "mined.jsonl", min_score=0.99, max_fraction=None).run()
    assert report is not None
    assert (report["rows"], report["rows_with_too_few"], report["rows_with_none"]) == (20, 20, 20)
    assert report["mean_similarity"]["mined"] is None
    assert len(read(tmp_path / "mined.jsonl")) == 20


def test_a_corpus_adds_documents(tmp_path: Path) -> None:
    source = source_of(tmp_path / "rows.jsonl", rows(5))
    hard = "river rivers about0 detail0 item0 but another matter"
    (tmp_path / "corpus.txt").write_text(f"{hard}\nnothing alike\n")
    corpus = open_source(SourceConfig(path=str(tmp_path / "corpus.txt")), RecordKind.TEXT, 0)
    config = MiningConfig(num_negatives=1, depth=5, max_fraction=None)
    Mining(source, EMBEDDER, config, tmp_path / "mined.jsonl", cache=tmp_path / "vectors", corpus=corpus).run()
    assert read(tmp_path / "mined.jsonl")[0].negatives == (Text(hard),)


def test_another_jobs_output_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path / "rows.jsonl", rows(10))
    job(source, tmp_path / "mined.jsonl").run()
    with pytest.raises(DataError, match="exists and belongs to another job"):
        job(source, tmp_path / "mined.jsonl", seed=1)
    with pytest.raises(DataError, match=r"ends in \.jsonl"):
        job(source, tmp_path / "mined.parquet")
    for damaged in (b"job: [", b"\xff\xfe", b"[" * 100_000, b"- a\n", b"job: 1\njob: 2\n"):
        (tmp_path / "mined.report.yaml").write_bytes(damaged)
        with pytest.raises(DataError, match="exists and belongs to another job"):
            job(source, tmp_path / "mined.jsonl")


def test_shares_are_parsed() -> None:
    assert WorkShard.parse("2/4") == WorkShard(1, 4)
    for wrong in ("0/4", "5/4", "x", "1", "1/"):
        with pytest.raises(ConfigError, match=f"shard: got '{wrong}'"):
            WorkShard.parse(wrong)


def test_vectors_are_checked(tmp_path: Path) -> None:
    texts = [Text("a"), Text("b")]
    cases = {
        "of shape": lambda texts: np.zeros((1, 3)),
        "of 'b' is not finite": lambda texts: np.array([[1.0], [np.nan]]),
    }
    for message, encode in cases.items():
        with pytest.raises(DataError, match=message):
            VectorCache(tmp_path, message, encode).chunk_of(texts)


def test_the_cache_knows_texts_instructions_and_tag(tmp_path: Path) -> None:
    calls: list[int] = []

    def encode(texts: Sequence[Text]) -> np.ndarray:
        calls.append(len(texts))
        return bag_of_words(texts)

    for tag, text in (("m", Text("a b")), ("m", Text("a b")), ("m", Text("a b", "i")), ("n", Text("a b")), ("m", Text("a"))):
        VectorCache(tmp_path, tag, encode).chunk_of([text])
    assert len(calls) == 4


@pytest.mark.slow
def test_the_embedded_model_mines_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M, untrained as an embedder, on held-out docstrings: a minute on two cores."""
    from unified_lm.inference import UnifiedLM
    from unified_lm.models.embedded import embedded_directory

    monkeypatch.delenv("UNIFIED_LM_CACHE")
    source = open_source(SourceConfig(builtin="pydocs", split="test", limit=120), RecordKind.PAIR, 0)
    model = UnifiedLM.from_pretrained(embedded_directory(), template="chatml", device="cpu", dtype="float32")

    def encode(texts: Sequence[Text]) -> np.ndarray:
        return np.stack([model.encode(text.text, text.instruction, normalize=True, max_tokens=96) for text in texts])

    embedder = FunctionEmbedder("smollm2", encode, encode)
    config = MiningConfig(num_negatives=4, depth=30, max_fraction=None)
    report = Mining(source, embedder, config, tmp_path / "mined.jsonl", cache=tmp_path / "vectors").run()
    assert report is not None
    print(report["mean_similarity"], report["filtered"])
    assert report["mean_similarity"]["mined"] > report["mean_similarity"]["random"]
    assert report["rows_with_too_few"] == 0


def test_a_damaged_chunk_of_vectors_is_embedded_again(tmp_path: Path) -> None:
    texts = [Text(f"text {index}") for index in range(5)]
    calls = []

    def encode(chunk: Sequence[Text]) -> np.ndarray:
        calls.append(len(chunk))
        return bag_of_words(chunk)

    cache = VectorCache(tmp_path, "tag", encode)
    before = np.array(cache.chunk_of(texts))
    (path,) = tmp_path.glob("*.npy")
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="is damaged"):
        assert np.array_equal(cache.chunk_of(texts), before)
    assert np.array_equal(cache.chunk_of(texts), before)
    assert calls == [5, 5]
