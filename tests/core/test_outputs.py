"""Outputs replace what this package wrote, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unified_lm.core.errors import OutputError
from unified_lm.core.outputs import RECORD, FolderKind, check_file, check_folder, write_file, write_folder, write_text_file

KIND = FolderKind("thing", "a")


def fill(*names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)

    return write


def test_a_folder_of_ours_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "export"
    write_folder(target, KIND, fill("a", "sub/b"))
    write_folder(target, KIND, fill("c"))
    assert sorted(path.name for path in target.iterdir()) == [RECORD, "c"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    write_folder(tmp_path / "new", KIND, fill("a"))
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", KIND, fill("a"))
    assert (tmp_path / "empty" / "a").is_file()


@pytest.mark.parametrize(
    "change",
    [
        lambda target: (target / "notes.txt").write_text("mine"),
        lambda target: (target / "sub" / "notes.txt").write_text("mine"),
        lambda target: (target / "mine").mkdir(),
        lambda target: (target / "a").write_text("A"),
        lambda target: (target / "a").write_text("longer than before"),
        lambda target: (target / "sub" / "link").symlink_to(target),
        lambda target: (target / RECORD).unlink(),
        lambda target: (target / RECORD).write_text('{"name": "a"\nnull\n[]'),
    ],
)
def test_a_folder_with_anything_of_the_users_is_refused(tmp_path: Path, change: Callable[[Path], object]) -> None:
    target = tmp_path / "export"
    write_folder(target, KIND, fill("a", "sub/b"))
    change(target)
    with pytest.raises(OutputError, match="did not write there, or what was changed"):
        check_folder(target, KIND)
    with pytest.raises(OutputError):
        write_folder(target, KIND, lambda _: pytest.fail("the work began"))
    assert (target / "sub" / "b").read_text() == "sub/b"


def test_what_comes_while_a_folder_is_filled_stays(tmp_path: Path) -> None:
    target = tmp_path / "export"

    def fill_and_interfere(folder: Path) -> None:
        fill("a")(folder)
        target.mkdir()
        (target / "mine").write_text("mine")

    with pytest.raises(OutputError):
        write_folder(target, KIND, fill_and_interfere)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_files_links_and_the_working_directory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, reason in (("file", "is a file"), ("link", "is a link"), ("dangling", "is a link"), ("file/sub", "is a file")):
        with pytest.raises(OutputError, match=reason):
            write_folder(tmp_path / name, KIND, fill("a"))
    monkeypatch.chdir(tmp_path / "folder")
    for name in (".", "..", str(tmp_path / "folder")):
        with pytest.raises(OutputError, match="working directory"):
            write_folder(Path(name), KIND, fill("a"))


def test_a_file_of_ours_is_replaced_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text_file(path, "one")
    assert write_text_file(path, "two").read_text() == "two"
    path.write_text("edited")
    with pytest.raises(OutputError, match="did not write it, or it was changed"):
        write_text_file(path, "three")
    assert path.read_text() == "edited"
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(path)
    for name, reason in (("folder", "is a folder"), ("link", "is a link"), ("new/a.txt/b", "is a file")):
        with pytest.raises(OutputError, match=reason):
            check_file(tmp_path / name)
    assert (tmp_path / "link").is_symlink()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "a.txt", write)
    assert list(tmp_path.iterdir()) == []


def test_lines_of_several_writers_are_all_kept(tmp_path: Path) -> None:
    for index in range(5):
        write_text_file(tmp_path / f"{index}.txt", str(index))
    assert len({json.loads(line)["name"] for line in (tmp_path / RECORD).read_text().splitlines()}) == 5
    for index in range(5):
        check_file(tmp_path / f"{index}.txt")


def test_a_file_of_a_folder_is_replaced_with_the_folder_only(tmp_path: Path) -> None:
    """It is part of that output: of an export its model card, say."""
    target = tmp_path / "export"
    write_folder(target, KIND, fill("a"))
    with pytest.raises(OutputError, match=r"part of another output of unified_lm, the folder it lies in \(thing\)"):
        write_text_file(target / "a", "another output")
    assert (target / "a").read_text() == "a"
    write_text_file(target / "new", "one")
    write_text_file(target / "new", "two")
    with pytest.raises(OutputError, match=r"holds other outputs of unified_lm: new \(file\); nothing was changed"):
        write_folder(target, KIND, fill("a"))
    assert (target / "new").read_text() == "two"
    (target / "new").unlink()
    write_folder(target, KIND, fill("a"))


def test_a_file_whose_record_names_no_kind_is_replaced(tmp_path: Path) -> None:
    """An earlier version's record."""
    path = write_text_file(tmp_path / "a.txt", "one")
    forget_kinds(tmp_path)
    assert write_text_file(path, "two").read_text() == "two"


def forget_kinds(folder: Path) -> None:
    """Make the record what earlier versions wrote."""
    lines = [json.loads(line) for line in (folder / RECORD).read_text().splitlines()]
    for line in lines:
        del line["kind"]
    (folder / RECORD).write_text("".join(json.dumps(line) + "\n" for line in lines))
