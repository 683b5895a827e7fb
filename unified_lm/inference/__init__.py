"""Using a model: embed, search, generate."""

from unified_lm.inference.unified import Hit, UnifiedLM

__all__ = ["Hit", "UnifiedLM"]
