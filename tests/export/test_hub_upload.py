"""Uploads go to a fake Hub on this machine, from a process that is not offline; what arrives is byte-identical."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.fake_hub import TOKEN, FakeHub
from tests.inference.conftest import make_export
from unified_lm.core.errors import CheckpointError
from unified_lm.export.hub_upload import push_to_hub

_PUSH = """
import sys
from pathlib import Path
from unified_lm.export.hub_upload import push_to_hub
from unified_lm.core.errors import CheckpointError
try:
    print("pushed to", push_to_hub(Path(sys.argv[1]), sys.argv[2], private=sys.argv[3] == "private"))
except CheckpointError as error:
    print("refused:", error)
    sys.exit(2)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_export(tmp_path / "export")


def push(
    folder: Path, endpoint: str, tmp_path: Path, token: str | None = TOKEN, repo: str = "org/model", visibility: str = "private"
):
    dropped = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in dropped and "proxy" not in name.lower()}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    if token:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-c", _PUSH, str(folder), "org/model", "private"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_files_arrive_byte_identical(folder: Path, tmp_path: Path) -> None:
    with FakeHub() as hub:
        done = push(folder, hub.endpoint, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.visibility == {"org/model": "private"}
    sent = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: content for (_, path), content in hub.files.items()} == sent
    assert any(request.startswith("PUT /blob/") for request in hub.requests), "weights went through LFS"
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("token", "forbid", "expected"),
    [(None, False, "HF_TOKEN"), ("hf_wrong_token", False, "HF_TOKEN"), (TOKEN, True, "may not write")],
    ids=["no token", "wrong token", "read-only token"],
)
def test_refusals_say_what_to_do(folder: Path, tmp_path: Path, token: str | None, forbid: bool, expected: str) -> None:
    with FakeHub(forbid=forbid) as hub:
        done = push(folder, hub.endpoint, tmp_path, token=token)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "refused:" in done.stdout
    assert expected in done.stdout
    assert "Traceback" not in done.stderr
    assert not token or token not in done.stdout + done.stderr
    assert hub.files == {}


def test_no_server_is_one_clear_message(folder: Path, tmp_path: Path) -> None:
    with FakeHub() as hub:
        gone = hub.endpoint
    done = push(folder, gone, tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Check the network and HF_ENDPOINT" in done.stdout


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no unified_lm\.json"):
        push_to_hub(tmp_path, "org/model")


def test_a_malformed_name_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="organization/name"):
        push_to_hub(folder, "not a//name")
