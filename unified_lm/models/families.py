"""Differences between model families: which attention they support, and how their hidden states become logits.

A family that follows transformers' attention interface needs no entry here. These are the exceptions, refused by name where a
wrong mask would otherwise go unnoticed.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from unified_lm.core.errors import ModelError
from unified_lm.models.monet import MonetConfig  # registers its family with transformers

OWN_FAMILIES = frozenset({MonetConfig.model_type})
"""Families that transformers has from this package alone: stock tools load them where it is installed and imported."""

_PLANNED_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Layer types whose mask the plan describes. Others (linear, chunked, state space) carry state across packed sequences."""

_NO_PADDED = {
    "bloom": "its position bias (alibi) is computed from a 2-D mask",
    "mpt": "its position bias (alibi) does not restart with a 4-D mask",
    "gpt_neo": "its causal and local masks are fixed inside the attention layers",
    "codegen": "its causal mask is fixed inside the attention layers",
}
"""Families that cannot use a 4-D mask, with the reason."""


def text_config(causal_lm: PreTrainedModel) -> Any:
    """The configuration of the decoder, which multimodal models nest in their own."""
    return causal_lm.config.get_text_config(decoder=True)


def has_interface(causal_lm: PreTrainedModel) -> bool:
    """Whether the family calls transformers' attention interface; transformers decides it by the family's source."""
    return bool(causal_lm._can_set_attn_implementation())


def check_packed(causal_lm: PreTrainedModel) -> None:
    """Refuse families whose packed attention would be wrong.

    Raises:
        ModelError: the family has no attention interface, has layers that are not attention, or has sliding windows that its
            attention layers do not pass on.
    """
    config = text_config(causal_lm)
    family = config.model_type
    if not has_interface(causal_lm):
        reason = _NO_PADDED.get(family)
        fix = "Set model.attention_kernel=padded." if reason is None else f"Kernel padded cannot serve it either: {reason}."
        raise ModelError(f"family '{family}' does not call transformers' attention interface, so it cannot run packs. {fix}")
    _check_layers(config)
    if _windows_only_in_masks(causal_lm, config):
        raise ModelError(
            f"family '{family}' applies its sliding window ({config.sliding_window} tokens) only in transformers' own masks, "
            "so packed attention would ignore it. Set model.attention_kernel=padded, or, if no sample is longer than it, "
            "sliding_window=null in the model's config."
        )


def check_padded(causal_lm: PreTrainedModel) -> None:
    """Refuse families that cannot use a 4-D mask.

    Raises:
        ModelError: it names the family and the reason.
    """
    config = text_config(causal_lm)
    family = config.model_type
    reason = _NO_PADDED.get(family)
    if reason is None and getattr(config, "alibi", False):
        reason = "its position bias (alibi) is computed from a 2-D mask"
    if reason is not None:
        raise ModelError(f"kernel padded cannot serve family '{family}': {reason}. Choose another model.")
    current = causal_lm.config._attn_implementation
    if not has_interface(causal_lm) and current not in ("eager", "sdpa"):
        raise ModelError(
            f"family '{family}' was loaded with attention '{current}', which takes no 4-D mask and cannot be switched "
            "afterwards. Load it with attn_implementation='eager'."
        )
    _check_layers(config)


def experts(causal_lm: PreTrainedModel) -> tuple[int, int]:
    """Number of experts of a layer, and number of experts per token.

    Only for families whose balance loss transformers itself computes. Others balance differently: DeepSeek-V3 by a bias that is
    not part of the router logits.

    Raises:
        ModelError: it names the family and the reason.
    """
    family = text_config(causal_lm).model_type
    num_experts, top_k = (getattr(causal_lm, name, None) for name in ("num_experts", "num_experts_per_tok"))
    if not num_experts or not top_k or not hasattr(sys.modules[type(causal_lm).__module__], "load_balancing_loss_func"):
        raise ModelError(
            f"family '{family}' has no router balance loss: it is dense, or transformers has no such loss for it. "
            "Set streams.NAME.objective.router_aux_loss_coef=0."
        )
    return int(num_experts), int(top_k)


def router_places(causal_lm: PreTrainedModel) -> list[tuple[str, nn.Module, int]]:
    """The routers of a model, as transformers names them (`_can_record_outputs`), in the order of the layers.

    Returns:
        Of each its name in the decoder, the module, and the place of the logits in its output; none of a dense model, which may
        be a dense member of a family that has mixtures.
    """
    decoder = causal_lm.get_decoder()
    recorders = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits", ())
    places: list[tuple[int, str, nn.Module, int]] = []
    for recorder in recorders if isinstance(recorders, (list, tuple)) else [recorders]:
        target: Any = getattr(recorder, "target_class", recorder)
        part = str(getattr(recorder, "layer_name", None) or "")
        for number, (name, module) in enumerate(decoder.named_modules()):
            is_router: bool = isinstance(target, type) and isinstance(module, target)
            if is_router and part in name:
                places.append((number, name, module, int(getattr(recorder, "index", 0))))
    return [(name, module, index) for _, name, module, index in sorted(places, key=lambda place: place[0])]


def logit_scale(config: Any) -> float:
    """The factor between the head's output and the logits (see `batch.OutputHead`).

    Cohere multiplies by `logit_scale`, HyperCLOVA X by `logits_scaling`, Granite and MiniCPM 3 divide by `logits_scaling`.
    """
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
    scale = getattr(config, "logit_scale", None)
    return 1.0 if scale is None else float(scale)


def logit_softcap(config: Any) -> float | None:
    """Gemma's cap of the logits, or None."""
    softcap = getattr(config, "final_logit_softcapping", None)
    return None if softcap is None else float(softcap)


def _check_layers(config: Any) -> None:
    unsupported = sorted(set(getattr(config, "layer_types", None) or ()) - _PLANNED_LAYERS)
    if unsupported:
        raise ModelError(
            f"family '{config.model_type}' has layers of type {', '.join(unsupported)}, whose masks cannot be planned per "
            "sample. Only full and sliding-window attention can. Choose another model."
        )


def _windows_only_in_masks(causal_lm: PreTrainedModel, config: Any) -> bool:
    """Whether the family has sliding windows that exist only in the masks that transformers builds."""
    layer_types = getattr(config, "layer_types", None)
    if not getattr(config, "sliding_window", None) or (layer_types and "sliding_attention" not in layer_types):
        return False
    # A window reaches our kernels only if the layers pass it as a keyword, which no attribute of the model says.
    source = inspect.getsource(sys.modules[type(causal_lm.get_decoder()).__module__])
    return "create_sliding_window_causal_mask" in source and "sliding_window=" not in source
