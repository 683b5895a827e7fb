"""Cross-entropy through the output head, tile by tile: logits `[N, V]` never exist as a whole.

With z = head(h), the loss of position i is `logsumexp(z_i) - z_i[target_i]`, and its gradient with respect to z_i is
`softmax(z_i) - onehot(target_i)`. Both need one tile of z at a time. How tiles are cut depends on what is trained:

- **head frozen** (LoRA, evaluation): tiles of rows. The gradient of the hidden states is complete as soon as a row's tile is
  there, so it is computed in the forward and only scaled in the backward: two matrix products, nothing recomputed. A product
  wants many rows and the passes between the two want rows that stay in the cache, so on a CPU they take a tile in slices.
- **head trained**: tiles of vocabulary columns. Every tile's weight gradient is then one matrix product over all positions:
  nothing is summed over tiles in bfloat16, and no float32 copy of the head is needed. (Row tiles need one, or lose precision; a
  prototype of them took 1.1 to 1.9 times as long on CPU for 2,048 tokens.) Tiles are computed again in the backward, unless
  the whole vocabulary is one tile.

Matrix products run in the head's dtype (or in autocast's, where autocast is on), everything after them in float32, or in
float64 where the hidden states are. Legend: `batch/__init__.py`; C is the number of columns (or rows) of a tile, P
of rows of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from unified_lm.batch import OutputHead

TILE_BYTES = 32 * 2**20
"""Bytes of one tile of logits; about twice as much is alive at a time (less on a CPU with a frozen head, and half a tile
more on other devices, where a tile in the head's dtype lies beside its float32 copies)."""

_CACHED_BYTES = 2 * 2**20  # of float32 logits that a CPU works on at a time: flat from 1 to 6 MiB

_MIN_COLUMNS = 256  # narrower tiles make the matrix products inefficient; only exceeds the budget beyond 32,768 positions


class TokenLosses(NamedTuple):
    """Per supervised position.

    Attributes:
        losses: float32 `[N]` (float64 for float64 hidden states), cross-entropy in nats, with gradient.
        correct: bool `[N]`, whether no other token has a higher logit than the target (ties count as correct).
    """

    losses: torch.Tensor
    correct: torch.Tensor


class _Settings(NamedTuple):
    """What a tile's computation depends on besides tensors.

    Attributes:
        scale, softcap: see `OutputHead`.
        product: dtype of matrix products.
        work: dtype of everything else.
        tile_bytes: see `TILE_BYTES`.
        differentiate: whether a backward may follow.
    """

    scale: float
    softcap: float | None
    product: torch.dtype
    work: torch.dtype
    tile_bytes: int
    differentiate: bool


def linear_cross_entropy(
    hidden: torch.Tensor,
    head: OutputHead,
    targets: torch.Tensor,
    weights: torch.Tensor,
    *,
    tile_bytes: int = TILE_BYTES,
) -> torch.Tensor:
    """`sum_i weights_i * CE_i`, differentiable with respect to the hidden states and the head.

    Args:
        hidden: `[N, D]`, states that predict, any floating dtype. N may be 0: the sum is then 0, with a graph.
        head: the output head.
        targets: int64 `[N]`, tokens to predict, in `[0, V)`.
        weights: `[N]`, float.
        tile_bytes: see `TILE_BYTES`.

    Returns:
        float32 scalar (float64 for float64 hidden states).
    """
    losses = token_losses(hidden, head, targets, tile_bytes=tile_bytes).losses
    return (losses * weights.to(losses.dtype)).sum()


def token_losses(hidden: torch.Tensor, head: OutputHead, targets: torch.Tensor, *, tile_bytes: int = TILE_BYTES) -> TokenLosses:
    """Cross-entropy of every position, for objectives that need more than one weighted sum.

    Args:
        hidden, head, targets, tile_bytes: as in `linear_cross_entropy`.
    """
    work = torch.promote_types(hidden.dtype, torch.float32)
    if not len(targets):
        return TokenLosses(hidden.sum(-1).to(work), torch.zeros(0, dtype=torch.bool, device=hidden.device))
    device = hidden.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    tensors = (head.weight,) if head.bias is None else (head.weight, head.bias)
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    differentiate = trained or (torch.is_grad_enabled() and hidden.requires_grad)
    settings = _Settings(head.scale, head.softcap, product, work, tile_bytes, differentiate)
    function = _ColumnTiles if trained else _RowTiles
    with torch.autocast(device, enabled=False):
        losses, correct = function.apply(hidden.to(product), head.weight, head.bias, targets, settings)
    return TokenLosses(losses, correct)


class _RowTiles(torch.autograd.Function):
    """Frozen head: losses, and the hidden states' gradient at once, a tile of `[C, V]` at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        settings: _Settings,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses `[N]` and whether the target is the likeliest token, bool `[N]`."""
        weight_VD = weight_VD.to(settings.product)
        losses_N = torch.empty(len(targets_N), dtype=settings.work, device=hidden_ND.device)
        correct_N = torch.empty(len(targets_N), dtype=torch.bool, device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND) if settings.differentiate else None
        rows, rows_cached = _rows(len(weight_VD), settings, hidden_ND.device)
        for tile in _slices(len(targets_N), rows):
            product_CV = hidden_ND[tile] @ weight_VD.t()
            for part in _slices(len(product_CV), rows_cached):
                at = slice(tile.start + part.start, tile.start + part.stop)
                target_P1 = targets_N[at, None]
                logits_PV = _logits(product_CV[part], bias_V, settings)
                chosen_P1 = logits_PV.gather(1, target_P1)
                normalizer_P1 = logits_PV.logsumexp(1, keepdim=True)
                losses_N[at] = (normalizer_P1 - chosen_P1)[:, 0]
                correct_N[at] = chosen_P1[:, 0] >= logits_PV.amax(1)
                if gradient_ND is not None:
                    minus_one_P1 = torch.full_like(chosen_P1, -1.0)
                    product_CV[part] = _logits_gradient(logits_PV, normalizer_P1, target_P1, minus_one_P1, settings)
            if gradient_ND is not None:
                gradient_ND[tile] = product_CV @ weight_VD  # by now the gradient of the product
        ctx.save_for_backward(gradient_ND)
        ctx.mark_non_differentiable(correct_N)
        return losses_N, correct_N

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The hidden states' gradient, scaled; the head has none."""
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * gradients[0][:, None]).to(gradient_ND.dtype), None, None, None, None


class _ColumnTiles(torch.autograd.Function):
    """Trained head: a running log-sum-exp over tiles of `[N, C]`, which the backward computes again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        settings: _Settings,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses `[N]` and whether the target is the likeliest token, bool `[N]`."""
        size = len(targets_N)
        highest_N1 = torch.full((size, 1), -torch.inf, dtype=settings.work, device=hidden_ND.device)
        total_N1 = torch.zeros_like(highest_N1)
        chosen_N1 = torch.zeros_like(highest_N1)
        columns = _columns(size, len(weight_VD), settings)
        for at in columns:
            logits_NC = _tile(hidden_ND, weight_VD, bias_V, at, settings)
            column_N1, inside_N1 = _target_column(targets_N, at, logits_NC.shape[1])
            chosen_N1 = torch.where(inside_N1, logits_NC.gather(1, column_N1), chosen_N1)
            raised_N1 = torch.maximum(highest_N1, logits_NC.amax(1, keepdim=True))
            if len(columns) > 1:
                logits_NC.sub_(raised_N1).exp_()
                tile_total_N1 = logits_NC.sum(1, keepdim=True)
            else:
                tile_total_N1 = (logits_NC - raised_N1).exp_().sum(1, keepdim=True)
            total_N1 = total_N1 * (highest_N1 - raised_N1).exp() + tile_total_N1
            highest_N1 = raised_N1
        normalizer_N1 = highest_N1 + total_N1.log()
        kept_NV = None
        if len(columns) == 1:  # one tile: keep its gradient instead of computing the logits again
            minus_one_N1 = torch.full_like(chosen_N1, -1.0)
            gradient_NV = _logits_gradient(logits_NC, normalizer_N1, targets_N[:, None], minus_one_N1, settings)
            kept_NV = gradient_NV.to(settings.product)
        correct_N = (chosen_N1 >= highest_N1)[:, 0]
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, normalizer_N1, kept_NV)
        ctx.settings = settings
        ctx.mark_non_differentiable(correct_N)
        return (normalizer_N1 - chosen_N1)[:, 0], correct_N

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the hidden states and of the head's weight and bias, as far as they are wanted."""
        hidden_ND, weight_VD, bias_V, targets_N, normalizer_N1, kept_NV = ctx.saved_tensors
        settings: _Settings = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        upstream_N1 = gradients[0][:, None]
        hidden_gradient = torch.zeros_like(hidden_ND, dtype=settings.work) if wants_hidden else None
        weight_gradient = torch.empty_like(weight_VD) if wants_weight else None
        bias_gradient = torch.empty_like(bias_V) if wants_bias else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for at in _columns(len(targets_N), len(weight_VD), settings):
                if kept_NV is not None:
                    gradient_NC = torch.mul(kept_NV, upstream_N1, out=torch.empty_like(kept_NV))
                else:
                    gradient_NC = _column_gradient(hidden_ND, weight_VD, bias_V, targets_N, normalizer_N1, at, settings)
                    gradient_NC = gradient_NC.mul_(upstream_N1).to(settings.product)
                if hidden_gradient is not None:
                    hidden_gradient += gradient_NC @ weight_VD[at].to(settings.product)
                if weight_gradient is not None:
                    weight_gradient[at] = gradient_NC.t() @ hidden_ND
                if bias_gradient is not None:
                    bias_gradient[at] = gradient_NC.sum(0, dtype=settings.work)
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(hidden_ND.dtype)
        return hidden_gradient, weight_gradient, bias_gradient, None, None


def _rows(vocabulary: int, settings: _Settings, device: torch.device) -> tuple[int, int]:
    """Rows of a tile, and how many of them are worked on at a time between its two products."""
    row_bytes = vocabulary * settings.work.itemsize
    if device.type != "cpu":
        rows = max(1, settings.tile_bytes // row_bytes)
        return rows, rows
    return max(1, settings.tile_bytes // (vocabulary * settings.product.itemsize)), max(1, _CACHED_BYTES // row_bytes)


def _columns(num_positions: int, vocabulary: int, settings: _Settings) -> list[slice]:
    width = max(_MIN_COLUMNS, settings.tile_bytes // (num_positions * settings.work.itemsize))
    return list(_slices(vocabulary, width))


def _slices(total: int, width: int) -> Iterator[slice]:
    for start in range(0, total, width):
        yield slice(start, min(start + width, total))


def _logits(product: torch.Tensor, bias: torch.Tensor | None, settings: _Settings) -> torch.Tensor:
    """`OutputHead`'s formula after the matrix product, in `settings.work`; in place where the product has that dtype."""
    logits = product.to(settings.work)
    if bias is not None:
        logits += bias.to(settings.work)
    if settings.scale != 1.0:
        logits *= settings.scale
    if settings.softcap is not None:
        logits.div_(settings.softcap).tanh_().mul_(settings.softcap)
    return logits


def _tile(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, at: slice, settings: _Settings
) -> torch.Tensor:
    bias = None if bias_V is None else bias_V[at]
    return _logits(hidden_ND @ weight_VD[at].to(settings.product).t(), bias, settings)


def _target_column(targets_N: torch.Tensor, at: slice, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target's column within a tile (clamped into it), and whether it truly lies there; both `[N, 1]`."""
    column_N1 = targets_N[:, None] - at.start
    inside_N1 = (column_N1 >= 0) & (column_N1 < width)
    return column_N1.clamp(0, width - 1), inside_N1


def _column_gradient(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    normalizer_N1: torch.Tensor,
    at: slice,
    settings: _Settings,
) -> torch.Tensor:
    """d(loss_i)/d(head product) of one tile of columns, computed again from the hidden states."""
    logits_NC = _tile(hidden_ND, weight_VD, bias_V, at, settings)
    column_N1, inside_N1 = _target_column(targets_N, at, logits_NC.shape[1])
    return _logits_gradient(logits_NC, normalizer_N1, column_N1, -inside_N1.to(settings.work), settings)


def _logits_gradient(
    logits: torch.Tensor,
    normalizer: torch.Tensor,
    column: torch.Tensor,
    correction: torch.Tensor,
    settings: _Settings,
) -> torch.Tensor:
    """Turn logits, in place, into d(loss)/d(hidden @ weight.T + bias).

    Args:
        logits: capped and scaled `[R, C]`.
        normalizer: `[R, 1]`, log-sum-exp over the whole vocabulary.
        column: int64 `[R, 1]`, the target's column.
        correction: `[R, 1]`, -1 where the target lies in this tile, else 0.
        settings: scale and cap, whose derivatives the result includes.
    """
    # d/dx [softcap * tanh(x * scale / softcap)] = scale * (1 - (logits / softcap) ** 2)
    slope = None if settings.softcap is None else (logits / settings.softcap).square_().neg_().add_(1.0)
    gradient = logits.sub_(normalizer).exp_().scatter_add_(1, column, correction)
    if slope is not None:
        gradient.mul_(slope)
    if settings.scale != 1.0:
        gradient.mul_(settings.scale)
    return gradient
