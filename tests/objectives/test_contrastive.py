"""The contrastive loss against its formula, and what each option changes."""

import pytest
import torch
import torch.nn.functional as F

from unified_lm.batch import MISSING
from unified_lm.core.errors import ConfigError
from unified_lm.objectives import ContrastiveConfig
from unified_lm.objectives.contrastive import Contrastive
from unified_lm.objectives.protocol import EmbeddingObjective

G, K, D = 6, 3, 10


def objective(score_bytes=2**28, *, mask_same_text=False, **options):
    options["mask_same_text"] = mask_same_text
    return Contrastive(ContrastiveConfig(**options), score_bytes=score_bytes)


@pytest.fixture
def embeddings():
    return torch.randn(G, K, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def by_hand(embeddings, temperature, excluded=()):
    """A loop over queries; `excluded` holds (query, group, slot) of documents left out."""
    unit = F.normalize(embeddings, dim=-1)
    total = 0.0
    for query in range(len(unit)):
        documents = [(g, s) for g in range(len(unit)) for s in range(1, unit.shape[1]) if (query, g, s) not in excluded]
        scores = torch.stack([unit[query, 0] @ unit[g, s] / temperature for g, s in documents])
        total = total + scores.logsumexp(0) - scores[documents.index((query, 1))]
    return total


def test_equals_the_formula(embeddings):
    term = objective(temperature=0.07)(embeddings)
    assert term.count == G
    expected = by_hand(embeddings, 0.07)
    torch.testing.assert_close(term.sum, expected)
    torch.testing.assert_close(torch.autograd.grad(term.sum, embeddings), torch.autograd.grad(expected, embeddings))


def test_order_of_groups_does_not_matter_but_that_of_slots_does(embeddings):
    term = objective()(embeddings).sum
    torch.testing.assert_close(objective()(embeddings.flip(0)).sum, term)
    assert abs(objective()(embeddings[:, [1, 0, 2]]).sum - term) > 1e-3


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_chunks_of_rows_change_nothing(embeddings, symmetric, mask):
    ids = torch.randint(1, 4, (G, K), generator=torch.Generator().manual_seed(3))
    results = []
    for score_bytes in (2**28, 1, 2 * G * 2 * 8):
        loss = objective(score_bytes, symmetric=symmetric, mask_same_text=mask)
        total = loss(embeddings, ids).sum
        results.append((total.detach(), torch.autograd.grad(total, embeddings)[0], dict(loss.metrics)))
    for other in results[1:]:
        torch.testing.assert_close(other[:2], results[0][:2], rtol=1e-12, atol=1e-12)
        assert other[2] == pytest.approx(results[0][2])


def test_symmetric_averages_both_directions(embeddings):
    swapped = embeddings[:, [1, 0]]
    expected = (by_hand(embeddings, 0.05) + by_hand(swapped, 0.05)) / 2
    torch.testing.assert_close(objective(temperature=0.05, symmetric=True)(embeddings).sum, expected)


def test_same_text_is_left_out(embeddings):
    ids = torch.arange(1, G * K + 1).reshape(G, K)
    ids[3, 2] = ids[0, 1]  # a hard negative of group 3 has the text of query 0's positive
    ids[4, 1] = ids[1, 0]  # the positive of group 4 has the text of query 1
    expected = by_hand(embeddings, 0.02, {(0, 3, 2), (1, 4, 1)})
    torch.testing.assert_close(objective(mask_same_text=True)(embeddings, ids).sum, expected)
    torch.testing.assert_close(objective(mask_same_text=False)(embeddings, ids).sum, by_hand(embeddings, 0.02))
    assert abs(expected - by_hand(embeddings, 0.02)) > 1e-6


def test_same_positive_everywhere_leaves_only_hard_negatives(embeddings):
    ids = torch.arange(1, G * K + 1).reshape(G, K)
    ids[:, 1] = 99
    excluded = {(q, g, 1) for q in range(G) for g in range(G) if q != g}
    found = objective(mask_same_text=True)(embeddings, ids).sum
    torch.testing.assert_close(found, by_hand(embeddings, 0.02, excluded))


def not_negatives(ids):
    """(query, group, slot) of documents that are left out, by a loop over the definition."""
    ids, left_out = ids.tolist(), set()
    for i, (query, positive, *_) in enumerate(ids):
        answers = {positive} | {other[1] for other in ids if query and other[0] == query}
        for j, group in enumerate(ids):
            for slot in range(1, len(group)):
                same = group[slot] and (group[slot] in answers or group[slot] == query)
                answer = slot == 1 and query and group[0] == query
                if (j, slot) != (i, 1) and (same or answer):
                    left_out.add((i, j, slot))
    return left_out


def test_answers_to_the_same_query_are_no_negatives_of_each_other():
    """Four answers to one query are all there is: nothing is left to tell apart, and the loss is 0, not ln 4."""
    same = torch.ones(4, 2, D, dtype=torch.float64)
    ids = torch.tensor([[7, 1], [7, 2], [7, 3], [7, 4]])
    for symmetric in (False, True):
        loss = objective(temperature=1.0, mask_same_text=True, symmetric=symmetric)
        assert float(loss(same, ids).sum) / 4 == 0.0
        assert float(loss(same, ids.flip(1)).sum) / 4 == 0.0  # one text that answers four queries
    assert float(objective(temperature=1.0)(same, ids).sum) / 4 == pytest.approx(torch.tensor(4.0).log().item())


def test_positives_of_the_same_query_elsewhere_are_left_out(embeddings):
    ids = torch.arange(1, G * K + 1).reshape(G, K)
    ids[3, 0] = ids[0, 0]  # groups 0 and 3 have one query,
    ids[5, 2] = ids[3, 1]  # and a hard negative of group 5 has the text of the second answer
    excluded = {(0, 3, 1), (3, 0, 1), (0, 5, 2), (3, 5, 2)}
    assert not_negatives(ids) == excluded
    torch.testing.assert_close(objective(mask_same_text=True)(embeddings, ids).sum, by_hand(embeddings, 0.02, excluded))


@pytest.mark.parametrize("seed", range(6))
def test_the_mask_is_its_definition(embeddings, seed):
    ids = torch.randint(0, 9, (G, K), generator=torch.Generator().manual_seed(seed))
    excluded = not_negatives(ids)
    assert excluded
    for score_bytes in (2**28, 1):
        found = objective(score_bytes, mask_same_text=True)(embeddings, ids).sum
        torch.testing.assert_close(found, by_hand(embeddings, 0.02, excluded))
    turned = by_hand(embeddings[:, [1, 0]], 0.02, not_negatives(ids[:, [1, 0]]))
    both = objective(mask_same_text=True, symmetric=True)(embeddings, ids).sum
    torch.testing.assert_close(both, (by_hand(embeddings, 0.02, excluded) + turned) / 2)


def test_unknown_texts_are_never_equal(embeddings):
    ids = torch.zeros(G, K, dtype=torch.int64)
    torch.testing.assert_close(objective(mask_same_text=True)(embeddings, ids).sum, by_hand(embeddings, 0.02))


def test_matryoshka_averages_over_leading_dimensions(embeddings):
    expected = (by_hand(embeddings[..., :4], 0.02) + by_hand(embeddings, 0.02)) / 2
    torch.testing.assert_close(objective(matryoshka_dims=(4, D))(embeddings).sum, expected)


def test_inverse_world_size_scales_the_gradient_only(embeddings):
    exact = objective()(embeddings).sum
    shrunk = objective(gradient_scale="inverse_world_size", reference_world_size=8)(embeddings).sum
    torch.testing.assert_close(shrunk, exact)
    torch.testing.assert_close(torch.autograd.grad(shrunk, embeddings)[0] * 8, torch.autograd.grad(exact, embeddings)[0])


def test_similarities_are_float32_under_autocast(embeddings):
    """bfloat16 scores at temperature 0.02 have a spacing of 0.25: GritLM's and LLM2Vec's defect."""
    values = embeddings.detach().bfloat16()
    expected = objective()(values.double()).sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = objective()(values).sum
        unit = F.normalize(values, dim=-1)
        coarse = (unit[:, 0] @ unit[:, 1:].transpose(0, 1).flatten(0, 1).T) / 0.02
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    low = F.cross_entropy(coarse.double(), torch.arange(G), reduction="sum")
    assert abs(low.item() - expected.item()) > 1e-3


def test_extreme_scores_stay_finite():
    embeddings = torch.ones(4, 2, 8).requires_grad_()
    loss = objective(temperature=0.001)(embeddings).sum
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert loss.item() == pytest.approx(4 * torch.tensor(4.0).log().item(), rel=1e-5)
    assert gradient.isfinite().all()


def test_metrics():
    query = torch.eye(4)
    embeddings = torch.stack([query, query], dim=1)
    loss = objective()
    assert isinstance(loss, EmbeddingObjective)
    loss(embeddings)
    assert loss.metrics == {"accuracy": 1.0, "positive_similarity": 1.0, "negative_similarity": 0.0}
    loss(torch.stack([query, query.flip(0)], dim=1))
    assert loss.metrics["accuracy"] == 0.0
    loss(torch.ones(4, 2, 8))
    assert loss.metrics["accuracy"] == 0.0, "a collapsed model ranks nothing"


def test_no_groups_and_one_group():
    empty = torch.zeros(0, 0, 0, requires_grad=True)
    term = objective()(empty)
    assert (term.sum.item(), term.count) == (0.0, 0.0)
    term.sum.backward()
    loss = objective()
    assert loss(torch.randn(1, 2, 4)).sum.item() == 0.0
    assert "negative_similarity" not in loss.metrics


def test_bad_input(embeddings):
    with pytest.raises(ConfigError, match="groups of 1"):
        objective()(embeddings[:, :1])
    with pytest.raises(ConfigError, match="got 64, but embeddings have only 10"):
        objective(matryoshka_dims=(64,))(embeddings)
    with pytest.raises(ConfigError, match="needs the text ids"):
        objective(mask_same_text=True)(embeddings)
    with pytest.raises(ConfigError, match="temperature: got 0"):
        objective(temperature=0)
    with pytest.raises(ConfigError, match="needs reference_world_size"):
        objective(gradient_scale="inverse_world_size")
    with pytest.raises(ConfigError, match=r"Did you mean 'exact'"):
        objective(gradient_scale="exakt")


def test_similarities_in_bfloat16_are_near_and_not_equal() -> None:
    embeddings = torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(5))
    exact = objective(temperature=0.05)(embeddings).sum
    rounded = objective(temperature=0.05, similarity_dtype="bfloat16")(embeddings).sum
    assert rounded.dtype == torch.float32
    assert rounded != exact
    assert torch.isclose(rounded, exact, rtol=0.05)


def test_an_unknown_similarity_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        Contrastive(ContrastiveConfig(similarity_dtype="bfloat"))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("score_bytes", [2**28, 1])
def test_missing_negatives_are_in_no_sum(embeddings, symmetric, mask, score_bytes):
    """The loss is that over each row's own number of negatives, whatever the empty places hold."""
    ids = torch.arange(1, 1 + G * K).reshape(G, K)
    ids[1, 2] = ids[4, 2] = MISSING
    loss = objective(score_bytes, temperature=0.2, symmetric=symmetric, mask_same_text=mask)
    term = loss(embeddings, ids)
    expected = by_hand(embeddings, 0.2, {(query, group, 2) for query in range(G) for group in (1, 4)})
    if symmetric:
        expected = (expected + by_hand(embeddings[:, [1, 0]], 0.2)) / 2
    torch.testing.assert_close(term.sum, expected)
    gradients = torch.autograd.grad(term.sum, embeddings, retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, embeddings))
    assert not gradients[0][[1, 4], 2].any()
    unit = F.normalize(embeddings.detach(), dim=-1)
    cosines = unit[:, 0] @ unit[:, 1:].flatten(0, 1).T
    kept = [i for i in range(2 * G) if i not in (3, 9)]
    negative = (cosines[:, kept].sum() - (unit[:, 0] * unit[:, 1]).sum()) / (G * (len(kept) - 1))
    assert loss.metrics["negative_similarity"] == pytest.approx(float(negative))
    moved = embeddings.detach().clone()
    moved[1, 2] = -moved[1, 0]
    torch.testing.assert_close(loss(moved, ids).sum, expected.detach())
    assert abs(loss(moved, ids.abs() * 2).sum - expected) > 1e-3, "as texts they would count"
