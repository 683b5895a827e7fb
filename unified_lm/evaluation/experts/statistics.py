"""How much each expert of a MONET model is used by texts of several kinds.

The weight of expert (i, j) for a token is the sum over heads of g1[h, i] g2[h, j]. Its sum over tokens is one matrix product of
a router, `[E, tokens * H] @ [tokens * H, E]`: no token's experts are ever listed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unified_lm.batch import Pack, Sample
from unified_lm.core.errors import DataError
from unified_lm.evaluation.generation.perplexity import Domain, tokenized
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.backbone import Backbone
from unified_lm.models.embedding import sample_states
from unified_lm.models.monet.masks import router_key, routers_of

Places = list[tuple[int, int]]
"""Of tokens: a document, and a place among its token ids."""

_TOKEN_BUDGET = 2048
_FORMAT = "unified_lm routing statistics 1"


@dataclass(frozen=True, eq=False)
class RoutingStatistics:
    """Mean weights of all experts, by kind of text.

    Attributes:
        means: name of a kind -> float32 `[G, E, E]`, mean over its tokens of an expert's weight, summed over heads.
        tokens: name of a kind -> its tokens.
        routers: `router_key` of the model.
    """

    means: Mapping[str, np.ndarray]
    tokens: Mapping[str, int]
    routers: str

    def save(self, path: Path) -> None:
        """Write them.

        Raises:
            OSError: it cannot be written.
        """
        about = {"tokens": dict(self.tokens), "routers": self.routers}
        save_file(dict(self.means), path, {"format": _FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> RoutingStatistics:
        """Read what `save` wrote.

        Raises:
            DataError: no such file, or another one.
        """
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError("a file of another format")
                about = json.loads(metadata["about"])
                means = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            return cls(means, {name: int(about["tokens"][name]) for name in means}, str(about["routers"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise DataError(
                f"{path} holds no routing statistics ({error}). `unified-lm experts routing` writes them."
            ) from error


def routing_statistics(
    model: UnifiedLM, domains: Sequence[Domain], *, context: int, progress: Callable[[int], None] | None = None
) -> RoutingStatistics:
    """Read texts causally, and sum up how much each expert is used; the start token of a text does not count.

    Args:
        model: a MONET model.
        domains: the kinds of text.
        context: tokens of a window; longer documents are read in several.
        progress: called with the number of tokens that were read since the last call.

    Raises:
        ModelError: the model is none.
        DataError: a document without a token.
    """
    means, tokens = {}, {}
    with model.borrow_backbone() as backbone:
        key = router_key(backbone.causal_lm)
    for domain in domains:
        total: torch.Tensor | None = None
        count = 0
        for gates_NGSHE, _ in gates_of(model, domain, context):
            first, second = gates_NGSHE.unbind(2)
            # [G, E, N * H] @ [G, N * H, E]
            left, right = (side.permute(1, 3, 0, 2).flatten(2) for side in (first, second))
            part = torch.bmm(left, right.transpose(1, 2)).double()
            total = part if total is None else total.add_(part)
            count += len(gates_NGSHE)
            if progress is not None:
                progress(len(gates_NGSHE))
        assert total is not None, "a domain has documents, and a document a token"
        means[domain.name] = (total / count).float().cpu().numpy()
        tokens[domain.name] = count
    return RoutingStatistics(means, tokens, key)


def gates_of(model: UnifiedLM, domain: Domain, context: int) -> Iterator[tuple[torch.Tensor, Places]]:
    """The gates of all tokens of a kind of text but the start tokens, read causally.

    Args:
        model: a MONET model.
        domain: the texts.
        context: tokens of a window.

    Yields:
        Gates `[N, G, 2, H, E]` of tokens, and where each of them is.

    Raises:
        ModelError: the model is no MONET.
        DataError: a document without a token.
    """
    with model.borrow_backbone() as backbone:
        router = routers_of(backbone.causal_lm)[0]
    routers = model.embedder.routers

    def gates(backbone: Backbone, pack: Pack) -> torch.Tensor:
        """Gates of all routers, `[T, G, 2, H, E]`."""
        rows = torch.arange(len(pack.input_ids), device=pack.input_ids.device)
        _, layers = routers.trace(pack, rows)
        return torch.stack([layer.probabilities.unflatten(1, (2, router.heads, router.keys)) for layer in layers], dim=1)

    yield from read_tokens(model, domain, context, gates)


def read_tokens(
    model: UnifiedLM, domain: Domain, context: int, read: Callable[[Backbone, Pack], torch.Tensor]
) -> Iterator[tuple[torch.Tensor, Places]]:
    """What a model makes of every token of some texts but those that do not count (start tokens; in chats what is no answer).

    Args:
        model: it reads causally.
        domain: the texts.
        context: tokens of a window; longer documents are read in several.
        read: runs a pack of at most a few thousand tokens; `[T, ...]`. It must not borrow the backbone, which is borrowed.

    Yields:
        `[N, ...]` of tokens, and where each of them is.

    Raises:
        DataError: a document without a token.
    """
    documents = tokenized(model.prompt_encoder, domain)
    pieces = [(number, start) for number, document in enumerate(documents) for start in range(0, len(document.ids), context)]
    samples = [Sample(input_ids=documents[number].ids[start : start + context], stream="text") for number, start in pieces]
    with model.borrow_backbone() as backbone:
        of_pack = partial(read, backbone)
        for index, values in sample_states(of_pack, samples, token_budget=_TOKEN_BUDGET, device=model.device):
            number, start = pieces[index]
            counted = np.flatnonzero(documents[number].scored[start : start + context])
            yield values[torch.from_numpy(counted).to(values.device)], [(number, start + int(place)) for place in counted]
