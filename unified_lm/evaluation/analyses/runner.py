"""Running analyses over models, one model in memory at a time; what is measured already is not measured again."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from unified_lm.core.errors import DataError
from unified_lm.core.files import write_json
from unified_lm.evaluation.analyses.arms import Arm
from unified_lm.evaluation.analyses.base import Analysis, AnalysisSettings, Material, Numbers
from unified_lm.evaluation.result_table import FOLDER


@dataclass(frozen=True)
class Outcome:
    """What an analysis wrote.

    Attributes:
        name: of the analysis.
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
    """Measure, then draw.

    After every measurement `out/NAME.json` is written, so that a run that was stopped goes on with the next one. Beside the
    export of a run, table and figure are also put where the run's report finds them: `RUN/evaluation/analysis-NAME`.

    Args:
        analyses: in the order of the results.
        arms: models, in the order of the figures.
        settings: what to measure on.
        out: folder for NAME.json and NAME.png.
        overwrite: measure again what is there.
        show_progress: draw bars on stderr.
        report: called with one line per measurement.

    Raises:
        UserError: material that cannot be read, a model that cannot be loaded, a control that fails.
    """
    materials = {analysis.name: analysis.prepare(settings) for analysis in analyses}
    found = {a.name: {} if overwrite else _read(out / f"{a.name}.json") for a in analyses}
    results: dict[str, dict[str, Numbers]] = {analysis.name: {} for analysis in analyses}
    for arm in arms:
        content = arm.key()
        model = None
        for analysis in analyses:
            material = materials[analysis.name]
            key = _key(analysis, material, content)
            numbers = found[analysis.name].get(key)
            if numbers is None:
                model = model or arm.load()
                start = time.perf_counter()
                numbers = analysis.measure(model, material, show_progress)
                report(f"{analysis.name}, {arm.label}: {time.perf_counter() - start:.1f} s")
            else:
                report(f"{analysis.name}, {arm.label}: measured before")
            results[analysis.name][arm.label] = {"key": key, "model": str(arm.folder), **numbers}
            _write(out, analysis, material, results[analysis.name], found[analysis.name])
    runs = list(dict.fromkeys(arm.run_dir for arm in arms if arm.run_dir is not None))
    return [_finish(analysis, materials[analysis.name], results[analysis.name], out, runs) for analysis in analyses]


def _finish(analysis: Analysis, material: Material, arms: dict[str, Numbers], out: Path, runs: Sequence[Path]) -> Outcome:
    path = _write(out, analysis, material, arms, {})
    figure = analysis.draw(arms, material.description, out / f"{analysis.name}.png")
    for run in runs:
        target = run / FOLDER / f"analysis-{analysis.name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(figure, target)
        replace(analysis.tabulate(arms, material.description), figure=target.name).save(target.with_suffix(".json"))
    return Outcome(analysis.name, path, figure, arms)


def _key(analysis: Analysis, material: Material, model: str) -> str:
    return blake2b(f"{analysis.name}:{analysis.version}:{material.fingerprint}:{model}".encode(), digest_size=12).hexdigest()


def _read(path: Path) -> dict[str, Numbers]:
    """Key -> numbers of an earlier run.

    Raises:
        DataError: the file is there and damaged.
    """
    if not path.is_file():
        return {}
    try:
        arms: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["arms"]
        return {arm["key"]: {k: v for k, v in arm.items() if k not in ("key", "model")} for arm in arms.values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is not the result of an analysis ({error!r}). Remove it, or use --overwrite.") from error


def _write(out: Path, analysis: Analysis, material: Material, arms: dict[str, Numbers], earlier: dict[str, Numbers]) -> Path:
    """Write the numbers; those of an earlier run that are still to be taken over stay until the end."""
    kept = {arm["key"] for arm in arms.values()}
    waiting = {f"(earlier) {key}": {"key": key, "model": "", **value} for key, value in earlier.items() if key not in kept}
    path = out / f"{analysis.name}.json"
    write_json(path, {"analysis": analysis.name, "measured_on": dict(material.description), "arms": {**arms, **waiting}})
    return path
