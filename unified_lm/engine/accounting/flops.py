"""Floating-point operations of a pack: what a training step must compute, counted from the model and the samples.

Conventions (Chowdhery et al., 2022, "PaLM", appendix B; the 6N rule is Kaplan et al., 2020, "Scaling Laws", section 2.1):

- a weight of a matrix product costs 2 per token forward, 2 per token for the gradient of its input, and 2 per token for its
  own gradient where it is trained: 6 trained, 4 frozen (LoRA's base weights);
- attention costs 2 (d_qk + d_v) per head, layer and *visible* pair of tokens forward, and twice that backward. Only pairs that
  the mask lets through count (PaLM counts the whole square, also for causal models);
- the output head counts only at supervised positions; embeddings, norms and activation functions do not count; of a mixture of
  experts only the experts that a token visits count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unified_lm.batch import Pack
from unified_lm.batch.plan import free_stretches
from unified_lm.engine.training_module import TrainingModule
from unified_lm.models import families
from unified_lm.models.token_rows import token_row_layers


@dataclass(frozen=True)
class ModelFlops:
    """Cost of one token, one supervised position and one visible pair.

    Attributes:
        trained: weights of matrix products per token that are trained (experts: those that a token visits).
        frozen: weights of matrix products per token that are not.
        head: weights of the output head.
        head_trained: whether the head is trained.
        pair: operations per visible pair and layer, forward.
        windows: number of layers per sliding window in tokens; None is a layer without one.
    """

    trained: float
    frozen: float
    head: int
    head_trained: bool
    pair: int
    windows: dict[int | None, int]

    @classmethod
    def of(cls, trainable: TrainingModule) -> ModelFlops:
        """Read the sizes of a model. Weights that ZeRO-3 has partitioned count as whole."""
        causal_lm = trainable.backbone.causal_lm
        config = families.text_config(causal_lm)
        head = trainable.backbone.head_weight
        visited = _visited_fraction(config)
        counted = {True: 0.0, False: 0.0}
        for name, size, trained in _matrices(causal_lm, skipped=id(head)):
            counted[trained] += size * (visited if ".experts." in name else 1.0)
        return cls(
            trained=counted[True],
            frozen=counted[False],
            head=_size(head),
            head_trained=head.requires_grad or any(token_row_layers(causal_lm)),
            pair=_flops_per_pair(config),
            windows=_windows(config),
        )

    def forward(self, pack: Pack, *, tokens: bool = True) -> float:
        """Operations of one forward of a pack, including the output head if `tokens`."""
        body = 2 * (self.trained + self.frozen) * len(pack) + self._attention(pack)
        return body + (2 * self.head * _supervised(pack) if tokens else 0)

    def training(self, pack: Pack) -> float:
        """Operations of one forward and backward of a pack."""
        body = (6 * self.trained + 4 * self.frozen) * len(pack) + 3 * self._attention(pack)
        return body + (6 if self.head_trained else 4) * self.head * _supervised(pack)

    def _attention(self, pack: Pack) -> float:
        return self.pair * sum(layers * visible_pairs(pack, window) for window, layers in self.windows.items())


def visible_pairs(pack: Pack, window: int | None = None) -> int:
    """The (query, key) pairs that a pack's mask lets through in one layer: the True entries of `AttentionPlan.dense_mask`.

    Args:
        pack: the pack.
        window: the layer's sliding window in tokens; None: no limit.
    """
    plan = pack.plan
    plain = [i for i, blocks in enumerate(plan.blocks) if not blocks]
    kinds = Counter((plan.lengths[i], plan.spans[i][1] - plan.spans[i][0]) for i in plain)
    pairs = sum(count * _pairs(length, span, window) for (length, span), count in kinds.items())
    for length, blocks in zip(plan.lengths, plan.blocks, strict=True):
        if blocks:
            pairs += sum(_pairs(b.stop - b.start, b.span[1] - b.span[0], window) for b in blocks)
            # What lies outside sees all that comes before, as the same rows of a causal sequence do.
            pairs += sum(_pairs(b, 0, window) - _pairs(a, 0, window) for a, b in free_stretches(length, blocks))
    return pairs


def _pairs(length: int, span: int, window: int | None) -> int:
    """Visible pairs of one sequence with a bidirectional span of `span` tokens (`batch.plan.visible` says who sees whom)."""
    reach = length if window is None else min(length, window)
    causal = _diagonals(length, 0, reach - 1)
    ahead = _diagonals(span, 1, span - 1 if window is None else min(span - 1, window))
    behind = span - window if window is not None and span > window else 0  # a span's window reaches one token further back
    return causal + ahead + behind


def _diagonals(size: int, first: int, last: int) -> int:
    """Number of entries on the diagonals `first` to `last` of a square matrix; 0 is the main diagonal."""
    return sum((size - first, size - last)) * (last - first + 1) // 2 if last >= first else 0


def _supervised(pack: Pack) -> int:
    return sum(len(part.positions) for part in pack.supervised.values())


def _matrices(model: nn.Module, skipped: int) -> list[tuple[str, int, bool]]:
    """Every weight matrix that tokens are multiplied with: name, number of elements, whether it is trained."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) == skipped or _dimensions(parameter) < 2 or key.endswith("bias"):
                continue
            # 4-bit weights are stored packed, so the tensor's shape is not that of the matrix; the layer's sizes are.
            linear = isinstance(module, nn.Linear) and key == "weight"
            size = module.in_features * module.out_features if linear else _size(parameter)
            found.append((f"{name}.{key}", int(size), parameter.requires_grad))
    return found


def _size(parameter: torch.Tensor) -> int:
    """Number of elements of the whole parameter; ZeRO-3 empties partitioned ones and keeps the number in `ds_numel`."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _dimensions(parameter: torch.Tensor) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _visited_fraction(config: Any) -> float:
    """The fraction of a layer's experts that one token visits; 1 without experts."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    visited = getattr(config, "num_experts_per_tok", None)
    return visited / experts if experts and visited else 1.0


def _flops_per_pair(config: Any) -> int:
    """2 (d_qk + d_v) for every head: one product with a key, one with a value."""
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries = getattr(config, "qk_head_dim", None) or head_dim
    values = getattr(config, "v_head_dim", None) or head_dim
    return 2 * heads * (queries + values)


def _windows(config: Any) -> dict[int | None, int]:
    """Number of layers by sliding window; see `ModelFlops.windows`."""
    layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None)
    if window is None or not kinds:
        return {window: layers}
    sliding = sum(kind == "sliding_attention" for kind in kinds)
    return {size: count for size, count in ((window, sliding), (None, layers - sliding)) if count}
