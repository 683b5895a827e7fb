"""How does standardizing every dimension change a model's scores, and how much does the reference corpus matter?

Statistics are fitted on every given corpus and, as an upper bound that no deployed model can reach, on the evaluated texts
themselves. The evaluated vectors are computed once, with the model's own standardizer disabled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from unified_lm.core.errors import ConfigError
from unified_lm.data.rows.records import Text
from unified_lm.evaluation.analyses.base import Analysis, AnalysisSettings, Material, Numbers, rounded
from unified_lm.evaluation.analyses.figure import PALETTE, finish, save, subplots
from unified_lm.evaluation.analyses.routed import MIN_TEXTS, without_standardizer
from unified_lm.evaluation.analyses.states import pooled_vectors
from unified_lm.evaluation.analyses.texts import (
    RetrievalPairs,
    ScoredPairs,
    distinct,
    fingerprint,
    read_retrieval,
    read_scored_pairs,
    read_texts,
)
from unified_lm.evaluation.bootstrap import bootstrap_draws, percentile_interval
from unified_lm.evaluation.result_table import ResultTable
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.standardizer import RunningMoments, Standardizer
from unified_lm.objectives.ranking import ndcg_at_k

NONE = "none"
ITSELF = "the evaluated texts"
"""Labels of the two conditions that are always measured."""

_RANKS = 10


@dataclass(frozen=True)
class _Content:
    sts: ScoredPairs | None
    retrieval: RetrievalPairs | None
    corpora: Mapping[str, list[str]]


def _prepare(settings: AnalysisSettings) -> Material:
    if settings.sts is None and settings.retrieval is None:
        raise ConfigError("standardize needs something to score: --sts, --retrieval, or both.")
    reserved = {NONE, ITSELF} & set(settings.corpora)
    if reserved:
        raise ConfigError(
            f"a corpus cannot be called '{reserved.pop()}'; that name is reserved for a row that is always measured."
        )
    corpora, names = {}, {}
    for label, source in settings.corpora.items():
        name, texts = read_texts(source, settings.corpus_texts, split="train")
        corpora[label] = distinct(texts)
        names[label] = {"source": name, "num_texts": len(corpora[label])}
    sts = None if settings.sts is None else read_scored_pairs(settings.sts, settings.num_pairs)
    retrieval = None if settings.retrieval is None else read_retrieval(settings.retrieval, settings.num_pairs)
    description = {
        "sts": None if sts is None else {"name": sts.name, "num_pairs": len(sts.left)},
        "retrieval": None if retrieval is None else {"name": retrieval.name, "num_queries": len(retrieval.queries)},
        "corpora": names,
    }
    read = [vars(part) if part is not None else None for part in (sts, retrieval)]
    numbers = None if sts is None else sts.scores.tolist()
    return Material(description, fingerprint(read, numbers, corpora), _Content(sts, retrieval, corpora))


def _measure(model: UnifiedLM, material: Material, show_progress: bool) -> Numbers:
    content: _Content = material.content
    if model.embedder.method == "moee_sum":
        raise ConfigError(
            "standardize fits statistics on vectors before they are weighed, and this model's moee_sum weighs them. "
            "Compare with `unified-lm analyze methods`, which does it in that order."
        )
    own = model.standardizer
    with without_standardizer(model):

        def encode(texts: list[Text]) -> np.ndarray:
            """Embed texts: float32 `[N, D]`, pooled and not normalized."""
            return pooled_vectors(model, texts, show_progress)

        fitted = {label: _fit(encode([Text(text) for text in texts])) for label, texts in content.corpora.items()}
        result: Numbers = {"attention": model.attention, "standardized": own is not None}
        if content.sts is not None:
            left, right = (encode([Text(text) for text in side]) for side in (content.sts.left, content.sts.right))
            score = partial(_spearman, left, right, content.sts.scores)
            result["spearman"] = _rows(score, {**fitted, ITSELF: _fit(np.concatenate([left, right]))})
        if content.retrieval is not None:
            queries, documents = encode(content.retrieval.queries), encode(content.retrieval.documents)
            score = partial(_ndcg, queries, documents, content.retrieval.relevant)
            result["ndcg@10"] = _rows(score, {**fitted, ITSELF: _fit(np.concatenate([queries, documents]))})
    return result


def _fit(vectors: np.ndarray) -> Standardizer:
    moments = RunningMoments()
    moments.update(vectors)
    return Standardizer.fit(moments, MIN_TEXTS)


Scores = tuple[np.ndarray, Callable[..., float], tuple[np.ndarray, ...]]
"""(per-item values under a standardizer, statistic of (values, fixed columns...), fixed columns)"""


def _rows(score: Callable[[Standardizer | None], Scores], fitted: Mapping[str, Standardizer]) -> dict[str, Numbers]:
    """Scores without standardization and with every corpus, and the paired difference to the former, with 95 % intervals."""
    plain, statistic, fixed = score(None)
    base_value, base_draws = bootstrap_draws(statistic, plain, *fixed)
    base = percentile_interval(base_value, base_draws)
    rows = {NONE: {"value": rounded(base.value), "low": rounded(base.low), "high": rounded(base.high)}}
    for label, standardizer in fitted.items():
        values, _, _ = score(standardizer)
        value, draws = bootstrap_draws(statistic, values, *fixed)
        interval, change = percentile_interval(value, draws), percentile_interval(value - base_value, draws - base_draws)
        rows[label] = {
            "value": rounded(interval.value),
            "low": rounded(interval.low),
            "high": rounded(interval.high),
            "change": rounded(change.value),
            "change_low": rounded(change.low),
            "change_high": rounded(change.high),
        }
    return rows


def _unit(vectors: np.ndarray, standardizer: Standardizer | None) -> np.ndarray:
    changed = torch.from_numpy(vectors) if standardizer is None else standardizer(torch.from_numpy(vectors))
    return torch.nn.functional.normalize(changed.double(), dim=-1).numpy()


def _spearman(left: np.ndarray, right: np.ndarray, gold: np.ndarray, standardizer: Standardizer | None) -> Scores:
    cosines = (_unit(left, standardizer) * _unit(right, standardizer)).sum(axis=1)
    return cosines, rank_correlation, (gold,)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation: Pearson's correlation of the ranks, where ties have their mean rank.

    scipy's `spearmanr` also computes a p-value, which takes ten times as long as the rest; the bootstrap calls this function
    thousands of times.
    """
    x, y = rankdata(a), rankdata(b)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else float("nan")


def _ndcg(queries: np.ndarray, documents: np.ndarray, relevant: list[set[int]], standardizer: Standardizer | None) -> Scores:
    scores = torch.from_numpy(_unit(queries, standardizer) @ _unit(documents, standardizer).T)
    each = np.asarray([ndcg_at_k(scores[i : i + 1], [relevant[i]], _RANKS) for i in range(len(relevant))])
    return each, lambda a: float(a.mean()), ()


_METRICS = {"spearman": "Spearman correlation of cosines", "ndcg@10": "nDCG@10"}


def _draw(arms: Mapping[str, Numbers], material: Mapping[str, Any], path: Path) -> Path:
    metrics = [metric for metric in _METRICS if any(metric in numbers for numbers in arms.values())]
    rows = list(next(iter(arms.values()))[metrics[0]])
    width = max(5.0, 1.0 + 0.35 * len(arms) * len(rows))
    figure, axes = subplots(1, len(metrics), width * len(metrics), 4.4)
    bar = 0.82 / len(rows)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for index, row in enumerate(rows):
            values = [numbers[metric][row] for numbers in arms.values()]
            error = np.array([[v["value"] - v["low"], v["high"] - v["value"]] for v in values]).T
            centers = np.arange(len(arms)) + (index - (len(rows) - 1) / 2) * bar
            bars = axis.bar(
                centers, [v["value"] for v in values], width=bar * 0.94, yerr=np.maximum(error, 0), capsize=2, ecolor="#555555",
                error_kw={"linewidth": 0.9}, color=PALETTE[index % len(PALETTE)], hatch="//" if row == ITSELF else None,
                edgecolor="white", linewidth=0.5,
            )  # fmt: skip
            axis.bar_label(bars, labels=[f"{v['value']:.2f}" for v in values], fontsize=7, padding=2)
        axis.set_xticks(range(len(arms)), list(arms))
        name = material["sts" if metric == "spearman" else "retrieval"]["name"]
        finish(axis, name, "", _METRICS[metric])
        axis.grid(axis="x", visible=False)
    handles = axes[0][0].containers
    bars_only = [h for h in handles if h.__class__.__name__ == "BarContainer"]
    figure.legend(
        bars_only, [f"fitted on: {row}" if row != NONE else "not standardized" for row in rows], loc="outside upper left",
        ncols=min(2 * len(metrics), len(rows)), frameon=False, fontsize=9,
    )  # fmt: skip
    return save(figure, path)


def _tabulate(arms: Mapping[str, Numbers], material: Mapping[str, Any]) -> ResultTable:
    keys = ("value", "low", "high", "change", "change_low", "change_high")
    rows = [
        [label, material["sts" if metric == "spearman" else "retrieval"]["name"], name, row, *(scores.get(key) for key in keys)]
        for label, numbers in arms.items()
        for metric, name in _METRICS.items()
        for row, scores in numbers.get(metric, {}).items()
    ]
    return ResultTable(
        title="Standardized vectors, by reference corpus",
        columns=("model", "data", "score", "fitted on", "value", "low", "high", "change", "change, low", "change, high"),
        rows=rows,
        note=f"Change: paired difference to no standardization. 95 % intervals: bootstrap over pairs or queries. No model in "
        f"use can be fitted on {ITSELF}.",
    )


STANDARDIZE = Analysis(
    name="standardize",
    summary="scores without and with standardization, by reference corpus",
    version=1,
    prepare=_prepare,
    measure=_measure,
    draw=_draw,
    tabulate=_tabulate,
)
