"""Every name that the glossary puts in code type exists."""

import re
from functools import cache

from tests.docs.pages import DOCS, ROOT


@cache
def sources() -> str:
    """All that may define a name: the package, recipes and groups."""
    files = [path for suffix in ("py", "yaml") for path in ROOT.rglob(f"unified_lm/**/*.{suffix}")]
    files += [*ROOT.glob("recipes/*.yaml"), *ROOT.glob("configs/**/*.yaml")]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def exists(term: str) -> bool:
    """Whether a term is a file or folder, a dotted module, or a name in the code (`Class.attribute`: both are)."""
    term = term.rstrip("/")
    if (ROOT / term).exists() or (ROOT / term.replace(".", "/")).is_dir() or (ROOT / f"{term.replace('.', '/')}.py").is_file():
        return True
    if re.search(rf"(?<![\w.]){re.escape(term)}(?!\w)", sources()):
        return True
    return "." in term and all(re.search(rf"\b{re.escape(part)}\b", sources()) for part in term.split("."))


def test_terms_exist() -> None:
    terms = set(re.findall(r"`([^`]+)`", (DOCS / "glossary.md").read_text(encoding="utf-8")))
    assert len(terms) > 60
    assert not sorted(term for term in terms if not exists(term))


def test_unknown_terms_are_found() -> None:
    assert exists("Sample.group")
    assert not exists("Sample.place_in_group")
    assert not exists("GradCashStep")


def test_every_room_of_the_package_is_in_the_picture() -> None:
    picture = (DOCS / "images" / "architecture.svg").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "unified_lm").glob("*/__init__.py")}
    assert rooms == set(re.findall(r'<text class="name" x="\d+" y="\d+">(\w+)</text>', picture))
