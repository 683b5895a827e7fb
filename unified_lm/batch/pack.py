"""Packs and batches: samples laid end to end up to a token budget, no padding.

Legend: `batch/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from unified_lm.batch.plan import AttentionPlan, mode_of
from unified_lm.batch.sample import IGNORE, Sample

_MODE_ORDER = ("causal", "span", "blocks", "keep_first", "bidirectional")


@dataclass(frozen=True, eq=False)
class Supervision:
    """The supervised positions of one stream in one pack.

    Attributes:
        positions: int64 `[N]`, pack coordinates of the states that predict (one before each label).
        targets: int64 `[N]`, the tokens to predict.
        weights: float32 `[N]`, the weight of each prediction in the sum.
        lengths: how many positions each of the stream's labeled samples has, in pack order; they add up to N.
    """

    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Pack:
    """What one forward sees.

    Attributes:
        input_ids: int64 `[T]`.
        position_ids: int64 `[T]`, restarting at 0 with every sample.
        plan: who sees whom.
        pool_spans: int64 `[E, 2]`, pooled `[start, stop)` in pack coordinates, for every sample that is pooled.
        pool_rows: per stream the rows of that stream's embedding matrix `[G * K, D]` on this rank that the pooled samples
            fill, in the order of `pool_spans`; see `pool_streams`.
        pool_streams: `E` stream names, one per row of `pool_spans`.
        supervised: per stream its supervised positions; streams without any are absent.
        samples: the samples, in pack order.
        num_pooled: tokens in all pool spans, a number that the host knows without asking the device.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    plan: AttentionPlan
    pool_spans: torch.Tensor
    pool_rows: tuple[int, ...]
    pool_streams: tuple[str, ...]
    supervised: Mapping[str, Supervision]
    samples: tuple[Sample, ...] = field(repr=False)
    num_pooled: int

    def __len__(self) -> int:
        return self.plan.num_tokens

    def labeled(self, stream: str) -> list[Sample]:
        """The stream's samples with supervised positions, in the order of `Supervision.lengths`."""
        return [sample for sample in self.samples if sample.stream == stream and sample.num_supervised]

    def positions_of(self, stream: str) -> torch.Tensor:
        """int64 `[N]`, pack coordinates of all tokens of a stream's samples, on the pack's device."""
        mine = [
            torch.arange(offset, offset + len(sample))
            for sample, offset in zip(self.samples, self.plan.offsets, strict=False)
            if sample.stream == stream
        ]
        positions = torch.cat(mine) if mine else torch.zeros(0, dtype=torch.int64)
        return positions.to(self.input_ids.device, non_blocking=True)

    def to(self, device: torch.device) -> Pack:
        """The same pack with every tensor on `device`."""
        supervised = {
            name: replace(
                s,
                positions=s.positions.to(device, non_blocking=True),
                targets=s.targets.to(device, non_blocking=True),
                weights=s.weights.to(device, non_blocking=True),
            )
            for name, s in self.supervised.items()
        }
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            plan=self.plan.to(device),
            pool_spans=self.pool_spans.to(device, non_blocking=True),
            supervised=supervised,
        )


@dataclass(frozen=True, eq=False)
class ScoredPacks:
    """Packs that are forwarded for their log-probabilities alone, without a gradient.

    Attributes:
        controls: samples that are only scored (`Sample.is_control`), apart from all others.
        unknown: the samples of `Batch.packs` whose log-probability under the reference is not known yet, once more.
    """

    controls: tuple[Pack, ...] = ()
    unknown: tuple[Pack, ...] = ()

    def to(self, device: torch.device) -> ScoredPacks:
        """The same packs with every tensor on `device`."""
        return ScoredPacks(*(tuple(pack.to(device) for pack in packs) for packs in (self.controls, self.unknown)))


@dataclass(frozen=True, eq=False)
class Batch:
    """The packs of one optimizer step on one rank.

    Attributes:
        packs: packs with pooled samples first, then those without; only the last pooled one holds both kinds.
        group_sizes: per contrastive stream K, the samples per group (query + positive + hard negatives).
        num_groups: per contrastive stream the groups on this rank.
        text_ids: per contrastive stream int64 `[G, K]`, hashes of the embedded texts (`Sample.text_id`) on this rank.
        counts: per stream with labels what its loss sum is divided by, for the whole step over all ranks (known from the
            data alone, before any forward).
        num_truncated: samples cut to their limit.
        sequences: what is scored before the step, for objectives over whole sequences.
    """

    packs: tuple[Pack, ...]
    group_sizes: Mapping[str, int] = field(default_factory=dict)
    num_groups: Mapping[str, int] = field(default_factory=dict)
    text_ids: Mapping[str, torch.Tensor] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    num_truncated: int = 0
    sequences: ScoredPacks = ScoredPacks()

    @property
    def num_tokens(self) -> int:
        """Tokens trained on in this step on this rank; those only scored do not count."""
        return sum(len(pack) for pack in self.packs)

    @property
    def num_samples(self) -> int:
        """Samples trained on in this step on this rank."""
        return sum(len(pack.samples) for pack in self.packs)

    def to(self, device: torch.device) -> Batch:
        """The same batch with every tensor on `device`."""
        return replace(
            self,
            packs=tuple(pack.to(device) for pack in self.packs),
            sequences=self.sequences.to(device),
            text_ids={name: ids.to(device, non_blocking=True) for name, ids in self.text_ids.items()},
        )


def make_pack(samples: Sequence[Sample], rows: Mapping[int, int] | None = None) -> Pack:
    """Lay samples end to end, equal attention modes next to each other.

    Args:
        samples: at least one.
        rows: for pooled samples, `id(sample)` -> its row in its stream's embedding matrix. None numbers the pooled
            samples in the order given.
    """
    if rows is None:
        rows = {id(s): row for row, s in enumerate(s for s in samples if s.pool is not None)}
    # Equal modes next to each other: a kernel then needs one call per mode and layer. The sort is stable, so that a pack
    # depends on the order of its samples alone.
    ordered = sorted(samples, key=lambda s: _MODE_ORDER.index(mode_of(len(s), s.bidirectional, s.blocks).value))
    spans, blocks = [s.bidirectional for s in ordered], [s.blocks for s in ordered]
    plan = AttentionPlan.build([len(s) for s in ordered], spans, blocks=blocks)
    pooled = [(s, offset) for s, offset in zip(ordered, plan.offsets, strict=False) if s.pool is not None]
    pool_spans = [(offset + s.pool[0], offset + s.pool[1]) for s, offset in pooled if s.pool is not None]
    return Pack(
        input_ids=torch.from_numpy(np.concatenate([np.asarray(s.input_ids, dtype=np.int64) for s in ordered])),
        # From 0 for every sample: positions that ran on would make a sample's states depend on its neighbors.
        position_ids=torch.cat([torch.arange(len(s)) for s in ordered]),
        plan=plan,
        pool_spans=torch.tensor(pool_spans, dtype=torch.int64).reshape(-1, 2),
        pool_rows=tuple(rows[id(s)] for s, _ in pooled),
        pool_streams=tuple(s.stream for s, _ in pooled),
        supervised=_supervise(ordered, plan.offsets),
        samples=tuple(ordered),
        num_pooled=sum(stop - start for start, stop in pool_spans),
    )


def _supervise(samples: Sequence[Sample], offsets: Sequence[int]) -> dict[str, Supervision]:
    parts: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for sample, offset in zip(samples, offsets, strict=False):
        if sample.labels is None:
            continue
        at = np.flatnonzero(sample.labels != IGNORE)
        if not len(at):
            continue
        weights = np.ones(len(at), np.float32) if sample.token_weights is None else sample.token_weights[at]
        # The state one position earlier predicts a label. Position 0 has no label, so no prediction comes from a neighbor.
        parts.setdefault(sample.stream, []).append((at - 1 + offset, sample.labels[at], weights))
    return {
        stream: Supervision(
            positions=torch.from_numpy(np.concatenate([p for p, _, _ in rows]).astype(np.int64)),
            lengths=tuple(len(p) for p, _, _ in rows),
            targets=torch.from_numpy(np.concatenate([t for _, t, _ in rows]).astype(np.int64)),
            weights=torch.from_numpy(np.concatenate([w for _, _, w in rows]).astype(np.float32)),
        )
        for stream, rows in parts.items()
    }


def make_batch(samples: Iterable[Sample], token_budget: int, counts: Mapping[str, float] | None = None) -> Batch:
    """Pack one rank's samples of one step.

    Samples with a pool span fill the first packs (first-fit decreasing). The others fill what room is left in the last of
    these, then packs of their own: GradCache forwards every pooled pack twice except the last, whose graph it keeps, so
    nothing is computed twice in vain. Samples that are only scored get packs of their own. Within a contrastive stream the
    groups are numbered anew from 0 on this rank, in order of `Sample.group`.

    Args:
        samples: this rank's samples. Every group is complete: slots 0 to K-1, K the same for all groups of a stream.
        token_budget: the most tokens of a pack. A longer sample gets a pack of its own.
        counts: see `Batch.counts`.
    """
    drawn = list(samples)
    members = [s for s in drawn if not s.is_control]
    groups = {name: sorted({s.group for s in members if s.stream == name}) for name in {s.stream for s in members if s.pool}}
    sizes, rows, text_ids = {}, {}, {}
    for name, numbers in groups.items():
        local = {number: index for index, number in enumerate(numbers)}
        mine = [s for s in members if s.stream == name]
        size = 1 + max(s.slot for s in mine)
        assert len(mine) == size * len(numbers), f"stream '{name}' has incomplete groups"
        ids = torch.zeros(len(numbers), size, dtype=torch.int64)
        for sample in mine:
            rows[id(sample)] = local[sample.group] * size + sample.slot
            ids[local[sample.group], sample.slot] = sample.text_id
        sizes[name], text_ids[name] = size, ids
    pooled = first_fit([s for s in members if s.pool is not None], token_budget)
    plain = [s for s in members if s.pool is None]
    bins = pooled[:-1] + first_fit(plain, token_budget, pooled[-1:])
    return Batch(
        packs=tuple(make_pack(content, rows) for content in bins),
        group_sizes=sizes,
        num_groups={name: len(numbers) for name, numbers in groups.items()},
        text_ids=text_ids,
        counts=dict(counts or {}),
        num_truncated=sum(s.truncated for s in members),
        sequences=_scored_packs(drawn, token_budget),
    )


def _scored_packs(samples: Sequence[Sample], token_budget: int) -> ScoredPacks:
    """Apart from the packs that are trained on: a control beside those would cost activations and have no gradient."""
    controls = [s for s in samples if s.is_control]
    unknown = [s for s in samples if s.sequence and not s.is_control and s.sequence.reference is None]
    return ScoredPacks(*(tuple(map(make_pack, first_fit(kind, token_budget))) for kind in (controls, unknown)))


def empty_pack() -> Pack:
    """What a rank forwards when others have more packs than it has: two tokens that nobody looks at, and no samples."""
    # It has a pool span because attention, pooling and projection must all run: under ZeRO-3 ranks wait for one another at each
    # of their parameters.
    filler = Sample(input_ids=np.zeros(2, dtype=np.int64), stream="", bidirectional=(0, 0), pool=(0, 2))
    return replace(make_pack([filler]), pool_streams=("",), samples=())


def first_fit(samples: Sequence[Sample], token_budget: int, bins: Sequence[Sequence[Sample]] = ()) -> list[list[Sample]]:
    """First-fit decreasing: longest sample first, each into the first bin with room, a new bin where none has.

    Args:
        samples: what to place.
        token_budget: capacity of a bin in tokens.
        bins: bins that already hold samples; they are filled up, not changed in place.
    """
    filled = [list(content) for content in bins]
    room = [token_budget - sum(map(len, content)) for content in filled]
    for sample in sorted(samples, key=len, reverse=True):
        # First fit decreasing needs at most 11/9 of the fewest possible bins (plus one), and is the same on every machine.
        place = next((index for index, free in enumerate(room) if free >= len(sample)), None)
        if place is None:
            filled.append([])
            room.append(token_budget)
            place = len(filled) - 1
        filled[place].append(sample)
        room[place] -= len(sample)
    return filled


def padded_tokens(samples: Sequence[Sample]) -> int:
    """Positions that would be computed if every sample were padded to the longest of its kind.

    A kind is a stream, and within one whose samples are pooled queries and documents apart: what the usual trainers pad.

    Args:
        samples: of one step on one rank.
    """
    lengths: dict[tuple[str, bool], list[int]] = {}
    for sample in samples:
        lengths.setdefault((sample.stream, sample.slot == 0), []).append(len(sample))
    return sum(len(kind) * max(kind) for kind in lengths.values())
