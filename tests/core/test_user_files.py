"""Paths and files of a user: every failure names the path."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import yaml

from unified_lm.core.distributed import find_device
from unified_lm.core.errors import CheckpointError, ConfigError, DataError, UserError, about
from unified_lm.core.user_files import explain_os_error, naming, parse_json, parse_yaml, read_json, user_path


def test_a_path_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/runs") == Path("/home/me/runs")
    assert user_path("runs/~x") == Path("runs/~x")
    written = user_path("./~nobody_of_that_name/x")
    assert written == Path.cwd() / "~nobody_of_that_name" / "x"
    assert user_path(written) == written
    with pytest.raises(UserError, match=r"~nobody_of_that_name/x: there is no user of that name.*\./~"):
        user_path("~nobody_of_that_name/x")
    with pytest.raises(UserError, match="holds a NUL character"):
        user_path("a\0b")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"a": 1', "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "4300 digits"),
        (b'[{"a": {"b": 1, "c": 2, "b": 1}}]', "the key 'b' more than once"),
    ],
)
def test_a_damaged_file_of_json(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{path}.*{told}.*Write it again\.$"):
        read_json(path, CheckpointError, fix="Write it again.")
    with pytest.raises(ValueError):  # noqa: PT011 - no more can be said of every kind
        parse_json(content)
    with pytest.raises(DataError, match=rf"cannot read {path}/b: Not a directory\."):
        read_json(path / "b", fix="")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: 1\nb: 2\na: 1\n", "the key 'a' more than once"),
        (b"x: [{b: 1, b: 2}]", "the key 'b' more than once"),
        (b"1: a\n1.0: b\n", "the key '1.0' more than once"),
        (b"[a]: 1", "unhashable|unacceptable"),
        (b"a: [1", "expected"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_damaged_yaml(content: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_yaml(content)


def test_yaml_is_read_as_ever() -> None:
    content = b"base: &base {a: 1, b: [2, x]}\nmore: {<<: *base, a: 3}\n"
    assert parse_yaml(content) == yaml.safe_load(content) == {"base": {"a": 1, "b": [2, "x"]}, "more": {"a": 3, "b": [2, "x"]}}


def test_an_error_of_the_operating_system_names_the_path_that_the_user_knows(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    with pytest.raises(OSError, match="No space") as caught, naming(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert explain_os_error(caught.value) == (
        f"{path}: No space left on device. Make room there, or name another place; what was complete before is as it was."
    )
    with pytest.raises(OSError, match="other") as caught, naming(path, tmp_path / ".v"):
        raise OSError(errno.EACCES, "Permission denied", "other")
    assert caught.value.filename == "other", "an error that names its own file keeps it"
    with pytest.raises(OSError, match=r"v\.npy") as caught, naming(path, tmp_path / ".v"):
        raise OSError(errno.EACCES, "Permission denied", str(tmp_path / ".v"))
    assert explain_os_error(BrokenPipeError(errno.EPIPE, "Broken pipe")) == "the operating system refused: Broken pipe."
    assert explain_os_error(OSError("a library's own words")) is None


def test_an_error_says_what_it_is_about() -> None:
    with pytest.raises(DataError, match=r"^streams\.a: no such file$"), about("streams.a"):
        raise DataError("no such file")
    with pytest.raises(ConfigError, match=r"^streams\.a\.b is wrong$"), about("streams.a"):
        raise ConfigError("streams.a.b is wrong")


@pytest.mark.parametrize("name", ["banana", "", "meta", "cuda:99", "cpu:-1"])
def test_a_device_that_cannot_be_used(name: str) -> None:
    with pytest.raises(UserError, match=f"device '{name}' cannot be used here .*Here there are: cpu"):
        find_device(name)
    assert find_device("cpu").type == "cpu"
