"""Comparison of runs: how their configurations differ, and how their held-out metrics differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from unified_lm.composition.convert import saved_settings
from unified_lm.composition.flat import flatten
from unified_lm.composition.locate import RESOLVED_NAME
from unified_lm.core.errors import DataError, did_you_mean
from unified_lm.core.typed import require_typed
from unified_lm.core.user_files import read_json
from unified_lm.engine.metrics import held_out, held_out_lines
from unified_lm.engine.validation_items import ItemScores, read_items
from unified_lm.evaluation.bootstrap import Interval, bootstrap_interval
from unified_lm.reporting.curves import load_runs, run_folders
from unified_lm.reporting.report_numbers import FEWEST_ITEMS

SWEEP_FILE = "sweep.json"
"""File in the folder of an ablation: its recipe, its base, and the names of its arms in order."""
_IGNORED = ("run_dir", "resume", "dry_run", "description", "notices", "logging", "checkpoint", "export", "parallel")
"""Parts of a configuration that decide where and how a run is executed, not what it trains."""
_SEED = "seed"
_SEED_SUFFIX = re.compile(r"-seed\d+$")
_SAME_MEASURE = {
    *("sources", "attention", "template", "source_temperature"),
    *("objective.weight", "objective.router_aux_loss_coef", "objective.reference"),
    *("objective.router_uniformity_coef", "objective.router_ambiguity_coef"),
    *("objective.gradient_scale", "objective.reference_world_size", "objective.cross_entropy"),
}
"""Settings of a stream that may change what a model learns, but not what its held-out loss means. Every other one, also of a
format or an objective from outside the package, counts as changing the loss."""
_AVERAGING = {"objective.normalization", "objective.micro_batch_size"}
"""Settings of a stream that change its held-out loss unless `validation.normalization` sets how all arms are averaged."""
_RETRIEVAL = "validation.retrieval"
"""Prefix of the settings that decide the retrieval queries."""


@dataclass(frozen=True)
class ComparedRun:
    """One run.

    Attributes:
        name: unique name among the compared runs.
        folder: folder of the run.
        settings: dotted key -> value, for the settings that affect training.
        seed: seed of the run.
        step: step of its last held-out measurement.
        finished: whether that is the last step of the run.
        before: held-out metrics before the first step; empty if unknown.
        after: held-out metrics of the last measurement.
        items: metric -> scores by item, of which `after` holds the means.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    seed: int
    step: int
    finished: bool
    before: Mapping[str, float]
    after: Mapping[str, float]
    items: Mapping[str, ItemScores]


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seeds."""

    name: str
    runs: Sequence[ComparedRun]

    def values(self, metric: str) -> list[float]:
        """The values of the metric, ordered by seed; runs without it are skipped."""
        return [run.after[metric] for run in self.runs if metric in run.after]

    def mean(self, metric: str) -> float | None:
        """Mean over seeds; None if no run has the metric."""
        values = self.values(metric)
        return fmean(values) if values else None

    def deviation(self, metric: str) -> float | None:
        """Sample standard deviation over seeds (divisor n - 1); None with fewer than two runs."""
        values = self.values(metric)
        return stdev(values) if len(values) > 1 else None

    def before(self, metric: str) -> float | None:
        """Mean of the metric before training, over seeds; None if no run has it."""
        values = [run.before[metric] for run in self.runs if metric in run.before]
        return fmean(values) if values else None

    def setting(self, key: str) -> Any:
        """The arm's value of a setting; None if it has no such key."""
        return self.runs[0].settings.get(key)


@dataclass(frozen=True)
class Comparison:
    """A comparison of arms.

    Attributes:
        arms: in the order of the folders.
        differing: dotted keys of the settings in which the arms differ.
        metrics: held-out metrics that at least one run has, retrieval first.
        reference: the arm with which the others are compared.
        notes: what a reader must know to interpret the numbers.
    """

    arms: Sequence[Arm]
    differing: Sequence[str]
    metrics: Sequence[str]
    reference: Arm
    notes: Sequence[str]

    def difference(self, arm: Arm, metric: str) -> Interval | None:
        """The arm minus the reference with a 95 % interval: a bootstrap over items, paired within each seed.

        The interval covers variation of the held-out queries, not of the training seed: the differences of an item are
        averaged over seeds first, since one query measured three times is not three queries. None if the runs have not
        stored scores by item, or their items differ.
        """
        if arm is self.reference or (metric.startswith("retrieval") and self._asks_others(arm)):
            return None
        reference = {run.seed: run.items.get(metric) for run in self.reference.runs}
        pairs = [(run.items.get(metric), reference.get(run.seed)) for run in arm.runs]
        kept = [_paired(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
        usable = [pair for pair in kept if pair is not None]
        differences = [ours - theirs for ours, theirs in usable]
        if len({len(each) for each in differences}) != 1 or len(differences[0]) < FEWEST_ITEMS:
            return None
        return bootstrap_interval(lambda items: float(items.mean()), np.mean(differences, axis=0))

    def _asks_others(self, arm: Arm) -> bool:
        """Whether the arm's queries differ from the reference's."""
        keys = [key for key in self.differing if key.startswith(_RETRIEVAL)]
        return any(arm.setting(key) != self.reference.setting(key) for key in keys)


def _paired(ours: ItemScores, theirs: ItemScores) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores of the same items; None if the items are not comparable (batches of a loss depend on the arm's settings)."""
    if ours.unit == "batch" or ours.unit != theirs.unit or len(ours.scores) != len(theirs.scores):
        return None
    return np.asarray(ours.scores), np.asarray(theirs.scores)


def compare(folders: Sequence[Path], reference: str | None = None) -> Comparison:
    """Read runs and compare them.

    If any run is finished, unfinished ones are excluded (and named in a note), since their numbers are of other steps.

    Args:
        folders: folders of runs, or of ablations or chains, which contain runs.
        reference: name of the arm with which the others are compared; None selects the first.

    Raises:
        DataError: a folder is missing or contains no run, nothing was measured on held-out data, or there is no such arm.
    """
    found = _load(folders)
    runs = [run for run in found if run.finished] or found
    arms = _group(runs)
    metrics = _order({metric for run in runs for metric in run.after})
    differing = [
        key
        for key in dict.fromkeys(key for arm in arms for key in arm.runs[0].settings)
        if len({repr(arm.setting(key)) for arm in arms}) > 1
    ]
    names = [arm.name for arm in arms]
    if reference is not None and reference not in names:
        raise DataError(f"no arm '{reference}'.{did_you_mean(reference, names)}")
    chosen = arms[0 if reference is None else names.index(reference)]
    return Comparison(arms, differing, metrics, chosen, _notes(found, runs, differing, arms))


def _load(folders: Sequence[Path]) -> list[ComparedRun]:
    found = list(dict.fromkeys(path for folder in folders for path in _in_order(folder)))
    runs = []
    for path, run in zip(found, load_runs(found), strict=True):
        lines = held_out_lines(path)
        if not lines:
            continue
        if not (path / RESOLVED_NAME).is_file():
            raise DataError(f"{path} has no {RESOLVED_NAME}, so its settings are unknown.")
        saved = saved_settings(path / RESOLVED_NAME)
        plan = require_typed(_Plan, saved, path / RESOLVED_NAME, DataError, fix="It is damaged.", open_ended=True)
        before, after = held_out(path)
        after = after or _metrics(lines[-1])
        step = int(lines[-1]["step"])
        settings = {key: value for key, value in flatten(saved).items() if not _is_ignored(key)}
        finished = step == plan.max_steps
        runs.append(ComparedRun(run.name, path, settings, plan.seed, step, finished, before, after, read_items(path, step)))
    if not runs:
        raise DataError(f"nothing to compare: no held-out number is measured yet in {', '.join(map(str, folders))}.")
    return runs


def _in_order(folder: Path) -> list[Path]:
    """The runs of a folder; for an ablation, in the order of its arms.

    Raises:
        DataError: there are no runs, or the file with the order is damaged.
    """
    found = run_folders(folder)
    if not (folder / SWEEP_FILE).is_file():
        return found
    fix = "Remove it: the arms are then in the order of names."
    file = folder / SWEEP_FILE
    names = require_typed(_Sweep, read_json(file, fix=fix), file, DataError, fix=fix, open_ended=True).arms
    position = {name: number for number, name in enumerate(names)}
    return sorted(found, key=lambda path: position.get(_SEED_SUFFIX.sub("", path.name), len(names)))


@dataclass(frozen=True)
class _Plan:
    """What is read of a run's configuration beside its settings."""

    max_steps: int
    seed: int


@dataclass(frozen=True)
class _Sweep:
    """What is read of an ablation's file."""

    arms: tuple[str, ...]


def _metrics(line: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in line.items() if "/" in key and isinstance(value, (int, float))}


def _is_ignored(key: str) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in _IGNORED)


def _group(runs: Sequence[ComparedRun]) -> list[Arm]:
    """Group runs that differ only in the seed into arms, named after their folders."""
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        key = repr(sorted((k, repr(v)) for k, v in run.settings.items() if k != _SEED))
        groups.setdefault(key, []).append(run)
    names = [_SEED_SUFFIX.sub("", members[0].name) for members in groups.values()]
    short = [name.rpartition("/")[2] for name in names]
    unique = short if len(set(short)) == len(short) else names
    return [Arm(name, sorted(members, key=lambda run: run.seed)) for name, members in zip(unique, groups.values(), strict=True)]


def _order(metrics: Iterable[str]) -> list[str]:
    """Sort metrics: nDCG first, then the other retrieval metrics, then losses."""
    ranks = ("retrieval/ndcg", "retrieval_causal/ndcg", "retrieval/", "retrieval_causal/")

    def rank(metric: str) -> tuple[int, str]:
        """Sort key: the index of the first prefix that the metric begins with, then its name."""
        return next((i for i, prefix in enumerate(ranks) if metric.startswith(prefix)), len(ranks)), metric

    return sorted(metrics, key=rank)


def _notes(
    found: Sequence[ComparedRun], runs: Sequence[ComparedRun], differing: Sequence[str], arms: Sequence[Arm]
) -> list[str]:
    notes = []
    open_runs = [f"{run.name} (step {run.step} of {run.settings['max_steps']})" for run in found if not run.finished]
    if open_runs:
        notes.append(f"Not finished{'' if len(runs) == len(found) else ', left out'}: {', '.join(open_runs)}.")
    for stream in sorted({key.split(".")[1] for key in differing if key.startswith("streams.") and key.count(".") > 1}):
        own = [key for key in differing if key.startswith(f"streams.{stream}.")]
        common = all(arm.setting("validation.normalization") is not None for arm in arms)
        harmless = _SAME_MEASURE | _AVERAGING if common else _SAME_MEASURE
        causes = [key for key in own if key.removeprefix(f"streams.{stream}.") not in harmless]
        if causes and any(f"heldout/{stream}" in run.after for run in runs):
            notes.append(f"heldout/{stream} does not compare: the arms measure it differently ({', '.join(causes)}).")
    if any(key.endswith(".attention") for key in differing):
        notes.append("retrieval/ is measured under each arm's own attention, retrieval_causal/ always causally.")
    seeds = {tuple(run.seed for run in arm.runs) for arm in arms}
    if len(seeds) > 1:
        notes.append("The arms were not run with the same seeds.")
    elif max(len(arm.runs) for arm in arms) == 1:
        notes.append("One seed an arm: how far the numbers move with the seed is not known.")
    return notes


def title_of(metric: str) -> str:
    """The display name of a metric."""
    group, _, rest = metric.partition("/")
    name = {"ndcg@10": "nDCG@10"}.get(rest, rest)
    if group == "retrieval":
        return name
    if group == "retrieval_causal":
        return f"{name}, read causally"
    return f"held-out {rest} loss" if group == "heldout" and "/" not in rest else f"held-out {rest}"
