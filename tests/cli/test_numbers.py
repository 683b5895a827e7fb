"""Numbers that mean nothing are refused: in every numeric option of every command, and in every numeric setting."""

import argparse
import dataclasses
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from tests.cli.all_commands import commands, parser_of
from unified_lm.cli.arguments import finite, from_zero, positive, whole
from unified_lm.composition.convert import convert
from unified_lm.config import schema
from unified_lm.core.errors import ConfigError
from unified_lm.data.formats import FORMATS
from unified_lm.inference.generation import generation_settings
from unified_lm.inference.search import best_hits
from unified_lm.mining.negatives import MiningConfig
from unified_lm.mining.overlap import OverlapConfig
from unified_lm.objectives import OBJECTIVES

WORDS = ("nan", "inf", "-inf", "-1", "1e999", "x", "")


@pytest.mark.parametrize("name", commands())
def test_numeric_options_take_numbers_that_mean_something(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "eval words":
        pytest.importorskip("seqeval")
    parser = parser_of(commands()[name], monkeypatch)
    for action in parser._actions:
        assert action.type not in (int, float), f"{action.option_strings}: takes nan or a negative number"
        if action.type in (positive, whole, finite, from_zero):
            assert callable(action.type)
            for word in WORDS[: 3 if action.type is finite else None]:
                with pytest.raises(argparse.ArgumentTypeError):
                    action.type(word)


def test_some_options_were_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {a.type for name in ("search", "generate", "data mine") for a in parser_of(commands()[name], monkeypatch)._actions}
    assert {positive, whole, finite, from_zero} <= kinds


def configs() -> list[type]:
    """Every dataclass of the schema, and of every format and objective."""
    bases = (schema.StreamConfig, schema.ObjectiveConfig)  # of formats and objectives, which have their fields
    own = [getattr(schema, name) for name in schema.__all__]
    return [*(cls for cls in own if cls not in bases), *FORMATS.values(), *OBJECTIVES.values()]


def numeric(kind: Any) -> Iterator[type]:
    """The numeric types in an annotation."""
    if kind is float:
        yield kind
    elif get_origin(kind) in (Union, UnionType, tuple, dict):
        for inner in get_args(kind):
            yield from numeric(inner)


def fields() -> list[tuple[type, str]]:
    return [
        (cls, field.name)
        for cls in configs()
        for field in dataclasses.fields(cls)
        if any(numeric(get_type_hints(cls)[field.name]))
    ]


UNUSABLE = [float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 3.5e38, 1e-308, -1e-39, 10**400]
"""Not finite, or so in the float32 that training computes with, or 0 in it."""


@pytest.mark.parametrize("value", UNUSABLE, ids=lambda value: str(value)[:9])
@pytest.mark.parametrize(("cls", "name"), fields(), ids=lambda item: getattr(item, "__name__", item))
def test_settings_are_finite(cls: type, name: str, value: float) -> None:
    kind = get_type_hints(cls)[name]
    size = len(get_args(kind)) if get_origin(kind) is tuple and Ellipsis not in get_args(kind) else 1
    given: Any = [value] * size if get_origin(kind) is tuple else value
    base = next(
        (
            base
            for base, table in ((schema.StreamConfig, FORMATS), (schema.ObjectiveConfig, OBJECTIVES))
            if cls in table.values()
        ),
        cls,
    )
    selected = {base.selector: getattr(cls, base.selector)} if base is not cls else {}
    _, problems = convert(base, {**selected, name: given})
    assert any(problem.startswith(name) and "expected a finite number" in problem for problem in problems), problems


@pytest.mark.parametrize("value", [0.0, 1e30, 1e-30, -1e-30, 3.4e38, 1.2e-38])
def test_what_32_bits_hold_is_a_number(value: float) -> None:
    made, problems = convert(schema.OptimConfig, {"weight_decay": value})
    assert (made.weight_decay, problems) == (value, [])


def test_the_schema_has_such_fields() -> None:
    names = {name for _, name in fields()}
    assert {"learning_rate", "weight_decay", "betas", "weight", "temperature", "timeout_minutes", "dropout"} <= names


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("cls", [MiningConfig, OverlapConfig])
def test_settings_of_the_data_tools_are_finite(cls: type, value: float) -> None:
    for field in dataclasses.fields(cls):
        if any(numeric(get_type_hints(cls)[field.name])):
            with pytest.raises(ConfigError):
                cls(**{field.name: value})


def test_python_callers_are_refused_too() -> None:
    with pytest.raises(ConfigError, match="k: got -1"):
        best_hits(np.zeros((1, 3)), -1)
    template: Any = None
    good = {"max_new_tokens": 1, "temperature": 0.0, "top_p": 1.0}
    for change in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            generation_settings(template, template, None, **{**good, **change})  # type: ignore[arg-type]
