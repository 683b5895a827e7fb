"""One optimizer step's losses and gradients, exact for any number of packs and ranks.

A contrastive loss couples every embedding of the global batch, but activations of a large batch do not fit in memory.
GradCache (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup") splits the chain
rule at the embeddings e = f(x; w):

    dL/dw = sum over packs of (dL/de_pack) * (de_pack/dw)

1. forward every pooled pack without a graph, remembering the random state before it;
2. compute the loss over all embeddings of all ranks, and its gradient with respect to this rank's embeddings;
3. forward each pack again with a graph and the same random state, and backward the inner product with that gradient.

The last pooled pack keeps its graph from (1), so a batch that fits one pack is the ordinary direct path, and N packs cost
N - 1 extra forwards. Token losses are sums over positions: they need no cache and join whatever pack holds them. So do losses
of whole samples, once `engine.sequences` has found what these are compared with. The balance of routers couples all tokens of
the step (`engine.balance`): where it is trained, packs without pooled samples go through (1) and (3) as well.

Every term is `weight * sum / count` with the count of the whole step over all ranks, known before any backward. Gradients
of ranks are therefore *summed*, never averaged (`engine.backends.backend`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from unified_lm.batch import Batch, Pack, SequenceScores, empty_pack
from unified_lm.core import distributed
from unified_lm.core.random import RngState
from unified_lm.engine.balance import RouterBalance
from unified_lm.engine.sequences import SequenceScoring
from unified_lm.engine.training_module import PackOutput
from unified_lm.objectives.balance import Routing
from unified_lm.objectives.protocol import EmbeddingObjective

Forward = Callable[..., PackOutput]
Backward = Callable[[torch.Tensor], None]


@dataclass
class StepLosses:
    """What a step measured, over all ranks.

    Attributes:
        by_stream: unweighted loss of every stream.
        total: weighted sum of them.
        metrics: further numbers of the embedding and sequence objectives and of the router balance, as "stream/name".
        scores: per stream with a sequence objective those of every sample of the step.
    """

    by_stream: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    scores: dict[str, SequenceScores] = field(default_factory=dict)


@dataclass
class _Cached:
    """A pack between its first forward and its backward."""

    pack: Pack
    state: RngState
    output: PackOutput | None  # kept, with its graph, for the packs that are not forwarded again
    embeddings: torch.Tensor
    routing: Mapping[str, Routing] = field(default_factory=dict)


class GradCacheStep:
    """Computes losses and accumulates gradients for one batch.

    Args:
        forward: pack -> `PackOutput`; takes `tokens=False` to leave token losses out.
        backward: called with a scalar; adds its gradients.
        embedding_objectives: per contrastive stream its objective.
        weights: per stream the factor of its loss.
        num_retained: packs forwarded twice otherwise, counted from the last, whose graph is kept instead. One fits in memory by
            construction; more trade memory for time.
        equal_forwards: whether every rank must run the same sequence of forwards and backwards (ZeRO-2 and 3). Ranks with
            fewer packs then run empty ones, which change neither losses, gradients nor the random numbers of real packs.
        sequences: the sequence objectives, or None where no stream has one.
        balance: the router balance, or None where no stream has one. `losses_only` leaves it out: a held-out loss is that of
            the stream's objective.
    """

    def __init__(
        self,
        forward: Forward,
        backward: Backward,
        embedding_objectives: Mapping[str, EmbeddingObjective],
        weights: Mapping[str, float],
        num_retained: int = 1,
        equal_forwards: bool = False,
        sequences: SequenceScoring | None = None,
        balance: RouterBalance | None = None,
    ) -> None:
        self.forward = forward
        self.backward = backward
        self.embedding_objectives = embedding_objectives
        self.weights = weights
        self.num_retained = num_retained
        self.equal_forwards = equal_forwards
        self.sequences = sequences
        self.balance = balance
        self._sums: dict[str, torch.Tensor] = {}

    def __call__(self, batch: Batch) -> StepLosses:
        """Accumulate the gradients of one batch (on the module's device) and return its losses."""
        losses = self._begin(batch)
        pooled = [pack for pack in batch.packs if len(pack.pool_rows)]
        plain = [pack for pack in batch.packs if not len(pack.pool_rows)]
        if self.equal_forwards:
            num_pooled, num_plain = distributed.all_reduce_max([len(pooled), len(plain)])
            pooled = [_EMPTY.to(distributed.local_device())] * (num_pooled - len(pooled)) + pooled
            plain = plain + [_EMPTY.to(distributed.local_device())] * (num_plain - len(plain))
        twice, once = (pooled, plain) if self.balance is None else (pooled + plain, [])
        cached = [self._first_forward(pack, index >= len(twice) - self.num_retained) for index, pack in enumerate(twice)]
        end = RngState.capture()
        if self.balance is not None:
            self.balance.begin([entry.routing for entry in cached])
        gradients = self._embedding_gradients(batch, cached, losses)
        for entry, gradient in reversed(list(zip(cached, gradients, strict=True))):
            self._backward_cached(entry, gradient, batch)
        end.restore()
        for pack in once:
            output = self._forward(pack)
            self._backward(self._pack_loss(pack, output, batch), output)
        self._report(batch, losses)
        if self.balance is not None:
            losses.metrics |= {f"{stream}/router_balance": loss for stream, loss in self.balance.losses.items()}
            losses.total += self.balance.total
        return losses

    @torch.no_grad()
    def losses_only(self, batch: Batch) -> StepLosses:
        """The losses of one batch (on the module's device) without gradients: what validation calls."""
        losses = self._begin(batch)
        cached = []
        packs = list(batch.packs)
        if self.equal_forwards:
            (num_packs,) = distributed.all_reduce_max([len(packs)])
            packs += [_EMPTY.to(distributed.local_device())] * (num_packs - len(packs))
        for pack in packs:
            state = RngState.capture()
            output = self._forward(pack)
            self._pack_loss(pack, output, batch)
            pack.plan.kernel_cache.clear()
            if len(pack.pool_rows):
                cached.append(_Cached(pack, state, None, output.embeddings))
        self._embedding_gradients(batch, cached, losses)
        self._report(batch, losses)
        return losses

    def _begin(self, batch: Batch) -> StepLosses:
        self._sums = {}
        if self.sequences is not None:
            self.sequences.begin(batch)
        return StepLosses()

    def _first_forward(self, pack: Pack, retain: bool) -> _Cached:
        state = RngState.capture()
        if retain:
            output = self._forward(pack)
            return _Cached(pack, state, output, output.embeddings.detach(), output.routing)
        with torch.no_grad():
            output = self._forward(pack, tokens=False)
        pack.plan.kernel_cache.clear()  # made again in the second forward: many packs must not all keep theirs
        return _Cached(pack, state, None, output.embeddings, output.routing)

    def _forward(self, pack: Pack, *, tokens: bool = True) -> PackOutput:
        """Forward a pack; an empty one draws its random numbers without a trace."""
        if pack.samples:
            return self.forward(pack, tokens=tokens)
        state = RngState.capture()
        output = self.forward(pack, tokens=tokens)
        state.restore()
        return output

    def _embedding_gradients(self, batch: Batch, cached: list[_Cached], losses: StepLosses) -> list[torch.Tensor]:
        """dL/d(embeddings) of every pooled pack, from the loss over the global batch."""
        gradients = [torch.zeros_like(entry.embeddings) for entry in cached]
        for stream, objective in self.embedding_objectives.items():
            places = [_places(entry.pack, stream) for entry in cached]
            local = _collect(cached, places, batch.num_groups.get(stream, 0), batch.group_sizes.get(stream, 0))
            loss, gradient, metrics = contrastive_gradient(local, batch.text_ids.get(stream), objective)
            losses.by_stream[stream] = loss
            losses.metrics |= {f"{stream}/{name}": value for name, value in metrics.items()}
            if not len(gradient):
                continue
            flat = gradient.flatten(0, 1) * (self.weights[stream] if math.isfinite(loss) else math.nan)
            for (at, rows), target in zip(places, gradients, strict=True):
                target[at] = flat[rows].to(target.dtype)
        return gradients

    def _backward_cached(self, entry: _Cached, gradient: torch.Tensor, batch: Batch) -> None:
        output = entry.output
        if output is None:
            entry.state.restore()
            output = self._forward(entry.pack)
        loss = (output.embeddings * gradient).sum()
        others = self._pack_loss(entry.pack, output, batch)
        if others is not None:
            loss = loss + others
        if self.balance is not None:
            loss = loss + propagate_nonfinite(self.balance.share_of_pack(output.routing))
        self._backward(loss, output)
        entry.output, entry.routing = None, {}  # frees the graph before the next pack is forwarded
        entry.pack.plan.kernel_cache.clear()

    def _backward(self, loss: torch.Tensor | None, output: PackOutput) -> None:
        if output.anchor is not None:
            loss = output.anchor if loss is None else loss + output.anchor
        if loss is not None:
            self.backward(loss)

    def _pack_loss(self, pack: Pack, output: PackOutput, batch: Batch) -> torch.Tensor | None:
        """The weighted share of a pack in all losses but those of embeddings and of routers."""
        terms = dict(output.terms)
        if self.sequences is not None:
            terms |= self.sequences.terms(pack, output)
        total: torch.Tensor | None = None
        for stream, term in terms.items():
            self._sums[stream] = self._sums.get(stream, 0.0) + term.sum.detach()
            share = propagate_nonfinite(term.sum) * (self.weights[stream] / batch.counts[stream])
            total = share if total is None else total + share
        return total

    def _report(self, batch: Batch, losses: StepLosses) -> None:
        for stream, count in batch.counts.items():
            value = self._sums.get(stream, torch.zeros((), dtype=torch.float32)).to(distributed.local_device())
            losses.by_stream[stream] = float(distributed.all_reduce_sum(value.clone())) / count if count else 0.0
        if self.sequences is not None:
            losses.scores = self.sequences.finish()
            for stream, scores in losses.scores.items():
                measured = self.sequences.objectives[stream].measure(scores)
                losses.metrics |= {f"{stream}/{name}": float(values.mean()) for name, values in measured.items() if len(values)}
        losses.total = sum(self.weights[stream] * loss for stream, loss in losses.by_stream.items())


_EMPTY = empty_pack()


def propagate_nonfinite(loss: torch.Tensor) -> torch.Tensor:
    """A loss that is not finite gets a gradient that is not either, so that the update is skipped on every rank."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def _places(pack: Pack, stream: str) -> tuple[list[int], list[int]]:
    """Where a stream's embeddings lie: indices within the pack, and rows of the stream's embedding matrix."""
    at = [index for index, name in enumerate(pack.pool_streams) if name == stream]
    return at, [pack.pool_rows[index] for index in at]


def _collect(cached: list[_Cached], places: list[tuple[list[int], list[int]]], groups: int, size: int) -> torch.Tensor:
    """This rank's embeddings of one stream as `[G, K, D]`; `[0, 0, 0]` on a rank without any."""
    if not groups:
        return torch.zeros(0, 0, 0, device=distributed.local_device())
    local = cached[0].embeddings.new_empty(groups * size, cached[0].embeddings.shape[-1])
    for (at, rows), entry in zip(places, cached, strict=True):
        local[rows] = entry.embeddings[at]
    return local.reshape(groups, size, -1)


def contrastive_gradient(
    local: torch.Tensor, text_ids: torch.Tensor | None, objective: EmbeddingObjective
) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Loss over the embeddings of all ranks, and its gradient with respect to this rank's.

    Every rank evaluates the whole loss on gathered constants with its own slice as the free variable. The gradients of
    the ranks therefore add up to the gradient of the global loss: nothing shrinks with the world size.

    Args:
        local: `[G_rank, K, D]`; `[0, 0, 0]` on a rank without groups.
        text_ids: int64 `[G_rank, K]` or None.
        objective: takes the embeddings and text ids of the global batch.

    Returns:
        The mean loss, the gradient `[G_rank, K, D]`, and the objective's metrics.
    """
    shape = distributed.all_reduce_max(list(local.shape[1:]))
    if not shape[0]:  # no rank has a group of this stream
        return 0.0, local, {}
    if not len(local):
        local = local.new_zeros(0, *shape)
    ids = torch.zeros(local.shape[:2], dtype=torch.int64, device=local.device) if text_ids is None else text_ids
    parts, rank = distributed.all_gather_uneven(local)
    id_parts, _ = distributed.all_gather_uneven(ids.reshape(local.shape[:2]).contiguous())
    own = local.detach().requires_grad_()
    parts[rank] = own
    with torch.enable_grad():
        term = objective(torch.cat(parts), torch.cat(id_parts))
        (gradient,) = torch.autograd.grad(term.sum / term.count, own)
    return float(term.sum.detach()) / term.count, gradient, dict(objective.metrics)
