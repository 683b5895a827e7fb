"""Run analyses over models, with one model in memory at a time; existing measurements are reused."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from unified_lm.core.errors import DataError, about
from unified_lm.core.outputs import check_files, write_file, write_json_file
from unified_lm.core.user_files import read_json
from unified_lm.evaluation.analyses.arms import Arm
from unified_lm.evaluation.analyses.base import Analysis, AnalysisSettings, Material, Numbers
from unified_lm.evaluation.result_table import FOLDER

_IN_RUN = "analysis-"
"""What the names of table and figure begin with among the evaluations of a run."""


@dataclass(frozen=True)
class Outcome:
    """The output of an analysis.

    Attributes:
        name: name of the analysis.
        numbers: the JSON file.
        figure: the PNG file.
        arms: label -> numbers.
    """

    name: str
    numbers: Path
    figure: Path
    arms: dict[str, Numbers]


def run_analyses(
    analyses: Sequence[Analysis],
    arms: Sequence[Arm],
    settings: AnalysisSettings,
    out: Path,
    *,
    overwrite: bool = False,
    show_progress: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Measure every arm, then draw.

    `out/NAME.json` is written after every measurement, so that an interrupted run resumes with the next one. For the export of
    a run, table and figure are also written to where the run's report finds them: `RUN/evaluation/analysis-NAME`.

    Args:
        analyses: in the order of the results.
        arms: models, in the order of the figures.
        settings: the data to measure on.
        out: folder for NAME.json and NAME.png.
        overwrite: ignore existing measurements.
        show_progress: draw progress bars on stderr.
        report: called with one line per measurement.

    Raises:
        UserError: unreadable material, a model that cannot be loaded, or a failed control.
    """
    runs = list(dict.fromkeys(arm.run_dir for arm in arms if arm.run_dir is not None))
    places = [(out, ""), *((run / FOLDER, _IN_RUN) for run in runs)]
    names = [f"{analysis.name}.{ending}" for analysis in analyses for ending in ("json", "png")]
    check_files(folder / f"{prefix}{name}" for folder, prefix in places for name in names)
    materials = {analysis.name: analysis.prepare(settings) for analysis in analyses}
    found = {a.name: {} if overwrite else _read(out / f"{a.name}.json") for a in analyses}
    results: dict[str, dict[str, Numbers]] = {analysis.name: {} for analysis in analyses}
    for arm in arms:
        content = arm.key()
        model = None  # loaded only if some analysis lacks its numbers
        for analysis in analyses:
            material = materials[analysis.name]
            key = _key(analysis, material, content)
            numbers = found[analysis.name].get(key)
            if numbers is None:
                with about(arm.label):
                    model = model or arm.load()
                    start = time.perf_counter()
                    numbers = analysis.measure(model, material, show_progress)
                report(f"{analysis.name}, {arm.label}: {time.perf_counter() - start:.1f} s")
            else:
                report(f"{analysis.name}, {arm.label}: measured before")
            results[analysis.name][arm.label] = {"key": key, "model": str(arm.folder), **numbers}
            _write(out, analysis, material, results[analysis.name], found[analysis.name])
    return [_finish(analysis, materials[analysis.name], results[analysis.name], out, runs) for analysis in analyses]


def _finish(analysis: Analysis, material: Material, arms: dict[str, Numbers], out: Path, runs: Sequence[Path]) -> Outcome:
    path = _write(out, analysis, material, arms, {})
    figure = analysis.draw(arms, material.description, out / f"{analysis.name}.png")
    for run in runs:
        target = run / FOLDER / f"{_IN_RUN}{analysis.name}.png"
        write_file(target, partial(shutil.copyfile, figure))
        replace(analysis.tabulate(arms, material.description), figure=target.name).save(target.with_suffix(".json"))
    return Outcome(analysis.name, path, figure, arms)


def _key(analysis: Analysis, material: Material, model: str) -> str:
    return blake2b(f"{analysis.name}:{analysis.version}:{material.fingerprint}:{model}".encode(), digest_size=12).hexdigest()


def _read(path: Path) -> dict[str, Numbers]:
    """Read the results of an earlier run: key -> numbers; empty without a file.

    Raises:
        DataError: the file is damaged.
    """
    if not path.is_file():
        return {}
    content = read_json(path, fix="Remove it, or use --overwrite.")
    try:
        arms: dict[str, dict[str, Any]] = content["arms"]
        return {arm["key"]: {k: v for k, v in arm.items() if k not in ("key", "model")} for arm in arms.values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is not the result of an analysis ({error!r}). Remove it, or use --overwrite.") from error


def _write(out: Path, analysis: Analysis, material: Material, arms: dict[str, Numbers], earlier: dict[str, Numbers]) -> Path:
    """Write the numbers; results of an earlier run stay in the file until they are reused or the run ends."""
    kept = {arm["key"] for arm in arms.values()}
    waiting = {f"(earlier) {key}": {"key": key, "model": "", **value} for key, value in earlier.items() if key not in kept}
    path = out / f"{analysis.name}.json"
    write_json_file(path, {"analysis": analysis.name, "measured_on": dict(material.description), "arms": {**arms, **waiting}})
    return path
