"""Agreement of clusterings and fused classifiers; and what the published code of MOEE does instead."""

import numpy as np
import pytest

from unified_lm.core.errors import DataError
from unified_lm.evaluation.agreement import agreement, classify, k_means, training_draw
from unified_lm.evaluation.analyses.routed import Parts

pytest.importorskip("sklearn")

K = 20


def _views(seed: int = 0, count: int = 2000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, vectors that know something of them, and noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, K, count)
    centers = generator.normal(size=(K, 16))
    states = centers[labels] + 3 * generator.normal(size=(count, 16))
    return labels, states.astype(np.float32), generator.normal(size=(count, 16)).astype(np.float32)


def test_agreement_of_equal_partitions_is_one_whatever_the_clusters_are_called() -> None:
    first = np.array([0, 0, 1, 1, 2, 2])
    for value in agreement(first, (first + 1) % 3).values():
        assert value == pytest.approx(1)


def test_agreement_by_hand() -> None:
    first, second = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])
    found = agreement(first, second)
    # together in the first: {01, 23}; in the second: {01, 02, 12}; in both: {01}
    assert found["jaccard"] == pytest.approx(1 / 4)
    assert found["exact"] == pytest.approx(3 / 4)
    assert found["v_measure"] == pytest.approx(found["nmi"])


def test_random_partitions_agree_by_chance_only() -> None:
    generator = np.random.default_rng(0)
    found = agreement(generator.integers(0, 40, 400), generator.integers(0, 40, 400))
    assert abs(found["ami"]) < 0.03
    assert found["v_measure"] > 0.4, "not adjusted for chance: what AMI is reported for"


def test_a_noise_partner_does_not_raise_ami() -> None:
    labels, states, noise = _views()
    parts = Parts(states, noise)
    own, noisy = (agreement(labels, k_means(parts.vectors(method), K, 0)) for method in ("hs", "moee_sum"))
    assert own["ami"] > 0.05
    assert noisy["ami"] < own["ami"]
    assert noisy["v_measure"] < own["v_measure"], "one clustering of k clusters cannot gain by being finer"


def test_averaged_cluster_numbers_are_the_artefact() -> None:
    """The published rule with a noise partner: V-measure rises and AMI falls. So the data above would show it."""
    labels, states, noise = _views()
    first, second = k_means(states, K, 0), k_means(noise, K, 0)
    averaged = (first + 0.7 * second) / 1.7
    published = agreement(labels, np.unique(averaged, return_inverse=True)[1])
    alone = agreement(labels, first)
    assert len(set(averaged)) > 3 * K
    assert published["ami"] < alone["ami"]
    assert published["v_measure"] > 1.3 * alone["v_measure"], "rewarded for a partner that knows nothing"


def test_fused_classes_are_no_logical_and() -> None:
    """Two texts, one sure view each: the surer one decides, for either class."""
    sure, unsure = 4.0, 0.3
    train = np.array([True] * 8 + [False] * 4)
    labels = np.array([0, 1] * 6)
    known = np.array([-2.0, 2.0] * 4)
    first = np.concatenate([known, [sure, -unsure, unsure, -sure]])[:, None]
    second = np.concatenate([known, [-unsure, sure, -sure, unsure]])[:, None]
    assert classify([first, second], labels, train).tolist() == [1, 1, 0, 0]
    alone = [classify([view], labels, train) for view in (first, second)]
    assert (alone[0] & alone[1]).tolist() == [0, 0, 0, 0], "what averaging and flooring class numbers would say"


def test_a_noise_partner_does_not_help_a_rare_class() -> None:
    generator = np.random.default_rng(1)
    labels = (generator.random(4000) < 0.08).astype(int)
    view = (labels + 1.2 * generator.normal(size=4000))[:, None]
    noise = generator.normal(size=(4000, 1))
    train = training_draw(labels, 40, 0)
    alone, fused = ((classify(views, labels, train) == labels[~train]).mean() for views in ([view], [view, noise]))
    assert fused <= alone + 0.02


def test_training_draws_have_every_label_and_leave_some() -> None:
    labels = np.array(["a"] * 20 + ["b"] * 5)
    train = training_draw(labels, 4, 0)
    assert {label: int((labels[train] == label).sum()) for label in "ab"} == {"a": 4, "b": 4}
    assert (training_draw(labels, 4, 1) != train).any()
    with pytest.raises(DataError, match=r"label 'b' has 5 texts; 5 to learn from and one to test"):
        training_draw(labels, 5, 0)


def test_too_few_texts_for_the_clusters() -> None:
    with pytest.raises(DataError, match="3 texts cannot form 4 clusters"):
        k_means(np.eye(3), 4, 0)
