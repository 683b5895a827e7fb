"""Adapters and the rows of template tokens: announced where they look untrained, trained on request, exported."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.engine.small_run import small_run
from unified_lm.assembly import build_run
from unified_lm.assembly.checkpoints import export_adapter, export_checkpoint
from unified_lm.assembly.trained_tokens import trained_tokens
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose_run
from unified_lm.core.errors import CheckpointError, ConfigError
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

EOS = tiny_tokenizer().eos_token_id


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model that never saw the token by which the template ends an answer."""
    model = tiny_model("llama", tie_word_embeddings=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight.data[EOS] = 0.0
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def arguments(base: Path, run: str, *more: str) -> list[str]:
    own = [f"model.name={base}", "model.source=hub", "model.family=llama", "model.dtype=float32", "lora=all_linear"]
    kept = [a for a in small_run(base.parent, base.parent / run) if a not in ("model=tiny_random", "export.enabled=false")]
    return [*kept, *own, "max_steps=3", "optim.learning_rate=0.01", "optim.warmup_ratio=0", *more]


def said(argv: list[str]) -> str:
    console = Console(file=StringIO(), width=400)
    build_run(compose_run(argv), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_untrained_rows_are_announced_with_the_fix(base: Path) -> None:
    assert "the embedding of </s> looks as if it had never been trained" in said(arguments(base, "plain"))
    assert "lora.trainable_tokens=template trains the template's tokens" in said(arguments(base, "again"))
    assert "never been trained" not in said(arguments(base, "rows", "lora.trainable_tokens=template"))
    assert "never been trained" not in said(arguments(base, "full", "lora=none")), "every row is trained"


@pytest.mark.parametrize(("frozen", "is_told"), [("embed_tokens", True), ("lm_head", True), ("q_proj", False)])
def test_untrained_rows_of_a_frozen_table_are_announced(frozen: str, is_told: bool, base: Path) -> None:
    told = said(arguments(base, "frozen", "lora=none", f"optim.frozen=[{frozen}]"))
    assert ("the embedding of </s> looks as if it had never been trained" in told) == is_told
    assert ("optim.frozen leaves it so" in told) == is_told


def test_rows_are_trained_and_exported(base: Path) -> None:
    # the end of embedded texts too: the end of a last answer is predicted, but nothing follows that would read it
    ends = [f"streams.{name}.template=grit+eos" for name in ("embedding", "generation")]
    for run, more in (("plain", ()), ("rows", ('lora.trainable_tokens=["</s>"]', "export.dtype=float32"))):
        train(arguments(base, run, *ends, *more))  # the export is compared with the model there
    exports = {run: load_file(base.parent / run / "export" / "model.safetensors") for run in ("plain", "rows")}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert not exports["plain"][name][EOS].any(), "adapters alone leave the row as it was"
        assert exports["rows"][name][EOS].norm() > 1e-3
        others = torch.arange(len(exports["rows"][name])) != EOS
        assert torch.equal(exports["rows"][name][others], load_file(base / "model.safetensors")[name][others])
    manifest = json.loads((base.parent / "rows" / "export" / "unified_lm.json").read_text())
    assert manifest["stages"][0]["adapter"]["tokens"] == ["</s>"]

    again = export_checkpoint(base.parent / "rows", base.parent / "again", Console(quiet=True))
    saved = [(folder / "model.safetensors").read_bytes() for folder in (base.parent / "rows" / "export", again)]
    assert saved[0] == saved[1], "an export of the checkpoint is that of the run"
    with pytest.raises(CheckpointError, match="rows of the embedding table were trained beside the adapters"):
        export_adapter(base.parent / "rows", base.parent / "adapter", Console(quiet=True))
    assert not (base.parent / "adapter").exists()


def test_which_tokens(base: Path) -> None:
    def found(*more: str) -> dict[str, int]:
        return trained_tokens(compose_run(arguments(base, "x", *more)), tiny_tokenizer())

    assert found() == {}
    assert found("lora.trainable_tokens=template") == {"<s>": 1, "</s>": 2}, "grit writes out both"
    assert found('lora.trainable_tokens=["</s>",a]') == {"</s>": 2, "a": tiny_tokenizer().convert_tokens_to_ids("a")}
    with pytest.raises(ConfigError, match=r"'</ss>' is not one token .* Did you mean '</s>'"):
        found('lora.trainable_tokens="</ss>"')
    with pytest.raises(ConfigError, match="templates of the streams have no special token"):
        found("~streams.generation", "streams.embedding.template=plain", "lora.trainable_tokens=template")
