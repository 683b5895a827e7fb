"""A folder of the cache is what was written, or it is made again."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from unified_lm.core import cached_folder as module
from unified_lm.core import files
from unified_lm.core.cached_folder import LIST, cached_folder

CONTENT = {"rows.jsonl": "one\ntwo\n", "deeper/table.json": '{"rows": 2}', "empty": ""}


def fill(folder: Path) -> None:
    for name, text in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in CONTENT}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return cached_folder(tmp_path / "cache" / "v1.2", "rows", fill)


def opened(folder: Path) -> Path:
    return cached_folder(folder, "rows", fill)


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_text("" if path.stat().st_size else "x"),
    "removed": lambda path: path.unlink(),
    "longer": lambda path: path.write_text(path.read_text() + "\n3"),
    "flipped": lambda path: flip(path) if path.stat().st_size else path.write_text("x"),
    "another kind of file": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", CONTENT)
def test_every_damaged_file_is_found(name: str, damage: str, folder: Path) -> None:
    DAMAGE[damage](folder / name)
    with pytest.warns(UserWarning, match=rf"the cache of rows, .*v1\.2, is damaged \(.*{Path(name).name}.*it is made again"):
        assert content(opened(folder)) == CONTENT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert content(opened(folder)) == CONTENT


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"files": {}}', '{"files": {}, "list": 0}', '{"files": [], "list": 1}', "\ud800"]
)
def test_a_damaged_list_vouches_for_nothing(text: str, folder: Path) -> None:
    (folder / LIST).write_bytes(text.encode(errors="surrogatepass"))
    (folder / "rows.jsonl").write_text("")
    with pytest.warns(UserWarning, match="is damaged"):
        assert content(opened(folder)) == CONTENT


def test_every_number_of_the_list_counts(folder: Path) -> None:
    said = json.loads((folder / LIST).read_text())
    for name in said["files"]:
        (folder / LIST).write_text(json.dumps({**said, "files": {**said["files"], name: 7}}))
        with pytest.warns(UserWarning, match="checksums.json is not what was written"):
            opened(folder)


def test_a_folder_without_a_list_is_made_again_in_silence(folder: Path) -> None:
    (folder / LIST).unlink()
    (folder / "rows.jsonl").write_text("old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert content(opened(folder)) == CONTENT


def test_a_whole_folder_is_left_alone_and_read_once_by_a_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(module, "checksum", lambda path: read.append(path.name) or files.checksum(path))
    before = (folder / "rows.jsonl").stat().st_ino
    for _ in range(3):
        opened(folder)
    assert sorted(read) == ["empty", "rows.jsonl", "table.json"]
    assert (folder / "rows.jsonl").stat().st_ino == before


def test_what_fails_to_be_made_is_not_there(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        fill(folder)
        raise RuntimeError("torn")

    with pytest.raises(RuntimeError, match="torn"):
        cached_folder(tmp_path / "made", "rows", fails)
    assert not (tmp_path / "made").exists()
