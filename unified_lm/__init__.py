"""unified_lm: one engine fine-tunes any decoder-only language model to embed and to generate."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unified_lm.assembly.session import training_session
    from unified_lm.assembly.stages import build_run, export_run, fit_run
    from unified_lm.composition.compose import compose
    from unified_lm.inference import UnifiedLM

__version__ = "0.1.0"
__all__ = ["UnifiedLM", "__version__", "build_run", "compose", "export_run", "fit_run", "training_session"]

_HOMES = {
    "UnifiedLM": "unified_lm.inference",
    "build_run": "unified_lm.assembly.stages",
    "compose": "unified_lm.composition.compose",
    "export_run": "unified_lm.assembly.stages",
    "fit_run": "unified_lm.assembly.stages",
    "training_session": "unified_lm.assembly.session",
}
"""Where each public name is defined. (`export_run`, not `export`: that name is the package `unified_lm.export`.)"""


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: the command line must not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'unified_lm' has no attribute '{name}'")


def __dir__() -> list[str]:
    """The public names too, for completion and `help`."""
    return sorted({*globals(), *__all__})
