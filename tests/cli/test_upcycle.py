"""`unified-lm upcycle`: a checkpoint that stock tools load and recipes train."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.small_run import small_run
from tests.inference.conftest import make_export
from unified_lm.cli.main import main
from unified_lm.cli.script import train
from unified_lm.inference import UnifiedLM


def test_a_dense_export_becomes_a_mixture_that_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, out = make_export(tmp_path / "dense" / "export"), tmp_path / "sparse"
    assert main(["upcycle", str(dense), "--experts", "4", "--out", str(out)]) == 0
    assert "mixtral, 4 experts" in capsys.readouterr().out
    assert json.loads((out / "upcycled.json").read_text())["experts"] == 4
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (dense, out)]
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(models[1](ids).logits, models[0](ids).logits, rtol=1e-4, atol=1e-5)
    vectors = UnifiedLM.from_pretrained(out, template="grit", device="cpu", method="moee_sum").encode(["a text"])
    assert vectors.shape == (1, 64 + 8)
    where = ["model.tiny_random=false", "model.source=hub", f"model.name={out}", "model.family=mixtral", "model.dtype=float32"]
    balance = "streams.generation.objective.router_aux_loss_coef=0.01"
    train(small_run(tmp_path, tmp_path / "run", *where, balance, "max_steps=1"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("generation/router_balance" in line for line in lines)
    for inside, told in ((dense, "is what this command reads"), (dense / "sparse", "lies in the model itself")):
        assert main(["upcycle", str(dense), "--out", str(inside)]) == 2
        assert told in capsys.readouterr().err
    assert main(["upcycle", str(out), "--out", str(tmp_path / "again")]) == 2
    assert "family 'mixtral' cannot be upcycled" in capsys.readouterr().err
