"""Packs and batches: nothing lost, nothing moved, equal modes together, every coordinate right."""

import numpy as np
import pytest
import torch

from unified_lm.batch import IGNORE, Sample, empty_pack, make_batch, make_pack
from unified_lm.batch.pack import first_fit


def sample(length: int, first: int = 100, mode: str = "causal", stream: str = "gen", **settings) -> Sample:
    span = {"causal": (0, 0), "bidirectional": (0, length), "span": (0, max(2, length // 2))}[mode]
    return Sample(input_ids=np.arange(first, first + length), stream=stream, bidirectional=span, **settings)


def labeled(length: int, first: int, at: list[int], stream: str = "gen", weights: float | None = None) -> Sample:
    labels = np.full(length, IGNORE)
    labels[at] = np.array(at) + first + 1000
    token_weights = None if weights is None else np.full(length, weights, np.float32)
    return sample(length, first, stream=stream, labels=labels, token_weights=token_weights)


def group(number: int, size: int, stream: str = "emb", length: int = 6) -> list[Sample]:
    return [
        sample(
            length + slot + number, 1000 * number + 100 * slot, "bidirectional", stream, pool=(2, length + slot + number),
            group=number, slot=slot, text_id=10 * number + slot,
        )
        for slot in range(size)
    ]  # fmt: skip


def random_samples(seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = [s for g in range(5) for s in group(g, 3, length=int(rng.integers(3, 20)))]
    for i in range(8):
        length = int(rng.integers(2, 30))
        at = sorted(rng.choice(np.arange(1, length), size=int(rng.integers(1, length)), replace=False).tolist())
        samples.append(labeled(length, 10_000 + 100 * i, at, weights=0.5))
    samples += [sample(int(rng.integers(4, 20)), 50_000 + 100 * i, "span", "prefix") for i in range(3)]
    return samples


def test_a_pack_holds_every_sample_where_the_plan_says():
    samples = [sample(3, 10, "bidirectional"), sample(5, 20), sample(4, 30, "span"), sample(2, 40)]
    pack = make_pack(samples)
    assert len(pack) == 14
    assert [s.input_ids[0] for s in pack.samples] == [20, 40, 30, 10], "causal, then spans, then bidirectional; stable within"
    for s, start, stop in zip(pack.samples, pack.plan.offsets, pack.plan.offsets[1:], strict=False):
        assert pack.input_ids[start:stop].tolist() == s.input_ids.tolist()
        assert pack.position_ids[start:stop].tolist() == list(range(len(s)))
    assert len(pack.plan.runs) == 3
    assert pack.plan.spans == tuple(s.bidirectional for s in pack.samples)
    assert pack.input_ids.dtype == pack.position_ids.dtype == torch.int64


def test_supervision_points_at_the_state_before_each_label():
    one, two = labeled(5, 10, [2, 4], weights=0.25), labeled(4, 50, [1], stream="mntp")
    pack = make_pack([one, two])
    gen, mntp = pack.supervised["gen"], pack.supervised["mntp"]
    assert gen.positions.tolist() == [1, 3]
    assert gen.targets.tolist() == [1012, 1014]
    assert gen.weights.tolist() == [0.25, 0.25]
    assert mntp.positions.tolist() == [5]
    assert mntp.targets.tolist() == [1051]
    assert mntp.weights.tolist() == [1.0]
    assert (gen.positions.dtype, gen.targets.dtype, gen.weights.dtype) == (torch.int64, torch.int64, torch.float32)


def test_supervision_never_crosses_a_border():
    pack = make_pack([labeled(3, 10, [1]), labeled(3, 20, [1])])
    starts = set(pack.plan.offsets[:-1])
    owner = np.searchsorted(pack.plan.offsets, pack.supervised["gen"].positions, side="right") - 1
    assert owner.tolist() == [0, 1]
    assert set(pack.supervised["gen"].positions.tolist()) <= starts


def test_a_label_at_position_0_is_impossible():
    with pytest.raises(AssertionError, match="position 0 has no predecessor"):
        Sample(input_ids=np.arange(3), stream="x", labels=np.arange(3))


def test_samples_without_labels_or_pool_leave_no_trace():
    pack = make_pack([sample(4), Sample(input_ids=np.arange(3), stream="x", labels=np.full(3, IGNORE))])
    assert pack.supervised == {}
    assert pack.pool_spans.shape == (0, 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("token_budget", [20, 40, 100, 10_000])
def test_every_sample_is_in_exactly_one_pack_and_every_coordinate_finds_its_tokens(seed, token_budget):
    samples = random_samples(seed)
    batch = make_batch(samples, token_budget)
    assert sorted(id(s) for pack in batch.packs for s in pack.samples) == sorted(map(id, samples))
    assert batch.num_tokens == sum(map(len, samples))
    assert batch.num_samples == len(samples)
    seen_rows = []
    for pack in batch.packs:
        assert len(pack) <= token_budget or len(pack.samples) == 1
        modes = [run.mode for run in pack.plan.runs]
        assert len(modes) == len(set(modes)), "one kernel call per mode"
        pooled = [s for s in pack.samples if s.pool is not None]
        for s, (start, stop), row in zip(pooled, pack.pool_spans.tolist(), pack.pool_rows, strict=True):
            assert pack.input_ids[start:stop].tolist() == s.input_ids[s.pool[0] : s.pool[1]].tolist()
            assert row == s.group * 3 + s.slot
            seen_rows.append(row)
        gen = [s for s in pack.samples if s.stream == "gen"]
        if gen:
            found = pack.supervised["gen"]
            expected = [(s.input_ids[i - 1], s.labels[i]) for s in gen for i in np.flatnonzero(s.labels != IGNORE)]
            assert list(zip(pack.input_ids[found.positions].tolist(), found.targets.tolist(), strict=True)) == expected
            assert (found.weights == 0.5).all()
    assert sorted(seen_rows) == list(range(15))


def test_groups_are_numbered_anew_in_order_of_their_global_number():
    batch = make_batch([*group(7, 2), *group(3, 2), *group(5, 2, "other")], 1000)
    assert batch.group_sizes == {"emb": 2, "other": 2}
    assert batch.num_groups == {"emb": 2, "other": 1}
    assert batch.text_ids["emb"].tolist() == [[30, 31], [70, 71]]
    rows = {(s, r) for pack in batch.packs for s, r in zip(pack.pool_streams, pack.pool_rows, strict=True)}
    assert rows == {("emb", 0), ("emb", 1), ("emb", 2), ("emb", 3), ("other", 0), ("other", 1)}


def test_text_ids_keep_all_63_bits():
    big = 2**63 - 1
    (one,) = make_batch([sample(3, stream="emb", pool=(0, 3), text_id=big)], 10).text_ids["emb"].tolist()
    assert one == [big]


def test_an_incomplete_group_is_our_mistake():
    with pytest.raises(AssertionError, match="incomplete groups"):
        make_batch([*group(0, 3), *group(1, 3)[:2]], 100)


def test_labeled_samples_share_only_the_last_pooled_pack():
    pooled = [s for g in range(6) for s in group(g, 2, length=10)]
    plain = [labeled(5, 10_000 + 10 * i, [1]) for i in range(6)]
    batch = make_batch([*plain, *pooled], 40)
    holds_pooled = [any(s.pool for s in pack.samples) for pack in batch.packs]
    holds_plain = [any(not s.pool for s in pack.samples) for pack in batch.packs]
    assert holds_pooled == sorted(holds_pooled, reverse=True), "pooled packs come first"
    assert sum(a and b for a, b in zip(holds_pooled, holds_plain, strict=True)) <= 1
    assert not any(holds_plain[: sum(holds_pooled) - 1])


def test_a_share_of_labeled_samples_only():
    batch = make_batch([labeled(5, 10, [1]), labeled(6, 20, [1])], 8, {"gen": 2.0})
    assert len(batch.packs) == 2
    assert batch.group_sizes == {}
    assert batch.counts == {"gen": 2.0}


def test_truncated_samples_are_counted():
    assert make_batch([sample(3, truncated=True), sample(4), sample(5, truncated=True)], 100).num_truncated == 2


def test_first_fit_fills_and_does_not_change_its_input():
    bins = [[sample(6)]]
    filled = first_fit([sample(4), sample(9), sample(2), sample(30)], 10, bins)
    assert [[len(s) for s in content] for content in filled] == [[6, 4], [30], [9], [2]]
    assert [len(s) for s in bins[0]] == [6]


def test_packing_wastes_little_on_skewed_lengths():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4, 0.8, size=200).astype(int), 2, 512)
    batch = make_batch([sample(int(n)) for n in lengths], 2048)
    assert len(batch.packs) == -(-int(lengths.sum()) // 2048), "as few packs as the tokens allow"


def test_a_moved_batch_is_the_same_batch():
    batch = make_batch(random_samples(0), 60, {"gen": 3.0})
    moved = batch.to(torch.device("cpu"))
    assert moved.counts == batch.counts
    for pack, other in zip(batch.packs, moved.packs, strict=True):
        assert torch.equal(pack.input_ids, other.input_ids)
        assert torch.equal(pack.pool_spans, other.pool_spans)
        assert pack.pool_rows == other.pool_rows
        assert pack.supervised.keys() == other.supervised.keys()


def test_positions_of_a_stream_are_all_tokens_of_its_samples() -> None:
    samples = random_samples(0)
    pack = make_pack(samples)
    for stream in ("gen", "emb", "prefix"):
        expected = sorted(token for s in samples if s.stream == stream for token in s.input_ids.tolist())
        assert sorted(pack.input_ids[pack.positions_of(stream)].tolist()) == expected
    assert pack.positions_of("other").dtype == torch.int64
    assert len(pack.positions_of("other")) == len(empty_pack().positions_of("gen")) == 0
