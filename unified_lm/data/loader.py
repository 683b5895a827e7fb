"""One batch per optimizer step: every rank draws the same samples and keeps its own share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from unified_lm.batch import Batch, Sample, make_batch
from unified_lm.batch.normalization import normalize
from unified_lm.core.errors import CheckpointError, ConfigError
from unified_lm.data.streams import Stream


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

    def next_batch(self) -> Batch:
        """This rank's share of the next step."""
        samples, counts = self.draw()
        shares = deal(samples, self.world_size)
        return make_batch(shares[self.rank], self.token_budget, counts)

    def draw(self) -> tuple[dict[str, list[Sample]], dict[str, float]]:
        """The next step's samples of every stream over all ranks, and the counts that loss sums are divided by."""
        samples: dict[str, list[Sample]] = {}
        counts: dict[str, float] = {}
        for name, stream in self.streams.items():
            samples[name] = stream.draw()
            if not stream.pooled:
                objective = stream.config.objective
                samples[name], counts[name] = normalize(samples[name], objective.normalization, objective.micro_batch_size)
        return samples, counts

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


def deal(samples: Mapping[str, Sequence[Sample]], world_size: int) -> list[list[Sample]]:
    """Share a step's samples among ranks: whole groups, balanced by tokens.

    Longest first, each to the rank with the fewest tokens so far (LPT). Streams whose samples are pooled come first, and the
    first units of a stream go to different ranks, so that no rank is left without a group.

    Args:
        samples: per stream its samples of the step, group after group.
        world_size: ranks.

    Returns:
        Per rank its samples, in the order in which they were drawn.
    """
    load = [0] * world_size
    shares: list[list[Sample]] = [[] for _ in range(world_size)]
    for name in sorted(samples, key=lambda name: not any(s.pool is not None for s in samples[name])):
        units = [list(members) for _, members in groupby(samples[name], key=lambda sample: sample.group)]
        sizes = [sum(map(len, unit)) for unit in units]
        owners: list[int] = [0] * len(units)
        held = [0] * world_size
        for place, index in enumerate(sorted(range(len(units)), key=lambda i: (-sizes[i], i))):
            candidates = [r for r in range(world_size) if place >= world_size or not held[r]]
            owner = min(candidates, key=lambda r: (load[r], r))
            owners[index] = owner
            load[owner] += sizes[index]
            held[owner] += 1
        for unit, owner in zip(units, owners, strict=True):
            shares[owner].extend(unit)
    return shares
