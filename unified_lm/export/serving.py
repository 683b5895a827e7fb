"""Copies of an export for serving engines, which read less of it than sentence-transformers does.

vLLM and Text Embeddings Inference (TEI) take the mask from the root config.json and know nothing of the overlay by which
sentence-transformers embeds bidirectionally, so they would embed a dual-mode export causally, in silence. One process of theirs
serves one mode anyway, so each mode gets a folder of its own; the weights are hard links and take no space.

What each engine reads is from its source, not tried: vLLM 0.33.0, text-embeddings-inference of July 2026 (docs/serving.md).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from unified_lm.core.errors import CheckpointError, did_you_mean
from unified_lm.core.files import write_json, write_text
from unified_lm.core.outputs import check_folder, write_folder
from unified_lm.export.manifest import FILE_NAME, FOR_ENGINE, Manifest
from unified_lm.export.model_card import model_card
from unified_lm.export.sentence_transformers_files import read_object, read_prompts
from unified_lm.export.tokenizer_files import with_end
from unified_lm.models.families import OWN_FAMILIES
from unified_lm.models.weights_hash import check_weights

_SENTENCE_TRANSFORMERS = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_GENERATION = ("generation_config.json", "chat_template.jinja")
_POOLING = Path("1_Pooling", "config.json")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What a serving engine makes of a folder.

    Attributes:
        mode: "embed" or "generate".
        launch: its command line; `{folder}` and `{pooling}` are filled in.
        bidirectional: families that it can embed with bidirectional attention.
        families: families that it can embed at all, or None for all of transformers'.
        poolings: our name of a pooling -> the engine's.
        scaled_rope: whether it reads scaled rotary frequencies.
        note: what else the user must know.
    """

    mode: str
    launch: str
    bidirectional: frozenset[str] = frozenset()
    families: frozenset[str] | None = None
    poolings: tuple[tuple[str, str], ...] = ()
    scaled_rope: bool = True
    note: str = ""


ENGINES: dict[str, Engine] = {
    "vllm-embed": Engine(
        mode="embed",
        launch="vllm serve {folder} --runner pooling",
        bidirectional=frozenset({"llama", "mistral", "qwen2", "qwen3", "apertus", "qwen3_next", "phi3", "gemma3_text"}),
        poolings=(("mean", "MEAN"), ("last_token", "LAST"), ("cls", "CLS")),
    ),
    "tei": Engine(
        mode="embed",
        launch="text-embeddings-router --model-id {folder} --pooling {pooling}",
        bidirectional=frozenset({"llama", "mistral", "qwen3"}),
        families=frozenset({"llama", "mistral", "qwen2", "qwen3"}),
        poolings=(("mean", "mean"), ("last_token", "last-token"), ("cls", "cls")),
        scaled_rope=False,
        note="TEI runs Llama models on CUDA only.",
    ),
    "vllm-generate": Engine(mode="generate", launch="vllm serve {folder} --runner generate"),
}
"""Engines by the name that `unified-lm export --for` takes."""


def write_serving(source: Path, target: Path, engine_name: str, *, pool_prompt: bool = False) -> str:
    """Write the copy of an export that an engine can serve; a previous one is replaced once the new one is complete.

    Args:
        source: the export.
        target: the folder to write.
        engine_name: one of `ENGINES`.
        pool_prompt: whether prompts are pooled with the text. Engines cannot leave them out; a model that was trained without
            them then gives other vectors than sentence-transformers does, the same in every engine.

    Returns:
        The command line that serves the folder.

    Raises:
        CheckpointError: `source` is no export, or the engine cannot serve it as it was trained; all reasons are named.
        ModelError: the weights of `source` are not those that were exported, or some are missing.
        OutputError: `target` holds what this package did not write.
    """
    if engine_name not in ENGINES:
        raise CheckpointError(f"unknown engine '{engine_name}'.{did_you_mean(engine_name, ENGINES)}")
    check_folder(target, FOR_ENGINE, [source])
    engine = ENGINES[engine_name]
    manifest = Manifest.load(source)
    config = read_object(source / "config.json")
    pools_prompt = pool_prompt or bool(manifest.template_fields.get("pools_prompt", False))
    obstacles = _obstacles(engine, manifest, config, read_prompts(source), pool_prompt=pools_prompt)
    if obstacles:
        raise CheckpointError(f"{source} cannot be served by {engine_name}: " + " ".join(obstacles))
    check_weights(source, manifest.weights_hash)
    launch = engine.launch.format(folder=target, pooling=dict(engine.poolings).get(manifest.pooling, ""))
    complete = replace(manifest, modes=(engine.mode,))

    def fill(building: Path) -> None:
        """Link or copy what the engine reads into `building`, and write what must differ."""
        _copy(source, building, engine)
        write_json(building / "config.json", _engine_config(config, engine, manifest))
        if engine.mode == "embed":
            pooling = read_object(source / _POOLING)
            write_json(building / _POOLING, pooling | {"include_prompt": pool_prompt or pooling.get("include_prompt", True)})
            _end_texts(source, building)
        complete.save(building)
        card = model_card(complete, read_prompts(source), engine.mode == "embed")
        write_text(building / "README.md", f"{card.rstrip()}\n\n{_card_section(engine_name, engine, launch, pool_prompt)}")

    write_folder(target, FOR_ENGINE, fill)
    return launch


def _obstacles(
    engine: Engine, manifest: Manifest, config: dict[str, Any], prompts: dict[str, str], *, pool_prompt: bool
) -> list[str]:
    """Why the engine would not compute what was trained; one sentence each."""
    if manifest.family in OWN_FAMILIES:
        return [f"family '{manifest.family}' is this project's own, and no engine has it."]
    if engine.mode not in manifest.modes:
        return [f"it was exported to {' and '.join(manifest.modes)} only."]
    if engine.mode == "generate":
        return []
    if manifest.attention == "bidirectional_keep_first":
        return ["it embeds with a first token that sees itself alone, which no engine can be told."]
    if not prompts:
        return ["it has no files of sentence-transformers, by which engines know how to pool."]
    family, found = manifest.family, []
    if engine.families is not None and family not in engine.families:
        found.append(f"family '{family}' is not one of its: {', '.join(sorted(engine.families))}.")
    elif manifest.attention == "bidirectional" and family not in engine.bidirectional:
        served = ", ".join(sorted(engine.bidirectional))
        found.append(f"it runs family '{family}' causally whatever the configuration says. Bidirectional there: {served}.")
    if manifest.pooling not in dict(engine.poolings):
        found.append(f"it has no pooling '{manifest.pooling}'.")
    elif manifest.pooling != "last_token" and any(prompts.values()) and not pool_prompt:
        found.append(
            "it pools the prompt too, which training left out. Pass --pool-prompt to accept other vectors than training's, "
            "or fetch token embeddings and pool in the client."
        )
    if manifest.method != "hs":
        found.append(f"it embeds with routing (method {manifest.method}), which no engine computes.")
    if manifest.projection_dim is not None or manifest.standardizer is not None:
        found.append(
            "it may leave out the layers behind the pooling (2_Dense) without an error, and was not tried with them. Serve an "
            "export without them (docs/serving.md)."
        )
    rope_type = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if not engine.scaled_rope and rope_type != "default":
        found.append(f"it does not read rotary frequencies of type '{rope_type}'.")
    return found


def _engine_config(config: dict[str, Any], engine: Engine, manifest: Manifest) -> dict[str, Any]:
    """The config.json whose root says what sentence-transformers takes from the overlay."""
    causal = engine.mode == "generate" or manifest.attention == "causal"
    changed = config | {"is_causal": causal}
    if not causal:
        changed["use_bidirectional_attention"] = True
        if manifest.family == "gemma3_text" and config.get("sliding_window"):
            # Gemma 3 halves its window where this flag is set: `window // 2 + 1`. This value comes out as the trained one.
            changed["sliding_window"] = 2 * (config["sliding_window"] - 1)
    return changed


def _copy(source: Path, building: Path, engine: Engine) -> None:
    """Everything but what is written anew or belongs to the other mode; weights as hard links where the disk has them."""
    left_out = {"config.json", "README.md", FILE_NAME, *(_GENERATION if engine.mode == "embed" else _SENTENCE_TRANSFORMERS)}
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        behind_pooling = len(name.parts) > 1 and engine.mode == "generate"
        if path.is_dir() or name.as_posix() in left_out or name == _POOLING or behind_pooling:
            continue
        target = building / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target)
            continue
        try:
            os.link(path.resolve(), target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, target)


def _end_texts(source: Path, building: Path) -> None:
    """Have the tokenizer add the end token that sentence-transformers is told to add: engines read its own file alone."""
    settings = read_object(source / "sentence_bert_config.json").get("processor_kwargs") or {}
    if settings.get("add_eos_token"):
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        with_end(tokenizer, settings.get("eos_token") or str(tokenizer.eos_token)).save_pretrained(building)


def _card_section(name: str, engine: Engine, launch: str, pool_prompt: bool) -> str:
    """The section of the model card about the engine."""
    lines = [f"## Serve ({name})", "", f"```bash\n{launch}\n```", ""]
    if engine.mode == "embed":
        lines.append("Send each text with its prompt in front (see above); engines add none.")
    if pool_prompt:
        lines.append(
            "Prompts are pooled with the text here, which training did not do: all engines agree, and so does this folder"
        )
        lines.append("in sentence-transformers; the original export gives other vectors.")
    if engine.note:
        lines.append(engine.note)
    return "\n".join(lines).rstrip() + "\n"
