"""README.md of an export: what it is, how it was made, how to use it. All facts in it come from the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files

import jinja2

from unified_lm.export.manifest import FILE_NAME, Manifest
from unified_lm.models.families import OWN_FAMILIES

_REGISTERING = "import unified_lm.models.monet  # registers the family, which transformers does not know"
_TEMPLATE = "model_card.md.jinja"


def model_card(manifest: Manifest, prompts: Mapping[str, str], sentence_transformers: bool) -> str:
    """Render the text of README.md.

    Args:
        manifest: the export's manifest, complete.
        prompts: prompt name -> string, as written to config_sentence_transformers.json.
        sentence_transformers: whether the export loads in sentence-transformers.
    """
    loads = sentence_transformers and manifest.can_embed
    overlaid = loads and manifest.attention == "bidirectional" and manifest.can_generate
    tags = ["feature-extraction"] if manifest.can_embed else []
    tags += ["sentence-transformers", "sentence-similarity"] if loads else []
    tags += ["text-generation"] if manifest.can_generate else []
    tags += ["unified_lm", manifest.family]
    columns = list(dict.fromkeys(column for row in manifest.metrics.values() for column in row))
    text = files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters.update(
        json=_json, yaml=_json, cell=_cell, pretty=_pretty, cells=_cells, trained=_trained, number=lambda v: f"{v:.4g}"
    )
    card = environment.from_string(text).render(
        library="sentence-transformers" if loads else "transformers",
        pipeline="sentence-similarity" if loads else "feature-extraction" if manifest.can_embed else "text-generation",
        license=manifest.base_license,
        base_model=manifest.base_model,
        hub_base=manifest.base_model.count("/") == 1 and not manifest.base_model.startswith((".", "/", "~")),
        tags=tags,
        title=f"{manifest.recipe} on {manifest.base_model or manifest.family}",
        summary=_summary(manifest),
        modes=manifest.modes,
        sentence_transformers=loads,
        prompts=prompts,
        instruction_prompt=_instruction_prompt(manifest, prompts),
        chats=bool(manifest.template_fields.get("turns")),
        query_instruction=manifest.instructions.get("query", ""),
        settings=_settings(manifest),
        stages=manifest.stages,
        adapted=any(stage.adapter for stage in manifest.stages),
        data=manifest.data,
        metrics=manifest.metrics,
        columns=columns,
        max_tokens=manifest.max_tokens,
        overlay_note=overlaid,
        manifest_file=FILE_NAME,
        weights_hash=manifest.weights_hash,
        registering=f"\n{_REGISTERING}\n" if manifest.family in OWN_FAMILIES else "",
    )
    return card.replace("\n\n\n", "\n\n")


def _summary(manifest: Manifest) -> str:
    made = f"was made from {manifest.base_model} " if manifest.base_model else "was made "
    uses = []
    if manifest.can_embed:
        pooling = manifest.pooling.replace("_", " ")
        uses.append(f"embeds texts ({manifest.attention} attention, {pooling} pooling, {manifest.embedding_dim} dimensions)")
    if manifest.can_generate:
        uses.append("generates text (causal attention)")
    return f"This {manifest.family} model {made}with unified_lm, recipe `{manifest.recipe}`. It {' and '.join(uses)}" + (
        ", with the same weights." if len(uses) == 2 else "."
    )


def _settings(manifest: Manifest) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("model family", manifest.family),
        ("weights", manifest.dtype),
        ("prompt template", manifest.template),
    ]
    if manifest.can_embed:
        rows += [
            ("attention when embedding", manifest.attention),
            ("pooling", manifest.pooling),
            *_routed(manifest),
            ("dimensions", manifest.embedding_dim),
            ("normalized", "yes" if manifest.normalize else "no"),
            *_standardized(manifest),
            ("longest text with prompt, tokens", manifest.max_tokens),
        ]
    if manifest.base_revision:
        rows.append(("revision of the base model", manifest.base_revision))
    return rows + [(f"{name} version", version) for name, version in manifest.versions.items()]


def _routed(manifest: Manifest) -> list[tuple[str, object]]:
    if manifest.method == "hs":
        return []
    return [("vectors", f"{manifest.method}, alpha {manifest.alpha:g} (hidden states and routing, arXiv:2410.10814)")]


def _standardized(manifest: Manifest) -> list[tuple[str, object]]:
    record = manifest.standardizer
    if record is None:
        return []
    return [("standardized per dimension on", f"{record.num_texts} texts of {record.corpus} ({record.corpus_hash[:12]})")]


def _instruction_prompt(manifest: Manifest, prompts: Mapping[str, str]) -> str:
    """The template's prompt with `{instruction}` left open, including the begin-of-text token if the prompts have it."""
    form = str(manifest.template_fields.get("instruction_prompt", ""))
    bare = str(manifest.template_fields.get("bare_prompt", ""))
    if "{instruction}" not in form:
        return ""
    document = prompts.get("document", "")
    begin = (
        document[: len(document) - len(bare)] if not manifest.instructions.get("document") and document.endswith(bare) else ""
    )
    return begin + form


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _cells(row: Mapping[str, float], columns: list[str]) -> str:
    return " | ".join(f"{row[column]:.4g}" if column in row else "" for column in columns)


def _pretty(settings: Mapping[str, object]) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False, default=str)


def _trained(stage: object) -> str:
    adapter = getattr(stage, "adapter", None)
    if adapter is None:
        return "all weights"
    rows = f", and the rows of {', '.join(adapter.tokens)}" if adapter.tokens else ""
    targets = ", ".join(adapter.target_modules) + rows
    return f"LoRA r={adapter.r}, alpha={adapter.alpha:g}, dropout={adapter.dropout:g}, on {targets}"
