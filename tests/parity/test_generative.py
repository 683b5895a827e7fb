"""G2, L2: the generative loss of GritLM, and masked next-token prediction of LLM2Vec on tiny models."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.parity.parity_case import Case
from unified_lm.batch import IGNORE, OutputHead, Sample, make_pack
from unified_lm.batch.normalization import normalize
from unified_lm.models.backbone import Backbone
from unified_lm.objectives import MaskedNextTokenConfig, NextTokenConfig
from unified_lm.objectives.token import MaskedNextToken, NextToken

SCHEMES = {"mixed": "mixed", "token": "sum_per_sample"}


def as_sample(ids, labels, bidirectional=False):
    """A row without its padding. A label at position 0 has no predecessor: a `Sample` refuses it, the reference ignores it."""
    labels = labels.numpy().copy()
    labels[0] = IGNORE
    span = (0, len(ids)) if bidirectional else (0, 0)
    return Sample(input_ids=ids.numpy(), labels=labels, stream="s", bidirectional=span)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", ["mixed", "mixed_half", "token", "token_003"])
def test_g2_gritlm(shared_dir, name, trained, dtype):
    """Their "mixed" is our "mixed" with the local batch as micro-batch; their "token" is our "sum_per_sample".

    With an identity as head, hidden states are logits. Departure: label weights are float32, so that "mixed" (a weight of
    1/11 here) agrees to 1e-7 instead of 1e-9 in float64.
    """
    case = Case(shared_dir, f"G2_generative_{name}")
    labels = case["input/labels"]
    scheme = SCHEMES[case.params["loss_type"]]
    ids = torch.zeros(labels.shape[1], dtype=torch.int64)
    samples, count = normalize([as_sample(ids, row) for row in labels], scheme, len(labels) if scheme == "mixed" else None)
    pack = make_pack(samples)
    logits = case["input/logits"].to(dtype).requires_grad_()
    head = OutputHead(torch.eye(logits.shape[-1], dtype=dtype).requires_grad_(trained))
    term = NextToken(NextTokenConfig())(logits.flatten(0, 1), head, pack.supervised["s"])
    loss = case.params["factor"] * term.sum / count
    loss.backward()
    assert term.count == case.params["supervised_tokens_after_shift"]
    case.check(loss.detach(), "loss", "float32" if scheme == "mixed" else None)
    case.check(logits.grad, "grad_logits", "float32" if scheme == "mixed" else None)
    assert loss.item() == pytest.approx(case["output/loss"].item(), rel=1e-6)


def load(case):
    options = dict(case.params["hf_config"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    model.load_state_dict(case.weights())
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("layout", ["nopad", "right", "left"])
def test_l2_llm2vec(shared_dir, family, layout):
    """One pack without padding against their unpadded, right-padded and left-padded batches.

    Departure: with left padding the reference predicts a padded row's first label from a padding state; the case holds
    none, and ours has no such position.
    """
    case = Case(shared_dir, f"L2_mntp_{family}")
    backbone = Backbone(load(case), kernel="sdpa")
    mask = case[f"input/{layout}/attention_mask"].bool()
    rows = list(zip(case[f"input/{layout}/input_ids"], case[f"input/{layout}/labels"], mask, strict=True))
    samples = [as_sample(ids[kept], labels[kept], bidirectional=True) for ids, labels, kept in rows]
    samples, count = normalize(samples, "token")
    pack = make_pack(samples)
    assert len(pack) == int(mask.sum()), "no padding"
    head = backbone.output_head()
    with torch.no_grad():
        hidden = backbone(pack)
        term = MaskedNextToken(MaskedNextTokenConfig())(hidden, head, pack.supervised["s"])
    tolerance = case.entry["tolerance"]["default"]["float32"]
    torch.testing.assert_close(hidden, case[f"output/{layout}/hidden"][mask], **tolerance)
    torch.testing.assert_close(hidden @ head.weight.T, case[f"output/{layout}/logits"][mask], **tolerance)
    case.check(term.sum / count, f"{layout}/loss")


def test_l2_causal_attention_is_far_away(shared_dir):
    """The negative case: the same weights with a causal mask."""
    case = Case(shared_dir, "L2_mntp_llama")
    mask = case["input/nopad/attention_mask"].bool()
    pack = make_pack([Sample(input_ids=np.asarray(case["input/nopad/input_ids"][mask]), stream="s")])
    with torch.no_grad():
        hidden = Backbone(load(case), kernel="sdpa")(pack)
    assert (hidden - case["output/nopad/hidden"][mask]).abs().max() > 1.0
