"""The configuration reference holds every key, with the sentence that stands under it."""

from dataclasses import dataclass, field

import pytest

from docs.generate_reference import Page, keys_of, pages, render
from unified_lm.config import schema


@dataclass(frozen=True, kw_only=True)
class Base:
    """What all have."""

    name: str
    """A name | with a bar."""
    weight: float = 1.0
    """Factor of
    the term."""


@dataclass(frozen=True, kw_only=True)
class Margin(Base):
    """A kind with a margin.

    More about it.
    """

    weight: float = 0.5
    margin: float = 0.2
    """Distance, in cosine."""
    dims: tuple[int, ...] = field(default_factory=lambda: (1, 2))
    """Dimensions."""


@dataclass(frozen=True)
class Silent:
    """A class with a field that nothing is said about."""

    key: int = 0


def test_keys_with_inherited_ones() -> None:
    keys = {key.name: key for key in keys_of(Margin)}
    assert list(keys) == ["name", "weight", "margin", "dims"]
    assert (keys["name"].default, keys["weight"].default, keys["dims"].default) == ("required", "0.5", "(1, 2)")
    assert keys["weight"].sentence == "Factor of the term."
    assert keys["name"].owner is Base
    assert keys["weight"].owner is Margin


def test_a_kind_lists_what_it_adds_to_its_base() -> None:
    page = Page("objective", "Objectives", "streams.NAME.objective.", (Base, Margin))
    text = render(page, [page])
    assert "`streams.NAME.objective.key=value`" in text
    assert "| `name` | `str` | required | A name \\| with a bar. |" in text
    assert text.index("## Margin") < text.index("| `margin` |")
    assert text.count("| `name` |") == 1
    assert text.count("| `weight` |") == 2
    assert "More about it." not in text


def test_a_field_without_a_sentence_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Silent\.key has no sentence under it"):
        keys_of(Silent)


def test_a_value_that_is_a_class_links_to_its_page() -> None:
    text = render(pages()[0], pages())
    assert "([Model](model.md))" in text
    assert "([Streams](stream.md))" in text


def test_every_class_of_settings_has_a_page() -> None:
    documented = {owner for page in pages() for owner in page.classes}
    composed_by_others = {schema.ChainConfig, schema.ArmConfig, schema.SweepConfig}  # no key of theirs is set by a user
    named = {value for name, value in vars(schema).items() if name.endswith("Config") and isinstance(value, type)}
    assert named - composed_by_others <= documented
    for page in pages():
        for owner in page.classes:
            assert all(f"| `{key.name}` |" in render(page, pages()) for key in keys_of(owner))
