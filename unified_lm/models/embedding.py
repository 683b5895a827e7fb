"""Embedding many samples: packed by similar length, results in the order of the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import nn

from unified_lm.batch import Pack, Sample, make_pack
from unified_lm.models.key_values import KeyValueCache, KeyValueReader
from unified_lm.models.modes import evaluation_mode
from unified_lm.models.moee import RoutedPooling
from unified_lm.models.pooling import Pooling, pool


def embed_samples(
    backbone: Callable[[Pack], torch.Tensor],
    samples: Sequence[Sample],
    pooling: str | Pooling | RoutedPooling,
    *,
    token_budget: int,
    device: torch.device | str,
    normalize: bool = False,
    projection: nn.Module | None = None,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Embed samples without gradients, in evaluation mode.

    Samples are packed longest first, so that a pack holds similar lengths and the most expensive pack comes first: the process
    runs out of memory at once or never.

    Args:
        backbone: pack -> last hidden states `[T, D]`. If it is a module, or a module's method, the module is switched to
            evaluation mode and back.
        samples: each with a pool span; the same object may appear twice.
        pooling: a `Pooling` or its name, or what pools routing too.
        token_budget: the most tokens of one forward; a longer sample gets a forward of its own.
        device: where the backbone runs.
        normalize: whether to scale vectors to length 1.
        projection: applied to pooled vectors; switched to evaluation mode like the backbone.
        progress: called after every pack with its number of samples.

    Returns:
        float32 `[N, D]` on the CPU, in the order of `samples`; `[0, 0]` for none.

    Raises:
        ConfigError: unknown pooling.
    """
    method = pooling if isinstance(pooling, RoutedPooling) else Pooling.parse(pooling)
    if not samples:
        return torch.zeros(0, 0)
    parts: list[torch.Tensor] = []
    order: list[int] = []
    # no_grad, not inference_mode: a rotary table that a model caches here must remain usable in the next training step
    with evaluation_mode(backbone, projection), torch.no_grad():
        for indices in _plan(samples, token_budget):
            pack = _number(samples, indices).to(torch.device(device))
            with _listening(method, pack):
                hidden = backbone(pack)
            parts.append(_vectors(hidden, pack, method, projection, normalize))
            order.extend(pack.pool_rows)
            if progress is not None:
                progress(len(indices))
    gathered = torch.cat(parts)
    result = torch.empty_like(gathered)
    result[torch.tensor(order)] = gathered
    return result


def read_samples(
    reader: KeyValueReader,
    samples: Sequence[Sample],
    pooling: str | Pooling | RoutedPooling,
    *,
    token_budget: int,
    device: torch.device | str,
    normalize: bool = False,
    projection: nn.Module | None = None,
) -> Iterator[tuple[int, torch.Tensor, KeyValueCache]]:
    """Embed samples and keep what the layers hold of them, in one forward for both; `embed_samples` has the arguments.

    Yields:
        The index of a sample, its vector, float32 `[D]` on the CPU, and its keys and values, on the device; pack by pack.
    """
    method = pooling if isinstance(pooling, RoutedPooling) else Pooling.parse(pooling)
    for indices in _plan(samples, token_budget) if samples else ():
        # entered again for every pack: the consumer of this generator may train the model between two of them
        with evaluation_mode(reader.backbone, projection), torch.no_grad():
            pack = _number(samples, indices).to(torch.device(device))
            with _listening(method, pack):
                hidden, caches = reader.read(pack)
            vectors = _vectors(hidden, pack, method, projection, normalize)
        yield from zip(pack.pool_rows, vectors, caches, strict=True)


def _listening(method: Pooling | RoutedPooling, pack: Pack) -> AbstractContextManager[None]:
    return nullcontext() if isinstance(method, Pooling) else method.listening(pack)


def _vectors(
    hidden: torch.Tensor, pack: Pack, method: Pooling | RoutedPooling, projection: nn.Module | None, normalize: bool
) -> torch.Tensor:
    spans = pack.pool_spans
    if isinstance(method, Pooling):
        vectors = pool(hidden, spans, method, pack.num_pooled)
    else:
        vectors = method(hidden, spans)
    if projection is not None:
        vectors = projection(vectors)
    if normalize:
        vectors = F.normalize(vectors, dim=-1)
    return vectors.float().cpu()


def sample_states(
    backbone: Callable[[Pack], torch.Tensor],
    samples: Sequence[Sample],
    *,
    token_budget: int,
    device: torch.device | str,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Last hidden states of samples without gradients, in evaluation mode: what word-level tasks and perplexity read.

    Args:
        backbone: see `embed_samples`.
        samples: pool spans and labels are ignored.
        token_budget: see `embed_samples`.
        device: see `embed_samples`.

    Yields:
        The index of a sample and its states `[T, D]`, on the device and in the dtype of the model; longest sample first.
    """
    if not samples:
        return
    for indices in _plan(samples, token_budget):
        members = [replace(samples[index], labels=None, token_weights=None, pool=None) for index in indices]
        # by identity, because `make_pack` reorders its samples by attention mode
        index_of = {id(member): index for member, index in zip(members, indices, strict=True)}
        # entered again for every pack: the consumer of this generator may train the model between two of them
        with evaluation_mode(backbone), torch.no_grad():
            pack = make_pack(members).to(torch.device(device))
            states = backbone(pack)
        start = 0
        for member in pack.samples:
            yield index_of[id(member)], states[start : start + len(member)]
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
    """A pack whose `pool_rows` are indices into `samples`; without labels, which nothing reads here."""
    members = [replace(samples[index], labels=None, token_weights=None) for index in indices]
    assert all(member.pool is not None for member in members), "only samples with a pool span can be embedded"
    return make_pack(members, {id(member): index for member, index in zip(members, indices, strict=True)})


@contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Callable[[int], None] | None]:
    """Show a progress bar on stderr while texts are embedded.

    Args:
        total: number of texts.
        show: whether to show one.

    Yields:
        A function that advances the bar by a number of texts, or None if nothing is shown.
    """
    if not show:
        yield None
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("embedding", total=total)
        yield lambda count: bar.update(task, advance=count)
