"""What an mteb evaluation yields and what its results are filed under. Free of mteb, so that it imports where mteb does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The result of one task.

    Attributes:
        name: name of the task.
        type: mteb's task type.
        metric: name of the main score.
        score: the main score, averaged over splits and subsets.
        seconds: duration including loading; for a `resumed` task, that of the run that computed it.
        resumed: whether an earlier run had already finished the task.
        path: mteb's result file.
    """

    name: str
    type: str
    metric: str
    score: float
    seconds: float
    resumed: bool
    path: Path


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """The name under which mteb files results.

    Attributes:
        name: "organization/model".
        revision: hash of the model's content.
        settings: whatever differs from the model's own defaults (instructions, attention...); results of different settings
            are kept apart.
    """

    name: str
    revision: str
    settings: Mapping[str, str]
