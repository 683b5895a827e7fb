"""Embedding many samples: packs of similar lengths, results in the order asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from unified_lm.batch import Pack, Sample, make_pack
from unified_lm.models.pooling import Pooling, pool


def embed_samples(
    backbone: Callable[[Pack], torch.Tensor],
    samples: Sequence[Sample],
    pooling: str | Pooling,
    *,
    token_budget: int,
    device: torch.device | str,
    normalize: bool = False,
    projection: nn.Module | None = None,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Embed samples without gradients, in evaluation mode.

    Samples are packed longest first, so that a pack holds similar lengths and the largest pack comes first: running out of
    memory happens at once or never.

    Args:
        backbone: pack -> last hidden states `[T, D]`. A module, or a module's method, is put into evaluation mode and back.
        samples: each with a pool span; the same object may appear twice.
        pooling: a `Pooling` or its name.
        token_budget: the most tokens of one forward; a longer sample gets one of its own.
        device: where the backbone runs.
        normalize: whether to scale vectors to length 1.
        projection: applied to pooled vectors; put into evaluation mode likewise.
        progress: called after every pack with the number of samples it held.

    Returns:
        float32 `[N, D]` on the CPU, in the order of `samples`; `[0, 0]` for none.

    Raises:
        ConfigError: unknown pooling.
    """
    method = Pooling.parse(pooling)
    if not samples:
        return torch.zeros(0, 0)
    parts: list[torch.Tensor] = []
    order: list[int] = []
    # no_grad, not inference_mode: a rotary table that a model caches here must be usable in the next training step
    with _evaluation_mode(backbone, projection), torch.no_grad():
        for indices in _plan(samples, token_budget):
            pack = _number(samples, indices).to(torch.device(device))
            vectors = pool(backbone(pack), pack.pool_spans, method)
            if projection is not None:
                vectors = projection(vectors)
            if normalize:
                vectors = F.normalize(vectors, dim=-1)
            parts.append(vectors.float().cpu())
            order.extend(pack.pool_rows)
            if progress is not None:
                progress(len(indices))
    gathered = torch.cat(parts)
    result = torch.empty_like(gathered)
    result[torch.tensor(order)] = gathered
    return result


def sample_states(
    backbone: Callable[[Pack], torch.Tensor],
    samples: Sequence[Sample],
    *,
    token_budget: int,
    device: torch.device | str,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Last hidden states of samples without gradients, in evaluation mode: what word-level tasks and perplexity read.

    Args:
        backbone, token_budget, device: as in `embed_samples`.
        samples: pool spans and labels are ignored.

    Yields:
        The index of a sample and its states `[T, D]`, on the device and in the type of the model; longest sample first.
    """
    if not samples:
        return
    for indices in _plan(samples, token_budget):
        members = [replace(samples[index], labels=None, token_weights=None, pool=None) for index in indices]
        place = {id(member): index for member, index in zip(members, indices, strict=True)}
        # entered anew for every pack: whoever consumes the states may do anything in between
        with _evaluation_mode(backbone), torch.no_grad():
            pack = make_pack(members).to(torch.device(device))
            states = backbone(pack)
        start = 0
        for member in pack.samples:
            yield place[id(member)], states[start : start + len(member)]
            start += len(member)


def _plan(samples: Sequence[Sample], token_budget: int) -> Iterator[list[int]]:
    """Indices of the samples of each pack, longest sample first."""
    indices: list[int] = []
    filled = 0
    for index in sorted(range(len(samples)), key=lambda i: (-len(samples[i]), i)):
        if indices and filled + len(samples[index]) > token_budget:
            yield indices
            indices, filled = [], 0
        indices.append(index)
        filled += len(samples[index])
    yield indices


def _number(samples: Sequence[Sample], indices: Sequence[int]) -> Pack:
    """A pack whose `pool_rows` are indices into `samples`; labels are left out, nobody reads them here."""
    members = [replace(samples[index], labels=None, token_weights=None) for index in indices]
    assert all(member.pool is not None for member in members), "only samples with a pool span can be embedded"
    return make_pack(members, {id(member): index for member, index in zip(members, indices, strict=True)})


@contextmanager
def _evaluation_mode(*parts: object) -> Iterator[None]:
    """Evaluation mode for every module among `parts` (or behind a bound method), each submodule's own mode restored after."""
    owners = [getattr(part, "__self__", part) for part in parts]
    modes = [(module, module.training) for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
