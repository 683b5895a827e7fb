"""How many cases a property is tried on: a few in the fast tests, `UNIFIED_LM_CASES` (10,000) in the slow ones.

The cases of a seed are always the same: nothing is drawn from the clock, and no earlier failures are stored.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from unified_lm.core.errors import UserError

SEED = int(os.environ.get("UNIFIED_LM_SEED", "0"))
MANY = int(os.environ.get("UNIFIED_LM_CASES", "10000"))

Case = dict[str, Any]


def run_cases(strategy: st.SearchStrategy[Case], check: Callable[[Case], None], num: int) -> None:
    """Check `num` cases that the seed decides; a failure is shrunk, and its case is the last that hypothesis prints."""

    @seed(SEED)
    @settings(
        max_examples=num,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def one_case(case: Case) -> None:
        check(case)

    one_case()


def require_text(error: UserError, *, naming: Sequence[str] = ("",)) -> None:
    """Check that a message says something, briefly, and names one of some things."""
    text = str(error)
    assert text.strip(), "an error without a text"
    assert any(name in text for name in naming), f"names none of {naming}: {text}"
    assert len(text) < 30_000, "a message of thousands of characters"


TEXTS = st.sampled_from(
    [
        *(
            "",
            " ",
            "a",
            "none",
            "null",
            "auto",
            "???",
            "nan",
            "1",
            "-1",
            "true",
            "a.b.c",
            "a/b/c",
            "x" * 300,
            "é ",
            "[",
            "{a: 1}",
        ),
        *("${data.pairs}", "${model}", "${model.name}", "${nothing.there}", "${oc.env:NO_SUCH_VARIABLE}", "${", "${a:b}", "$"),
        *(
            "~nobody_of_that_name/x",
            "~",
            ".",
            "..",
            "/",
            "no/such/file",
            "x" * 300,
            "y" * 5000,
            "a\0b",
            "torch.nn.Linear",
            "os.getcwd",
        ),
        *("\ud800", "a\nb", "\\", "'", '"', "#", "a: b", "- a", "*", "&a", "!!python/object:os.system"),
    ]
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 7, 10**30, -(10**30), 2**31, 2**63, 2**64, 0.0, 0.5, -0.5, 1e308, -1e308, 1e-308, 1e30])
ODD_NUMBERS = st.sampled_from([math.nan, math.inf, -math.inf])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, ODD_NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(TEXTS, st.sampled_from(["name", "path", "builtin", "format"])), inner, max_size=3),
    ),
    max_leaves=5,
)
"""What a setting, a row or an entry of a JSON file may hold by mistake."""


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of nested values with one of them replaced (without it where `new` is ...)."""
    if not path:
        return new
    head, *rest = path
    if isinstance(value, list):
        kept = [replaced(item, tuple(rest), new) if index == head else item for index, item in enumerate(value)]
        return [item for item in kept if item is not ...]
    if new is ... and not rest:
        return {key: item for key, item in value.items() if key != head}
    return {key: replaced(item, tuple(rest), new) if key == head else item for key, item in value.items()}


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of everything in nested values, sections and leaves."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([prefix] if prefix else []), *(path for key, item in inner for path in paths(item, (*prefix, key)))]


def mutated(value: Any, most: int = 2) -> st.SearchStrategy[Any]:
    """Nested values of which some have become something else, or are gone."""
    change = st.tuples(st.sampled_from(paths(value)), st.one_of(VALUES, st.just(...)))

    def apply(changes: list[tuple[tuple[Any, ...], Any]]) -> Any:
        result = value
        for path, new in changes:
            if path in paths(result):
                result = replaced(result, path, new)
        return result

    return st.lists(change, min_size=1, max_size=most).map(apply)


def to_json(value: Any) -> bytes:
    """JSON as Python writes it, NaN and half surrogates included."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
