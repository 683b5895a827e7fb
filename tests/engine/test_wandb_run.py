"""Weights & Biases with the real package: an offline run holds what docs/monitoring.md promises, and no secret."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unified_lm.cli.script import train
from unified_lm.config.schema import LoggingConfig
from unified_lm.core import version
from unified_lm.core.errors import ConfigError
from unified_lm.engine.metrics import Reporter, read_metrics
from unified_lm.engine.wandb_run import RUN_FILE, check_wandb, hide_secrets

PROMISED = {
    *("loss", "loss/embedding", "loss/generation", "learning_rate", "gradient_norm", "tokens_per_second", "samples_per_second"),
    *("padding_free_share", "padding_share_if_padded", "mfu", "hfu", "memory_gib", "memory_peak_gib", "data_share"),
    *("imbalance_tokens", "imbalance_compute", "step_seconds", "skipped_steps", "heldout/embedding", "retrieval/ndcg@10"),
}
_BLOCK = 32 * 1024


def records(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file: 7 bytes of header, then LevelDB's log format (blocks of 32 KiB; crc, length, type)."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):
            return  # still being written
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, last
            yield parts
            parts = b""


def read_offline(run_dir: Path) -> tuple[list[dict[str, Any]], list[Any], list[int], list[Path]]:
    """History rows, `run` records, exit codes and files of every offline start in a run's folder, oldest first.

    wandb's own process may still be writing the last record when `finish` returns: it is waited for.
    """
    deadline = time.monotonic() + 30
    while True:
        files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
        found = [_read(path) for path in files]
        exits = [code for _, _, codes in found for code in codes]
        if len(exits) == len(files) or time.monotonic() > deadline:
            return [row for rows, _, _ in found for row in rows], [run for _, runs, _ in found for run in runs], exits, files
        time.sleep(0.1)


def _read(path: Path) -> tuple[list[dict[str, Any]], list[Any], list[int]]:
    from wandb.proto.wandb_internal_pb2 import Record

    rows, runs, exits = [], [], []
    for data in records(path):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        elif kind == "run":
            runs.append(record.run)
        elif kind == "exit":
            exits.append(record.exit.exit_code)
    return rows, runs, exits


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no settings and no netrc of whoever runs the tests."""
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.usefixtures("alone")
def test_an_offline_run_holds_the_promised_metrics_and_continues(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["recipe=grit_smollm2", "model=tiny_random", "validation.num_batches=1", "export.enabled=false"]
    arguments += ["logging.progress=false", "logging.wandb=offline", "logging.wandb_group=night", "logging.wandb_tags=[a,b]"]
    arguments += ["checkpoint.every=2", f"run_dir={run_dir}"]
    train([*arguments, "max_steps=2"])
    rows, runs, exits, _ = read_offline(run_dir)
    assert {name for row in rows for name in row} >= PROMISED
    assert [row["step"] for row in rows if "tokens_per_second" in row] == [1, 2]
    assert rows[1]["loss/embedding"] == pytest.approx(read_metrics(run_dir)[1]["loss/embedding"])
    assert exits == [0]
    run = runs[0]
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("unified_lm", "run", "night", ["a", "b"])
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["recipe"] == "grit_smollm2"
    assert settings["optim"]["learning_rate"] > 0
    assert settings["code_version"]["unified_lm"]
    assert settings["peak_source"] == "measured"

    train([*arguments, "max_steps=4", "resume=auto"])
    rows, runs, exits, files = read_offline(run_dir)
    assert len(files) == 2
    assert len({run.run_id for run in runs}) == 1
    assert runs[0].run_id == json.loads((run_dir / RUN_FILE).read_text())["id"]
    assert [row["step"] for row in rows if "tokens_per_second" in row] == [1, 2, 3, 4]
    assert exits == [0, 0]


@pytest.mark.usefixtures("alone")
def test_a_run_that_fails_is_finished_as_failed_and_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-the-environment")
    secret = "hf_" + "A" * 34
    settings = {"model": {"name": f"https://me:{secret}@host/model"}, "data": ["a-secret-of-the-environment"]}
    config = LoggingConfig(wandb="offline", progress=False)

    def fail_after_a_step() -> None:
        with Reporter(config, tmp_path, 3, settings) as reporter:
            reporter.step(1, {"loss": 1.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_a_step()
    rows, _, exits, files = read_offline(tmp_path)
    assert exits == [1]
    assert rows[0]["loss"] == 1.0
    everything = b"".join(path.read_bytes() for path in files[0].parent.rglob("*") if path.is_file())
    assert b"host/model" in everything
    assert secret.encode() not in everything
    assert b"a-secret-of-the-environment" not in everything


@pytest.mark.usefixtures("alone")
def test_online_without_a_key_is_refused_before_any_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unified_lm.assembly.stages.assemble_run", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match="needs an API key, and there is none") as caught:
        train(["recipe=grit_smollm2", "model=tiny_random", "logging.wandb=online", f"run_dir={tmp_path}/run"])
    assert "logging.wandb=offline" in str(caught.value)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ConfigError, match="has 5 characters") as caught:
        check_wandb(LoggingConfig(wandb="online"))
    assert "short" not in str(caught.value)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    check_wandb(LoggingConfig(wandb="online"))


@pytest.mark.usefixtures("alone")
def test_a_key_in_netrc_is_found(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {'x' * 40}\n")
    check_wandb(LoggingConfig(wandb="online"))


def test_without_the_package_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'unified_lm\[wandb\]'"):
        check_wandb(LoggingConfig(wandb="offline"))
    check_wandb(LoggingConfig(wandb="disabled"))


def test_what_looks_like_a_secret_is_hidden_and_nothing_else() -> None:
    settings = {
        "mask_token": "_",
        "token_budget": 2048,
        "name": "mistralai/Mistral-7B-v0.1",
        "sources": ("s3://bucket/x.jsonl",),
    }
    assert hide_secrets(settings) == {**settings, "sources": ["s3://bucket/x.jsonl"]}
    assert hide_secrets("https://user:pass@host/x") == "https://[hidden]@host/x"
    assert hide_secrets("ghp_" + "a" * 36) == "[hidden]"


def test_the_code_version_names_the_commit_in_a_checkout() -> None:
    found = version.code_version()
    assert found["unified_lm"]
    assert found["torch"]
    if (Path(version.__file__).resolve().parents[2] / ".git").exists():
        assert len(found["commit"].partition("+")[0]) == 40
