"""Draws: reproducible, resumable, one source per contrastive batch, every row once per epoch; and the token cache beneath."""

import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.fake_source import FakeSource, chats, pairs, stream_config, texts
from unified_lm.batch import Sample
from unified_lm.composition.compose import compose_run
from unified_lm.config.schema import ModelConfig, RetrievalConfig, RunConfig, SourceConfig, ValidationConfig
from unified_lm.core.errors import CheckpointError, ConfigError, DataError
from unified_lm.data import stream as stream_module
from unified_lm.data.cursor import Cursor
from unified_lm.data.formats import MaskingConfig
from unified_lm.data.retrieval import build_retrieval
from unified_lm.data.rows.records import PairRecord, Text
from unified_lm.data.streams import TableStream, build_streams, build_validation_streams
from unified_lm.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def make_stream(*sources: list, format: str = "pairs", seed: int = 0, weights=None, **settings) -> TableStream:
    opened = [FakeSource(records, f"{index}.jsonl") for index, records in enumerate(sources)]
    return TableStream("s", stream_config(format, **settings), opened, TOKENIZER, seed, weights)


def content(samples: list[Sample]) -> list[tuple]:
    return [(s.input_ids.tolist(), s.group, s.slot, None if s.labels is None else s.labels.tolist()) for s in samples]


def queries(samples: list[Sample]) -> list[str]:
    return [TOKENIZER.decode(s.input_ids[s.pool[0] : s.pool[1]]) for s in samples if s.slot == 0]


# -- cursor ---------------------------------------------------------------------------------------------------------------


def make_cursor(num_rows: int) -> Cursor:
    return Cursor(num_rows, lambda epoch: np.random.default_rng(epoch).permutation(num_rows))


@pytest.mark.parametrize(("num_rows", "batch"), [(10, 3), (10, 10), (7, 5), (3, 10), (1, 4), (5, 5), (12, 11)])
def test_every_epoch_has_every_row_once_and_no_batch_repeats_what_it_can_avoid(num_rows, batch):
    cursor = make_cursor(num_rows)
    drawn: list[int] = []
    for _ in range(20):
        rows = cursor.take(batch)
        counts = Counter(rows).values()
        assert len(rows) == batch
        assert max(counts) == -(-batch // num_rows)
        drawn += rows
    for start in range(0, len(drawn) - num_rows + 1, num_rows):
        assert sorted(drawn[start : start + num_rows]) == list(range(num_rows))


def test_the_order_differs_between_epochs():
    cursor = make_cursor(50)
    assert cursor.take(50) != cursor.take(50)


@pytest.mark.parametrize("steps", range(9))
def test_a_cursor_resumes_from_its_state_through_json(steps):
    uninterrupted, stopped = make_cursor(7), make_cursor(7)
    for _ in range(steps):
        uninterrupted.take(5)
        stopped.take(5)
    resumed = make_cursor(7)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert [resumed.take(5) for _ in range(6)] == [uninterrupted.take(5) for _ in range(6)]


# -- streams --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "records", "settings"),
    [
        ("pairs", pairs(11, negatives=3), {"num_hard_negatives": 2}),
        ("chat", chats(11), {}),
        ("masked_text", texts(11), {"masking": MaskingConfig(), "template": "plain"}),
        ("views", texts(11), {"template": "plain"}),
    ],
)
@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_a_resumed_stream_continues_as_if_never_stopped(format, records, settings, stop):
    def make() -> TableStream:
        return make_stream(records, [*records[:4]], format=format, batch_size=4, **settings)

    uninterrupted = make()
    expected = [content(uninterrupted.draw()) for _ in range(stop + 4)]
    stopped = make()
    for _ in range(stop):
        stopped.draw()
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert [content(resumed.draw()) for _ in range(4)] == expected[stop:]
    resumed.reset()
    assert content(resumed.draw()) == expected[0]


def test_seeds_and_names_change_the_order():
    draws = [queries(make_stream(pairs(40), seed=seed).draw(40)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    other = TableStream("other", stream_config("pairs"), [FakeSource(pairs(40), "0.jsonl")], TOKENIZER, 0)
    assert queries(other.draw(40)) != draws[0]


def test_contrastive_batches_come_from_one_source_in_proportion_to_rows():
    stream = make_stream(pairs(30, prefix="a "), pairs(10, prefix="b "), batch_size=5)
    prefixes = [{query[0] for query in queries(stream.draw())} for _ in range(400)]
    assert all(len(found) == 1 for found in prefixes)
    assert sum(found == {"a"} for found in prefixes) / 400 == pytest.approx(0.75, abs=0.06)


def test_labeled_batches_mix_sources():
    stream = make_stream(chats(30), [*chats(10)], format="chat", batch_size=40)
    stream.draw()
    taken = [cursor.epoch * cursor.num_rows + cursor.position for cursor in stream.cursors]
    assert sum(taken) == 40
    assert taken[0] / 40 == pytest.approx(0.75, abs=0.15)


@pytest.mark.parametrize(
    ("weights", "temperature", "expected"),
    [(None, 1.0, [0.75, 0.25]), ([1.0, 3.0], 1.0, [0.5, 0.5]), (None, 0.0, [0.5, 0.5]), ([0.0, 1.0], 0.0, [0.0, 1.0])],
)
def test_source_shares(weights, temperature, expected):
    stream = make_stream(pairs(30), pairs(10), weights=weights, source_temperature=temperature)
    assert stream.probabilities.tolist() == pytest.approx(expected)


def test_source_temperature_flattens():
    stream = make_stream(pairs(16), pairs(4), source_temperature=0.5)
    assert stream.probabilities.tolist() == pytest.approx([4 / 6, 2 / 6])


def test_impossible_weights_are_refused():
    with pytest.raises(ConfigError, match=r"source weights are \[0.0, 0.0\]"):
        make_stream(pairs(3), pairs(3), weights=[0.0, 0.0])


def test_a_batch_larger_than_its_source_repeats_as_little_as_possible():
    stream = make_stream(pairs(3), batch_size=7)
    assert sorted(Counter(queries(stream.draw())).values()) == [2, 2, 3]


@pytest.mark.parametrize(
    "changed",
    [
        {"records": pairs(12)},
        {"max_query_tokens": 60},
        {"seed": 1},
        {"batch_size": 3},
        {"template": "plain"},
        {"num_hard_negatives": 1},
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_state_of_other_data_or_settings_is_refused(changed):
    state = make_stream(pairs(11, negatives=1), batch_size=4).state_dict()
    settings = {"records": pairs(11, negatives=1), "batch_size": 4, **changed}
    with pytest.raises(CheckpointError, match=r"the checkpoint's stream 's' has (fingerprint|seed)"):
        make_stream(settings.pop("records"), **settings).load_state_dict(state)


def test_the_objective_may_change_on_resume():
    stream = make_stream(pairs(11))
    other = make_stream(pairs(11), objective=stream_config("pairs").objective.__class__(name="contrastive", temperature=0.5))
    other.load_state_dict(stream.state_dict())


def test_no_source_and_no_usable_row_are_errors():
    with pytest.raises(DataError, match=r"streams\.s has no source"):
        make_stream()
    with pytest.raises(DataError, match=r"0\.jsonl has no usable row \(1 x query: text empty after stripping\)"):
        make_stream([PairRecord(Text(" "), (Text("x"),))])


# -- cache ----------------------------------------------------------------------------------------------------------------


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    original = stream_module.PromptEncoder.embed

    def embed(self, texts, limit):
        calls.extend(text for text, _ in texts if text.startswith(("query", "document")))
        return original(self, texts, limit)

    monkeypatch.setattr(stream_module.PromptEncoder, "embed", embed)
    return calls


def test_rows_are_tokenized_once(monkeypatch):
    calls = counting(monkeypatch)
    first = make_stream(pairs(5)).draw(5)
    assert len(calls) == 10
    again = make_stream(pairs(5)).draw(5)
    assert len(calls) == 10
    assert content(first) == content(again)
    make_stream(pairs(5), max_query_tokens=64)
    assert len(calls) == 20, "other limits are other tokens"
    make_stream(pairs(6))
    assert len(calls) == 32, "other rows are other tokens"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "meta"])
def test_a_damaged_cache_is_built_anew_with_a_warning(own_cache: Path, damage):
    expected = content(make_stream(pairs(5)).draw(5))
    (folder,) = (path for path in (own_cache / "tokens").iterdir() if path.is_dir())
    ids = folder / "ids.bin"
    if damage == "flip":
        data = bytearray(ids.read_bytes())
        data[8] ^= 1
        ids.write_bytes(data)
    elif damage == "truncate":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "delete":
        ids.unlink()
    else:
        (folder / "table.json").write_text("{")
    with pytest.warns(UserWarning, match=r"is damaged .* it is made again"):
        assert content(make_stream(pairs(5)).draw(5)) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_stream(pairs(5))


def test_rejections_are_remembered_by_the_cache():
    rows = [*pairs(2), PairRecord(Text(" "), (Text("x"),))]
    assert make_stream(rows).stats.rejected == make_stream(rows).stats.rejected == {"query: text empty after stripping": 1}


def test_a_failing_source_leaves_no_cache_behind(own_cache: Path):
    with pytest.raises(DataError):
        make_stream(pairs(3), max_query_tokens=8)
    assert [path for path in (own_cache / "tokens").iterdir() if path.is_dir()] == []


# -- from a configuration ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run_config(tmp_path: Path) -> RunConfig:
    def write(name: str, rows: list[dict]) -> SourceConfig:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SourceConfig(path=str(path), instruction="Find it")

    train = write("train.jsonl", [{"query": f"q{i}", "positive": f"d{i}", "negative": "no"} for i in range(8)])
    held_out = write("held.jsonl", [{"query": f"h{i}", "positive": f"e{i // 2}", "negative": "no"} for i in range(6)])
    return RunConfig(
        recipe="test",
        model=ModelConfig(),
        streams={"emb": stream_config("pairs", sources=(train,), batch_size=8, attention="bidirectional")},
        validation=ValidationConfig(sources={"emb": (held_out,)}, retrieval=RetrievalConfig(queries=held_out, max_queries=4)),
    )


def test_streams_of_a_configuration(run_config):
    training, held_out = build_streams(run_config, TOKENIZER)["emb"], build_validation_streams(run_config, TOKENIZER)["emb"]
    assert sorted(queries(training.draw())) == [f"q{i}" for i in range(8)]
    assert held_out.batch_size == 6, "a held-out batch repeats no row"
    first = held_out.draw()
    held_out.reset()
    assert content(held_out.draw()) == content(first)
    assert TOKENIZER.decode(training.draw()[0].input_ids).startswith("<s><|user|>\nFind it\n<|embed|>\nq")


def test_held_out_sources_of_an_unknown_stream(run_config):
    config = RunConfig(
        recipe="t", model=ModelConfig(), streams=run_config.streams, validation=ValidationConfig(sources={"ebm": ()})
    )
    with pytest.raises(ConfigError, match=r"validation.sources names the stream 'ebm'. Did you mean 'emb'"):
        build_validation_streams(config, TOKENIZER)


def test_retrieval_searches_every_document_once(run_config):
    retrieval = build_retrieval(run_config, TOKENIZER)
    assert retrieval is not None
    texts_found = [TOKENIZER.decode(s.input_ids[s.pool[0] :]) for s in retrieval.documents]
    assert texts_found == ["e0", "no", "e1", "e2"]
    assert [TOKENIZER.decode(s.input_ids[s.pool[0] :]) for s in retrieval.queries] == ["h0", "h1", "h2", "h3"]
    assert retrieval.relevant == [{0}, {0}, {2}, {2}]
    assert all(s.bidirectional == (0, len(s)) for s in (*retrieval.queries, *retrieval.documents))


def test_retrieval_without_a_stream_of_pairs_is_refused(run_config):
    streams = {"gen": stream_config("chat", sources=run_config.streams["emb"].sources)}
    config = RunConfig(recipe="t", model=ModelConfig(), streams=streams, validation=run_config.validation)
    with pytest.raises(ConfigError, match=r"needs a stream that trains embeddings.*gen \(chat\)"):
        build_retrieval(config, TOKENIZER)


@pytest.mark.parametrize("content", ['{"query": "q"}', "", None], ids=["a row without an answer", "empty", "missing"])
def test_an_error_of_held_out_rows_names_their_place(content: str | None, run_config: RunConfig, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "bad.jsonl").write_text(content + "\n")
    bad = SourceConfig(path=str(tmp_path / "bad.jsonl"))
    held_out = ValidationConfig(sources={"emb": (bad,)}, retrieval=RetrievalConfig(queries=bad, max_queries=4))
    config = replace(run_config, validation=held_out)
    with pytest.raises(DataError, match=rf"^validation\.sources\.emb: .*{tmp_path}/bad\.jsonl"):
        build_validation_streams(config, TOKENIZER)
    with pytest.raises(DataError, match=rf"^validation\.retrieval: .*{tmp_path}/bad\.jsonl"):
        build_retrieval(config, TOKENIZER)


def test_an_error_of_a_source_names_the_stream(tmp_path: Path) -> None:
    config = compose_run(
        [
            "recipe=grit_smollm2",
            "model=tiny_random",
            "~streams.embedding",
            "~validation.sources",
            "~validation.retrieval",
            f"streams.generation.sources=[{{path: {tmp_path}/no.jsonl}}]",
        ]
    )
    with pytest.raises(DataError, match=r"^streams\.generation: no such file or folder: "):
        build_streams(config, tiny_tokenizer())
