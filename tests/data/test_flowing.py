"""Running text that is read along: every row once an epoch, the same from any position, nothing read that is not needed."""

import json
import shutil
from collections import Counter
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tests.data.fake_source import FakeSource, stream_config
from tests.engine.small_run import equal, metrics, tensors
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose_run
from unified_lm.config.streams import RecordKind, SourceConfig
from unified_lm.core.errors import CheckpointError, ConfigError, DataError
from unified_lm.data import flowing
from unified_lm.data.flowing import FlowingStream, open_flow
from unified_lm.data.formats import MaskingConfig
from unified_lm.data.rows.records import TextRecord
from unified_lm.data.streams import TableStream
from unified_lm.models.tiny import tiny_tokenizer
from unified_lm.reporting.report_page import write_report

TOKENIZER = tiny_tokenizer()
LIMIT = 12


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(flowing, "BLOCK_ROWS", 4)


def write(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def sentences(start: int, count: int) -> list[str]:
    return [f"row {i} " + "word " * (i % 5) for i in range(start, start + count)]


def folder(tmp_path: Path) -> Path:
    for number, count in enumerate((9, 1, 7)):
        write(tmp_path / "corpus" / f"part-{number}.jsonl", sentences(100 * number, count))
    return tmp_path / "corpus"


def make(*paths: Path, chunking: str = "record", seed: int = 0, weights=None, **settings) -> FlowingStream:
    config = stream_config(settings.pop("format", "text"), chunking=chunking, max_tokens=LIMIT, **settings)
    flows = [open_flow(SourceConfig(path=str(path), streaming=True), RecordKind.TEXT) for path in paths]
    return FlowingStream("s", config, flows, TOKENIZER, seed, weights or [1.0] * len(flows))


def drawn(stream, count: int) -> list[tuple]:
    return [(s.input_ids.tolist(), s.labels.tolist(), s.group) for s in stream.draw(count)]


@pytest.mark.parametrize("chunking", ["record", "concatenate"])
def test_an_epoch_has_the_tokens_of_the_table(tmp_path, chunking):
    """As a stream that tokenizes everything first; only the order of rows differs."""
    corpus = folder(tmp_path)
    texts = [text for number, count in enumerate((9, 1, 7)) for text in sentences(100 * number, count)]
    table = TableStream(
        "s",
        stream_config("text", chunking=chunking, max_tokens=LIMIT),
        [FakeSource([TextRecord(text) for text in texts])],
        TOKENIZER,
        0,
    )
    stream = make(corpus, chunking=chunking)
    whole = sorted(tuple(s.input_ids.tolist()) for s in table.draw(table.num_rows))
    if chunking == "record":
        assert sorted(tuple(ids) for ids, *_ in drawn(stream, table.num_rows)) == whole
        assert stream.stats.truncated == {"corpus": sum(map(bool, table.tables[0].truncated))}
    else:  # cut elsewhere; the tokens that do not fill a piece go into the next epoch
        lead = len(stream.encoder.leading_ids)
        tokens = sum(len(ids) - lead for ids in whole)
        pieces = drawn(stream, tokens // (LIMIT - lead))
        assert {len(ids) for ids, *_ in pieces} == {LIMIT}
        counted = Counter(token for ids in whole for token in ids[lead:])
        counted.subtract(token for ids, *_ in pieces for token in ids[lead:])
        assert min(counted.values()) >= 0
        assert counted.total() == tokens % (LIMIT - lead)


def test_epochs_read_every_row_once_in_other_orders(tmp_path):
    stream = make(folder(tmp_path))
    first, second = drawn(stream, 17), drawn(stream, 17)
    assert sorted(ids for ids, *_ in first) == sorted(ids for ids, *_ in second)
    assert [ids for ids, *_ in first] != [ids for ids, *_ in second]
    assert stream.stats.epochs == {"corpus": 1}
    assert drawn(make(folder(tmp_path)), 17) == first
    assert drawn(make(folder(tmp_path), seed=1), 17) != first
    stream.reset()
    assert drawn(stream, 17) == first


@pytest.mark.parametrize("chunking", ["record", "concatenate"])
@pytest.mark.parametrize("format", ["text", "masked_text"])
def test_from_any_position_the_rest_is_the_same(tmp_path, chunking, format):
    corpus = folder(tmp_path)
    other = write(tmp_path / "other.jsonl", sentences(1000, 6))
    more = {"format": format, "chunking": chunking, "weights": [2.0, 1.0]}
    more |= {"masking": MaskingConfig()} if format == "masked_text" else {}
    stream = make(corpus, other, **more)
    states, batches = [], []
    for _ in range(25):
        states.append(json.loads(json.dumps(stream.state_dict())))
        batches.append(drawn(stream, 3))
    for index, state in enumerate(states):
        resumed = make(corpus, other, **more)
        resumed.load_state_dict(state)
        assert [drawn(resumed, 3) for _ in batches[index:]] == batches[index:], index


def test_nothing_is_read_ahead_of_a_block(tmp_path):
    """A corpus may have any length: here it has no end."""

    def endless(start: int):
        for number in range(start, 10**9):
            read.append(number)
            yield f"row {number}", {"text": f"text {number}"}

    read: list[int] = []
    found = open_flow(SourceConfig(path=str(write(tmp_path / "a.jsonl", ["x"])), streaming=True), RecordKind.TEXT)
    flow = flowing.Flow("endless", [flowing.Part("endless", endless)], "hash", found.parser, found.skip)
    stream = FlowingStream("s", stream_config("text", max_tokens=LIMIT), [flow], TOKENIZER, 0, [1.0])
    stream.draw(6)
    assert read == list(range(8))
    state = stream.state_dict()
    resumed = FlowingStream("s", stream_config("text", max_tokens=LIMIT), [flow], TOKENIZER, 0, [1.0])
    read.clear()
    resumed.load_state_dict(state)
    assert read == [4, 5, 6, 7], "only the block that it stopped in"
    assert drawn(resumed, 9) == drawn(stream, 9)


def test_what_cannot_be_used(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one of them"}\n{"text": " "}\n{"text": 5}\n{"text": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"streams\.s: .*a\.jsonl, line 3, field 'text': got"):
        make(path).draw(1)
    flow = open_flow(SourceConfig(path=str(path), streaming=True, on_unusable="skip"), RecordKind.TEXT)
    stream = FlowingStream("s", stream_config("text", max_tokens=LIMIT), [flow], TOKENIZER, 0, [1.0])
    stream.draw(1)
    assert stream.stats.rejected.total() == 2
    path.write_text('{"text": " "}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl has no usable row \(1 x empty text after stripping\)"):
        make(path).draw(1)
    with pytest.raises(DataError, match="no such file or folder"):
        make(tmp_path / "none.jsonl")


def test_changed_files_are_refused(tmp_path):
    corpus = folder(tmp_path)
    stream = make(corpus)
    stream.draw(11)
    state = stream.state_dict()
    write(corpus / "part-1.jsonl", sentences(100, 2))
    with pytest.raises(CheckpointError, match="has fingerprint"):
        make(corpus).load_state_dict(state)
    with pytest.raises(CheckpointError, match="has fingerprint"):
        make(corpus, chunking="concatenate").load_state_dict(state)
    same_size = [text.replace("row", "   ").replace("word", "    ") if "7" not in text else text for text in sentences(0, 9)]
    one = write(tmp_path / "one.jsonl", sentences(0, 9))
    stream = make(one)
    stream.draw(3)
    state = stream.state_dict()
    write(one, [" " * len(text) for text in same_size])
    with pytest.raises(CheckpointError, match=r"has given 3 pieces of the rows from 1 on, and has 0 now"):
        make(one).load_state_dict(state)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> str:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for number, count in enumerate((9, 1, 7)):
        write(tmp_path / "hub" / f"train-{number:05d}-of-00003.jsonl", sentences(100 * number, count))
    write(tmp_path / "hub" / "test.jsonl", sentences(500, 3))
    return str(tmp_path / "hub")


def test_a_hub_data_set_is_read_along(hub):
    def open_stream(split: str | None = None) -> FlowingStream:
        flow = open_flow(SourceConfig(hub=hub, streaming=True, split=split), RecordKind.TEXT)
        return FlowingStream("s", stream_config("text", max_tokens=LIMIT), [flow], TOKENIZER, 0, [1.0])

    stream = open_stream()
    assert len(stream.cursors[0].flow.parts) == 3
    batches, states = [], []
    for _ in range(12):
        states.append(stream.state_dict())
        batches.append(drawn(stream, 3))
    first = [ids for batch in batches for ids, *_ in batch][:17]
    assert len(set(map(tuple, first))) == 17, "every row once"
    resumed = open_stream()
    resumed.load_state_dict(states[5])
    assert [drawn(resumed, 3) for _ in batches[5:]] == batches[5:]
    assert len({tuple(ids) for ids, *_ in drawn(open_stream("test"), 9)}) == 3


CHANGED = {
    "columns": {"text": "other"},
    "ignore": ("label",),
    "on_unusable": "skip",
    "split": "test",
    "subset": "x",
    "revision": "y",
    "data_dir": "z",
}
ELSEWHERE = {
    "streaming": "what this file is about",
    "limit": "with it the first rows are read (test_sources)",
    "instruction": "refused for running text (StreamConfig.problems)",
    "document_instruction": "as above",
    "on_empty": "running text always skips blank rows",
    "weight": "how often rows are drawn",
}


@pytest.mark.parametrize("field", [f.name for f in fields(SourceConfig) if f.name not in ("path", "hub", "builtin")])
def test_every_setting_changes_what_is_read_or_is_refused(tmp_path, field):
    assert (field in CHANGED) != (field in ELSEWHERE), f"a new setting of sources: say what it does here ({field})"
    if field in ELSEWHERE:
        return
    for split in ("train", "test"):
        rows = [{"text": f"{split} {i}", "other": f"o{i}", **({"label": 0} if field == "ignore" else {})} for i in range(5)]
        rows += [{"text": 5, "other": "o"}] if field == "on_unusable" else []
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def read(**given) -> object:
        config = SourceConfig(**{"path": str(tmp_path), "streaming": True, "split": "train"} | given)
        try:
            flow = open_flow(config, RecordKind.TEXT)
            stream = FlowingStream("s", stream_config("text", max_tokens=LIMIT), [flow], TOKENIZER, 0, [1.0])
            return flow.fingerprint, sorted(ids for ids, *_ in drawn(stream, 5))
        except DataError as error:
            return str(error)

    before, after = read(), read(**{field: CHANGED[field]})
    assert after != before
    if field in ("subset", "revision", "data_dir"):
        assert isinstance(after, str)
        assert field in after


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("streams.generation.sources=[{path: a, streaming: true}]", "only as running text, got format chat"),
        ("streams.text.sources=[{path: a, streaming: true}, {path: b}]", "set it for all sources of a stream"),
        ("streams.text.sources=[{path: a, streaming: true, limit: 3}]", "with a limit it belongs to a Hub data set"),
        ("validation.sources.text=[{path: a, streaming: true}]", "held-out rows are read before training"),
    ],
)
def test_settings_that_do_not_fit(override, message):
    recipe = "grit_smollm2" if "generation" in override else "monet_tiny"
    with pytest.raises(ConfigError, match=message):
        compose_run([f"recipe={recipe}", override])


def test_a_run_stopped_anywhere_goes_on_bit_for_bit(tmp_path):
    corpus = folder(tmp_path)
    common = [
        "recipe=llm2vec_mntp",
        "model=tiny_random",
        "lora=none",
        f"streams.mntp.sources=[{{path: {corpus}, streaming: true}}]",
        "~validation.sources",
        "streams.mntp.batch_size=3",
        "max_steps=8",
        "checkpoint.every=3",
        "checkpoint.keep_last=9",
        "export.enabled=false",
        "logging.progress=false",
    ]
    whole = train([*common, f"run_dir={tmp_path}/whole"])
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    for step in (6, 8):
        shutil.rmtree(part / "checkpoints" / f"step-{step:08d}")
    train([*common, f"run_dir={part}", "resume=auto"])
    last = "checkpoints/step-00000008"
    assert equal(tensors(whole / last), tensors(part / last))
    assert metrics(whole) == metrics(part)
    rows = json.loads((whole / "run.json").read_text())["data"]
    assert [row["rows"] for row in rows] == [None]


def test_a_row_that_cannot_be_used_costs_no_step(tmp_path):
    """Nobody looks at the rows beforehand, so it is met in the middle of the run."""
    path = write(tmp_path / "a.jsonl", [f"a sentence of some words number {i} " * 40 for i in range(12)])
    common = [
        "recipe=llm2vec_mntp",
        "model=tiny_random",
        "lora=none",
        f"streams.mntp.sources=[{{path: {path}, streaming: true}}]",
        "~validation.sources",
        "streams.mntp.batch_size=2",
        "max_steps=9",
        "checkpoint.every=0",
        "export.enabled=false",
        "logging.progress=false",
    ]
    whole = train([*common, f"run_dir={tmp_path}/whole"])
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:6], '{"text": 5}'.ljust(len(rows[6])), *rows[7:]]) + "\n")  # of the same size
    with pytest.raises(
        DataError, match=r"(?s)a\.jsonl, line 7, field 'text'.*\nThe [1-8] steps taken are saved.*on_unusable=skip"
    ):
        train([*common, f"run_dir={tmp_path}/broken"])
    (saved,) = (tmp_path / "broken" / "checkpoints").glob("step-*")
    path.write_text("\n".join(rows) + "\n")
    train([*common, f"run_dir={tmp_path}/broken", "resume=auto"])
    last = "checkpoints/step-00000009"
    assert saved.name != "step-00000009"
    assert equal(tensors(whole / last), tensors(tmp_path / "broken" / last))


def test_the_record_says_what_was_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    long = "a sentence of some words " * 40
    rows = [{"text": f"{i} {long}", "source": "x"} if i % 3 else {"text": 5} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(
        [
            "recipe=llm2vec_mntp",
            "model=tiny_random",
            "lora=none",
            f"streams.mntp.sources=[{{path: {path}, streaming: true, on_unusable: skip}}]",
            "streams.mntp.chunking=record",
            "~validation.sources",
            "streams.mntp.batch_size=4",
            "max_steps=2",
            "export.enabled=false",
            "logging.progress=false",
            f"run_dir={tmp_path}/run",
        ]
    )
    (entry,) = json.loads((run / "run.json").read_text())["data"]
    assert sum(entry["rejected"].values()) == 4
    assert entry["truncated"] == 8
    assert entry["ignored"] == {"source": 8}
    assert "read along" in write_report(run).read_text()


def test_a_format_of_whole_rows_is_refused(tmp_path, monkeypatch):
    class Own(flowing.Text):
        def samples(self, table, row, group, rng):
            return super().samples(table, row, group, rng)

    monkeypatch.setattr("unified_lm.data.stream.get_format", lambda config: Own)
    with pytest.raises(ConfigError, match="overrides `samples`, which has whole rows"):
        make(folder(tmp_path))


def test_weights_decide_how_often_a_source_is_drawn(tmp_path):
    first = write(tmp_path / "a.jsonl", ["aaaa"])
    second = write(tmp_path / "b.jsonl", ["bbbb"])
    stream = make(first, second, weights=[3.0, 1.0])
    assert np.allclose(stream.probabilities, [0.75, 0.25])
    ids = Counter(tuple(ids) for ids, *_ in islice(drawn(stream, 400), 400))
    assert sorted(ids.values())[0] == pytest.approx(100, abs=40)
    assert asdict(stream.config)["format"] == "text"
