"""Arrays of caches carry a checksum; what is not written leaves no folder."""

from pathlib import Path

import numpy as np
import pytest

from unified_lm.core.files import read_array, replacing, write_array, write_directory

VALUES = np.arange(600, dtype=np.float32).reshape(200, 3)


def test_an_array_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    assert read_array(path) is None
    write_array(path, VALUES)
    found = read_array(path)
    assert found is not None
    assert np.array_equal(found, VALUES)
    assert np.array_equal(np.load(path), VALUES), "other readers see the array alone"
    write_array(path, VALUES[:0])
    assert (empty := read_array(path)) is not None
    assert empty.shape == (0, 3)


@pytest.mark.parametrize("where", [0, 20, 200, 1000, -20, -1])
def test_a_flipped_byte_is_found(where: int, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write_array(path, VALUES)
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="is damaged"):
        assert read_array(path) is None


@pytest.mark.parametrize("length", [0, 1, 10, 500, 2500])
def test_a_cut_file_is_found(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write_array(path, VALUES)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.warns(UserWarning, match="is damaged"):
        assert read_array(path) is None


def test_a_file_without_checksum_is_not_trusted(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VALUES)
    with pytest.warns(UserWarning, match="is damaged"):
        assert read_array(tmp_path / "a.npy") is None


def test_what_fails_leaves_no_folder(tmp_path: Path) -> None:
    def fail(building: Path) -> None:
        if building.parent.name == "shared":
            (building.parent / "of another process").touch()
        raise ValueError("nothing to write")

    def fail_in_file(target: Path) -> None:
        with replacing(target) as building:
            building.write_text("half")
            fail(building)

    (tmp_path / "there").mkdir()
    for place in ("new/inner", "there", "shared"):
        with pytest.raises(ValueError, match="nothing to write"):
            fail_in_file(tmp_path / place / "a")
        with pytest.raises(ValueError, match="nothing to write"):
            write_directory(tmp_path / place / "b", fail)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"there", "shared", "shared/of another process"}
