"""Analyses from the papers, for any model: numbers as JSON, and one figure that compares all models."""

from __future__ import annotations

from collections.abc import Mapping

from unified_lm.evaluation.analyses.anisotropy import ANISOTROPY
from unified_lm.evaluation.analyses.base import Analysis, AnalysisSettings
from unified_lm.evaluation.analyses.complementarity import COMPLEMENTARITY
from unified_lm.evaluation.analyses.future import FUTURE
from unified_lm.evaluation.analyses.layers import LAYERS
from unified_lm.evaluation.analyses.methods import METHODS
from unified_lm.evaluation.analyses.norms import NORMS
from unified_lm.evaluation.analyses.prompts import PROMPT_STABILITY
from unified_lm.evaluation.analyses.routing_layers import ROUTING_LAYERS
from unified_lm.evaluation.analyses.standardize import STANDARDIZE
from unified_lm.evaluation.analyses.uniformity import UNIFORMITY

_OF_STATES = (FUTURE, LAYERS, ANISOTROPY, UNIFORMITY, NORMS, STANDARDIZE)
_OF_ROUTING = (METHODS, COMPLEMENTARITY, PROMPT_STABILITY, ROUTING_LAYERS)

ANALYSES: Mapping[str, Analysis] = {analysis.name: analysis for analysis in (*_OF_STATES, *_OF_ROUTING)}
"""Name -> analysis."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "all": tuple(analysis.name for analysis in _OF_STATES),
    "moee": tuple(analysis.name for analysis in _OF_ROUTING),
}
"""Name of several analyses -> their names: those of any model, and those of a mixture of experts."""

__all__ = ["ANALYSES", "GROUPS", "Analysis", "AnalysisSettings"]
