"""The attention plan: modes, runs, and the reference mask against a definition written out token by token."""

import numpy as np
import pytest
import torch

from unified_lm.batch import AttentionMode, AttentionPlan, Block, Sample, attention_span, consecutive_blocks
from unified_lm.batch.plan import free_stretches, mode_of, sequence_mask

CASES = [
    ([5], [(0, 0)]),
    ([5], [(0, 5)]),
    ([4, 1, 6, 3], [(0, 0), (0, 1), (2, 5), (0, 3)]),
    ([6, 6], [(0, 3), (3, 6)]),
]


def sees(query: int, key: int, span: tuple[int, int], window: int | None) -> bool:
    """The definition: causal, or both inside the span; the window as transformers counts it in either direction."""
    inside = span[0] <= query < span[1] and span[0] <= key < span[1]
    if window is None:
        return key <= query or inside
    return (key <= query and query - key < window) or (inside and abs(query - key) <= window)


@pytest.mark.parametrize(("lengths", "spans"), CASES)
@pytest.mark.parametrize("window", [None, 1, 2, 4])
def test_the_dense_mask_is_the_definition(lengths, spans, window):
    plan = AttentionPlan.build(lengths, spans)
    places = [(sequence, position) for sequence, length in enumerate(lengths) for position in range(length)]
    expected = [
        [a == b and sees(query, key, spans[a], window) for b, key in places]
        for a, query in places
    ]  # fmt: skip
    assert torch.equal(plan.dense_mask(window), torch.tensor(expected))


def test_no_sequence_sees_another_and_every_token_sees_itself():
    mask = AttentionPlan.build([3, 4, 2], [(0, 3), (0, 0), (0, 2)]).dense_mask()
    assert mask.diagonal().all()
    assert not mask[:3, 3:].any()
    assert not mask[3:7, :3].any()
    assert not mask[3:7, 7:].any()
    assert not mask[7:, :7].any()


def test_a_block_sees_itself_and_what_lies_outside_sees_all_before():
    blocks = (Block(1, 3), Block(3, 6, bidirectional=True))
    plan = AttentionPlan.build([8], [(0, 0)], blocks=[blocks])
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]
    assert torch.equal(plan.dense_mask(), torch.tensor(expected, dtype=torch.bool))
    expected[6] = [0, 0, 0, 0, 0, 1, 1, 0]
    expected[7] = [0, 0, 0, 0, 0, 0, 1, 1]
    assert torch.equal(plan.dense_mask(2), torch.tensor(expected, dtype=torch.bool))
    assert (plan.mode(0), plan.runs[0].mode) == (AttentionMode.BLOCKS, AttentionMode.BLOCKS)
    assert free_stretches(8, blocks) == [(0, 1), (6, 8)]
    assert free_stretches(6, blocks) == [(0, 1)]


def test_blocks_that_fill_a_sequence_are_sequences_of_their_own():
    together = AttentionPlan.build([9], [(0, 0)], blocks=[(Block(0, 4), Block(4, 9, bidirectional=True))])
    assert torch.equal(together.dense_mask(), AttentionPlan.build([4, 5], [(0, 0), (0, 5)]).dense_mask())


@pytest.mark.parametrize(
    ("blocks", "span", "text"),
    [
        ((Block(0, 3), Block(2, 4)), (0, 0), "overlap"),
        ((Block(4, 6),), (0, 0), "outside"),
        ((Block(2, 2),), (0, 0), "empty"),
        ((Block(0, 2),), (0, 5), "not both"),
    ],
)
def test_blocks_that_cannot_be_are_refused(blocks, span, text):
    with pytest.raises(AssertionError, match=text):
        Sample(input_ids=np.arange(5), stream="s", bidirectional=span, blocks=blocks)


def test_modes():
    assert mode_of(4, (0, 0)) is AttentionMode.CAUSAL
    assert mode_of(4, (2, 3)) is AttentionMode.CAUSAL, "a span of one token changes nothing"
    assert mode_of(1, (0, 1)) is AttentionMode.CAUSAL
    assert mode_of(4, (0, 4)) is AttentionMode.BIDIRECTIONAL
    assert mode_of(4, (0, 3)) is AttentionMode.SPAN
    assert mode_of(4, (2, 4)) is AttentionMode.SPAN
    assert mode_of(4, (1, 4)) is AttentionMode.KEEP_FIRST
    assert mode_of(2, (1, 2)) is AttentionMode.CAUSAL, "two tokens, the first alone: causal"


def test_a_first_token_alone_is_the_only_difference_to_bidirectional():
    """The sample's own mask, a block's, and one with a window, entry by entry."""
    for length in (1, 2, 3, 9):
        expected = torch.ones(length, length, dtype=torch.bool)
        expected[0, 1:] = False
        span = attention_span("bidirectional_keep_first", length)
        assert torch.equal(sequence_mask(length, span), expected)
        block = AttentionPlan.build([length], [(0, 0)], blocks=[consecutive_blocks([length], "bidirectional_keep_first")])
        assert torch.equal(block.dense_mask(), expected)
        windowed = sequence_mask(length, span, sliding_window=3)
        assert torch.equal(windowed[1:, 1:], sequence_mask(length, (0, length), sliding_window=3)[1:, 1:])
        assert windowed[0].tolist() == [True] + [False] * (length - 1)
    assert attention_span("bidirectional", 5) == (0, 5)
    assert attention_span("causal", 5) == (0, 0)
    with pytest.raises(KeyError):
        attention_span("sideways", 5)


def test_a_one_token_span_has_the_causal_mask():
    assert torch.equal(sequence_mask(4, (2, 3)), sequence_mask(4, (0, 0)))
    assert not torch.equal(sequence_mask(4, (1, 3)), sequence_mask(4, (0, 0)))


def test_runs_cover_the_pack_and_join_neighbors_of_one_mode():
    lengths, spans = [3, 2, 5, 4, 1], [(0, 0), (0, 0), (1, 3), (0, 4), (0, 1)]
    plan = AttentionPlan.build(lengths, spans)
    assert [run.mode for run in plan.runs] == [
        AttentionMode.CAUSAL,
        AttentionMode.SPAN,
        AttentionMode.BIDIRECTIONAL,
        AttentionMode.CAUSAL,
    ]
    assert [(run.first, run.last, run.start, run.stop) for run in plan.runs] == [
        (0, 2, 0, 5),
        (2, 3, 5, 10),
        (3, 4, 10, 14),
        (4, 5, 14, 15),
    ]
    assert plan.runs[0].cu_seqlens.tolist() == [0, 3, 5]
    assert [run.max_seqlen for run in plan.runs] == [3, 5, 4, 1]
    assert plan.cu_seqlens.tolist() == list(plan.offsets) == [0, 3, 5, 10, 14, 15]
    assert plan.cu_seqlens.dtype == plan.runs[0].cu_seqlens.dtype == torch.int32
    assert (plan.num_tokens, plan.max_seqlen) == (15, 5)


def test_a_moved_plan_forgets_what_kernels_derived():
    plan = AttentionPlan.build([2], [(0, 2)])
    plan.kernel_cache["block mask"] = object()
    assert plan.to(torch.device("cpu")).kernel_cache == {}
    assert plan.kernel_cache
