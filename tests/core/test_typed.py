"""Plain values against annotations: what fits is converted, everything else is said at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from unified_lm.core.errors import DataError
from unified_lm.core.typed import FAILED, read_typed, require_typed


@dataclass(frozen=True)
class Inner:
    """A part."""

    size: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    """A whole."""

    inner: Inner
    scores: Mapping[str, float] = field(default_factory=dict)
    text: str | None = None
    others: tuple[Inner, ...] = ()
    either: str | Mapping[str, str] = ""


def test_what_fits_is_converted() -> None:
    value = {
        "inner": {"size": 3, "names": ["a"]},
        "scores": {"x": 1, "y": math.inf},
        "others": [{"size": 1}],
        "either": {"k": "v"},
    }
    found = require_typed(Outer, value, "here", DataError, fix="")
    assert found == Outer(Inner(3, ("a",)), {"x": 1.0, "y": math.inf}, None, (Inner(1),), {"k": "v"})
    assert isinstance(found.scores["x"], float)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (5, r"got 5 \(int\), expected an object"),
        ({}, r"missing field 'inner' \(keys and values\)"),
        ({"inner": {"size": True}}, r"inner\.size: got True \(bool\), expected a whole number"),
        ({"inner": {"size": 2**63}}, r"inner\.size: got a whole number of 19 digits"),
        ({"inner": {"size": 1, "names": "abc"}}, r"inner\.names: got 'abc' \(str\), expected a list of text"),
        ({"inner": {"size": 1, "nmaes": []}}, r"unknown field 'inner\.nmaes'. Did you mean 'names'"),
        ({"inner": {"size": 1}, "scores": {"x": "1"}}, r"scores\.x: got '1' \(str\), expected a number"),
        ({"inner": {"size": 1}, "others": [{"size": None}]}, r"others\.0\.size: got None \(null\)"),
        ({"inner": {"size": 1}, "text": "a\0b"}, "text: .*holds a NUL character"),
        ({"inner": {"size": 1}, "text": "\ud800"}, "text: .*half of a surrogate pair"),
        ({"inner": {"size": 1}, "either": 3}, r"either: got 3 \(int\), expected text or keys and values"),
    ],
)
def test_what_does_not_fit_is_said(value: object, told: str) -> None:
    with pytest.raises(DataError, match=rf"^here: .*{told}.* Mend it\.$"):
        require_typed(Outer, value, "here", DataError, fix="Mend it.")


def test_all_problems_are_listed_and_unknown_keys_may_be_allowed() -> None:
    problems: list[str] = []
    assert read_typed(Outer, {"inner": {"size": "1"}, "text": 2, "more": 3}, "", problems) is FAILED
    assert len(problems) == 3
    problems.clear()
    assert read_typed(Outer, {"inner": {"size": 1}, "more": 3}, "", problems, open_ended=True) == Outer(Inner(1))
    assert not problems
