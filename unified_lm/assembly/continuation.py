"""What a resume compares: the settings of the run that wrote the checkpoint, and those of now (`config.continuation`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unified_lm.checkpoint.state import saved_settings
from unified_lm.checkpoint.store import find_checkpoint
from unified_lm.composition.convert import convert
from unified_lm.composition.flat import flatten
from unified_lm.composition.locate import RESOLVED_NAME, read_yaml
from unified_lm.config.continuation import Change, change_of
from unified_lm.config.schema import RunConfig
from unified_lm.core.errors import CheckpointError
from unified_lm.engine.schedule import learning_rate

_SHOWN = 12


def earlier_settings(config: RunConfig, run_dir: Path) -> RunConfig | None:
    """The settings of the run that wrote the checkpoint to resume; None without one, or where nothing kept them.

    Raises:
        CheckpointError: `config.resume` names no complete checkpoint, or its settings cannot be read.
    """
    copies = config.checkpoint.copy_to
    path = find_checkpoint(config.resume, run_dir / "checkpoints", Path(copies) if copies else None).path
    if path is None:
        return None
    saved = saved_settings(path)
    beside = path.resolve().parents[1] / RESOLVED_NAME
    if saved is None:  # written before checkpoints kept them; copies may have no run beside them
        if not beside.is_file():
            return None
        saved = read_yaml(beside)
    earlier, problems = convert(RunConfig, saved)
    if earlier is None:
        raise CheckpointError(f"checkpoint {path}: the settings of its run cannot be read: {'; '.join(problems)}.")
    assert isinstance(earlier, RunConfig)
    return earlier


def check_continuation(earlier: RunConfig, config: RunConfig) -> list[str]:
    """Compare the settings of a checkpoint's run with those of the run that goes on from it.

    Args:
        earlier: of the checkpoint's run.
        config: of this run, with what the machine decides filled in.

    Returns:
        Notices: what differs and may.

    Raises:
        CheckpointError: a setting differs that makes this another run; all of them are named.
    """
    differences = list(_differences(earlier, config))
    refused = [text for key, text in differences if change_of(key) is Change.REFUSED]
    if refused:
        raise CheckpointError(
            f"the checkpoint belongs to another run. {_listed(refused)}. Undo the change, use another run_dir, or start a new "
            "run from the weights: `unified-lm export RUN`, then model.init_from=RUN."
        )
    reported = [text for key, text in differences if change_of(key) is Change.REPORTED]
    notices = [f"this run goes on with other settings. {_listed(reported)}."] if reported else []
    if earlier.max_steps != config.max_steps:
        notices += _schedule_notice(earlier, config)
    return notices


def _differences(earlier: RunConfig, config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, sentence) of every setting that differs; lists are compared as a whole."""
    before, now = flatten(earlier), flatten(config)
    for key in {**before, **now}:
        there, here = before.get(key), now.get(key)
        if there != here:
            yield key, f"{key}: the checkpoint has {_show(there)}, this run {_show(here)}"


def _schedule_notice(earlier: RunConfig, config: RunConfig) -> list[str]:
    """Say so where another last step bends the learning rate: a decay is over the steps really taken."""
    step = min(earlier.max_steps, config.max_steps) - 1
    there, here = (learning_rate(c.optim, step, c.max_steps) for c in (earlier, config))
    if there == here:
        return []
    return [
        f"with another max_steps the learning rate decays otherwise: at step {step + 1:,} it is {here:.3g}, and was "
        f"{there:.3g}; optim.horizon_steps keeps a schedule."
    ]


def _listed(texts: list[str]) -> str:
    more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + more


def _show(value: Any) -> str:
    if isinstance(value, str):
        return repr(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
