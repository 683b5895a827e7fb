"""`train.py`, the program that stands outside the package, as a function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def train(argv: Sequence[str]) -> Path:
    """Compose `key=value` arguments, build, fit and export what they ask for: the `main` of `train.py`.

    A run that a signal stops (see `assembly.stages.fit_run`) returns like one that is finished; its export is not written.

    Returns:
        The folder of the run (`Session.run_dir`).
    """
    run_dir: Path = _script().main(argv)
    return run_dir


@cache
def _script() -> ModuleType:
    """`train.py`: beside the package in a checkout, and as `_train.py` inside an installed wheel.

    It belongs to the package's program, but stands outside, where a reader looks first and torchrun finds it.
    """
    package = Path(__file__).resolve().parents[1]
    installed = package / "_train.py"
    spec = spec_from_file_location("unified_lm._train", installed if installed.is_file() else package.parent / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
