"""Differences between arms: what the interval is made of, and when there is none."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.reporting.test_report import write_run
from unified_lm.composition.compose import compose_run
from unified_lm.composition.convert import saved_settings, to_plain, to_yaml
from unified_lm.config.objectives import TokenObjectiveConfig
from unified_lm.core.errors import DataError
from unified_lm.engine.validation_items import ItemScores
from unified_lm.evaluation.bootstrap import bootstrap_interval
from unified_lm.reporting.compare import Arm, ComparedRun, Comparison, compare

METRIC = "retrieval/ndcg@10"


def _run(name: str, seed: int, scores: np.ndarray, settings: dict[str, Any] | None = None) -> ComparedRun:
    items = {METRIC: ItemScores("query", scores.tolist())}
    after = {METRIC: float(scores.mean())}
    return ComparedRun(name, Path(name), settings or {}, seed, 1, True, {}, after, items)


def _comparison(ours: Arm, reference: Arm, differing: tuple[str, ...] = ()) -> Comparison:
    return Comparison([reference, ours], differing, [METRIC], reference, [])


def test_queries_measured_under_several_seeds_do_not_count_several_times() -> None:
    rng = np.random.default_rng(0)
    base, gain = rng.random(40), rng.normal(0.05, 0.2, 40)
    one = _comparison(Arm("a", [_run("a", 1, base + gain)]), Arm("b", [_run("b", 1, base)]))
    three = _comparison(
        Arm("a", [_run("a", seed, base + gain) for seed in (1, 2, 3)]), Arm("b", [_run("b", seed, base) for seed in (1, 2, 3)])
    )
    found = [comparison.difference(comparison.arms[1], METRIC) for comparison in (one, three)]
    expected = bootstrap_interval(lambda d: float(d.mean()), gain)
    for interval in found:
        assert interval is not None
        assert (interval.value, interval.low, interval.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_other_queries_are_not_paired() -> None:
    key = "validation.retrieval.queries.path"
    scores = np.linspace(0, 1, 20)
    arms = [Arm(name, [_run(name, 1, scores, {key: path})]) for name, path in (("a", "x"), ("b", "y"), ("c", "x"))]
    comparison = Comparison(arms, [key], [METRIC], arms[0], [])
    assert comparison.difference(arms[1], METRIC) is None
    assert comparison.difference(arms[2], METRIC) is not None


def test_runs_that_are_not_finished_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.linspace(0, 1, 20)
    settings = {"max_steps": 20, "optim.learning_rate": 1.0}
    done, begun = (_run("a", seed, scores - seed, settings) for seed in (0, 1))
    begun = replace(begun, name="a-seed1", step=0, finished=False)
    monkeypatch.setattr("unified_lm.reporting.compare._load", lambda folders: [done, begun])
    found = compare([])
    assert found.reference.mean(METRIC) == pytest.approx(0.5)
    assert "Not finished, left out: a-seed1 (step 0 of 20)." in found.notes
    monkeypatch.setattr("unified_lm.reporting.compare._load", lambda folders: [begun])
    found = compare([])
    assert found.reference.mean(METRIC) == pytest.approx(-0.5)
    assert "Not finished: a-seed1 (step 0 of 20)." in found.notes


@pytest.mark.parametrize(
    ("key", "noted"),
    [
        ("objective.margin", True),  # of an objective from outside the package
        ("objective.beta", True),
        ("objective.name", True),
        ("swap_probability", True),  # of a format from outside the package
        ("masking.probability", True),
        ("batch_size", True),
        ("objective.normalization", True),
        ("objective.weight", False),
        *((f"objective.{field.name}", False) for field in fields(TokenObjectiveConfig) if field.name.startswith("router_")),
        ("objective.reference", False),
        ("objective.gradient_scale", False),
        ("objective.cross_entropy", False),
        ("sources", False),
        ("attention", False),
        ("template", False),
        ("source_temperature", False),
    ],
)
def test_losses_that_arms_measure_differently_are_named(monkeypatch: pytest.MonkeyPatch, key: str, noted: bool) -> None:
    changed = f"streams.mine.{key}"
    assert _notes_of(monkeypatch, changed, {}) == (
        [f"heldout/mine does not compare: the arms measure it differently ({changed})."] if noted else []
    )


def test_a_common_average_makes_normalizations_comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"validation.normalization": "token"}
    assert not _notes_of(monkeypatch, "streams.mine.objective.normalization", common)
    assert _notes_of(monkeypatch, "streams.mine.objective.margin", common)


def _notes_of(monkeypatch: pytest.MonkeyPatch, changed: str, common: dict[str, Any]) -> list[str]:
    """The notes about losses that do not compare, where two arms differ in one setting."""
    scores = np.linspace(0, 1, 20)
    runs = [
        replace(_run(name, 1, scores, {**common, "max_steps": 1, changed: name}), after={"heldout/mine": 0.5})
        for name in ("a", "b")
    ]
    monkeypatch.setattr("unified_lm.reporting.compare._load", lambda folders: runs)
    return [note for note in compare([]).notes if "does not compare" in note]


def test_results_are_read_without_importing_the_parts_that_made_them(tmp_path: Path) -> None:
    """A script's folder is on the path of imports only while it runs there."""
    run = to_plain(compose_run(["recipe=grit_smollm2", "model=tiny_random", "max_steps=4"]))
    for name, margin in (("a", 0.2), ("b", 0.3)):
        folder = write_run(tmp_path / name)
        run["streams"]["embedding"]["objective"] = {"name": "my_script.Margin", "weight": 1.0, "margin": margin}
        (folder / "config.yaml").write_text(yaml.safe_dump(run))
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert found.differing == ["streams.embedding.objective.margin"]
    assert found.reference.mean(METRIC) == 0.75


def test_settings_of_an_older_run_have_todays_defaults(tmp_path: Path) -> None:
    config = compose_run(["recipe=grit_smollm2", "model=tiny_random"])
    (tmp_path / "new.yaml").write_text(to_yaml(config))
    assert saved_settings(tmp_path / "new.yaml") == to_plain(config)
    older = to_plain(config)
    del older["optim"]["max_skipped_steps"], older["streams"]["generation"]["objective"]["normalization"], older["lora"]
    older["streams"]["generation"]["objective"]["temperature"] = 0.5  # of another kind, which earlier versions saved
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(older))
    assert saved_settings(tmp_path / "old.yaml") == to_plain(config)


def test_a_configuration_with_mistyped_values_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "config.yaml").write_text("max_steps: four\nseed: 1\n")
    with pytest.raises(DataError, match=r"a/config\.yaml: max_steps: got 'four' \(str\), expected a whole number"):
        compare([folder])
