"""Which code a run used."""

from __future__ import annotations

import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_DEPENDENCIES = ("torch", "transformers", "peft", "deepspeed")


@cache
def code_version() -> dict[str, str]:
    """Versions of this package, of Python and of the numeric libraries, and the git commit if this is a checkout.

    Returns:
        Values by name. Packages that are not installed are absent. "+changes" after the commit: tracked files differ from it.
    """
    package = sys.modules[__name__.partition(".")[0]]  # looked up, not imported: `core` must not import the package above it
    found = {"unified_lm": str(package.__version__), "python": platform.python_version()}
    for name in _DEPENDENCIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = _commit()
    return found | ({"commit": commit} if commit else {})


def _commit() -> str | None:
    """The commit of the checkout that contains this package; None for an installed package, or without git."""
    if not (_ROOT / ".git").exists():
        return None
    head = _git("rev-parse", "HEAD")
    return head and head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
