"""The composition root: the only place that sees every layer."""

from unified_lm.assembly.build import Run, build_run
from unified_lm.assembly.publish import export_run
from unified_lm.assembly.stages import run_chain, run_stage, train

__all__ = ["Run", "build_run", "export_run", "run_chain", "run_stage", "train"]
