"""A leak probe for the model at hand, run once at start-up: who really sees whom?

Nothing is assumed about the family: three short samples are packed, the last token of one is changed, and the hidden states
tell whether its past, its future and its neighbors noticed. Costs four forwards of eighteen tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from unified_lm.batch import AttentionMode, Pack, Sample, make_pack
from unified_lm.core.errors import ModelError
from unified_lm.core.random import RngState
from unified_lm.models.backbone import Backbone

Whole = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]
"""Parameters -> a context in which they hold their whole values."""

_LENGTH = 6
_SPAN = (1, 4)

_ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""By dtype: a relative change of a state up to this may be rounding (experts get other numbers of tokens, say)."""


def _as_they_are(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    return nullcontext()


@torch.no_grad()
def probe_attention(backbone: Backbone, *, partial_spans: bool = True, whole: Whole = _as_they_are) -> None:
    """Check on the loaded model that the mask of every kind of sample is what its plan says, and that logits are as described.

    Training mode and random state are left as they were.

    Args:
        backbone: the model, on the device that it will run on.
        partial_spans: whether to probe partial spans too; turn off for kernels that refuse them.
        whole: parameters -> a context in which they hold their whole values, where ranks hold parts.

    Raises:
        ModelError: a causal token sees its future, a bidirectional one does not, a neighbor leaks, or the output head is not
            what `Backbone.output_head` says.
    """
    rng, training = RngState.capture(), backbone.training
    backbone.eval()
    try:
        _probe_masks(backbone, _samples(backbone.vocab_size, partial_spans))
        _probe_head(backbone, whole)
    finally:
        backbone.train(training)
        rng.restore()


def _samples(vocab_size: int, partial_spans: bool) -> list[Sample]:
    spans = [(0, 0), (0, _LENGTH), *([_SPAN] if partial_spans else [])]
    tokens = 3 + np.arange(len(spans) * _LENGTH, dtype=np.int64) * 7
    return [
        Sample(input_ids=ids % vocab_size, stream="probe", bidirectional=span)
        for ids, span in zip(tokens.reshape(-1, _LENGTH), spans, strict=True)
    ]


def _probe_masks(backbone: Backbone, samples: list[Sample]) -> None:
    pack = make_pack(samples).to(backbone.causal_lm.device)
    before = backbone(pack)
    rounding = _ROUNDING.get(before.dtype, 1e-5)
    for index, (start, length) in enumerate(zip(pack.plan.offsets, pack.plan.lengths, strict=False)):
        # For a partial span the token to change is the span's last: what follows it is causal.
        changed = pack.plan.spans[index][1] - 1 if pack.plan.mode(index) is AttentionMode.SPAN else length - 1
        after = backbone(_flip(pack, start + changed, backbone.vocab_size))
        change_T = (after - before).float().norm(dim=-1) / before.float().norm(dim=-1).clamp_min(1e-12)
        _judge(backbone, pack, index, change_T.cpu(), changed, rounding)


def _flip(pack: Pack, position: int, vocab_size: int) -> Pack:
    input_ids = pack.input_ids.clone()
    input_ids[position] = (input_ids[position] + vocab_size // 2) % vocab_size
    return replace(pack, input_ids=input_ids)


def _judge(backbone: Backbone, pack: Pack, index: int, change_T: torch.Tensor, changed: int, rounding: float) -> None:
    plan = pack.plan
    start, stop = plan.offsets[index], plan.offsets[index + 1]
    mode = plan.mode(index)
    model = f"{type(backbone.causal_lm).__name__} with attention kernel '{backbone.kernel}'"
    if not torch.isfinite(change_T).all():
        raise ModelError(f"{model} gives states that are not finite for a pack of {plan.num_tokens} tokens.")
    if change_T[start + changed] == 0:
        raise ModelError(f"{model} ignores its input: changing a token changed nothing.")
    elsewhere = torch.cat([change_T[:start], change_T[stop:]])
    if elsewhere.max() > rounding:
        raise ModelError(f"{model} leaks: a token of one packed sample changed another sample by {elsewhere.max():.1e}.")
    past = change_T[start : start + changed]
    span_start = 0 if mode is AttentionMode.BIDIRECTIONAL else plan.spans[index][0]
    if mode is not AttentionMode.BIDIRECTIONAL:
        before_span = past if mode is AttentionMode.CAUSAL else past[:span_start]
        if before_span.max() > rounding:
            raise ModelError(f"{model} leaks: a causal token saw its future (changed by {before_span.max():.1e}).")
    if mode is not AttentionMode.CAUSAL and past[span_start] == 0:
        raise ModelError(f"{model} is not bidirectional where it was asked to be: the first token did not see the last.")


def _probe_head(backbone: Backbone, whole: Whole) -> None:
    head = backbone.output_head()
    with backbone.stock_attention() as causal_lm:
        tokens = torch.arange(3, 3 + _LENGTH, device=causal_lm.device)[None] % backbone.vocab_size
        hidden = causal_lm.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0].to(head.weight.dtype)
        expected = causal_lm(input_ids=tokens, use_cache=False).logits[0].float()
    with whole([tensor for tensor in (head.weight, head.bias) if isinstance(tensor, nn.Parameter)]):
        logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    error = float((logits - expected).norm() / expected.norm().clamp_min(1e-12))
    if error > 2 * _ROUNDING.get(hidden.dtype, 1e-5):
        raise ModelError(
            f"the output head of {type(backbone.causal_lm).__name__} is not linear as assumed: logits differ by {error:.1e} "
            "(relative). The family needs an entry in models/families.py."
        )
