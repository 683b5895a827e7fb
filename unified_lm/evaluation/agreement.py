"""How far two clusterings, or a clustering and labels, agree; and classifiers of two views that are fused by probability.

Agreement is adjusted for chance (AMI: Vinh et al. 2010, "Information theoretic measures for clusterings comparison") wherever
the number of clusters may differ: V-measure and NMI grow with the number of clusters, whatever is in them. The published code
of MOEE averages the *numbers* of two clusterings, which makes up to k^2 clusters of k and raises V-measure even where one of
the two is noise; and the numbers of two binary classes, which is a logical AND. Neither is done here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from unified_lm.core.errors import ConfigError, DataError

_INITIALIZATIONS = 4
_MAX_ITERATIONS = 300


def require_sklearn() -> None:
    """Refuse a measurement that needs scikit-learn before anything is embedded.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"this needs scikit-learn ({error}): pip install 'unified_lm[eval]'.") from error


def k_means(vectors: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Cluster of each vector, int `[N]`.

    Args:
        vectors: `[N, D]`.
        clusters: how many, at most N.
        seed: of the first centers.

    Raises:
        DataError: fewer vectors than clusters.
    """
    from sklearn.cluster import KMeans

    if len(vectors) < clusters:
        raise DataError(f"{len(vectors)} texts cannot form {clusters} clusters; give more texts or fewer clusters.")
    return KMeans(clusters, n_init=_INITIALIZATIONS, random_state=seed).fit_predict(vectors)


def agreement(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """How far two partitions of the same texts agree.

    Args:
        first: int `[N]`, cluster of each text.
        second: the same of another partition.

    Returns:
        "ami" and "nmi" (arithmetic means), "v_measure"; "jaccard" of the pairs of texts that are together; and "exact", the
        share of texts in the same cluster once clusters are matched one to one as well as they can be.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics
    from sklearn.metrics.cluster import contingency_matrix, pair_confusion_matrix

    pairs = pair_confusion_matrix(first, second)
    together = pairs[0, 1] + pairs[1, 0] + pairs[1, 1]
    counts = contingency_matrix(first, second)
    rows, columns = linear_sum_assignment(-counts)
    return {
        "ami": float(metrics.adjusted_mutual_info_score(first, second)),
        "nmi": float(metrics.normalized_mutual_info_score(first, second)),
        "v_measure": float(metrics.v_measure_score(first, second)),
        "jaccard": float(pairs[1, 1] / together) if together else 1.0,
        "exact": float(counts[rows, columns].sum() / len(first)),
    }


def classify(
    views: Sequence[np.ndarray], labels: np.ndarray, train: np.ndarray, weights: Sequence[float] | None = None
) -> np.ndarray:
    """Labels of the texts that were not trained on, by logistic regressions whose probabilities are averaged.

    Args:
        views: one or more vectors of the same texts, each `[N, ...]`.
        labels: `[N]`.
        train: bool `[N]`, the texts to learn from; each label must be among them.
        weights: of the views; by default equal.

    Returns:
        Predicted labels `[N - train.sum()]`, in the order of the texts.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    summed: np.ndarray | None = None
    classes = np.unique(labels)
    for view, weight in zip(views, weights or [1.0] * len(views), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # as in MTEB, whose limit is 100 iterations
            fitted = LogisticRegression(max_iter=_MAX_ITERATIONS).fit(view[train], labels[train])
        told = weight * fitted.predict_proba(view[~train])
        summed = told if summed is None else summed + told
    assert summed is not None, "classify needs a view"
    return classes[summed.argmax(axis=1)]


def training_draw(labels: np.ndarray, per_label: int, seed: int) -> np.ndarray:
    """bool `[N]`: a random choice of so many texts of each label to learn from, as MTEB draws them.

    Args:
        labels: `[N]`.
        per_label: texts of each label.
        seed: of the draw.

    Raises:
        DataError: a label has too few texts.
    """
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        (found,) = np.nonzero(labels == label)
        if len(found) <= per_label:
            raise DataError(
                f"label '{label}' has {len(found)} texts; {per_label} to learn from and one to test are needed. "
                "Give more texts (--num-labeled), or leave rare labels out."
            )
        chosen[generator.choice(found, per_label, replace=False)] = True
    return chosen
