"""Scores of whole samples as a coupled term: what an objective over log-probabilities needs before a step's gradients.

Such an objective (KTO) compares a sample's log-probability with that under a reference model, and with a baseline over samples
that are only scored. What couples the packs is the baseline, and it is known before any pack of the step is forwarded:

1. graph-free forwards in `begin`: the controls under the model and under the reference, which gives the baseline over all
   ranks; then the samples to train on under the reference, where their log-probability is not known beforehand;
2. the ordinary forwards and backwards (`engine.step`), in which a sample's loss depends on its own score alone. No pack is
   forwarded twice for it.

Step 1 runs in evaluation mode, so it draws no random number and dropout does not enter what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from unified_lm.batch import Batch, LossTerm, Pack, Sample, SequenceScores, empty_pack
from unified_lm.config.objectives import ObjectiveConfig
from unified_lm.core import distributed
from unified_lm.engine.coupled import CoupledTerm, TermParts, TermReport
from unified_lm.engine.readout import PackStates, Readout
from unified_lm.engine.training_module import PackOutput, TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.objectives.cross_entropy import token_losses
from unified_lm.objectives.protocol import SequenceObjective

_EMPTY = empty_pack()


class SequenceReadout(Readout):
    """Per stream float32 `[S]`: the log-probability of each of its labeled samples, in nats, in the order of `Pack.labeled`.

    Args:
        streams: whose samples are scored as wholes.
    """

    name = "sequence_scores"

    def __init__(self, streams: Collection[str]) -> None:
        self.labeled_streams = frozenset(streams)

    def __call__(self, states: PackStates, pack: Pack) -> dict[str, torch.Tensor]:
        """See `Readout.__call__`; logits are never whole (`objectives/cross_entropy.py`)."""
        assert states.head is not None, "a pack with labels comes with the head"
        scores = {}
        for name, part in pack.supervised.items():
            if name in self.labeled_streams:
                losses = token_losses(states.hidden.index_select(0, part.positions), states.head, part.targets).losses
                scores[name] = -torch.stack([losses_of_sample.sum() for losses_of_sample in losses.split(part.lengths)])
        return scores


def sample_scores(pack: Pack, output: PackOutput) -> dict[int, float]:
    """Log-probabilities of a pack's labeled samples in nats, by `id` of the sample.

    Args:
        pack: what was forwarded.
        output: of a module with a `SequenceReadout`.
    """
    found: dict[int, float] = {}
    for stream, values in output.readouts[SequenceReadout.name].items():
        found |= dict(zip(map(id, pack.labeled(stream)), values.tolist(), strict=True))
    return found


class SequenceScoring(CoupledTerm):
    """The sequence objectives of one run, and what they know about the present step.

    Args:
        forward: pack -> `PackOutput`.
        trainable: the module behind `forward`; it has a `SequenceReadout` of the objectives' streams.
        objectives: per stream its objective.
        weights: per stream the factor of its loss; other streams may have one too.
        equal_forwards: whether every rank must run the same sequence of forwards (ZeRO-2 and 3).
    """

    def __init__(
        self,
        forward: Callable[[Pack], PackOutput],
        trainable: TrainingModule,
        objectives: Mapping[str, SequenceObjective],
        weights: Mapping[str, float],
        equal_forwards: bool = False,
    ) -> None:
        self.forward = forward
        self.trainable = trainable
        self.objectives = objectives
        self.weights = weights
        self.equal_forwards = equal_forwards
        self._counts: Mapping[str, float] = {}
        self._references: dict[int, float] = {}
        self._baselines: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._seen: dict[str, list[SequenceScores]] = {}

    @classmethod
    def make(cls, parts: TermParts) -> CoupledTerm:
        """See `CoupledTerm.make`."""
        return cls(parts.forward, parts.trainable, parts.objectives, parts.weights, parts.equal_forwards)

    @classmethod
    def readout(cls, streams: Mapping[str, ObjectiveConfig], backbone: Backbone) -> Readout:
        """See `CoupledTerm.readout`."""
        return SequenceReadout(streams)

    def scored(self, batch: Batch) -> list[Pack]:
        """The controls under the model, then what is not known under the reference."""
        return [*batch.sequences.controls, *_unknown(batch)]

    def begin(self, batch: Batch) -> None:
        """Baselines and reference log-probabilities of a step."""
        self._counts, self._sums = batch.counts, {}
        self._references, self._baselines, self._seen = {}, {}, {name: [] for name in self.objectives}
        controls, unknown = list(batch.sequences.controls), _unknown(batch)
        if self.equal_forwards:
            num_controls, num_unknown = distributed.all_reduce_max([len(controls), len(unknown)])
            empty = _EMPTY.to(distributed.local_device())
            controls += [empty] * (num_controls - len(controls))
            unknown += [empty] * (num_unknown - len(unknown))
        with self.trainable.scoring():
            policy = self._score(controls)
        if unknown:
            # Adapters are switched off once for all packs: a second copy of the model would take its memory.
            with self.trainable.scoring(reference=True):
                self._references = self._score(unknown)
        # Masks of these packs are not needed again, and several hundred of them would be.
        for pack in (*batch.sequences.controls, *batch.sequences.unknown):
            pack.plan.kernel_cache.clear()
        device = distributed.local_device()
        for stream, objective in self.objectives.items():
            own = [s for pack in batch.sequences.controls for s in pack.labeled(stream)]
            ratios = torch.tensor([policy[id(s)] - self._reference(s) for s in own], dtype=torch.float32, device=device)
            # Over all ranks: with the baseline of its own controls a rank's loss would depend on how samples are partitioned.
            self._baselines[stream] = objective.baseline(self._of_all_ranks(ratios)).detach()

    def share(self, pack: Pack, output: PackOutput) -> torch.Tensor | None:
        """The weighted losses of one pack's samples, each over its stream's count of the step."""
        total: torch.Tensor | None = None
        for stream, policy in output.readouts[SequenceReadout.name].items():
            term = self._term(stream, pack.labeled(stream), policy)
            self._sums[stream] = self._sums.get(stream, 0.0) + term.sum.detach()
            share = term.sum * (self.weights[stream] / self._counts[stream])
            total = share if total is None else total + share
        return total

    def _term(self, stream: str, samples: Sequence[Sample], policy: torch.Tensor) -> LossTerm:
        # One table: a copy to the device for each column would wait twice.
        known = [(self._reference(s), bool(s.sequence and s.sequence.desirable)) for s in samples]
        reference, desirable = torch.tensor(known, dtype=torch.float32).to(policy.device, non_blocking=True).unbind(1)
        baseline = self._baselines[stream].expand(len(samples))
        scores = SequenceScores(policy, reference, desirable.bool(), baseline)
        self._seen[stream].append(SequenceScores(policy.detach(), reference, desirable.bool(), baseline))
        return self.objectives[stream](scores)

    def finish(self) -> TermReport:
        """Losses and what the objectives measured; the scores of every sample of the step, over all ranks, are kept."""
        losses = {}
        for stream in (name for name in self.objectives if name in self._counts):  # in one order on all ranks
            value = self._sums.get(stream, torch.zeros((), dtype=torch.float32)).to(distributed.local_device())
            count = self._counts[stream]
            losses[stream] = float(distributed.all_reduce_sum(value.clone())) / count if count else 0.0
        kept = {stream: self._gathered(seen) for stream, seen in self._seen.items()}
        measured = self._measure(kept)
        return TermReport(losses, metrics={name: float(values.mean()) for name, values in measured.items()}, kept=kept)

    def items(self, reports: Sequence[TermReport]) -> dict[str, torch.Tensor]:
        """What the objectives measure over the samples of several steps together: some numbers are no means of steps' means."""
        if not reports:
            return {}
        return self._measure({name: SequenceScores.cat([report.kept[name] for report in reports]) for name in self.objectives})

    def _measure(self, scores: Mapping[str, SequenceScores]) -> dict[str, torch.Tensor]:
        return {
            f"{stream}/{name}": values
            for stream, of_stream in scores.items()
            for name, values in self.objectives[stream].measure(of_stream).items()
            if len(values)
        }

    def _gathered(self, seen: Sequence[SequenceScores]) -> SequenceScores:
        rows = [torch.stack([s.policy, s.reference, s.desirable.float(), s.baseline], dim=1) for s in seen]
        own = torch.cat(rows) if rows else torch.zeros(0, 4, device=distributed.local_device())
        policy, reference, desirable, baseline = self._of_all_ranks(own).unbind(1)
        return SequenceScores(policy, reference, desirable.bool(), baseline)

    def _of_all_ranks(self, own: torch.Tensor) -> torch.Tensor:
        """The rows of every rank, in the order of ranks; they may have different numbers of rows."""
        parts, _ = distributed.all_gather_uneven(own)
        return torch.cat(parts)

    def _reference(self, sample: Sample) -> float:
        known = _known_reference(sample)
        return self._references[id(sample)] if known is None else known

    def _score(self, packs: Sequence[Pack]) -> dict[int, float]:
        """Log-probabilities by `id` of the sample; call it within `TrainingModule.scoring`."""
        found: dict[int, float] = {}
        for pack in packs:
            found |= sample_scores(pack, self.forward(pack))
        return found


def _known_reference(sample: Sample) -> float | None:
    return None if sample.sequence is None else sample.sequence.reference


def _unknown(batch: Batch) -> list[Pack]:
    """Packs to be read by the reference model: samples to train on without a known score, then controls without one."""
    controls = [pack for pack in batch.sequences.controls if any(_known_reference(sample) is None for sample in pack.samples)]
    return [*batch.sequences.unknown, *controls]
