"""Use of a trained model: embed, search, generate."""

from unified_lm.inference.interop import EmbedBatch
from unified_lm.inference.search import Hit
from unified_lm.inference.unified import UnifiedLM

__all__ = ["EmbedBatch", "Hit", "UnifiedLM"]
