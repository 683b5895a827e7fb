"""Checks of single values. Each yields one sentence with the key where the value is wrong, and nothing where it is right."""

from __future__ import annotations

import math
from collections.abc import Iterator

from unified_lm.core.errors import did_you_mean


def choice(path: str, value: str, known: tuple[str, ...], *, open_ended: bool = False) -> Iterator[str]:
    """A value that is none of the known ones (or, if `open_ended`, no dotted path either)."""
    if value not in known and not (open_ended and "." in value):
        yield f"{path}: unknown value '{value}'.{did_you_mean(value, known)}"


def at_least(path: str, value: float, least: float) -> Iterator[str]:
    """A number below `least`, or not finite."""
    if not (value >= least and math.isfinite(value)):
        yield f"{path}: got {value}, expected at least {least}."


def above(path: str, value: float, bound: float) -> Iterator[str]:
    """A number that is not above `bound`, or not finite."""
    if not (value > bound and math.isfinite(value)):
        yield f"{path}: got {value}, expected more than {bound}."


def at_most(path: str, value: float, most: float) -> Iterator[str]:
    """A number above `most`."""
    if value > most:
        yield f"{path}: got {value}, expected at most {most}."


def fraction(path: str, value: float) -> Iterator[str]:
    """A number outside [0, 1)."""
    if not 0 <= value < 1:
        yield f"{path}: got {value}, expected a share from 0 to below 1."
