"""Compiled decoder blocks: `torch.compile` for each layer, with attention left out of it.

A pack's plan is an object of Python, and kernels choose what they run by it. Attention therefore stays an ordinary call, and a
layer becomes the graph before it and the graph behind it. Both are dynamic in the number of tokens, and equal layers share
them: packs of any lengths run without compiling again. Gradient checkpointing lies around a compiled layer, ZeRO-1 and 2 around
the module; ZeRO-3 gathers weights in hooks inside of it, and does not go with it.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from unified_lm.core.errors import ModelError
from unified_lm.models.attention import register


def compile_blocks(causal_lm: PreTrainedModel) -> int:
    """Compile the layers of a decoder, in place; they are compiled in their first forwards.

    Random numbers are drawn as without compiling: dropout is that of the same seed.

    Args:
        causal_lm: with its adapters, whose attention goes through packs.

    Returns:
        The number of layers.

    Raises:
        ModelError: the family's layers cannot be compiled.
    """
    decoder = causal_lm.get_decoder()
    layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if not isinstance(layers, nn.ModuleList) or not getattr(causal_lm, "compiles_blocks", True):
        raise ModelError(f"the layers of family '{causal_lm.config.model_type}' cannot be compiled. Set model.compile=false.")
    _prepare()
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def _prepare() -> None:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    # Otherwise compiled dropout draws numbers of its own, and a run depends on what was compiled.
    inductor.fallback_random = True
    # Rather an error than blocks that run uncompiled in silence.
    dynamo.fail_on_recompile_limit_hit = True
    # Graphs of models of earlier stages and arms are not needed again, and count towards that limit.
    torch._dynamo.reset()
    register(outside_graphs=True)
