"""The file of an ablation: a base recipe, and the arms that vary it. Pure values; composing them is `composition.compose`'s.

```yaml
ablation:
  base:                       # recipes that can be varied, each with its own arguments; the first is the default
    grit_smollm2_short: []
    grit_mistral7b: [max_steps=1253]
  overrides: [export.enabled=false]               # of every arm
  arms: {token: [], sample: [streams.generation.objective.normalization=sample]}
  grid:                       # or axes: one arm for every combination, named VALUE-VALUE
    attention: {causal: [streams.embedding.attention=causal], bidirectional: []}
    pooling: {mean: [], last: [model.pooling=last_token]}
  exclude: [causal-mean]      # combinations of the grid that are no arm
  default: [token, sample]    # arms that run when none are chosen; all of them if left out
  seeds: [42]
```
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unified_lm.composition.convert import schema_keys
from unified_lm.core.errors import did_you_mean
from unified_lm.core.typed import show_briefly

KEY = "ablation"
"""The key that makes a recipe an ablation."""
ALL_ARMS = "all"
_KEYS = ("base", "overrides", "arms", "grid", "exclude", "default", "seeds")
_LISTED = {"exclude": "names of arms", "default": "names of arms"}
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True)
class AblationPlan:
    """What an ablation's file says.

    Attributes:
        bases: arguments by base recipe; the first base is the default.
        overrides: arguments of every arm.
        arms: arguments by arm, in order.
        default: names of the arms that run when none are chosen.
        seeds: one run of each arm for every seed.
    """

    bases: Mapping[str, tuple[str, ...]]
    overrides: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]
    default: tuple[str, ...]
    seeds: tuple[int, ...]

    def choose_arms(self, wanted: Any, problems: list[str]) -> tuple[str, ...]:
        """The names of the arms to run: None takes the default ones, "all" all, a name or a list of names these."""
        if wanted is None:
            return self.default
        if wanted == ALL_ARMS:
            return tuple(self.arms)
        names = [str(name) for name in (wanted if isinstance(wanted, list) else [wanted])]
        problems.extend(
            f"arms: unknown arm '{n}'.{did_you_mean(n, [*self.arms, ALL_ARMS])}" for n in names if n not in self.arms
        )
        if not names:
            problems.append(f"arms: is empty; choose some of {', '.join(self.arms)}.")
        return tuple(dict.fromkeys(name for name in names if name in self.arms))

    def choose_base(self, wanted: Any, problems: list[str]) -> str:
        """The base recipe; one that the file does not list is taken without arguments of its own."""
        if wanted is None:
            return next(iter(self.bases))
        if not isinstance(wanted, str):
            problems.append(f"base: got {show_briefly(wanted)}, expected the name of a recipe.")
            return next(iter(self.bases))
        return wanted

    def choose_seeds(self, wanted: Any, problems: list[str]) -> tuple[int, ...]:
        """The seeds: None takes the file's, a number or a list of numbers these."""
        if wanted is None:
            return self.seeds
        return _seeds(wanted, problems)


def read_plan(name: str, raw: Mapping[str, Any], problems: list[str]) -> AblationPlan:
    """Read the values of an ablation's file; `problems` takes what is wrong with them."""
    problems.extend(f"unknown key '{key}' in the ablation {name}." for key in raw if key not in (KEY, "description"))
    plan = raw[KEY]
    if not isinstance(plan, Mapping):
        problems.append(f"{name}: '{KEY}' holds {show_briefly(plan)}, expected {', '.join(_KEYS)}.")
        return AblationPlan({"": ()}, (), {}, (), ())
    for key in plan:
        if key not in _KEYS:
            problems.append(f"unknown key '{KEY}.{key}' in {name}.{did_you_mean(str(key), _KEYS)}")
    bases = _named(f"{name}: {KEY}.base", plan.get("base"), problems)
    arms = _named(f"{name}: {KEY}.arms", plan.get("arms") or {}, problems)
    exclude = _arguments(f"{name}: {KEY}.exclude", plan.get("exclude") or [], problems)
    arms |= _cross(name, plan.get("grid") or {}, exclude, problems)
    problems.extend(
        f"{name}: arm '{arm}' is not a folder's name ({_NAME.pattern})." for arm in arms if not _NAME.fullmatch(arm)
    )
    problems.extend(
        f"{name}: arm '{arm}' is named like a part of the configuration: {arm}.key=value on the command line could mean "
        "either. Choose another name."
        for arm in arms
        if arm in _sections()
    )
    if not bases or not arms:
        problems.append(f"{name}: {KEY} needs a base and at least one arm.")
    default = _arguments(f"{name}: {KEY}.default", plan.get("default") or list(arms), problems)
    problems.extend(
        f"{name}: {KEY}.default names '{a}', which is no arm.{did_you_mean(a, arms)}" for a in default if a not in arms
    )
    overrides = _arguments(f"{name}: {KEY}.overrides", plan.get("overrides") or [], problems)
    default = tuple(arm for arm in default if arm in arms)
    return AblationPlan(bases or {"": ()}, overrides, arms, default, _seeds(plan.get("seeds", [42]), problems))


def _sections() -> frozenset[str]:
    """What `NAME.key=value` sets in a run; `data` is there until a recipe is resolved."""
    return frozenset({"data", *(key.partition(".")[0] for key in schema_keys() if "." in key)})


def _cross(name: str, grid: Any, exclude: Sequence[str], problems: list[str]) -> dict[str, tuple[str, ...]]:
    """One arm for every combination of the axes' values, but for the excluded ones."""
    if not isinstance(grid, Mapping):
        problems.append(f"{name}: {KEY}.grid: got {show_briefly(grid)}, expected axes with their named values.")
        return {}
    if not grid:
        return {}
    axes = [_named(f"{name}: {KEY}.grid.{axis}", values, problems) for axis, values in grid.items()]
    arms = {
        "-".join(combination): tuple(itertools.chain.from_iterable(a[v] for a, v in zip(axes, combination, strict=True)))
        for combination in itertools.product(*axes)
    }
    problems.extend(f"{name}: {KEY}.exclude names '{e}', which the grid has not." for e in exclude if e not in arms)
    return {arm: arguments for arm, arguments in arms.items() if arm not in exclude}


def _named(path: str, value: Any, problems: list[str]) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, Mapping):
        problems.append(f"{path}: got {show_briefly(value)}, expected names with their lists of arguments.")
        return {}
    return {str(name): _arguments(f"{path}.{name}", arguments or [], problems) for name, arguments in value.items()}


def _arguments(path: str, value: Any, problems: list[str]) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        problems.append(
            f"{path}: got {show_briefly(value)}, expected a list of {_LISTED.get(path.rpartition('.')[2], 'arguments')}."
        )
        return ()
    return tuple(value)


def _seeds(value: Any, problems: list[str]) -> tuple[int, ...]:
    seeds = value if isinstance(value, list) else [value]
    if not seeds or not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        problems.append(f"seeds: got {show_briefly(value)}, expected whole numbers.")
        return ()
    return tuple(dict.fromkeys(seeds))
