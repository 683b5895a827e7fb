"""Hidden states, routing, and both: what each vector of MOEE scores on the same texts, and with which weight.

Similarity and retrieval by cosine, clusters by k-means against labels, classes by logistic regression; everything once on the
vectors as they are, and once standardized on a reference corpus, every method alike. Li and Zhou 2024
(arXiv:2410.10814) standardize all methods but hidden states, and so compare two things at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unified_lm.core.errors import ConfigError
from unified_lm.evaluation.agreement import agreement, classify, k_means, require_sklearn, training_draw
from unified_lm.evaluation.analyses.base import Analysis, AnalysisSettings, Material, Numbers, rounded
from unified_lm.evaluation.analyses.figure import MARKERS, PALETTE, finish, save, subplots
from unified_lm.evaluation.analyses.routed import Parts, embed_parts, fit_parts
from unified_lm.evaluation.analyses.standardize import rank_correlation
from unified_lm.evaluation.analyses.texts import (
    LabeledTexts,
    RetrievalPairs,
    ScoredPairs,
    fingerprint,
    read_labeled,
    read_retrieval,
    read_scored_pairs,
    read_texts,
)
from unified_lm.evaluation.bootstrap import bootstrap_draws, percentile_interval
from unified_lm.evaluation.result_table import ResultTable
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.moee import METHODS as VECTORS
from unified_lm.models.standardizer import Standardizer
from unified_lm.objectives.ranking import ndcg_per_query

ALPHAS = (0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Weights of the routing in the sweep."""

FUSED = "fused"
"""Two classifiers, of states and of routing, whose probabilities are averaged."""

RAW, STANDARDIZED = "raw", "standardized"

_RANKS = 10
_DRAWS = 10
_PER_LABEL = 16
"""Repetitions of clustering and classification, and texts of each label to learn from."""

SCORES = {
    "spearman": "Spearman correlation of cosines",
    "ndcg@10": "nDCG@10",
    "ami": "AMI of k-means",
    "v_measure": "V-measure of k-means",
    "accuracy": "accuracy",
}
_SWEPT = ("spearman", "ndcg@10")


@dataclass(frozen=True)
class Scored:
    """Texts that vectors are scored on; what is None is not measured."""

    sts: ScoredPairs | None
    retrieval: RetrievalPairs | None
    labeled: LabeledTexts | None
    corpus: list[str]


def prepare_scored(settings: AnalysisSettings) -> Material:
    """Read what the settings name.

    Raises:
        ConfigError: nothing to score, or scikit-learn is needed and missing. DataError: unreadable data.
    """
    if settings.sts is None and settings.retrieval is None and settings.labels is None:
        raise ConfigError("there is nothing to score: give --sts, --retrieval, --labels, or several of them.")
    if settings.labels is not None:
        require_sklearn()
    label, source = next(iter(settings.corpora.items()))
    _, corpus = read_texts(source, settings.corpus_texts, split="train")
    sts = None if settings.sts is None else read_scored_pairs(settings.sts, settings.num_pairs)
    retrieval = None if settings.retrieval is None else read_retrieval(settings.retrieval, settings.num_pairs)
    labeled = None if settings.labels is None else read_labeled(settings.labels, settings.num_labeled)
    if labeled is not None:
        training_draw(labeled.labels, _PER_LABEL, 0)  # refuses rare labels before anything is embedded
    description = {
        "sts": None if sts is None else {"name": sts.name, "num_pairs": len(sts.left)},
        "retrieval": None if retrieval is None else {"name": retrieval.name, "num_queries": len(retrieval.queries)},
        "labels": None if labeled is None else {"name": labeled.name, "num_texts": len(labeled.texts)},
        "corpus": {"name": label, "num_texts": len(corpus)},
    }
    read = [vars(part) if part is not None else None for part in (sts, retrieval, labeled)]
    lists = [None if sts is None else sts.scores.tolist(), None if labeled is None else labeled.labels.tolist()]
    return Material(description, fingerprint(read, lists, corpus), Scored(sts, retrieval, labeled, corpus))


@dataclass(frozen=True, eq=False)
class Embedded:
    """The parts of all texts of a `Scored`."""

    pairs: tuple[Parts, Parts] | None
    retrieval: tuple[Parts, Parts] | None
    labeled: Parts | None
    corpus: Parts


def embed_scored(model: UnifiedLM, content: Scored, show_progress: bool) -> Embedded:
    """Embed the texts, each once."""
    embed = partial(embed_parts, model, show_progress=show_progress)
    sts, retrieval = content.sts, content.retrieval
    return Embedded(
        None if sts is None else (embed(sts.left), embed(sts.right)),
        None if retrieval is None else (embed(retrieval.queries), embed(retrieval.documents)),
        None if content.labeled is None else embed(content.labeled.texts),
        embed(content.corpus),
    )


Values = tuple[np.ndarray, Callable[..., float], tuple[np.ndarray, ...]]
"""(what is resampled, statistic of it and the fixed columns, fixed columns)"""

Vectorize = Callable[[Parts], np.ndarray]


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def similarity_scores(content: Scored, embedded: Embedded, vectorize: Vectorize) -> dict[str, Values]:
    """Scores of similarity and retrieval under one way to make unit vectors of both parts."""
    found: dict[str, Values] = {}
    if content.sts is not None and embedded.pairs is not None:
        left, right = map(vectorize, embedded.pairs)
        found["spearman"] = (left * right).sum(axis=1), rank_correlation, (content.sts.scores,)
    if content.retrieval is not None and embedded.retrieval is not None:
        queries, documents = map(vectorize, embedded.retrieval)
        each = ndcg_per_query(torch.from_numpy(queries @ documents.T), content.retrieval.relevant, _RANKS)
        found["ndcg@10"] = each.numpy(), _mean, ()
    return found


def label_scores(labels: np.ndarray, views: list[np.ndarray], clusters: bool) -> dict[str, Values]:
    """AMI and V-measure of k-means with the labels, and accuracy of few-shot logistic regression, ten draws of each.

    Args:
        labels: of the texts, `[N]`.
        views: vectors of the texts, each `[N, D]`; classifiers of several views are fused by probability.
        clusters: whether to cluster (the first view), too.
    """
    found: dict[str, Values] = {}
    if clusters:
        agreed = [agreement(labels, k_means(views[0], len(set(labels)), seed)) for seed in range(_DRAWS)]
        found |= {key: (np.asarray([one[key] for one in agreed]), _mean, ()) for key in ("ami", "v_measure")}
    accuracies = []
    for seed in range(_DRAWS):
        train = training_draw(labels, _PER_LABEL, seed)
        accuracies.append(float((classify(views, labels, train) == labels[~train]).mean()))
    return found | {"accuracy": (np.asarray(accuracies), _mean, ())}


def _measure(model: UnifiedLM, material: Material, show_progress: bool) -> Numbers:
    content: Scored = material.content
    embedded = embed_scored(model, content, show_progress)
    result: Numbers = {
        "attention": model.attention,
        "gate": model.embedder.routers.meaning,
        "scores": {},
        "alpha": {},
        "tuned": {},
    }
    for way, standardizer in ((RAW, None), (STANDARDIZED, fit_parts(embedded.corpus))):

        def scores(method: str, standardizer: Standardizer | None = standardizer) -> dict[str, Values]:
            """All scores of one method."""

            def vectorize(parts: Parts) -> np.ndarray:
                return parts.vectors(method, 1.0, standardizer)

            found = similarity_scores(content, embedded, vectorize)
            if content.labeled is not None and embedded.labeled is not None:
                found |= label_scores(content.labeled.labels, [vectorize(embedded.labeled)], clusters=True)
            return found

        by_method = {method: scores(method) for method in VECTORS}
        if content.labeled is not None and embedded.labeled is not None:
            views = [embedded.labeled.vectors(method, 1.0, standardizer) for method in ("hs", "rw")]
            by_method[FUSED] = label_scores(content.labeled.labels, views, clusters=False)
        result["scores"][way] = _compared(by_method)
        swept = {alpha: similarity_scores(content, embedded, _weighted(alpha, standardizer)) for alpha in ALPHAS}
        result["alpha"][way] = {
            name: [[alpha, rounded(found[name][1](found[name][0], *found[name][2]))] for alpha, found in swept.items()]
            for name in next(iter(swept.values()))
        }
        result["tuned"][way] = {name: _tuned({a: found[name] for a, found in swept.items()}) for name in swept[1.0]}
    return result


def _weighted(alpha: float, standardizer: Standardizer | None) -> Vectorize:
    return lambda parts: parts.vectors("moee_sum", alpha, standardizer)


def _compared(by_method: Mapping[str, Mapping[str, Values]]) -> dict[str, dict[str, Numbers]]:
    """Per score and method its value and the paired difference to hidden states, with 95 % intervals."""
    rows: dict[str, dict[str, Numbers]] = {}
    base: dict[str, tuple[float, np.ndarray]] = {}
    for method, found in by_method.items():
        for name, (values, statistic, fixed) in found.items():
            value, draws = bootstrap_draws(statistic, values, *fixed)
            own = percentile_interval(value, draws)
            row = {"value": rounded(own.value), "low": rounded(own.low), "high": rounded(own.high)}
            if name in base:
                change = percentile_interval(value - base[name][0], draws - base[name][1])
                row |= {"change": rounded(change.value), "change_low": rounded(change.low), "change_high": rounded(change.high)}
            else:
                base[name] = value, draws
            rows.setdefault(name, {})[method] = row
    return rows


def tune_alpha(model: UnifiedLM, pairs: ScoredPairs, standardizer: Standardizer | None) -> tuple[float, dict[float, float]]:
    """The weight of the routing in `moee_sum` whose cosines rank scored sentence pairs best.

    Args:
        model: embeds the sentences; its own standardizer is left out.
        pairs: development data; what is reported must be measured on others.
        standardizer: of D + F dimensions, or None.

    Returns:
        The weight, the smallest of equally good ones, and the Spearman correlation of each of `ALPHAS`.
    """
    left, right = embed_parts(model, pairs.left), embed_parts(model, pairs.right)
    scores = {}
    for alpha in ALPHAS:
        sides = [part.vectors("moee_sum", alpha, standardizer) for part in (left, right)]
        scores[alpha] = rank_correlation((sides[0] * sides[1]).sum(axis=1), pairs.scores)
    return max(scores, key=lambda alpha: scores[alpha]), scores


def _tuned(swept: Mapping[float, Values]) -> Numbers:
    """The weight that is best on every second item, and what it scores on the others."""

    def half(values: Values, start: int) -> float:
        return values[1](values[0][start::2], *(column[start::2] for column in values[2]))

    best = max(swept, key=lambda alpha: half(swept[alpha], 0))
    return {
        "alpha": best,
        "value": rounded(half(swept[best], 1)),
        "fixed": rounded(half(swept[1.0], 1)),
        "hs": rounded(half(swept[0.0], 1)),
    }


def _draw(arms: Mapping[str, Numbers], material: Mapping[str, Any], path: Path) -> Path:
    names = list(next(iter(arms.values()))["scores"][RAW])
    swept = [name for name in names if name in _SWEPT]
    figure, axes = subplots(2 if swept else 1, len(names), max(3.4, 1.2 + 0.9 * len(arms)) * len(names), 6.6 if swept else 3.6)
    for axis, name in zip(axes[0], names, strict=True):
        methods = list(next(iter(arms.values()))["scores"][RAW][name])
        bar = 0.84 / (2 * len(methods))
        for index, (method, way) in enumerate((method, way) for method in methods for way in (RAW, STANDARDIZED)):
            found = [numbers["scores"][way][name][method] for numbers in arms.values()]
            error = np.array([[v["value"] - v["low"], v["high"] - v["value"]] for v in found]).T
            at = np.arange(len(arms)) + (index - len(methods) + 0.5) * bar
            axis.bar(
                at, [v["value"] for v in found], width=bar * 0.94, yerr=np.maximum(error, 0), ecolor="#555555", capsize=1.5,
                error_kw={"linewidth": 0.8}, color=PALETTE[methods.index(method)], edgecolor="white", linewidth=0.4,
                hatch="//" if way == STANDARDIZED else None, label=f"{method}, {way}",
            )  # fmt: skip
        axis.set_xticks(range(len(arms)), list(arms), rotation=20, ha="right")
        finish(axis, _where(name, material), "", SCORES[name])
        axis.grid(axis="x", visible=False)
    for column, name in enumerate(names):
        if swept and name not in swept:
            axes[1][column].set_visible(False)
        elif swept:
            _draw_sweep(axes[1][column], arms, name)
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda found: len(found[1]))
    figure.legend(handles, labels, loc="outside upper left", ncols=5, frameon=False, fontsize=8)
    return save(figure, path)


def _draw_sweep(axis: Any, arms: Mapping[str, Numbers], name: str) -> None:
    for index, (label, numbers) in enumerate(arms.items()):
        for way, style in ((RAW, "-"), (STANDARDIZED, "--")):
            _, values = zip(*numbers["alpha"][way][name], strict=True)
            axis.plot(
                range(len(ALPHAS)), values, style, color=PALETTE[index % len(PALETTE)], marker=MARKERS[index % len(MARKERS)],
                markersize=4, linewidth=1.2, label=f"{label}, {way}",
            )  # fmt: skip
    axis.set_xticks(range(len(ALPHAS)), [f"{alpha:g}" for alpha in ALPHAS], rotation=60)
    finish(axis, "", "α of moee_sum", SCORES[name])
    axis.legend(frameon=False, fontsize=7)


def _where(name: str, material: Mapping[str, Any]) -> str:
    part = {"spearman": "sts", "ndcg@10": "retrieval"}.get(name, "labels")
    return str(material[part]["name"])


def _tabulate(arms: Mapping[str, Numbers], material: Mapping[str, Any]) -> ResultTable:
    keys = ("value", "low", "high", "change", "change_low", "change_high")
    rows = [
        [label, _where(name, material), SCORES[name], way, method, *(row.get(key) for key in keys)]
        for label, numbers in arms.items()
        for way in (RAW, STANDARDIZED)
        for name, by_method in numbers["scores"][way].items()
        for method, row in by_method.items()
    ]
    return ResultTable(
        title="Hidden states, routing, and both",
        columns=(
            "model",
            "data",
            "score",
            "vectors",
            "method",
            "value",
            "low",
            "high",
            "change",
            "change, low",
            "change, high",
        ),
        rows=rows,
        note="Change: paired difference to hidden states. 95 % intervals: bootstrap over pairs or queries, and over "
        f"{_DRAWS} repetitions of k-means and of the choice of {_PER_LABEL} texts a label. Standardized on "
        f"{material['corpus']['num_texts']} texts of {material['corpus']['name']}.",
    )


METHODS = Analysis(
    name="methods",
    summary="scores of hidden states, routing and both, raw and standardized, and by the weight alpha",
    version=1,
    prepare=prepare_scored,
    measure=_measure,
    draw=_draw,
    tabulate=_tabulate,
)
