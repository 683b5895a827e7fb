"""Every name that the glossary puts in code type exists."""

import importlib
import re
from functools import cache

from tests.docs.pages import DOCS, ROOT


@cache
def sources() -> str:
    """All that may define a name: the package, recipes and groups."""
    files = [path for suffix in ("py", "yaml") for path in ROOT.rglob(f"unified_lm/**/*.{suffix}")]
    files += [*ROOT.glob("recipes/*.yaml"), *ROOT.glob("configs/**/*.yaml")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def has_attribute(name: str, attribute: str) -> bool:
    """Whether a class of the package, wherever it is defined, has or declares an attribute."""
    defines = re.compile(rf"^class {name}\b", re.MULTILINE)
    files = [path for path in ROOT.rglob("unified_lm/**/*.py") if defines.search(path.read_text(encoding="utf-8"))]
    modules = [importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in files]
    classes = [getattr(module, name) for module in modules]
    declared = {key for found in classes for parent in found.__mro__ for key in vars(parent).get("__annotations__", {})}
    return attribute in declared or any(hasattr(found, attribute) for found in classes)


def exists(term: str) -> bool:
    """Whether a term is a file or folder, a dotted module, a `Class.attribute`, or a name in the code."""
    term = term.rstrip("/")
    if (ROOT / term).exists() or (ROOT / term.replace(".", "/")).is_dir() or (ROOT / f"{term.replace('.', '/')}.py").is_file():
        return True
    if found := re.fullmatch(r"([A-Z]\w*)\.(\w+)", term):
        return has_attribute(*found.groups())
    return re.search(rf"(?<![\w.]){re.escape(term)}(?!\w)", sources()) is not None


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
