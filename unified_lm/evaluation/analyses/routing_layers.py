"""Which layers, and which tokens? Li and Zhou 2024 (arXiv:2410.10814), table 4: last or all, of hidden states and of routing.

The paper finds the last token best for both, and every layer's routing better than the last one's. Here each combination is
scored on the same sentence pairs, raw and standardized on a reference corpus; and every layer's routing alone. Beside it stands
whether routers are alive: how even probabilities and loads are, and how many experts nobody chose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unified_lm.batch import Pack
from unified_lm.core.errors import ConfigError
from unified_lm.evaluation.analyses.base import Analysis, AnalysisSettings, Material, Numbers, rounded
from unified_lm.evaluation.analyses.figure import PALETTE, arm_legend, finish, save, subplots
from unified_lm.evaluation.analyses.routed import MIN_TEXTS
from unified_lm.evaluation.analyses.standardize import rank_correlation
from unified_lm.evaluation.analyses.states import TOKEN_BUDGET
from unified_lm.evaluation.analyses.texts import ScoredPairs, fingerprint, read_scored_pairs, read_texts
from unified_lm.evaluation.result_table import ResultTable
from unified_lm.export.samples import embedding_sample
from unified_lm.inference.embedder import encode_texts
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.embedding import sample_states
from unified_lm.models.routing import LayerRouting
from unified_lm.models.standardizer import RunningMoments, Standardizer

TOKENS = ("last", "all")
COMBINATIONS = ("hs, last layer", "hs, all layers", "rw, all layers", "rw, last layer")


@dataclass(frozen=True)
class _Content:
    pairs: ScoredPairs
    corpus: list[str]


def _prepare(settings: AnalysisSettings) -> Material:
    if settings.sts is None:
        raise ConfigError("routing_layers needs scored sentence pairs: --sts.")
    pairs = read_scored_pairs(settings.sts, settings.num_pairs)
    label, source = next(iter(settings.corpora.items()))
    _, corpus = read_texts(source, settings.corpus_texts, split="train")
    description = {"pairs": pairs.name, "num_pairs": len(pairs.left), "corpus": {"name": label, "num_texts": len(corpus)}}
    return Material(description, fingerprint(vars(pairs), pairs.scores.tolist(), corpus), _Content(pairs, corpus))


@dataclass(frozen=True, eq=False)
class _Read:
    """What every layer says of some texts, by the tokens that are pooled.

    Attributes:
        states: per entry of `TOKENS` float32 `[N, L + 1, D]`.
        routing: per entry of `TOKENS` float32 `[N, F]`.
        load: per layer how often each expert was chosen, by all tokens.
        entropy: per layer the sum of the entropies of the tokens' probabilities, in units of that of even ones.
        num_tokens: how many tokens these are.
    """

    states: Mapping[str, np.ndarray]
    routing: Mapping[str, np.ndarray]
    load: list[np.ndarray]
    entropy: np.ndarray
    num_tokens: int


def _read(model: UnifiedLM, texts: Sequence[str]) -> _Read:
    routers = model.embedder.routers
    samples = [
        embedding_sample(item, model.attention) for item in encode_texts(model.prompt_encoder, texts, "", model.max_tokens)
    ]
    states: dict[str, dict[int, torch.Tensor]] = {tokens: {} for tokens in TOKENS}
    routing: dict[str, dict[int, torch.Tensor]] = {tokens: {} for tokens in TOKENS}
    load = [np.zeros(size) for size in routers.sizes]
    entropy = np.zeros(len(routers.sizes))
    with model.borrow_backbone() as backbone:

        def every_layer(pack: Pack) -> torch.Tensor:
            """`[T, (L + 1) D + F]`."""
            probabilities: dict[int, torch.Tensor] = {}

            def keep(number: int, routing: LayerRouting) -> None:
                probabilities[number] = routing.probabilities
                load[number] += routing.selected.sum(0).cpu().numpy()
                entropy[number] += float(routing.evenness().sum())

            with routers.reading(keep):
                hidden = backbone.layer_states(pack)
            return torch.cat([hidden.flatten(1).float(), *(probabilities[n] for n in range(len(routers.names)))], dim=1)

        depth = 0
        for index, found in sample_states(every_layer, samples, token_budget=TOKEN_BUDGET, device=model.device):
            start, stop = samples[index].pool or (0, len(samples[index]))
            depth = (found.shape[1] - routers.num_features) // backbone.hidden_size
            pooled = {"last": found[stop - 1], "all": found[start:stop].mean(dim=0)}
            for tokens, vector in pooled.items():
                both = vector.cpu().split([depth * backbone.hidden_size, routers.num_features])
                states[tokens][index], routing[tokens][index] = both
    ordered = range(len(samples))
    return _Read(
        {t: torch.stack([of[i] for i in ordered]).reshape(len(samples), depth, -1).numpy() for t, of in states.items()},
        {t: torch.stack([of[i] for i in ordered]).numpy() for t, of in routing.items()},
        load,
        entropy,
        sum(map(len, samples)),
    )


def _chosen(read: _Read, what: str, tokens: str, sizes: Sequence[int]) -> np.ndarray:
    """One entry of `COMBINATIONS`, `[N, ...]`."""
    states, routing = read.states[tokens], read.routing[tokens]
    return {
        "hs, last layer": lambda: states[:, -1],
        "hs, all layers": lambda: states[:, 1:].reshape(len(states), -1),
        "rw, all layers": lambda: routing,
        "rw, last layer": lambda: routing[:, -sizes[-1] :],
    }[what]()


def _score(left: np.ndarray, right: np.ndarray, corpus: np.ndarray | None, gold: np.ndarray) -> float:
    sides = [torch.from_numpy(np.ascontiguousarray(side)) for side in (left, right)]
    if corpus is not None:
        moments = RunningMoments()
        moments.update(np.ascontiguousarray(corpus))
        fitted = Standardizer.fit(moments, MIN_TEXTS)
        sides = [fitted(side) for side in sides]
    a, b = (torch.nn.functional.normalize(side.double(), dim=-1).numpy() for side in sides)
    return float(rounded(rank_correlation((a * b).sum(axis=1), gold)))


def _measure(model: UnifiedLM, material: Material, show_progress: bool) -> Numbers:
    content: _Content = material.content
    sizes, gold = model.embedder.routers.sizes, content.pairs.scores
    reads = [_read(model, texts) for texts in (content.pairs.left, content.pairs.right, content.corpus)]
    left, right, corpus = reads
    load = [np.sum(of_layer, axis=0) for of_layer in zip(*(read.load for read in reads), strict=True)]

    def scores(what: str, tokens: str) -> dict[str, float]:
        sides = [_chosen(read, what, tokens, sizes) for read in (left, right, corpus)]
        return {"raw": _score(sides[0], sides[1], None, gold), "standardized": _score(sides[0], sides[1], sides[2], gold)}

    ends = np.cumsum(sizes)
    by_layer: dict[str, list[float]] = {tokens: [] for tokens in TOKENS}
    for tokens, values in by_layer.items():
        for size, end in zip(sizes, ends, strict=True):
            of_layer = [read.routing[tokens][:, end - size : end] for read in (left, right)]
            values.append(_score(of_layer[0], of_layer[1], None, gold))
    return {
        "attention": model.attention,
        "gate": model.embedder.routers.meaning,
        "spearman": {what: {tokens: scores(what, tokens) for tokens in TOKENS} for what in COMBINATIONS},
        "rw_by_layer": by_layer,
        # by all tokens of all texts: 1 is even for both
        "entropy_by_layer": rounded(sum(read.entropy for read in reads) / sum(read.num_tokens for read in reads)),
        "largest_load_by_layer": [rounded(float(of.max() / of.mean())) for of in load],
        "unused_by_layer": [int((of == 0).sum()) for of in load],
    }


def _draw(arms: Mapping[str, Numbers], material: Mapping[str, Any], path: Path) -> Path:
    figure, axes = subplots(1, 3, 17.5, 4.4)
    bars = [(tokens, way) for tokens in TOKENS for way in ("raw", "standardized")]
    width = 0.84 / (len(bars) * len(arms))
    for index, numbers in enumerate(arms.values()):
        for place, (tokens, way) in enumerate(bars):
            at = np.arange(len(COMBINATIONS)) + (index * len(bars) + place) * width - 0.42 + width / 2
            heights = [numbers["spearman"][what][tokens][way] for what in COMBINATIONS]
            axes[0][0].bar(
                at, heights, width=width * 0.92, color=PALETTE[index % len(PALETTE)], alpha=1 if tokens == "last" else 0.55,
                hatch="//" if way == "standardized" else None, edgecolor="white", linewidth=0.4,
            )  # fmt: skip
        for tokens, style in zip(TOKENS, ("-", "--"), strict=True):
            axes[0][1].plot(
                numbers["rw_by_layer"][tokens], style, marker="o", markersize=3, color=PALETTE[index % len(PALETTE)]
            )
        axes[0][2].plot(numbers["entropy_by_layer"], marker="o", markersize=3, color=PALETTE[index % len(PALETTE)])
        axes[0][2].plot(numbers["largest_load_by_layer"], ":", marker="^", markersize=3, color=PALETTE[index % len(PALETTE)])
    axes[0][0].set_xticks(range(len(COMBINATIONS)), COMBINATIONS)
    where = f"{material['num_pairs']} pairs of {material['pairs']}"
    finish(axes[0][0], f"{where}; pale: all tokens, hatched: standardized", "", "Spearman correlation")
    finish(axes[0][1], "routing of one layer; dashed: all tokens", "layer with experts", "Spearman correlation")
    finish(axes[0][2], "entropy of probabilities; dotted: load of the most chosen", "layer with experts", "1: even")
    arm_legend(figure, list(arms))
    return save(figure, path)


def _tabulate(arms: Mapping[str, Numbers], material: Mapping[str, Any]) -> ResultTable:
    rows = [
        [label, what, tokens, numbers["spearman"][what][tokens]["raw"], numbers["spearman"][what][tokens]["standardized"]]
        for label, numbers in arms.items()
        for what in COMBINATIONS
        for tokens in TOKENS
    ]
    return ResultTable(
        title="Layers and tokens of hidden states and routing",
        columns=("model", "of", "tokens", "raw", "standardized"),
        rows=rows,
        note=f"Spearman correlation of cosines, {material['num_pairs']} pairs of {material['pairs']}. All tokens: their mean.",
    )


ROUTING_LAYERS = Analysis(
    name="routing_layers",
    summary="scores by layers (last, all, each) and tokens (last, all) of hidden states and of routing",
    version=1,
    prepare=_prepare,
    measure=_measure,
    draw=_draw,
    tabulate=_tabulate,
)
