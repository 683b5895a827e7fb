"""The content of `unified-lm report RUN`: everything known about a finished, stopped or running run, read from its folder.

All content was written by the run or by an evaluation of it; only intervals, sums and the hash of the exported weights are
computed here. Whatever a run has not recorded is listed in `RunReport.missing`, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_lm.composition.compose import compose_run
from unified_lm.composition.convert import to_plain
from unified_lm.composition.locate import RESOLVED_NAME, read_yaml
from unified_lm.core.errors import DataError, UserError
from unified_lm.core.typed import require_typed, show, unusable_text
from unified_lm.core.user_files import read_json
from unified_lm.engine.metrics import read_metrics
from unified_lm.engine.validation_items import FOLDER as ITEMS_FOLDER
from unified_lm.engine.wandb_run import hide_secrets
from unified_lm.evaluation.result_table import ResultTable, find_result_tables
from unified_lm.export.manifest import FILE_NAME, Manifest
from unified_lm.models.weights_hash import hash_weights
from unified_lm.reporting.report_numbers import Cost, HeldOutTable, held_out_table, run_cost

RECORD_NAME = "run.json"
"""File that every start of a run writes: data, model, machine."""

_OF_THE_RUN = frozenset({"run_dir", "resume", "dry_run", "notices", "description", "recipe", "logging"})
"""Settings that differ between all runs and do not affect training."""


@dataclass(frozen=True)
class Change:
    """A setting that differs from the recipe.

    Attributes:
        key: dotted key.
        default: value in the recipe; None if the recipe has no such key.
        value: value in the run; None if the run has no such key.
    """

    key: str
    default: str | None
    value: str | None


@dataclass(frozen=True)
class Settings:
    """The resolved configuration of a run.

    Attributes:
        values: dotted key -> value, for all settings.
        changes: differences from the currently installed recipe; None if the recipe could not be composed.
        obstacle: why it could not be composed; "" otherwise.
    """

    values: Mapping[str, str]
    changes: Sequence[Change] | None
    obstacle: str = ""


@dataclass(frozen=True)
class Export:
    """The export of a run.

    Attributes:
        manifest: its manifest.
        hash_holds: whether the weights have the hash recorded in the manifest.
        checks: the checks that passed before the folder was published.
    """

    manifest: Manifest
    hash_holds: bool
    checks: Sequence[str]


@dataclass(frozen=True)
class RunReport:
    """The report of one run.

    Attributes:
        name: name of its folder.
        recipe: name of the recipe.
        description: what the recipe does.
        num_steps: optimizer steps taken.
        max_steps: configured number of steps.
        settings: its configuration.
        held_out: held-out results, or None.
        tables: results of evaluations found in the run's folder.
        cost: cost of its steps, or None if none was measured.
        record: content of run.json; None for a run without one.
        export: the export, or None.
        missing: what is not shown, and why.
    """

    name: str
    recipe: str
    description: str
    num_steps: int
    max_steps: int
    settings: Settings
    held_out: HeldOutTable | None
    tables: Sequence[ResultTable]
    cost: Cost | None
    record: Mapping[str, Any] | None
    export: Export | None
    missing: Sequence[str]

    @property
    def is_finished(self) -> bool:
        """Whether all steps were taken."""
        return self.num_steps >= self.max_steps


def read_report(run_dir: Path) -> RunReport:
    """Read a run's folder.

    Raises:
        DataError: a file of the run is damaged, or it has no configuration.
        ConfigError: its configuration is not YAML.
        CheckpointError: the manifest of its export is damaged.
    """
    config_path = run_dir / RESOLVED_NAME
    if not config_path.is_file():
        raise DataError(f"{run_dir} has no {RESOLVED_NAME}, which every run writes before its first step. Give a run's folder.")
    config = hide_secrets(read_yaml(config_path))
    lines = read_metrics(run_dir)
    record = _read_record(run_dir / RECORD_NAME)
    held_out = held_out_table(run_dir)
    export = _read_export(run_dir / "export")
    cost = run_cost(lines, [] if record is None else record["starts"])
    tables = find_result_tables(run_dir)
    return RunReport(
        name=run_dir.resolve().name,
        recipe=str(config.get("recipe", "")),
        description=str(config.get("description", "")),
        num_steps=0 if cost is None else cost.num_steps,
        max_steps=_steps(config, config_path),
        settings=_settings(config, config_path),
        held_out=held_out,
        tables=tables,
        cost=cost,
        record=record,
        export=export,
        missing=_missing(record, held_out, cost, export, tables),
    )


def _steps(config: Mapping[str, Any], path: Path) -> int:
    found = config.get("max_steps", 0)
    if not isinstance(found, int):
        raise DataError(f"{path}: max_steps: got {show(found)}, expected a whole number.")
    return found


def _read_record(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    fix = "Remove it: the report then omits its content."
    record = read_json(path, fix=fix)
    if not require_typed(_Record, record, path, DataError, fix=fix, open_ended=True).starts:
        raise DataError(f"{path}: starts is empty. {fix}")
    return dict(record)


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What is shown of a record's model."""

    name: str = ""
    revision: str = ""
    family: str = ""
    fingerprint: str = ""
    parameters: int = 0
    trained_parameters: int = 0
    attention_kernel: str = ""
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Data:
    """What is shown of one of a record's sources."""

    stream: str = ""
    source: str = ""
    rows: int | None = 0
    rejected: Mapping[str, int]
    truncated: int = 0
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What is shown of one of a record's starts."""

    from_step: int
    num_ranks: int
    device_type: str
    versions: Mapping[str, str]
    time: str = ""
    backend: str = ""
    device: str = ""
    peak_teraflops_per_device: float = 0.0
    peak_source: str = ""
    platform: str = ""


@dataclass(frozen=True, kw_only=True)
class _Record:
    """The content of run.json, as far as it is shown; templates read the plain values, whose types this checks."""

    model: _Model
    data: tuple[_Data, ...]
    starts: tuple[_Start, ...]


# --- settings ----------------------------------------------------------------------------------------------------------


def _settings(config: Mapping[str, Any], path: Path) -> Settings:
    values = {key: _text(value) for key, value in _flatten(config, "")}
    for key, value in values.items():
        if fault := unusable_text(f"{key}{value}"):
            raise DataError(f"{path}: the setting {key!r:.60} {fault}. Write its characters themselves, in UTF-8.")
    try:
        default = compose_run([f"recipe={config.get('recipe', '')}"])
    except UserError as error:
        return Settings(values, None, str(error))
    return Settings(values, list(differences(to_plain(default), config)))


def differences(default: Any, value: Any, key: str = "") -> Iterator[Change]:
    """The differences between two nested configurations; a block that only one of them has is a single entry.

    Args:
        default: values of the recipe.
        value: values of the run.
        key: dotted key of both.
    """
    if _is_blocks(default) and _is_blocks(value) and len(default) == len(value):
        default, value = _by_index(default), _by_index(value)
    if not (isinstance(default, Mapping) and isinstance(value, Mapping)):
        if default != value:
            yield Change(key, _text(default), _text(value))
        return
    for name, own in value.items():
        inner = f"{key}.{name}" if key else str(name)
        if inner in _OF_THE_RUN:
            continue
        if name in default:
            yield from differences(default[name], own, inner)
        else:
            yield Change(inner, None, _text(own))
    for name, other in default.items():
        if name not in value and other and isinstance(other, (Mapping, list)):  # a single key is newer than the run
            yield Change(f"{key}.{name}" if key else str(name), _text(other), None)


def _flatten(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values; a list of scalars and an empty container count as values."""
    if _is_blocks(value):
        value = _by_index(value)
    if not (isinstance(value, Mapping) and value):
        yield key, value
        return
    for name, item in value.items():
        yield from _flatten(item, f"{key}.{name}" if key else str(name))


def _is_blocks(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _by_index(items: Sequence[Any]) -> dict[str, Any]:
    return {str(index): item for index, item in enumerate(items)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- export and gaps ---------------------------------------------------------------------------------------------------


def _read_export(folder: Path) -> Export | None:
    if not (folder / FILE_NAME).is_file():
        return None
    manifest = Manifest.load(folder)
    return Export(manifest, hash_weights(folder) == manifest.weights_hash, _checks(manifest))


def _checks(manifest: Manifest) -> list[str]:
    """The checks of `export.verify` and `export.merge`. They must have passed, since a failure leaves no folder."""
    checks = ["every tensor that transformers loads equals the trained one, rounded to the export's type"]
    if any(stage.adapter for stage in manifest.stages):
        checks.insert(0, "merged and adapter layers agree to 1e-5 of their largest output, in float32")
    if manifest.can_generate or manifest.attention == "causal":
        checks.append("leak probe: in AutoModelForCausalLM no token sees its future")
    if manifest.can_embed and manifest.stock_tools_embed and "sentence-transformers" in manifest.versions:
        sees = "every token sees its future" if manifest.attention == "bidirectional" else "no token sees its future"
        checks.append(f"leak probe: in sentence-transformers {sees}")
        checks.append("sentence-transformers and unified_lm give the same vectors to 1e-5, for every prompt")
    return checks


def _missing(
    record: Mapping[str, Any] | None,
    held_out: HeldOutTable | None,
    cost: Cost | None,
    export: Export | None,
    tables: Sequence[ResultTable],
) -> list[str]:
    found = []
    if record is None:
        found.append(
            f"No {RECORD_NAME}: the run is older than that file. Rejected and truncated rows, machine and code version are "
            "not known; sources are those of the export's manifest."
        )
    if held_out is None:
        found.append("The run measured nothing on held-out data (validation.sources, validation.retrieval).")
    elif not held_out.has_items:
        found.append(
            f"The run kept no scores by item ({ITEMS_FOLDER}/step-N.json), so its held-out numbers have no confidence interval."
        )
    if cost is None:
        found.append("No step was measured.")
    if export is None:
        found.append("The run has no export.")
    if not tables:
        found.append("The run folder contains no evaluation results (evaluation/*.json, mteb/results).")
    found.append("Energy was not measured.")
    return found
