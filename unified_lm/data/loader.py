"""One batch per optimizer step: every rank draws the same samples and keeps its own share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from unified_lm.batch import Batch, Sample, make_batch
from unified_lm.batch.normalization import normalize
from unified_lm.config.objectives import TokenObjectiveConfig
from unified_lm.core.errors import CheckpointError, ConfigError
from unified_lm.data.stream import Stream


@dataclass(frozen=True)
class SampleCost:
    """What a sample costs to train on: a term per token, and one per pair of tokens that see each other.

    Only the ratio of the two matters. A decoder's forward takes 2 operations per parameter and token (leaving out the embedding
    table, and the output head, which is used at few positions), and 4 per layer, unit of width and visible pair, for scores
    and for the sum of values: a third of PaLM's 6N + 12LHQT for forward and backward (arXiv:2204.02311, appendix B).
    For a 7B model the two are equal at 27,000 visible tokens, for a 135M model at 3,000.

    Attributes:
        per_token: cost of a token in every matrix product.
        per_pair: cost of a (query, key) pair of attention. 0: attention is free.
    """

    per_token: float = 1.0
    per_pair: float = 0.0

    def __post_init__(self) -> None:
        assert self.per_token > 0
        assert self.per_pair >= 0

    def __call__(self, sample: Sample) -> float:
        """The cost of a sample; sliding windows are not taken into account."""
        length = len(sample)
        span = sample.bidirectional[1] - sample.bidirectional[0]
        pairs = (length * (length + 1) + span * max(span - 1, 0)) // 2
        return self.per_token * length + self.per_pair * pairs


class StepLoader:
    """Draws, weighs, deals and packs.

    Drawing is cheap next to a forward, so every rank draws the whole step's samples and no sample travels between ranks. What
    loss sums are divided by is decided here, over the whole step, before the samples are dealt: neither the number of ranks nor
    the token budget changes it.

    Args:
        streams: by name.
        token_budget: the most tokens of a pack.
        rank: this process.
        world_size: the number of processes.
        cost: what a sample costs; ranks get equal shares of it. By default its tokens.

    Raises:
        ConfigError: no stream, or a step too small to give every rank a part of it.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        *,
        token_budget: int,
        rank: int = 0,
        world_size: int = 1,
        cost: SampleCost | None = None,
    ) -> None:
        if not streams:
            raise ConfigError("there is no stream to draw from")
        problems = [
            f"streams.{name}.batch_size is {stream.batch_size} for {world_size} ranks; every rank needs at least one group"
            for name, stream in streams.items()
            if stream.pooled and stream.batch_size < world_size
        ]
        if sum(stream.batch_size for stream in streams.values()) < world_size:
            problems.append(f"a step has fewer samples than the {world_size} ranks; raise a batch_size")
        if problems:
            raise ConfigError(problems)
        self.streams = dict(streams)
        self.token_budget = token_budget
        self.rank = rank
        self.world_size = world_size
        self.cost = cost or SampleCost()

    def next_batch(self) -> Batch:
        """This rank's share of the next step."""
        samples, counts = self.draw()
        shares = partition_samples(samples, self.world_size, self.cost)
        return make_batch(shares[self.rank], self.token_budget, counts)

    def draw(self) -> tuple[dict[str, list[Sample]], dict[str, float]]:
        """The next step's samples of every stream over all ranks, and the counts that loss sums are divided by."""
        samples: dict[str, list[Sample]] = {}
        counts: dict[str, float] = {}
        for name, stream in self.streams.items():
            samples[name] = stream.draw()
            if stream.scored:
                counts[name] = float(sum(not sample.is_control for sample in samples[name]))
            elif isinstance(objective := stream.config.objective, TokenObjectiveConfig):
                samples[name], counts[name] = normalize(samples[name], objective.normalization, objective.micro_batch_size)
        return samples, counts

    @property
    def reads_along(self) -> bool:
        """Whether a draw reads rows that nobody has looked at before, so that it may fail at any step."""
        return any(stream.config.is_flowing for stream in self.streams.values())

    @property
    def num_drawn(self) -> int:
        """Batches drawn since the first step of the run."""
        return next(iter(self.streams.values())).draws

    def reset(self) -> None:
        """Go back to the first step."""
        for stream in self.streams.values():
            stream.reset()

    def state_dict(self) -> dict[str, Any]:
        """Where every stream stands, as JSON; the same on every rank and for every number of ranks."""
        return {name: stream.state_dict() for name, stream in self.streams.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a saved loader stopped, on any number of ranks.

        Raises:
            CheckpointError: the state is of other streams, or of other data.
        """
        if set(state) != set(self.streams):
            raise CheckpointError(
                f"the checkpoint has the streams {sorted(state)}, this run has {sorted(self.streams)}; the data order "
                "cannot be continued. Resume with the recipe that wrote it."
            )
        for name, stream in self.streams.items():
            stream.load_state_dict(state[name])


def partition_samples(
    samples: Mapping[str, Sequence[Sample]], world_size: int, cost: SampleCost | None = None
) -> list[list[Sample]]:
    """Share a step's samples among ranks: whole groups, balanced by cost.

    Stream by stream, and within a stream the costliest group first, each to the rank with the least so far (LPT; Graham, 1969).
    The first `world_size` groups of a stream go to different ranks, so that no rank is left without one. Streams with large
    groups come first: the small ones level out what they leave. Whatever the streams, no rank is ahead of another by more
    than one group, so each holds at most the mean and the largest group.

    Args:
        samples: per stream its samples of the step, group after group.
        world_size: ranks.
        cost: of a sample; by default its tokens.

    Returns:
        Per rank its samples, stream by stream in the order in which they were drawn.
    """
    price = cost or SampleCost()
    units = {name: [list(members) for _, members in groupby(drawn, key=lambda s: s.group)] for name, drawn in samples.items()}
    costs = {name: [sum(map(price, unit)) for unit in stream] for name, stream in units.items()}
    load = [0.0] * world_size
    owners = {name: _assign(costs[name], load) for name in sorted(units, key=lambda n: -max(costs[n], default=0.0))}
    shares: list[list[Sample]] = [[] for _ in range(world_size)]
    for name, stream in units.items():
        for unit, owner in zip(stream, owners[name], strict=True):
            shares[owner].extend(unit)
    return shares


def _assign(costs: Sequence[float], load: list[float]) -> list[int]:
    """The rank of every unit of one stream; adds their costs to `load`, the cost that each rank holds already."""
    ranks = range(len(load))
    owners = [0] * len(costs)
    without = set(ranks)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(without or ranks, key=lambda r: (load[r], r))
        without.discard(owner)
        owners[index] = owner
        load[owner] += costs[index]
    return owners


def imbalance(loads: Sequence[float]) -> float:
    """The most that a rank has over what ranks have on average: 1.0 where all have the same, N where one of N has everything.

    The others wait for that rank, so a step takes this many times as long as one that is dealt perfectly.

    Args:
        loads: cost (or tokens, or seconds) of every rank; not negative.
    """
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean else 1.0
