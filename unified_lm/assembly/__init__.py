"""The composition root: the only place that sees every layer."""

from unified_lm.assembly.build import Run
from unified_lm.assembly.job import Job
from unified_lm.assembly.session import Session, training_session
from unified_lm.assembly.stages import build_run, export_run, fit_run

__all__ = ["Job", "Run", "Session", "build_run", "export_run", "fit_run", "training_session"]
