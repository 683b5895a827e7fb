"""What an export takes over from its run, and what it does not."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests.engine.small_run import small_run
from tests.inference.conftest import make_export
from unified_lm.assembly import build_run
from unified_lm.cli.script import train
from unified_lm.composition.compose import compose_run
from unified_lm.config.schema import ModelConfig
from unified_lm.core.errors import CheckpointError, ConfigError
from unified_lm.inference import UnifiedLM
from unified_lm.models.loading import load_model
from unified_lm.models.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained with attention dropout 0.1."""
    folder = tmp_path_factory.mktemp("run")
    train(small_run(folder, folder / "run", "max_steps=1", "export.enabled=true"))
    return folder / "run"


def test_dropout_of_training_is_not_exported(run: Path) -> None:
    assert "attention_dropout: 0.1" in (run / "config.yaml").read_text()
    assert json.loads((run / "export" / "config.json").read_text())["attention_dropout"] == 0.0
    next_stage = load_model(ModelConfig(init_from=str(run), dtype="float32"))
    assert next_stage.causal_lm.config.attention_dropout == 0.0


def start_from(folder: Path, family: str, **values: object) -> list[str]:
    """Arguments of a run from a checkpoint on disk."""
    tiny_model(family, **values).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    source = [f"model.name={folder}/base", "model.source=hub", f"model.family={family}", "model.dtype=float32"]
    arguments = small_run(folder, folder / "run", *source, "max_steps=1", "export.enabled=true")
    return [argument for argument in arguments if argument != "model=tiny_random"]


def test_a_base_that_cannot_be_made_causal_is_refused_before_training(tmp_path: Path) -> None:
    arguments = start_from(tmp_path, "gemma3_text", use_bidirectional_attention=True)
    message = r"could not generate: .* does not follow is_causal=true, since .*/base has use_bidirectional_attention=True"
    with pytest.raises(ConfigError, match=message):
        build_run(compose_run(arguments))
    build_run(compose_run([*arguments, "export.modes=[embed]", f"run_dir={tmp_path}/other"]))


def test_a_base_that_cannot_be_made_causal_cannot_embed_causally(tmp_path: Path) -> None:
    arguments = start_from(tmp_path, "gemma3_text", use_bidirectional_attention=True)
    causal = ["export.modes=[embed]", "streams.embedding.attention=causal"]
    message = r"could not embed with causal attention: .* does not follow is_causal=true, since .*/base has use_bidirectional"
    with pytest.raises(ConfigError, match=message):
        build_run(compose_run([*arguments, *causal]))


def test_a_tokenizer_that_is_read_differently_is_refused_before_training(tmp_path: Path) -> None:
    arguments = start_from(tmp_path, "qwen2")
    (tmp_path / "base").rename(tmp_path / "weights")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    more = [f"model.name={tmp_path}/weights", f"model.tokenizer={tmp_path}/tokenizer"]
    with pytest.raises(CheckpointError, match=r"encodes .* differently once saved and loaded"):
        build_run(compose_run([*arguments, *more]))


def embedding_run(folder: Path, *more: str) -> list[str]:
    """Arguments of a run that only embeds, with the last token."""
    kept = [a for a in small_run(folder, folder / "run") if "generation" not in a and not a.startswith(("recipe", "export"))]
    embedding = ["model.pooling=last_token", "streams.embedding.num_hard_negatives=0"]
    return ["recipe=embedding_only", *kept, *embedding, "max_steps=1", *more]


def test_a_run_with_a_joined_prompt_and_an_end_token_is_exported_for_stock_tools(tmp_path: Path) -> None:
    instructed = "streams.embedding.sources.0.instruction='Find it.'"
    train(embedding_run(tmp_path, "streams.embedding.template=e5_instruct", instructed))  # checked with stock tools there
    manifest = json.loads((tmp_path / "run" / "export" / "unified_lm.json").read_text())
    assert manifest["template_fields"]["embedding_end"] == "{eos}"
    prompts = json.loads((tmp_path / "run" / "export" / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts == {"query": "Instruct: Find it.\nQuery: ", "document": ""}


def test_the_last_token_without_an_end_token_is_announced(tmp_path: Path) -> None:
    said = {}
    for template in ("grit", "grit+eos"):
        console = Console(file=StringIO(), width=200)
        own = (f"streams.embedding.template={template}", f"run_dir={tmp_path}/{template}")
        build_run(compose_run(embedding_run(tmp_path, *own)), console)
        said[template] = console.file.getvalue()
    assert "streams.embedding.template=grit+eos adds the end of text" in said["grit"]
    assert "last_token" not in said["grit+eos"]


@pytest.mark.parametrize(("vectors", "dim"), [("rw", 8), ("moee_sum", 72)])
def test_an_export_embeds_with_the_vectors_that_were_trained(tmp_path: Path, vectors: str, dim: int) -> None:
    objective = [f"streams.embedding.objective.vectors={vectors}"]
    objective += ["streams.embedding.objective.alpha=0.5"] if vectors == "moee_sum" else []
    kept = [argument for argument in start_from(tmp_path, "mixtral") if "matryoshka" not in argument]
    train([*kept, *objective])
    export = tmp_path / "run" / "export"
    manifest = json.loads((export / "unified_lm.json").read_text())
    assert (manifest["method"], manifest["embedding_dim"]) == (vectors, dim)
    assert manifest.get("alpha", 1.0) == (0.5 if vectors == "moee_sum" else 1.0)
    (module,) = json.loads((export / "modules.json").read_text())
    assert module["type"].endswith("UseUnifiedLM"), "sentence-transformers knows no routing, and refuses"
    assert "routing" in (export / "README.md").read_text()
    model = UnifiedLM.from_pretrained(export, device="cpu")
    assert model.encode(["a text"]).shape == (1, dim)
    assert model.generate("Say something.", max_new_tokens=2) is not None


def test_vectors_that_an_export_could_not_have_are_refused(tmp_path: Path) -> None:
    arguments = [argument for argument in start_from(tmp_path, "mixtral") if "matryoshka" not in argument]
    other = "streams.other={format: pairs, sources: [{builtin: pydocs}], batch_size: 4, objective: {name: contrastive}}"
    routed = "streams.embedding.objective.vectors=rw"
    with pytest.raises(ConfigError, match=r"streams: compare different vectors \(hs \(alpha 1\), rw \(alpha 1\)\)"):
        compose_run([*arguments, routed, f"+{other}"])
    with pytest.raises(ConfigError, match=r"model.projection_dim: .* vectors=rw compares routing alone"):
        compose_run([*arguments, routed, "model.projection_dim=16"])


def test_a_run_that_goes_on_with_other_vectors_says_so(tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", "mixtral", changes={"method": "rw"})
    kept = [a for a in small_run(tmp_path, tmp_path / "run", "max_steps=1") if a != "model=tiny_random"]
    notices = build_run(
        compose_run([*kept, f"model.init_from={export}", "model.family=mixtral", "model.dtype=float32"])
    ).loaded.provenance["notices"]
    assert any("embeds with method rw; this run compares hs" in notice for notice in notices)


@pytest.mark.parametrize("trained", ["bidirectional", "bidirectional_keep_first", "causal"])
def test_a_run_that_goes_on_with_another_attention_says_so(trained: str, tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", changes={"attention": trained})
    kept = [a for a in small_run(tmp_path, tmp_path / "run", "max_steps=1") if a != "model=tiny_random"]
    for attention in ("bidirectional", "bidirectional_keep_first", "causal"):
        arguments = [*kept, f"model.init_from={export}", "model.family=llama", f"streams.embedding.attention={attention}"]
        notices = build_run(compose_run(arguments)).loaded.provenance["notices"]
        said = [notice for notice in notices if f"trained to embed with {trained} attention" in notice]
        assert len(said) == (attention != trained)
        assert all(f"streams.embedding.attention={trained} keeps it" in notice for notice in said)
