"""Scores of whole samples: what an objective over log-probabilities needs before a step's gradients.

Such an objective (KTO) compares a sample's log-probability with that under a reference model, and with a baseline over samples
that are only scored. A step therefore has two phases, as GradCache has:

1. graph-free forwards: the controls under the model and under the reference, which gives the baseline over all ranks; then
   the samples to train on under the reference, where their log-probability is not known beforehand;
2. the ordinary forwards and backwards (`engine.step`), in which a sample's loss depends on its own score alone.

Phase 1 runs in evaluation mode, so it draws no random number and dropout does not enter what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from unified_lm.batch import Batch, LossTerm, Pack, Sample, SequenceScores, empty_pack
from unified_lm.core import distributed
from unified_lm.engine.training_module import PackOutput, TrainingModule
from unified_lm.objectives.protocol import SequenceObjective

_EMPTY = empty_pack()


class SequenceScoring:
    """The sequence objectives of one run, and what they know about the present step.

    Args:
        forward: pack -> `PackOutput`.
        trainable: the module behind `forward`.
        objectives: per stream its objective.
        equal_forwards: whether every rank must run the same sequence of forwards (ZeRO-2 and 3).
    """

    def __init__(
        self,
        forward: Callable[[Pack], PackOutput],
        trainable: TrainingModule,
        objectives: Mapping[str, SequenceObjective],
        equal_forwards: bool = False,
    ) -> None:
        self.forward = forward
        self.trainable = trainable
        self.objectives = objectives
        self.equal_forwards = equal_forwards
        self._references: dict[int, float] = {}
        self._baselines: dict[str, torch.Tensor] = {}
        self._seen: dict[str, list[SequenceScores]] = {}

    def begin(self, batch: Batch) -> None:
        """Phase 1 of a step: baselines and reference log-probabilities. Collective.

        Args:
            batch: this rank's share, on the module's device.
        """
        self._references, self._baselines, self._seen = {}, {}, {name: [] for name in self.objectives}
        if not self.objectives:
            return
        controls, unknown = list(batch.control_packs), list(batch.reference_packs)
        unknown += [pack for pack in controls if any(sample.reference is None for sample in pack.samples)]
        if self.equal_forwards:
            num_controls, num_unknown = distributed.all_reduce_max([len(controls), len(unknown)])
            empty = _EMPTY.to(distributed.local_device())
            controls += [empty] * (num_controls - len(controls))
            unknown += [empty] * (num_unknown - len(unknown))
        with self.trainable.scoring():
            policy = self._score(controls)
        if unknown:
            with self.trainable.scoring(reference=True):
                self._references = self._score(unknown)
        for pack in (*batch.control_packs, *batch.reference_packs):
            pack.plan.kernel_cache.clear()
        device = distributed.local_device()
        for stream, objective in self.objectives.items():
            own = [s for pack in batch.control_packs for s in pack.labeled(stream)]
            ratios = torch.tensor([policy[id(s)] - self._reference(s) for s in own], dtype=torch.float32, device=device)
            self._baselines[stream] = objective.baseline(self._of_all_ranks(ratios)).detach()

    def terms(self, pack: Pack, output: PackOutput) -> dict[str, LossTerm]:
        """The losses of one pack, per stream with scores.

        Args:
            pack: one of the batch that `begin` was called with.
            output: its forward's.
        """
        terms = {}
        for stream, policy in output.scores.items():
            samples = pack.labeled(stream)
            columns = torch.tensor([(self._reference(s), bool(s.desirable)) for s in samples], dtype=torch.float32)
            reference, desirable = columns.to(policy.device).unbind(1)
            baseline = self._baselines[stream].expand(len(samples))
            scores = SequenceScores(policy, reference, desirable.bool(), baseline)
            terms[stream] = self.objectives[stream](scores)
            self._seen[stream].append(SequenceScores(policy.detach(), reference, desirable.bool(), baseline))
        return terms

    def finish(self) -> dict[str, SequenceScores]:
        """The scores of every sample of the step over all ranks, per stream, without gradient. Collective."""
        gathered = {}
        for stream, seen in self._seen.items():
            rows = [torch.stack([s.policy, s.reference, s.desirable.float(), s.baseline], dim=1) for s in seen]
            own = torch.cat(rows) if rows else torch.zeros(0, 4, device=distributed.local_device())
            policy, reference, desirable, baseline = self._of_all_ranks(own).unbind(1)
            gathered[stream] = SequenceScores(policy, reference, desirable.bool(), baseline)
        return gathered

    def _of_all_ranks(self, own: torch.Tensor) -> torch.Tensor:
        """The rows of every rank, in the order of ranks; they may have different numbers of rows."""
        parts, _ = distributed.all_gather_uneven(own)
        return torch.cat(parts)

    def _reference(self, sample: Sample) -> float:
        return self._references[id(sample)] if sample.reference is None else sample.reference

    def _score(self, packs: Sequence[Pack]) -> dict[int, float]:
        """Log-probabilities by `id` of the sample; call it within `TrainingModule.scoring`."""
        found: dict[int, float] = {}
        for pack in packs:
            for stream, values in self.forward(pack).scores.items():
                found |= dict(zip(map(id, pack.labeled(stream)), values.tolist(), strict=True))
        return found
