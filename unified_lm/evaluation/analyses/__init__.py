"""Analyses from the papers, for any model: numbers as JSON, and one figure that compares all models."""

from __future__ import annotations

from collections.abc import Mapping

from unified_lm.evaluation.analyses.anisotropy import ANISOTROPY
from unified_lm.evaluation.analyses.base import Analysis, AnalysisSettings
from unified_lm.evaluation.analyses.future import FUTURE
from unified_lm.evaluation.analyses.layers import LAYERS
from unified_lm.evaluation.analyses.norms import NORMS
from unified_lm.evaluation.analyses.standardize import STANDARDIZE
from unified_lm.evaluation.analyses.uniformity import UNIFORMITY

ANALYSES: Mapping[str, Analysis] = {a.name: a for a in (FUTURE, LAYERS, ANISOTROPY, UNIFORMITY, NORMS, STANDARDIZE)}
"""Name -> analysis."""

__all__ = ["ANALYSES", "Analysis", "AnalysisSettings"]
