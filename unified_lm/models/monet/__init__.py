"""MONET: mixtures of 262,144 monosemantic experts (Park et al. 2025, arXiv:2412.04139). Importing it registers the family."""

from unified_lm.models.monet.configuration import MonetConfig
from unified_lm.models.monet.modeling import MonetForCausalLM, MonetModel

__all__ = ["MonetConfig", "MonetForCausalLM", "MonetModel"]
