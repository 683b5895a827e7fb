"""`attention=bidirectional_keep_first` from stream to export: what is trained is what is embedded, stored and refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.small_run import small_run
from unified_lm.batch import Sample, make_pack
from unified_lm.cli.main import main
from unified_lm.cli.script import train
from unified_lm.inference import UnifiedLM
from unified_lm.models.pooling import pool
from unified_lm.retrieval.index import Index

TEXTS = ["a text of some words", "another text, longer than the first one is", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("keep_first")
    arguments = small_run(data, data / "run", "max_steps=2", "model.dtype=float32", "export.enabled=true")
    arguments = [argument for argument in arguments if argument != "export.enabled=false"]
    return train([*arguments, "streams.embedding.attention=bidirectional_keep_first", "export.dtype=float32"])


def test_vectors_are_those_of_the_mask_that_was_trained(folder: Path) -> None:
    model = UnifiedLM.from_pretrained(folder, device="cpu")
    assert model.attention == "bidirectional_keep_first"
    for text, vector in zip(TEXTS, model.encode(TEXTS), strict=True):
        (sample,) = model.embedder.samples([text], "", None)
        assert sample.bidirectional == (1, len(sample))
        with model.borrow_backbone() as backbone, torch.no_grad():
            whole = make_pack(
                [Sample(input_ids=sample.input_ids, stream="s", bidirectional=(1, len(sample)), pool=sample.pool)]
            )
            states = backbone(whole)
            expected = torch.nn.functional.normalize(pool(states, whole.pool_spans, "mean"), dim=-1)[0]
            first = backbone(make_pack([Sample(input_ids=sample.input_ids[:1], stream="s")]))[0]
            torch.testing.assert_close(states[0], first, rtol=1e-5, atol=1e-5)  # the first token knows nothing of the others
        np.testing.assert_allclose(vector, expected.numpy(), atol=2e-6)
    for other in ("bidirectional", "causal"):
        changed = UnifiedLM.from_pretrained(folder, device="cpu", attention=other).encode(TEXTS)
        assert np.abs(changed - model.encode(TEXTS)).max() > 1e-3


def test_stock_tools_refuse_to_embed_and_still_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    export = folder / "export"
    with pytest.raises(ValueError, match=r"interop\.UseUnifiedLM"):
        sentence_transformers.SentenceTransformer(str(export), device="cpu")
    with pytest.raises(Exception, match=r"Use unified_lm\.UnifiedLM\.from_pretrained"):
        sentence_transformers.SentenceTransformer(str(export), device="cpu", trust_remote_code=True)
    assert "cannot express how this model makes its vectors" in (export / "README.md").read_text()
    assert main(["generate", str(folder), "hello", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    for engine in ("vllm-embed", "tei"):
        assert main(["export", str(folder), "--for", engine, "--pool-prompt"]) == 2
        assert "a first token that sees itself alone" in capsys.readouterr().err


def test_texts_are_read_so_for_answers(folder: Path, tmp_path: Path) -> None:
    model = UnifiedLM.from_pretrained(folder, device="cpu")
    with Index.create(tmp_path / "index", model, form="float32") as index:
        index.add(TEXTS)
        assert index.kept_states == ("bidirectional_keep_first",)
        answer = index.answer("which text is longer?", k=2, mode="document_cache", max_new_tokens=3)
        assert answer.states == "bidirectional_keep_first"
        assert answer.cached_tokens > 0
