"""G1, L1, L4: the contrastive losses of GritLM and LLM2Vec."""

import pytest
import torch

from tests.parity.parity_case import Case
from unified_lm.objectives import ContrastiveConfig
from unified_lm.objectives.contrastive import Contrastive, info_nce

PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def contrastive(temperature):
    return Contrastive(ContrastiveConfig(temperature=temperature, mask_same_text=False))


def leaf(tensor, dtype):
    return tensor.to(dtype).requires_grad_()


@PRECISIONS
@pytest.mark.parametrize("name", ["G1", "G2", "G4", "G2_temp"])
def test_g1_gritlm(shared_dir, name, dtype):
    """Ours sums over queries and normalizes inside; their loss is the mean, on vectors normalized before.

    Departure: the gradient with respect to *normalized* vectors. Theirs is of the loss without normalization; ours lacks
    that gradient's radial part, because the loss does not depend on a vector's length. Through the normalization, with respect
    to the raw vectors, which is all that training sees, both are the same.
    """
    case = Case(shared_dir, f"G1_contrastive_{name}")
    size = case.params["G"]
    loss = contrastive(case.params["temperature"])

    def run(suffix):
        query, passages = leaf(case[f"input/q{suffix}"], dtype), leaf(case[f"input/p{suffix}"], dtype)
        grouped = torch.cat([query[:, None], passages.reshape(-1, size, passages.shape[-1])], dim=1)
        term = loss(grouped)
        mean = term.sum / term.count
        mean.backward()
        return mean.detach(), query, passages

    mean, query, passages = run("_raw")
    case.check(mean, "loss")
    case.check(query.grad, "grad_q_raw")
    case.check(passages.grad, "grad_p_raw")
    mean, query, passages = run("")
    case.check(mean, "loss")
    for tensor, output in ((query, "grad_q"), (passages, "grad_p")):
        unit, theirs = case[f"input/{output[-1]}"], case[f"output/{output}"]
        tangential = theirs - (theirs * unit).sum(1, keepdim=True) * unit
        torch.testing.assert_close(tensor.grad.double(), tangential, rtol=2e-4, atol=5e-5)


def groups_of(case, prefix, dtype):
    names = [name for name in ("q", "pos", "neg") if f"{prefix}{name}" in case.tensors]
    return {name: leaf(case[f"{prefix}{name}"], dtype) for name in names}


@PRECISIONS
@pytest.mark.parametrize("name", ["scale20_neg", "scale20_noneg", "scale50_neg", "scale50_noneg"])
def test_l1_llm2vec(shared_dir, name, dtype):
    """Their scale multiplies the cosine: it is our inverse temperature.

    Departure: our groups all have the same number of negatives. The case with 8 negatives for 5 queries goes through the
    function under the objective, which takes any number; the others go through both.
    """
    case = Case(shared_dir, f"L1_hardneg_{name}")
    parts = groups_of(case, "input/", dtype)
    query, *documents = parts.values()
    loss = info_nce(query, torch.cat(documents), 1 / case.params["scale"]).loss / len(query)
    loss.backward()
    case.check(loss.detach(), "loss")
    if all(len(part) == len(query) for part in documents):
        term = contrastive(1 / case.params["scale"])(torch.stack(list(parts.values()), dim=1))
        case.check(term.sum.detach() / term.count, "loss")
    for part, tensor in parts.items():
        case.check(tensor.grad, f"grad_{part}")


@PRECISIONS
@pytest.mark.parametrize("name", ["equal", "unequal"])
def test_l4_two_ranks(shared_dir, name, dtype):
    """The loss over both ranks' groups, and each rank's own slice of its gradient, as the engine's step forms them."""
    case = Case(shared_dir, f"L4_gathered_{name}")
    ranks = [groups_of(case, f"input/rank{rank}/", dtype) for rank in range(len(case.params["rank_sizes"]))]
    gathered = torch.cat([torch.stack(list(parts.values()), dim=1) for parts in ranks])
    term = contrastive(1 / case.params["scale"])(gathered)
    (term.sum / term.count).backward()
    case.check(term.sum.detach() / term.count, "loss")
    for rank, parts in enumerate(ranks):
        for part, tensor in parts.items():
            case.check(tensor.grad, f"rank{rank}/grad_{part}")


def test_l4_is_no_mean_of_rank_losses(shared_dir):
    """The negative case: losses of the ranks alone see fewer negatives."""
    case = Case(shared_dir, "L4_gathered_unequal")
    loss = contrastive(1 / case.params["scale"])
    ranks = [groups_of(case, f"input/rank{rank}/", torch.float64) for rank in (0, 1)]
    terms = [loss(torch.stack(list(parts.values()), dim=1)) for parts in ranks]
    apart = sum(t.sum for t in terms) / sum(t.count for t in terms)
    assert abs(apart - case["output/loss"]) > 1e-3
