"""G3, G4, L3: pooling of GritLM and LLM2Vec."""

import pytest
import torch
import torch.nn.functional as F

from tests.parity.parity_case import Case
from unified_lm.batch import Sample, make_pack
from unified_lm.models.pooling import pool

GRITLM = {"mean": "mean", "weightedmean": "weighted_mean", "lasttoken": "last_token"}


def lay_out(hidden, kept):
    """States of every row's kept positions end to end, and each row's span: `[T, D]`, `[B, 2]`."""
    lengths = kept.sum(1)
    stop = lengths.cumsum(0)
    return hidden[kept], torch.stack([stop - lengths, stop], dim=1)


@pytest.mark.parametrize("method", [*GRITLM, "cls"])
def test_g3_gritlm(shared_dir, method):
    """Masks with holes are laid out without the holes: a pool span is contiguous, and our weights too count kept tokens only.

    Departure: "cls" is the first token of the span; GritLM's is position 0 whether masked or not. A span over the whole row
    gives the same.
    """
    case = Case(shared_dir, "G3_pooling")
    kept = case["input/mask"].bool()
    states, spans = lay_out(case["input/hidden"], torch.ones_like(kept) if method == "cls" else kept)
    case.check(pool(states, spans, GRITLM.get(method, method)), method)


def packed(case, starts):
    """The rows as samples whose pool span begins at `starts`, packed, with the stand-in states of their tokens."""
    attended = case["input/attention_mask"].bool()
    samples = []
    for ids, kept, start in zip(case["input/input_ids"], attended, starts, strict=True):
        ids = ids[kept].numpy()
        samples.append(Sample(input_ids=ids, stream="s", pool=(start, len(ids)), bidirectional=(0, len(ids))))
    pack = make_pack(samples)
    assert torch.equal(pack.input_ids, case["input/input_ids"][attended]), "instruction tokens stay in the pack: attended to"
    return pack, case["input/hidden"][attended]


@pytest.mark.parametrize("method", GRITLM)
def test_g4_training(shared_dir, method):
    """The instruction is attended to and not pooled."""
    case = Case(shared_dir, "G4_instruction_mask_training")
    pack, hidden = packed(case, case["input/instruction_lens"].tolist())
    vectors = pool(hidden, pack.pool_spans, GRITLM[method])
    case.check(vectors, method)
    case.check(F.normalize(vectors, dim=-1), f"{method}_normalised")  # the reference tensors' own spelling
    assert torch.equal(pack.pool_spans[:, 1] - pack.pool_spans[:, 0], case["output/pooling_mask_sum"])


def test_g4_training_cls(shared_dir):
    """Departure: GritLM's "cls" pools position 0, an instruction token, even with the instruction masked; our span says so."""
    case = Case(shared_dir, "G4_instruction_mask_training")
    pack, hidden = packed(case, [0] * len(case["input/input_ids"]))
    case.check(pool(hidden, pack.pool_spans, "cls"), "cls")


@pytest.mark.parametrize("method", GRITLM)
def test_g4_inference(shared_dir, method):
    """At inference GritLM masks the instruction for the means only; the last token is the same either way."""
    case = Case(shared_dir, "G4_instruction_mask_inference")
    pack, hidden = packed(case, [case.params["instruction_len"]] * len(case["input/input_ids"]))
    vectors = pool(hidden, pack.pool_spans, GRITLM[method])
    case.check(vectors, method)
    case.check(F.normalize(vectors, dim=-1), f"{method}_normalised")  # the reference tensors' own spelling
    assert torch.equal(pack.pool_spans[:, 1] - pack.pool_spans[:, 0], case["output/pooling_mask_sum"])


def test_g4_instruction_included(shared_dir):
    """The option to pool the instruction too is a span from 0, and gives another vector."""
    case = Case(shared_dir, "G4_instruction_mask_inference")
    pack, hidden = packed(case, [0] * len(case["input/input_ids"]))
    vectors = pool(hidden, pack.pool_spans, "mean")
    case.check(vectors, "mean_with_instruction")
    assert (vectors - case["output/mean"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["plain", "instruction_skipped"])
@pytest.mark.parametrize("method", ["mean", "weighted_mean", "last", "eos"])
def test_l3_llm2vec(shared_dir, name, method):
    """Left-padded rows laid out without padding.

    Departure: a row without pooled tokens is impossible (`Sample` refuses an empty span); the reference averages padding.
    """
    case = Case(shared_dir, f"L3_pooling_{name}")
    kept = case["input/embed_mask" if case.params["skip_instruction"] else "input/attention_mask"].bool()
    states, spans = lay_out(case["input/hidden"], kept)
    case.check(pool(states, spans, "last_token" if method in ("last", "eos") else method), method)
