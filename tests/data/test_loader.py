"""A step's batch: the same samples, weights and counts on any number of ranks and for any token budget."""

import json

import numpy as np
import pytest
import torch

from tests.data.fake_source import FakeSource, chats, pairs, stream_config, texts
from unified_lm.batch import Batch, Sample
from unified_lm.batch.plan import sequence_mask
from unified_lm.core.errors import CheckpointError, ConfigError
from unified_lm.data.loader import SampleCost, StepLoader, imbalance, partition_samples
from unified_lm.data.streams import TableStream
from unified_lm.models.tiny import tiny_tokenizer
from unified_lm.objectives import NextTokenConfig

TOKENIZER = tiny_tokenizer()
MIXED = NextTokenConfig(normalization="mixed", micro_batch_size=3)


def make_streams() -> dict[str, TableStream]:
    configs = {
        "gen": (stream_config("chat", batch_size=7, objective=MIXED), chats(20)),
        "emb": (stream_config("pairs", batch_size=6, attention="bidirectional", num_hard_negatives=1), pairs(20, negatives=2)),
        "mntp": (stream_config("masked_text", batch_size=5, attention="bidirectional", template="plain"), texts(20)),
    }
    return {name: TableStream(name, config, [FakeSource(rows)], TOKENIZER, 0) for name, (config, rows) in configs.items()}


def make_loader(rank: int = 0, world_size: int = 1, token_budget: int = 256) -> StepLoader:
    return StepLoader(make_streams(), token_budget=token_budget, rank=rank, world_size=world_size)


def identity(sample: Sample) -> tuple:
    weights = None if sample.token_weights is None else sample.token_weights.tolist()
    labels = None if sample.labels is None else sample.labels.tolist()
    return (sample.stream, sample.group, sample.slot, sample.input_ids.tolist(), sample.bidirectional, labels, weights)


def everything(batches: list[Batch]) -> list[str]:
    return sorted(repr(identity(s)) for batch in batches for pack in batch.packs for s in pack.samples)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_union_over_ranks_is_the_batch_of_one_process(world_size):
    alone = make_loader()
    loaders = [make_loader(rank, world_size) for rank in range(world_size)]
    for _ in range(3):
        whole, shares = alone.next_batch(), [loader.next_batch() for loader in loaders]
        assert everything(shares) == everything([whole])
        assert all(share.counts == whole.counts for share in shares), "what sums are divided by is global"
        assert sum(share.num_groups["emb"] for share in shares) == whole.num_groups["emb"] == 6
        assert all(share.num_groups["emb"] >= 1 for share in shares)
        assert sum(share.num_tokens for share in shares) == whole.num_tokens
        assert sum(share.num_truncated for share in shares) == whole.num_truncated


@pytest.mark.parametrize("token_budget", [64, 100, 1000, 100_000])
def test_the_token_budget_changes_packs_only(token_budget):
    batch, reference = make_loader(token_budget=token_budget).next_batch(), make_loader().next_batch()
    assert everything([batch]) == everything([reference])
    assert batch.counts == reference.counts
    assert all(len(pack) <= token_budget or len(pack.samples) == 1 for pack in batch.packs)


def weighted_sum(batches: list[Batch], stream: str) -> float:
    """A stand-in for the loss: each supervised token costs its own number."""
    supervised = [pack.supervised[stream] for batch in batches for pack in batch.packs if stream in pack.supervised]
    return sum(float((s.weights.double() * s.targets.double()).sum()) for s in supervised)


def test_weighted_sums_and_counts_make_the_same_loss_on_any_number_of_ranks():
    alone = make_loader().next_batch()
    for world_size, budget in ((2, 64), (3, 1000)):
        shares = [make_loader(rank, world_size, budget).next_batch() for rank in range(world_size)]
        for stream in ("gen", "mntp"):
            assert weighted_sum(shares, stream) == pytest.approx(weighted_sum([alone], stream), rel=1e-12)
    assert alone.counts["gen"] == 3, "7 samples are 3 micro-batches of at most 3"
    labeled = sum(s.num_supervised for pack in alone.packs for s in pack.samples if s.stream == "mntp")
    assert alone.counts["mntp"] == labeled
    assert "emb" not in alone.counts


def test_groups_stay_whole_and_embedding_rows_are_numbered_per_rank():
    for rank in range(3):
        batch = make_loader(rank, 3, token_budget=100).next_batch()
        assert batch.group_sizes == {"emb": 3}
        rows = sorted(row for pack in batch.packs for row in pack.pool_rows)
        assert rows == list(range(3 * batch.num_groups["emb"]))
        assert batch.text_ids["emb"].shape == (batch.num_groups["emb"], 3)
        places = {row: (pack, i) for pack in batch.packs for i, row in enumerate(pack.pool_rows)}
        pooled = {id(pack): [s for s in pack.samples if s.pool] for pack in batch.packs}
        for row in rows:
            pack, index = places[row]
            sample = pooled[id(pack)][index]
            assert sample.slot == row % 3
            assert int(batch.text_ids["emb"][row // 3, row % 3]) == sample.text_id


COSTS = {"tokens": SampleCost(), "tokens and attention": SampleCost(1.0, 0.01), "mostly attention": SampleCost(1.0, 1.0)}


def random_step(seed: int) -> dict[str, list[Sample]]:
    """Streams of random sizes with log-normal lengths; pairs of three with bidirectional samples, chats alone."""
    rng = np.random.default_rng(seed)
    streams: dict[str, list[Sample]] = {}
    for name in ("first", "second", "third")[: rng.integers(1, 4)]:
        size = int(rng.choice([1, 3]))
        samples = []
        for group in range(int(rng.integers(1, 40))):
            for slot in range(size):
                length = int(rng.lognormal(4, 1)) + 2
                span = (0, length) if size > 1 else (0, 0)
                pool = (1, length) if size > 1 else None
                ids = np.ones(length, int)
                samples.append(Sample(input_ids=ids, stream=name, bidirectional=span, pool=pool, group=group, slot=slot))
        streams[name] = samples
    return streams


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 17])
def test_properties_of_a_deal(world_size, cost):
    for seed in range(8):
        step = random_step(seed)
        shares = partition_samples(step, world_size, cost)
        dealt = [id(sample) for share in shares for sample in share]
        assert sorted(dealt) == sorted(id(s) for samples in step.values() for s in samples), "every sample once"
        owners: dict[tuple[str, int], set[int]] = {}
        for rank, share in enumerate(shares):
            for sample in share:
                owners.setdefault((sample.stream, sample.group), set()).add(rank)
        assert all(len(ranks) == 1 for ranks in owners.values()), "groups stay whole"
        for name in step:
            num_groups = sum(stream == name for stream, _ in owners)
            holders = {rank for (stream, _), ranks in owners.items() if stream == name for rank in ranks}
            assert len(holders) == min(num_groups, world_size), "as many ranks hold the stream as can"
        loads = [sum(map(cost, share)) for share in shares]
        prices = [sum(cost(s) for samples in step.values() for s in samples if (s.stream, s.group) == unit) for unit in owners]
        assert max(loads) - min(loads) <= max(prices) * (1 + 1e-9), "ranks differ by at most one group"
        assert max(loads) <= sum(loads) / world_size + max(prices) * (1 + 1e-9)


def test_one_large_stream_keeps_the_bound_of_lpt():
    """At most 4/3 of the best deal (Graham, 1969); no deal is better than the mean or than the largest group."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        lengths = rng.lognormal(4, 1.5, size=30).astype(int) + 1
        samples = [Sample(input_ids=np.ones(n, int), stream="gen", group=i) for i, n in enumerate(lengths)]
        loads = [sum(map(len, share)) for share in partition_samples({"gen": samples}, 4)]
        assert max(loads) <= 4 / 3 * max(lengths.sum() / 4, lengths.max())


def test_a_sample_costs_its_tokens_and_the_pairs_that_see_each_other():
    for start, stop in ((0, 0), (0, 9), (2, 7), (3, 4)):
        sample = Sample(input_ids=np.ones(9, int), stream="a", bidirectional=(start, stop))
        pairs = int(sequence_mask(9, (start, stop)).sum())
        assert SampleCost(5.0, 2.0)(sample) == 5 * 9 + 2 * pairs
        assert SampleCost()(sample) == 9


def test_attention_counts_where_it_costs():
    """One sample of 1,000 tokens has as many tokens as ten of 100, and ten times the attention."""
    lengths = [1000] + [100] * 200
    samples = [Sample(input_ids=np.ones(n, int), stream="gen", group=i) for i, n in enumerate(lengths)]
    cost = SampleCost(1.0, 0.01)

    def waste(dealt_by: SampleCost) -> float:
        return imbalance([sum(map(cost, share)) for share in partition_samples({"gen": samples}, 4, dealt_by)])

    assert waste(cost) < 1.02 < 1.3 < waste(SampleCost())


def test_dealing_balances_tokens():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(4, 0.8, size=64).astype(int) + 1
    samples = {"gen": [Sample(input_ids=np.ones(n, int), stream="gen", group=i) for i, n in enumerate(lengths)]}
    loads = [sum(map(len, share)) for share in partition_samples(samples, 4)]
    in_order = [lengths[rank::4].sum() for rank in range(4)]
    assert imbalance(loads) < 1.02 < imbalance(in_order)


def test_imbalance_is_the_wait_for_the_slowest():
    assert imbalance([5, 5, 5]) == 1.0
    assert imbalance([4, 8]) == pytest.approx(4 / 3)
    assert imbalance([0, 0, 9]) == pytest.approx(3.0)
    assert imbalance([0, 0]) == 1.0, "nothing to wait for"


def test_the_loader_deals_by_its_cost():
    costly = StepLoader(make_streams(), token_budget=256, rank=0, world_size=2, cost=SampleCost(1.0, 1.0))
    assert everything([costly.next_batch()]) != everything([make_loader(0, 2).next_batch()])


def test_a_stream_of_few_groups_leaves_no_rank_without_one():
    big = [Sample(input_ids=np.ones(500, int), stream="a", pool=(0, 1), group=g, slot=s) for g in range(2) for s in (0, 1)]
    small = [Sample(input_ids=np.ones(n, int), stream="b", pool=(0, 1), group=g) for g, n in enumerate((3, 9))]
    shares = partition_samples({"a": big[:2] + big[2:], "b": small}, 2)
    assert all({s.stream for s in share} == {"a", "b"} for share in shares)


def test_resuming_on_another_number_of_ranks_continues_the_order():
    loader = make_loader()
    for _ in range(4):
        loader.next_batch()
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = [make_loader(rank, 2) for rank in range(2)]
    for part in resumed:
        part.load_state_dict(state)
    assert everything([part.next_batch() for part in resumed]) == everything([loader.next_batch()])


def test_reset_gives_the_first_batch_again():
    loader = make_loader()
    first = everything([loader.next_batch()])
    assert everything([loader.next_batch()]) != first
    loader.reset()
    assert everything([loader.next_batch()]) == first


def test_a_state_of_other_streams_is_refused():
    with pytest.raises(CheckpointError, match=r"has the streams \['x'\], this run has \['emb', 'gen', 'mntp'\]"):
        make_loader().load_state_dict({"x": {}})


def test_too_many_ranks_are_refused_all_problems_at_once():
    with pytest.raises(ConfigError, match=r"streams\.emb\.batch_size is 6 for 20 ranks(.|\n)*fewer samples than the 20 ranks"):
        make_loader(0, 20)
    with pytest.raises(ConfigError, match="no stream"):
        StepLoader({}, token_budget=8)


def test_drawing_does_not_touch_the_global_generators():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    make_loader().next_batch()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
