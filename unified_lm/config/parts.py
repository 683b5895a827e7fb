"""Parts that are chosen by name: each kind carries the settings that it alone has, and the facts that others ask it for.

A stream's format and a stream's objective are parts. A part has two halves. Its *description* is a frozen dataclass without
torch: settings, checks of them, and facts (what it yields, which mode of an export it trains, what it costs). Its
*implementation* is a class that is made from the description. Everything but the implementation's own module asks the
description; nothing compares names. So a new part is one file and its line in a table, or, outside this package, one file and
its dotted path: a class whose attribute `Config` is its description.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from unified_lm.core.errors import ConfigError
from unified_lm.core.tables import resolve


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Base of descriptions.

    Attributes:
        selector: the field that names the kind ("format", "name").
        role: what the part is, for messages ("format", "objective").
        implementation: dotted path of the class that is made from this description. Empty where the description belongs to a
            class that names it as its `Config`: the path that the user wrote is then the implementation's.
        required: facts without a default, which every description must state.
    """

    selector: ClassVar[str]
    role: ClassVar[str]
    implementation: ClassVar[str] = ""
    required: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def description_problems(cls) -> Iterator[str]:
        """What is wrong with the description itself, one phrase each; its required facts are there."""
        yield from ()

    @property
    def kind_name(self) -> str:
        """The name, or the dotted path, that chose this kind."""
        return str(getattr(self, self.selector))


P = TypeVar("P", bound=PartConfig)


def find_description(name: str, table: Mapping[str, type[P]], base: type[P]) -> type[P]:
    """The description of a part.

    Args:
        name: a name of the table, or the dotted path of a class (or of a description itself).
        table: the built-in descriptions.
        base: what every description of this role extends.

    Raises:
        ConfigError: unknown name, a path that cannot be imported, or a class without a description.
    """
    found = resolve(name, table, base.role)
    description = found if isinstance(found, type) and issubclass(found, base) else getattr(found, "Config", None)
    if not (isinstance(description, type) and issubclass(description, base)):
        got = "no such attribute" if description is None else repr(description)
        raise ConfigError(
            f"'{name}' is no {base.role} that can be used: its class attribute `Config` must be a subclass of "
            f"{base.__module__}.{base.__name__} with its settings and facts; got {got}. "
            f"Extend a built-in {base.role} to inherit its `Config`, or see docs/extending.md."
        )
    if faults := list(_faults(description)):
        raise ConfigError(f"'{name}': its description {description.__qualname__} is incomplete: {'; '.join(faults)}.")
    return description


def _faults(description: type[PartConfig]) -> Iterator[str]:
    """What a description from outside lacks that others will ask for."""
    own = [name for name, kind in vars(description).get("__annotations__", {}).items() if "ClassVar" not in str(kind)]
    if own and "__dataclass_params__" not in vars(description):
        yield f"it is no dataclass, so {', '.join(own)} cannot be set; decorate it with @dataclass(frozen=True, kw_only=True)"
    missing = [fact for fact in description.required if not hasattr(description, fact)]
    if missing:
        yield f"it does not say {', '.join(missing)} (class variables; {description.__mro__[1].__qualname__} documents them)"
    else:
        yield from description.description_problems()


def find_implementation(config: PartConfig, table: Mapping[str, type[P]]) -> Any:
    """The class that is made from a description.

    Raises:
        ConfigError: the path cannot be imported, or names a description without an implementation.
    """
    found = resolve(config.kind_name, table, config.role)
    if not (isinstance(found, type) and issubclass(found, PartConfig)):
        return found
    if not found.implementation:
        raise ConfigError(
            f"'{config.kind_name}' is the description of a {config.role}, and says nothing of its implementation. "
            "Name the class that it describes instead."
        )
    return resolve(found.implementation, {}, config.role)


class RunFacts(Protocol):
    """What a part may ask of the run it belongs to, a `RunConfig`."""

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained instead of all weights."""

    @property
    def adapter_dropout(self) -> float:
        """Probability of dropping an input of the adapters; 0 without adapters."""

    @property
    def attention_dropout(self) -> float | None:
        """Probability of dropping attention weights; None where the checkpoint's own setting holds."""

    @property
    def token_budget(self) -> int:
        """The most tokens of a pack."""

    @property
    def pads(self) -> bool:
        """Whether the attention kernel pads samples, so that padding tokens reach the feed-forward layers."""


@dataclass(frozen=True)
class RehearsalSizes:
    """How small `model=tiny_random` makes things.

    Attributes:
        tokens: limit of every text. It raises as well as lowers: the tiny tokenizer knows little more than bytes.
        groups: groups or samples of a step.
        dimensions: of the tiny model's embeddings.
    """

    tokens: int = 256
    groups: int = 4
    dimensions: int = 64
