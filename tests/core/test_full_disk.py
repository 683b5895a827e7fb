"""A disk that is full: every kind of writer ends in one message with the path, and leaves what was there before."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image
from pyarrow import parquet
from tokenizers import Tokenizer, models

from tests.full_disk import full_disk
from unified_lm.core.errors import CheckpointError
from unified_lm.core.files import write_array, write_directory, write_text
from unified_lm.core.outputs import RECORD, FolderKind, write_file, write_folder, write_text_file
from unified_lm.core.user_files import explain_os_error, naming, refusal
from unified_lm.data.rows.files import WRITABLE, RowWriter

NUMBERS = np.random.default_rng(0).random(200_000)
"""More than a file may hold."""


def _numpy(path: Path) -> None:
    with open(path, "wb") as handle:
        np.save(handle, NUMBERS)


def _tokenizer(path: Path) -> None:
    Tokenizer(models.WordLevel({f"word {number}": number for number in range(20_000)}, unk_token="word 0")).save(str(path))


def _picture(path: Path) -> None:
    Image.fromarray((NUMBERS.reshape(400, 500) * 255).astype(np.uint8)).save(path, "png")


def _copy(path: Path) -> None:
    shutil.copyfile(path.parents[1] / "large", path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("x" * 200_000),
    "numpy": _numpy,
    "safetensors of torch": lambda path: safetensors.torch.save_file({"a": torch.from_numpy(NUMBERS)}, path),
    "safetensors of numpy": lambda path: safetensors.numpy.save_file({"a": NUMBERS}, path),
    "tokenizers": _tokenizer,
    "parquet": lambda path: parquet.write_table(pa.table({"a": NUMBERS}), path),
    "picture": _picture,
    "copy": _copy,
}
TOLD = r"(File too large|not everything could be written: \d+ requested and \d+ written)"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "large").write_bytes(bytes(200_000))
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file(kind: str, place: Path) -> None:
    path = write_text_file(place / "v.npy", "what was there before")
    with full_disk(), pytest.raises(OSError, match=TOLD) as caught:
        write_file(path, WRITERS[kind])
    assert (said := explain_os_error(caught.value)) is not None
    assert said.startswith(f"{path}: ")
    assert said.endswith("what was complete before is as it was.")
    assert path.read_text() == "what was there before"
    assert {found.name for found in place.iterdir()} == {"v.npy", RECORD}


def _write_of_ours(target: Path, fill: Callable[[Path], None]) -> None:
    write_folder(target, FolderKind("thing", "a"), fill)


@pytest.mark.parametrize("write", [write_directory, _write_of_ours])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder(kind: str, write: Callable[[Path, Callable[[Path], None]], None], place: Path) -> None:
    target = place.parent / "folder"
    write(target, lambda building: write_text(building / "a", "what was there before"))
    with full_disk(), pytest.raises(CheckpointError, match=rf"^could not write {target}: .*{TOLD}.*before is untouched\.$"):
        write(target, lambda building: WRITERS[kind](building / "a") and None)
    assert (target / "a").read_text() == "what was there before"
    assert {found.name for found in place.parent.iterdir()} == {"folder", "large", "out"}


def test_an_array_of_a_cache(place: Path) -> None:
    with full_disk(), pytest.raises(OSError, match=TOLD) as caught:
        write_array(place / "a.npy", NUMBERS)
    assert caught.value.filename == str(place / "a.npy")
    assert not list(place.iterdir())


@pytest.mark.parametrize("ending", WRITABLE)
def test_rows(ending: str, place: Path) -> None:
    path = place / f"rows{ending}"
    with full_disk(), pytest.raises(OSError, match=TOLD) as caught:
        _write_rows(path)
    assert caught.value.filename == str(path)
    assert not list(place.iterdir())


def _write_rows(path: Path) -> None:
    with RowWriter(path) as rows:
        for number in NUMBERS:
            rows.write({"text": f"a text with the number {number}"})


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    found = refusal(safetensors.SafetensorError("I/O error: No space left on device (os error 28)"))
    assert found is not None
    assert (found.errno, found.strerror) == (errno.ENOSPC, "No space left on device")
    for error in (
        safetensors.SafetensorError("Error while deserializing header: header too large"),
        CheckpointError("a.safetensors cannot be read: No such file or directory (os error 2)"),
        KeyError("a"),
    ):
        assert refusal(error) is None
        with pytest.raises(type(error)) as caught, naming(tmp_path / "a"):
            raise error
        assert caught.value is error
    told = OSError("Can't load the tokenizer of 'x'")
    with pytest.raises(OSError, match="Can't load") as unnamed, naming(tmp_path / "a"):
        raise told
    assert unnamed.value is told, "it is about no file of ours"
    assert explain_os_error(told) is None
