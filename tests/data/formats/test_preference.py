"""Preference rows: samples with their controls, the choice of mismatched answers, and the built-in set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.fake_source import FakeSource, stream_config
from unified_lm.batch import IGNORE
from unified_lm.composition.compose import compose
from unified_lm.config.schema import RunConfig, SourceConfig
from unified_lm.core.errors import DataError
from unified_lm.data.formats.mismatch import mismatched_partners
from unified_lm.data.loader import StepLoader
from unified_lm.data.pydocs.preferences import Failure, failure_of, preference_rows
from unified_lm.data.rows.prepare import prepare
from unified_lm.data.rows.records import PreferenceRecord
from unified_lm.data.streams import TableStream, build_streams, build_validation_streams
from unified_lm.models.tiny import tiny_tokenizer
from unified_lm.objectives import KTOConfig

TOKENIZER = tiny_tokenizer()
KTO = KTOConfig()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path / "cache"))


def preferences(count: int) -> list[PreferenceRecord]:
    """Two rows a prompt, as in binarized data: neighbors share it."""
    return [PreferenceRecord(f"question {i // 2}", f"answer {i} {'y' * (5 * i % 23)}", i % 2 == 0) for i in range(count)]


def make_stream(*sources: FakeSource | list[PreferenceRecord], weights: list[float] | None = None) -> TableStream:
    config = stream_config("preference", objective=KTO, batch_size=4, max_tokens=128)
    opened = [source if isinstance(source, FakeSource) else FakeSource(source) for source in sources]
    return TableStream("preference", config, opened, TOKENIZER, 0, weights)  # type: ignore[arg-type]


def answer(sample) -> str:
    return TOKENIZER.decode(sample.labels[sample.labels != IGNORE].tolist())


def prompt(sample) -> str:
    return TOKENIZER.decode(sample.input_ids[sample.labels == IGNORE].tolist())


def test_a_row_is_a_sample_and_its_control():
    rows = preferences(10)
    stream = make_stream(rows)
    assert (stream.scored, stream.pooled) == (True, False)
    for row, record in enumerate(rows):
        sample, control = stream.format.samples(stream.tables[0], row, 3, np.random.default_rng(0))
        assert (sample.sequence.desirable, sample.is_control, sample.slot, sample.group) == (record.desirable, False, 0, 3)
        assert (control.sequence.desirable, control.is_control, control.slot, control.group) == (None, True, 1, 3)
        assert sample.bidirectional == control.bidirectional == (0, 0)
        assert answer(sample) == record.completion.strip() + TOKENIZER.eos_token
        assert prompt(sample) == prompt(control)
        assert record.prompt in prompt(sample)
        others = [r.completion.strip() for r in rows if r.prompt != record.prompt]
        assert answer(control).removesuffix(TOKENIZER.eos_token) in others


def test_partners_have_other_prompts_and_depend_on_the_rows_alone():
    keys = [1, 1, 2, 2, 2, 3, 1, 4]
    partners = mismatched_partners(keys, "rows")
    assert all(keys[partner] != key for partner, key in zip(partners, keys, strict=True))
    assert partners.tolist() == mismatched_partners(keys, "renamed").tolist()
    assert sorted(mismatched_partners(range(50), "rows").tolist()) == list(range(50)), "every answer once, where all differ"
    with pytest.raises(DataError, match="have one prompt between them"):
        mismatched_partners([7, 7, 7], "rows.jsonl")


def of_one_kind(desirable: bool) -> FakeSource:
    kind = "good" if desirable else "bad"
    return FakeSource([PreferenceRecord(f"question {i}", f"{kind} answer {i}", desirable) for i in range(4)], name=kind)


def test_one_kind_of_row_is_an_error():
    with pytest.raises(
        DataError, match=r"streams\.preference: all 4 rows are desirable \(good\)\. .* a source with undesirable"
    ):
        make_stream(of_one_kind(True))
    with pytest.raises(DataError, match=r"all 8 rows are undesirable \(bad #0, bad #1\)"):
        make_stream(of_one_kind(False), of_one_kind(False))


def test_each_kind_may_have_a_source_of_its_own():
    stream = make_stream(of_one_kind(True), of_one_kind(False))
    drawn = [sample for _ in range(4) for sample in stream.draw() if not sample.is_control]
    assert {(sample.sequence.desirable, "good" in answer(sample)) for sample in drawn} == {(True, True), (False, False)}
    with pytest.raises(DataError, match=r"all 4 rows are desirable \(good\)"):
        make_stream(of_one_kind(True), of_one_kind(False), weights=[1.0, 0.0])  # the second one is never drawn from


def test_each_kind_may_have_a_file_of_its_own(tmp_path: Path):
    files, folder = [], tmp_path / "rows"
    folder.mkdir()
    for label in (True, False):
        files.append(SourceConfig(path=str(folder / f"{label}.jsonl")))
        rows = [{"prompt": f"q {i}", "completion": f"{label} {i}", "label": label} for i in range(6)]
        (folder / f"{label}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose(["recipe=kto_smollm2", "model=tiny_random"])
    assert isinstance(config, RunConfig)
    for sources in (files, [SourceConfig(path=str(folder))]):
        part = replace(config.streams["preference"], sources=tuple(sources))
        held_out = replace(config.validation, sources={"preference": tuple(sources)}, retrieval=None)
        run = replace(config, streams={"preference": part}, validation=held_out)
        for streams in (build_streams(run, TOKENIZER), build_validation_streams(run, TOKENIZER)):
            assert streams["preference"].num_rows == 12


def test_the_count_of_a_step_is_that_of_its_rows_on_any_number_of_ranks():
    loaders = [
        StepLoader({"preference": make_stream(preferences(10))}, token_budget=100, rank=r, world_size=2) for r in range(2)
    ]
    (alone,) = [StepLoader({"preference": make_stream(preferences(10))}, token_budget=100)]
    whole, shares = alone.next_batch(), [loader.next_batch() for loader in loaders]
    assert whole.counts == shares[0].counts == shares[1].counts == {"preference": 4.0}
    assert whole.num_samples == sum(share.num_samples for share in shares) == 4
    for share in shares:
        controls = sorted(s.group for pack in share.sequences.controls for s in pack.samples)
        assert controls == sorted(s.group for pack in share.packs for s in pack.samples), "a control stays with its row"
        assert sum(len(p.samples) for p in share.sequences.unknown) == share.num_samples


def test_stored_references_travel_with_their_samples():
    stream = make_stream(preferences(10))
    before = stream.draw()
    stream.reset()
    stream.references = [np.arange(20, dtype=np.float32).reshape(10, 2)]
    after = stream.draw()
    assert all(sample.sequence.reference is None for sample in before)
    for plain, sample in zip(before, after, strict=True):
        assert plain.input_ids.tolist() == sample.input_ids.tolist()
        assert sample.sequence.reference % 2 == sample.slot
        if not sample.slot:
            row = int(answer(sample).removesuffix(TOKENIZER.eos_token).split()[1])
            assert sample.sequence.reference == 2 * row


def test_built_in_answers_fail_in_three_ways():
    names = [f"package.module.object_{i}" for i in range(60)]
    pairs = [(f"What does {name} do?", f"Sentence one of {name}. Sentence two.") for name in names]
    rows = list(preference_rows(pairs, "What does {name} do?"))
    assert [row["label"] for row in rows] == [True, False] * 60
    kinds = {failure_of(name) for name in names}
    assert kinds == set(Failure)
    for index, name in enumerate(names):
        good, bad = rows[2 * index], rows[2 * index + 1]
        assert good["prompt"] == bad["prompt"] == pairs[index][0]
        assert good["completion"] == pairs[index][1] != bad["completion"]
        expected = {Failure.WRONG: pairs[index - 1][1], Failure.REPETITIVE: " ".join([f"Sentence one of {name}."] * 3)}
        assert bad["completion"] == expected.get(failure_of(name), bad["completion"])


def test_ultrafeedback_becomes_two_rows_a_prompt(tmp_path: Path):
    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]

    rows = [
        {"prompt": "Q", "chosen": turns("Q", "good"), "rejected": turns("Q", "bad")},
        {"prompt": "R", "chosen": turns("R", "same"), "rejected": turns("R", "same")},
        {"prompt": "S", "chosen": turns("S", "a", "b", "c"), "rejected": turns("S", "bad")},
    ]
    for split in ("train_prefs", "test_prefs"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{split}-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = prepare("ultrafeedback", tmp_path / "out", local=tmp_path / "in")
    assert done.num_rows == 4
    assert dict(done.dropped) == {"both answers are equal": 2, "more than one turn": 2}
    written = [json.loads(line) for line in (tmp_path / "out/ultrafeedback/train.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["completion"]) for row in written] == [("Q", "good"), ("Q", "bad")]
    (tmp_path / "in" / "train_prefs-0.jsonl").write_text(json.dumps({"prompt": "Q", "chosen": "good"}) + "\n")
    with pytest.raises(DataError, match="field 'chosen'"):
        prepare("ultrafeedback", tmp_path / "again", local=tmp_path / "in")
