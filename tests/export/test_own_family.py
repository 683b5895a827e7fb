"""Exports of a family that transformers has from this package alone: what loads them, and what their card says."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.inference.conftest import make_export
from unified_lm.cli.main import main
from unified_lm.inference.unified import UnifiedLM

STOCK = """
import sys
import numpy as np
import torch
import unified_lm.models.monet  # registers the family, which transformers does not know
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = SentenceTransformer(folder, device="cpu")
np.save(sys.argv[2], model.encode(["a text", "another, longer one"], prompt_name="document"))
lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = tokenizer("a b c d", return_tensors="pt").input_ids
changed = ids.clone()
changed[0, -1] = 7
with torch.no_grad():
    assert torch.equal(lm(ids).logits[0, 0], lm(changed).logits[0, 0]), "causal"
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("own") / "export", "monet")


def test_stock_tools_load_it_where_the_package_is_imported(export: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    out = tmp_path / "v.npy"
    done = subprocess.run([sys.executable, "-c", STOCK, str(export), str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    own = UnifiedLM.from_pretrained(export, device="cpu").encode(["a text", "another, longer one"])
    np.testing.assert_allclose(np.load(out), own, atol=1e-5)


def test_its_card_says_so_and_others_do_not(export: Path, tmp_path: Path) -> None:
    line = "import unified_lm.models.monet"
    assert (export / "README.md").read_text().count(line) == 2
    assert line not in (make_export(tmp_path / "llama") / "README.md").read_text()


@pytest.mark.parametrize("engine", ["vllm-embed", "vllm-generate", "tei"])
def test_engines_do_not_have_it(engine: str, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(export), "--for", engine, "--out", str(tmp_path / "view")]) == 2
    assert "family 'monet' is this project's own, and no engine has it" in capsys.readouterr().err
