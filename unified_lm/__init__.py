"""unified_lm: one engine fine-tunes any decoder-only language model to embed and to generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unified_lm.inference import UnifiedLM

__version__ = "0.1.0"
__all__ = ["UnifiedLM", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `UnifiedLM` when it is asked for: the command line must not wait for torch."""
    if name == "UnifiedLM":
        from unified_lm.inference import UnifiedLM

        return UnifiedLM
    raise AttributeError(f"module 'unified_lm' has no attribute '{name}'")
