"""A leak probe of the loaded model, run once at start-up: which tokens really see which?

It assumes nothing about the family. Short samples of every mode are packed, one token of a sample is changed, and the hidden
states show whether earlier tokens, later tokens, other blocks and other samples are affected. Then one token moves to the
position of the longest sample, which no other sample may notice. It costs seven forwards of twenty-four tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from unified_lm.batch import AttentionMode, Block, Pack, Sample, attention_span, make_pack
from unified_lm.core.errors import ModelError
from unified_lm.core.random import RngState
from unified_lm.models import families
from unified_lm.models.backbone import Backbone
from unified_lm.models.headless import is_headless
from unified_lm.models.modes import GatherParameters, evaluation_mode, no_gathering

_LENGTH = 6
_SPAN = (1, 4)
_BLOCKS = (Block(0, 3, bidirectional=True), Block(3, 5))
_SPREAD = 16
"""Distance between neighboring positions where positions are probed."""

_ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""By dtype: relative change of a state that rounding may cause."""

_MIXTURE_ROUNDING = 1e-4
"""The same in float32 where tokens choose experts: another token elsewhere lets experts get other numbers of tokens, whose
products round differently (1.1e-5 after 30 layers of an upcycled SmolLM2). A token that is seen changes states by 1e-2."""


@torch.no_grad()
def probe_attention(
    backbone: Backbone, *, partial_spans: bool = True, longest: int = 0, whole: GatherParameters = no_gathering
) -> None:
    """Check that the loaded model applies the mask of every kind of sample, and that its logits are those of its output head.

    The training mode of every module and the random state are restored.

    Args:
        backbone: the model, on the device that it runs on.
        partial_spans: whether to probe partial spans too; False for kernels that refuse them.
        longest: tokens of the longest sample that will run, so that its last position is probed as well.
        whole: gathers parameters that are partitioned (ZeRO-3).

    Raises:
        ModelError: a causal token sees its future, a bidirectional one does not, a token sees another sample, a sample depends
            on the length of another, or the output head differs from what `Backbone.output_head` describes.
    """
    rng = RngState.capture()
    try:
        with evaluation_mode(backbone):  # dropout would change states without any leak
            samples = _samples(backbone.vocab_size, partial_spans)
            _probe_masks(backbone, samples)
            _probe_positions(backbone, samples, longest)
            if not is_headless(backbone.causal_lm):
                _probe_head(backbone, whole)
    finally:
        rng.restore()


@torch.no_grad()
def stock_attention_sees_future(backbone: Backbone, *, causal: bool) -> bool:
    """Whether transformers' own attention lets a token see later ones, if the configuration says `is_causal=causal`.

    This is what stock tools do with an export, whatever our kernels do in training.

    Args:
        backbone: the model, on the device that it runs on. Its configuration and modes are restored.
        causal: the value of `is_causal`.
    """
    config = families.text_config(backbone.causal_lm)
    before = config.__dict__.get("is_causal")
    rng = RngState.capture()
    tokens = (3 + 7 * torch.arange(2 * _LENGTH, device=backbone.causal_lm.device))[None] % backbone.vocab_size
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + backbone.vocab_size // 2) % backbone.vocab_size
    try:
        config.is_causal = causal
        with evaluation_mode(backbone), backbone.stock_attention() as causal_lm:
            decoder = causal_lm.get_decoder()
            first, other = (decoder(input_ids=ids, use_cache=False).last_hidden_state[0, :-1] for ids in (tokens, changed))
    finally:
        if before is None:
            del config.is_causal
        else:
            config.is_causal = before
        rng.restore()
    change = float(((other - first).float().norm(dim=-1) / first.float().norm(dim=-1).clamp_min(1e-12)).max())
    return change > rounding_of(backbone.causal_lm, first.dtype)


def rounding_of(causal_lm: PreTrainedModel, dtype: torch.dtype) -> float:
    """The relative change of a state of this dtype that rounding may cause in a model."""
    least = _ROUNDING.get(dtype, 1e-5)
    return max(least, _MIXTURE_ROUNDING) if families.router_places(causal_lm) else least


def _samples(vocab_size: int, partial_spans: bool) -> list[Sample]:
    masks: list[dict[str, Any]] = [{"bidirectional": (0, 0)}, {"bidirectional": (0, _LENGTH)}, {"blocks": _BLOCKS}]
    if partial_spans:
        masks += [{"bidirectional": _SPAN}, {"bidirectional": attention_span("bidirectional_keep_first", _LENGTH)}]
    tokens = 3 + np.arange(len(masks) * _LENGTH, dtype=np.int64) * 7
    return [
        Sample(input_ids=ids % vocab_size, stream="probe", **mask)
        for ids, mask in zip(tokens.reshape(-1, _LENGTH), masks, strict=True)
    ]


def _probe_masks(backbone: Backbone, samples: list[Sample]) -> None:
    pack = make_pack(samples).to(backbone.causal_lm.device)
    before = backbone(pack)
    rounding = rounding_of(backbone.causal_lm, before.dtype)
    for index, (start, length) in enumerate(zip(pack.plan.offsets, pack.plan.lengths, strict=False)):
        # The last token, which a causal mask hides from all others. For a partial span the span's last token, because the
        # tokens behind the span are causal and see it in any case; for blocks that of the first one, likewise.
        ends = {AttentionMode.SPAN: pack.plan.spans[index][1], AttentionMode.BLOCKS: _BLOCKS[0].stop}
        changed = ends.get(pack.plan.mode(index), length) - 1
        after = backbone(_flip(pack, start + changed, backbone.vocab_size))
        change_T = (after - before).float().norm(dim=-1) / before.float().norm(dim=-1).clamp_min(1e-12)
        _check_changes(backbone, pack, index, change_T.cpu(), changed, rounding)


def _probe_positions(backbone: Backbone, samples: list[Sample], longest: int) -> None:
    """Move the last token of a sample to the last position of the longest one: no other sample may notice.

    Frequencies that are chosen by the longest position of a pack would change them all.
    """
    if longest <= _LENGTH:
        return
    pack = make_pack(samples).to(backbone.causal_lm.device)
    # Spread out, because distant positions show changed frequencies best, which low precision would hide in near ones.
    near = replace(pack, position_ids=(pack.position_ids * _SPREAD).clamp(max=longest - 1))
    stop = pack.plan.offsets[1]
    far_T = near.position_ids.clone()
    far_T[stop - 1] = longest - 1
    before = backbone(near)[stop:].float()
    after = backbone(replace(pack, position_ids=far_T))[stop:].float()
    change_T = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-12)
    # Other frequencies change all tokens. In low precision rounding lets a token of a mixture choose another expert now and
    # then, which changes that one more (1.6e-2 in an upcycled SmolLM2 in bfloat16).
    change = float(change_T.median() if families.router_places(backbone.causal_lm) else change_T.max())
    if not change <= rounding_of(backbone.causal_lm, backbone.causal_lm.dtype):
        raise ModelError(
            f"{type(backbone.causal_lm).__name__} leaks: a sample of {longest} tokens changed the positions of another one in "
            f"its pack (by {change:.1e}). Lower the streams' limits, in tokens, to the model's original context."
        )


def _flip(pack: Pack, position: int, vocab_size: int) -> Pack:
    """The pack with another token at one position."""
    input_ids = pack.input_ids.clone()
    input_ids[position] = (input_ids[position] + vocab_size // 2) % vocab_size
    return replace(pack, input_ids=input_ids)


def _check_changes(backbone: Backbone, pack: Pack, index: int, change_T: torch.Tensor, changed: int, rounding: float) -> None:
    """Compare the changes of all states with what the plan lets through.

    Args:
        backbone: for the error text.
        pack: before the change.
        index: of the sample with the changed token.
        change_T: relative change of each state.
        changed: position of the changed token in its sample.
        rounding: largest relative change that rounding may cause.

    Raises:
        ModelError: a token that must not see the changed one does, or the reverse.
    """
    plan = pack.plan
    start, stop = plan.offsets[index], plan.offsets[index + 1]
    mode = plan.mode(index)
    model = f"{type(backbone.causal_lm).__name__} with attention kernel '{backbone.kernel}'"
    if not torch.isfinite(change_T).all():
        raise ModelError(f"{model} computes states that are not finite for a pack of {plan.num_tokens} tokens.")
    if change_T[start + changed] == 0:
        raise ModelError(f"{model} ignores its input: changing a token changed nothing.")
    # Other samples of the pack: with a wrong boundary or a stock causal mask, later ones would see this one.
    elsewhere = torch.cat([change_T[:start], change_T[stop:]])
    if elsewhere.max() > rounding:
        raise ModelError(f"{model} leaks: a token of one packed sample changed another sample by {elsewhere.max():.1e}.")
    seen = plan.mask(index)[:, changed].to(change_T.device)
    own = change_T[start:stop]
    # Nobody sees the token through others: what sees it directly is all that may change.
    if (hidden := own[~seen]).numel() and hidden.max() > rounding:
        who = "a block saw what is outside it" if mode is AttentionMode.BLOCKS else "a causal token saw its future"
        raise ModelError(f"{model} leaks: {who} (changed by {hidden.max():.1e}).")
    # Compared with 0, not with the tolerance: what one token contributes to another may be small.
    if mode is not AttentionMode.CAUSAL and own[seen][0] == 0:
        raise ModelError(f"{model} is not bidirectional where it was asked to be: the first token did not see the last.")


def _probe_head(backbone: Backbone, whole: GatherParameters) -> None:
    """Check that logits are the linear map, scale and cap that losses compute from `Backbone.output_head`."""
    dtype = backbone.head_weight.dtype
    with backbone.stock_attention() as causal_lm:
        tokens = torch.arange(3, 3 + _LENGTH, device=causal_lm.device)[None] % backbone.vocab_size
        hidden = causal_lm.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0].to(dtype)
        expected = causal_lm(input_ids=tokens, use_cache=False).logits[0].float()
    with whole(list(backbone.causal_lm.get_output_embeddings().parameters())):
        head = backbone.output_head()
        logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    error = float((logits - expected).norm() / expected.norm().clamp_min(1e-12))
    if error > 2 * rounding_of(backbone.causal_lm, hidden.dtype):
        raise ModelError(
            f"the output head of {type(backbone.causal_lm).__name__} is not linear as assumed: logits differ by {error:.1e} "
            "(relative). The family needs an entry in models/families.py."
        )
