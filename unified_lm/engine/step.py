"""One optimizer step's losses and gradients, exact for any number of packs and ranks.

A contrastive loss couples every embedding of the global batch, but activations of a large batch do not fit in memory.
GradCache (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup") splits the chain
rule at the embeddings e = f(x; w):

    dL/dw = sum over packs of (dL/de_pack) * (de_pack/dw)

1. forward every pooled pack without a graph, remembering the random state before it;
2. compute the loss over all embeddings of all ranks, and its gradient with respect to this rank's embeddings;
3. forward each pack again with a graph and the same random state, and backward the inner product with that gradient.

Embeddings are one thing that couples the packs of a step; choices of routers are another, the baseline of KTO a third. Each is
a `CoupledTerm` (`engine.coupled`): it says which packs it must see in (1), fixes something global in (2), and gives every pack
a scalar share in (3). What that is, a step does not know. Token losses are sums over positions: nothing couples them, so they
need no first forward and join whatever pack holds them.

The last pack that is seen keeps its graph from (1), so a batch that fits one pack is the ordinary direct path, and N packs cost
N - 1 extra forwards.

Every term is `weight * sum / count` with the count of the whole step over all ranks, known before any backward. Gradients
of ranks are therefore *summed*, never averaged (`engine.backends.backend`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from unified_lm.batch import Batch, Pack, empty_pack
from unified_lm.core import distributed
from unified_lm.core.random import RngState
from unified_lm.engine.coupled import CoupledTerm, TermReport
from unified_lm.engine.training_module import PackOutput

Forward = Callable[..., PackOutput]
Backward = Callable[[torch.Tensor], None]

_EMPTY = empty_pack()


@dataclass
class StepLosses:
    """What a step measured, over all ranks.

    Attributes:
        by_stream: unweighted loss of every stream.
        total: weighted sum of them, and what regularizers add.
        metrics: further numbers of the coupled terms, as "stream/name".
        reports: what each coupled term reported, in the order of the terms.
    """

    by_stream: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    reports: tuple[TermReport, ...] = ()


@dataclass
class _Seen:
    """A pack between its first forward and its backward."""

    pack: Pack
    state: RngState
    graph_free: PackOutput
    kept: PackOutput | None  # with its graph, for the packs that are not forwarded again


class GradCacheStep:
    """Computes losses and accumulates gradients for one batch.

    Args:
        forward: pack -> `PackOutput`; takes `tokens=False` to leave token losses out.
        backward: called with a scalar; adds its gradients.
        weights: per stream the factor of its loss.
        terms: the coupled terms; streams that none of them is the objective of have token losses.
        num_retained: packs forwarded twice otherwise, counted from the last, whose graph is kept instead. One fits in memory by
            construction; more trade memory for time.
        equal_forwards: whether every rank must run the same sequence of forwards and backwards (ZeRO-2 and 3). Ranks with
            fewer packs then run empty ones, which change neither losses, gradients nor the random numbers of real packs.
    """

    def __init__(
        self,
        forward: Forward,
        backward: Backward,
        weights: Mapping[str, float],
        terms: Sequence[CoupledTerm] = (),
        num_retained: int = 1,
        equal_forwards: bool = False,
    ) -> None:
        self.forward = forward
        self.backward = backward
        self.weights = weights
        self.terms = tuple(terms)
        self.num_retained = num_retained
        self.equal_forwards = equal_forwards
        self._sums: dict[str, torch.Tensor] = {}

    def __call__(self, batch: Batch) -> StepLosses:
        """Accumulate the gradients of one batch (on the module's device) and return its losses."""
        self._begin(batch, self.terms)
        twice = [pack for pack in batch.packs if self._is_seen(pack)]
        once = [pack for pack in batch.packs if not self._is_seen(pack)]
        num_twice, num_once = self._agree(len(twice), len(once))
        # Empty packs go first, so that the last one, whose graph is kept, is a real one.
        twice = [_EMPTY.to(distributed.local_device())] * (num_twice - len(twice)) + twice
        once = once + [_EMPTY.to(distributed.local_device())] * (num_once - len(once))
        seen = [self._first_forward(pack, index >= len(twice) - self.num_retained) for index, pack in enumerate(twice)]
        end = RngState.capture()
        self._couple(batch, [(entry.pack, entry.graph_free) for entry in seen], self.terms)
        # Latest first: the kept graph is the largest thing in memory, and is gone before another pack is forwarded.
        while seen:
            self._second_backward(seen.pop(), batch)
        # Replaying set the random state back; packs that are forwarded once draw what follows the first forwards.
        end.restore()
        for pack in once:
            self._backward(pack, self._forward(pack), batch)
        return self._report(batch, self.terms)

    @torch.no_grad()
    def losses_only(self, batch: Batch) -> StepLosses:
        """The losses of one batch (on the module's device) without gradients and regularizers: what validation calls."""
        terms = self._held_out
        self._begin(batch, terms)
        packs = list(batch.packs)
        (num_packs,) = self._agree(len(packs))
        packs += [_EMPTY.to(distributed.local_device())] * (num_packs - len(packs))
        outputs = []
        for pack in packs:
            outputs.append((pack, self._forward(pack)))
            pack.plan.kernel_cache.clear()
        self._couple(batch, outputs, terms)
        for pack, output in outputs:
            self._share(pack, output, batch, terms)
        return self._report(batch, terms)

    def items(self, steps: Sequence[StepLosses]) -> dict[str, torch.Tensor]:
        """What the coupled terms measured for each sample of several steps, by name ("stream/name"), each `[n]`.

        Args:
            steps: results of `losses_only`.
        """
        found: dict[str, torch.Tensor] = {}
        for index, term in enumerate(self._held_out):
            found |= term.items([step.reports[index] for step in steps])
        return found

    def extra_forwards(self, batch: Batch) -> tuple[list[Pack], list[Pack]]:
        """What this rank forwards beside once per pack: packs that are only scored, and packs that are forwarded again.

        Args:
            batch: this rank's share of a step.
        """
        twice = [pack for pack in batch.packs if self._is_seen(pack)]
        scored = [pack for term in self.terms for pack in term.scored(batch)]
        return scored, twice[: max(0, len(twice) - self.num_retained)]

    @property
    def _held_out(self) -> tuple[CoupledTerm, ...]:
        return tuple(term for term in self.terms if not term.regularizer)

    def _is_seen(self, pack: Pack) -> bool:
        return any(term.sees(pack) for term in self.terms)

    def _agree(self, *counts: int) -> list[int]:
        """How many forwards of each kind this rank runs: its own, or where ranks must be equal the most of any rank."""
        return distributed.all_reduce_max(list(counts)) if self.equal_forwards else list(counts)

    def _begin(self, batch: Batch, terms: Sequence[CoupledTerm]) -> None:
        self._sums = {}
        for term in terms:
            term.begin(batch)

    def _couple(self, batch: Batch, seen: Sequence[tuple[Pack, PackOutput]], terms: Sequence[CoupledTerm]) -> None:
        """Every rank calls every term, whatever packs it has: terms communicate."""
        for term in terms:
            term.couple(batch, [(pack, output) for pack, output in seen if pack.samples and term.sees(pack)])

    def _first_forward(self, pack: Pack, keep: bool) -> _Seen:
        state = RngState.capture()
        if keep:
            output = self._forward(pack)
            return _Seen(pack, state, output.detached(), output)
        with torch.no_grad():
            output = self._forward(pack, tokens=False)
        pack.plan.kernel_cache.clear()  # made again in the second forward: many packs must not all keep theirs
        return _Seen(pack, state, output, None)

    def _forward(self, pack: Pack, *, tokens: bool = True) -> PackOutput:
        """Forward a pack; an empty one draws its random numbers without a trace."""
        if pack.samples:
            return self.forward(pack, tokens=tokens)
        state = RngState.capture()
        output = self.forward(pack, tokens=tokens)
        state.restore()
        return output

    def _second_backward(self, entry: _Seen, batch: Batch) -> None:
        output = entry.kept
        if output is None:
            entry.state.restore()  # the same dropout: otherwise the gradient would be taken at another point
            output = self._forward(entry.pack)
        self._backward(entry.pack, output, batch)
        entry.pack.plan.kernel_cache.clear()

    def _backward(self, pack: Pack, output: PackOutput, batch: Batch) -> None:
        loss = self._share(pack, output, batch, self.terms)
        if output.anchor is not None:
            loss = output.anchor if loss is None else loss + output.anchor
        if loss is not None:
            self.backward(loss)

    def _share(self, pack: Pack, output: PackOutput, batch: Batch, terms: Sequence[CoupledTerm]) -> torch.Tensor | None:
        """The weighted share of a pack in all losses of the step; an empty pack has none."""
        shares = []
        for stream, term in output.terms.items():
            self._sums[stream] = self._sums.get(stream, 0.0) + term.sum.detach()
            shares.append(propagate_nonfinite(term.sum) * (self.weights[stream] / batch.counts[stream]))
        if pack.samples:
            coupled = [term.share(pack, output) for term in terms]
            shares += [propagate_nonfinite(share) for share in coupled if share is not None]
        return sum(shares[1:], start=shares[0]) if shares else None

    def _report(self, batch: Batch, terms: Sequence[CoupledTerm]) -> StepLosses:
        losses = StepLosses(reports=tuple(term.finish() for term in terms))
        for report in losses.reports:
            losses.by_stream |= report.losses
            losses.metrics |= report.metrics
        for stream, count in batch.counts.items():
            # Taken out and put in again: the total is a sum of floats, whose last bit depends on the order.
            known = losses.by_stream.pop(stream, None)
            losses.by_stream[stream] = self._token_loss(stream, count) if known is None else known
        losses.total = sum(self.weights[stream] * loss for stream, loss in losses.by_stream.items())
        losses.total += sum(report.extra for report in losses.reports)
        return losses

    def _token_loss(self, stream: str, count: float) -> float:
        value = self._sums.get(stream, torch.zeros((), dtype=torch.float32)).to(distributed.local_device())
        return float(distributed.all_reduce_sum(value.clone())) / count if count else 0.0


def propagate_nonfinite(loss: torch.Tensor) -> torch.Tensor:
    """A loss that is not finite gets a gradient that is not either, so that the update is skipped on every rank."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
