"""Every name that the glossary puts in code type exists."""

import importlib
import re
from functools import cache
from pathlib import Path

from tests.docs.pages import DOCS, ROOT


@cache
def files() -> dict[Path, str]:
    """The text of every file that may define a name: the package, recipes and groups."""
    found = [path for folder in ("unified_lm", "recipes", "configs") for path in (ROOT / folder).rglob("*.*")]
    return {path: path.read_text(encoding="utf-8") for path in found if path.suffix in (".py", ".yaml")}


@cache
def sources() -> str:
    return "\n".join(files().values())


def has_attribute(name: str, attribute: str) -> bool:
    """Whether a class of the package, wherever it is defined, has or declares an attribute."""
    defines = re.compile(rf"^class {name}\b", re.MULTILINE)
    found = [
        path for path, text in files().items() if path.suffix == ".py" and f"class {name}" in text and defines.search(text)
    ]
    modules = [importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in found]
    classes = [getattr(module, name) for module in modules]
    declared = {key for each in classes for parent in each.__mro__ for key in vars(parent).get("__annotations__", {})}
    return attribute in declared or any(hasattr(each, attribute) for each in classes)


def exists(term: str) -> bool:
    """Whether a term is a file or folder, a dotted module, a `Class.attribute`, or a name in the code."""
    term = term.rstrip("/")
    if (ROOT / term).exists() or (ROOT / term.replace(".", "/")).is_dir() or (ROOT / f"{term.replace('.', '/')}.py").is_file():
        return True
    if found := re.fullmatch(r"([A-Z]\w*)\.(\w+)", term):
        return has_attribute(*found.groups())
    # The lookbehind alone is tried at every character of two million; where the term stands is found at once.
    whole = re.compile(rf"(?<![\w.]){re.escape(term)}(?!\w)")
    return any(whole.match(sources(), place.start()) for place in re.finditer(re.escape(term), sources()))


def test_terms_exist() -> None:
    terms = set(re.findall(r"`([^`]+)`", (DOCS / "glossary.md").read_text(encoding="utf-8")))
    assert len(terms) > 60
    assert not sorted(term for term in terms if not exists(term))


def test_unknown_terms_are_found() -> None:
    assert exists("Sample.group")
    assert exists("Sample.is_control")
    assert exists("AttentionMode.SPAN")
    assert not exists("Sample.control"), "both words are in the code, but a sample has no such attribute"
    assert not exists("Sample.place_in_group")
    assert not exists("GradCashStep")


def test_every_room_of_the_package_is_in_the_picture() -> None:
    picture = (DOCS / "images" / "architecture.svg").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "unified_lm").glob("*/__init__.py")}
    assert rooms == set(re.findall(r'<text class="name" x="\d+" y="\d+">(\w+)</text>', picture))
