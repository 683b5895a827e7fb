"""Docstring cleaning, and the built-in data set: size, splits that share no text, determinism."""

import json
import shutil
from pathlib import Path

import pytest

from unified_lm.config.schema import SourceConfig
from unified_lm.core.errors import DataError
from unified_lm.data.pydocs import dataset as pydocs
from unified_lm.data.pydocs.docstrings import Docstring, clean, extract
from unified_lm.data.rows.records import ChatRecord, PairRecord, RecordKind, TextRecord
from unified_lm.data.sources import RecordSource, open_source

SOURCE = b'''
"""Shapes and what to do with them."""
def area(self, width: float, height: float = 1.0, *, unit: str = "m") -> float:
    """Compute the area
    of a rectangle.

    Uses :func:`~shapes.multiply` and ``width``.

    .. versionadded:: 1.2
       Not prose.

    .. note:: Negative sides are refused.

    Parameters
    ----------
    width : float
        One side.

    Examples
    --------
    >>> area(1, 2)
    2

    Any prose here belongs to the examples.
    """
def _hidden():
    """This one is private and is left out."""
class Shape:
    """A shape with a name."""
    def name(self):
        """Return the name of the shape."""
add_docstr(torch.abs, r"""
abs(input, *, out=None) -> Tensor

Computes the absolute value of each element in :attr:`input`.

Args:
    {input}

Example::

    >>> torch.abs(torch.tensor([-1]))
""".format(**common))
'''


def test_extract() -> None:
    found = {document.name: document for document in extract(SOURCE, "pkg._private.shapes")}
    assert list(found) == ["pkg.shapes", "pkg.shapes.area", "pkg.shapes.Shape", "pkg.shapes.Shape.name", "torch.abs"]
    area = found["pkg.shapes.area"]
    assert area.signature == "(width, height=1.0, *, unit='m')"
    assert area.summary == "Compute the area of a rectangle."
    assert area.paragraphs == (
        "Uses multiply and width.",
        "Negative sides are refused.",
        "Parameters: width : float One side.",
    )
    assert area.prose == area.paragraphs[:2]
    assert found["torch.abs"].signature == "(input, *, out=None) -> Tensor"
    assert found["torch.abs"].summary == "Computes the absolute value of each element in input."
    assert list(extract(b"def broken(:", "m")) == []


def test_clean_drops_code() -> None:
    assert clean("See::\n\n    x = 1\n\nAfter.\n\n```python\ny = 2\n```\n\nEnd.") == ["See:", "After.", "End."]
    assert clean("+---+---+\n| a | b |\n+---+---+") == []


def test_distinct_drops_near_duplicates() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    first = Docstring("a.f", "", "Compute the first of them.", (words,))
    near = Docstring("a.g", "", "Compute the second of them.", (words,))
    far = Docstring("a.h", "", "Something else about other matters.", ("an entirely different text",))
    same_summary = Docstring("a.i", "", "Compute the first of them!", ("yet other words about it",))
    assert pydocs.distinct([first, near, far, same_summary]) == [first, far]


def test_bounded_cuts_after_a_sentence_or_a_word() -> None:
    assert pydocs.bounded("One two. Three four five.", 100) == "One two. Three four five."
    assert pydocs.bounded("One two three. Four five.", 20) == "One two three."
    assert pydocs.bounded("One two three four five", 12) == "One two"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The real thing over two packages: enough to see every rule, in a second or two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIFIED_LM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(pydocs, "PACKAGES", ("numpy", "peft", "not_installed_anywhere"))
        patch.setattr(pydocs, "_root", lambda package, root=pydocs._root: None if package == "python" else root(package))
        yield pydocs.build()


@pytest.fixture
def small_build(built: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Found again by each test in spite of the cache of its own that it has."""
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(built.parents[1]))
    return built


def opened(part: str | None, kind: RecordKind, split: str = "train") -> RecordSource:
    return open_source(SourceConfig(builtin="pydocs", subset=part, split=split), kind, 0)


def test_every_part_opens_as_records(small_build: Path) -> None:
    pairs = opened(None, RecordKind.PAIR)
    assert pairs.name == "pydocs/pairs/train"
    assert len(pairs) > 400
    for record in pairs:
        assert isinstance(record, PairRecord)
        assert record.query.instruction == pydocs.INSTRUCTION
        document = record.positives[0].text
        assert record.query.text not in document
        assert ">>>" not in document
        assert len(document) <= pydocs.MAX_DOCUMENT_CHARACTERS
    chat = opened(None, RecordKind.CHAT)[0]
    assert isinstance(chat, ChatRecord)
    assert chat.turns[0][1].startswith("What does ")
    assert max(len(record.turns[1][1]) for record in opened("chats", RecordKind.CHAT)) <= pydocs.MAX_ANSWER_CHARACTERS  # type: ignore[union-attr]
    assert len(opened(None, RecordKind.TEXT)) > len(pairs)
    assert all(isinstance(record, TextRecord) for record in opened("sentences", RecordKind.TEXT))


def test_splits_share_nothing(small_build: Path) -> None:
    def all_rows(part: str, split: str) -> set[str]:
        return set((small_build / f"{part}-{split}.jsonl").read_text(encoding="utf-8").splitlines())

    for part in pydocs.PARTS:
        train, test = all_rows(part, "train"), all_rows(part, "test")
        assert not train & test
        assert 0.05 < len(test) / len(train | test) < 0.16
    # A held-out object is held out everywhere: its summary opens no training text.
    queries = {record.query.text for record in opened("pairs", RecordKind.PAIR, "test")}  # type: ignore[union-attr]
    openings = {record.text.split("\n")[0] for record in opened("text", RecordKind.TEXT)}  # type: ignore[union-attr]
    sentences = {record.text for record in opened("sentences", RecordKind.TEXT)}  # type: ignore[union-attr]
    assert not queries & openings
    assert not queries & sentences


def test_build_is_deterministic_and_says_what_is_missing(
    small_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path))
    again = pydocs.build()
    assert again != small_build
    assert again.name == small_build.name
    for file in sorted(small_build.glob("*.jsonl")):
        assert file.read_bytes() == (again / file.name).read_bytes()
    metadata = json.loads((again / "metadata.json").read_text())
    assert metadata["versions"]["not_installed_anywhere"] == ""
    assert metadata["rows"]["pairs-train.jsonl"] > 400
    assert pydocs._key(metadata["versions"]) == again.name
    assert pydocs._key({**metadata["versions"], "not_installed_anywhere": "1.0"}) != again.name


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("pairs", RecordKind.PAIR),
        ("hard_pairs", RecordKind.PAIR),
        ("hard_pairs/numpy", RecordKind.PAIR),
        ("preferences", RecordKind.PREFERENCE),
        ("grounded", RecordKind.GROUNDED),
    ],
)
def test_an_emptied_file_of_the_cache_is_made_again(
    part: str, kind: RecordKind, small_build: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every folder that is derived from another one, too."""
    shutil.copytree(small_build.parents[1], own_cache)
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(own_cache))
    before = list(opened(part, kind))
    pydocs.pydocs_file(part, "train", kind)[1].write_text("")
    with pytest.warns(
        UserWarning, match=rf"the cache of pydocs.*, {own_cache}.* is damaged \(.*\.jsonl is not what was written"
    ):
        assert list(opened(part, kind)) == before


@pytest.mark.parametrize(
    ("subset", "split", "kind", "message"),
    [
        ("pair", "train", RecordKind.PAIR, r"pydocs has no subset 'pair'\. Did you mean 'pairs'\?"),
        (None, "validation", RecordKind.PAIR, r"pydocs has no split 'validation'\. Known: test, train\."),
        ("chats", "train", RecordKind.PAIR, r"subset 'chats' holds chat rows, the format wants pair rows: pairs\."),
        ("preferences", "train", RecordKind.CHAT, r"holds preference rows, the format wants chat rows\."),
    ],
)
def test_wrong_requests(subset: str | None, split: str, kind: RecordKind, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(subset, kind, split)


@pytest.mark.slow
def test_whole_build_has_more_than_3000_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads every package: half a minute."""
    monkeypatch.setenv("UNIFIED_LM_CACHE", str(tmp_path))
    assert len(opened("pairs", RecordKind.PAIR)) > 3000
    assert len(opened("pairs", RecordKind.PAIR, "test")) >= 300
