"""Verification that a new export does in stock tools what it was trained to do.

It runs on the folder before it is renamed to its final name, so that an export that fails never replaces one that works.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from unified_lm.core.errors import CheckpointError, ModelError
from unified_lm.core.tables import choose
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder
from unified_lm.data.prompts.templates import Template
from unified_lm.export.manifest import Manifest
from unified_lm.export.samples import embedding_sample
from unified_lm.export.shallow import shallow_view
from unified_lm.export.standardizer_files import load_standardizer
from unified_lm.export.weight_files import Digest
from unified_lm.models.backbone import Backbone
from unified_lm.models.embedding import embed_samples
from unified_lm.models.headless import head_names
from unified_lm.models.pooling import Projection
from unified_lm.models.probe import rounding_of
from unified_lm.models.standardizer import embedding_head

TOLERANCE = 1e-4
"""Largest allowed difference between our vectors (of length 1) and those of sentence-transformers, both computed in float32.

Rounding alone makes 1e-7 to 1e-5 between packed and padded attention, most in models whose states have massive activations. A
wrong prompt or pool span makes 1e-2 and more.
"""

LEAK = 1e-5
"""Relative change of a state above which it counts as having seen a changed token. Without a leak it is bit for bit equal, but
in mixtures of experts (`models.probe.rounding_of`)."""

PROJECTION_FOLDER = "2_Dense"
"""Folder of the linear head on the pooled vector, a `Dense` module of sentence-transformers."""

_TEXTS = ("a short text", "A longer text, so that the two are padded when they share a batch.", "Zwölf – 十二")
_log = logging.getLogger(__name__)


class Verification(Enum):
    """How much of an export to verify.

    Attributes:
        FULL: what stock tools do with the folder. Every tensor that transformers loads equals what was exported, rounded to the
            export's dtype; then in float32: the language model is causal and the embedding model has the attention that it
            was trained with (two leak probes), and sentence-transformers computes our vectors for every prompt. If
            sentence-transformers is not installed, its checks are skipped with a warning. Takes 4 bytes per parameter.
        SAMPLED: the same, for the model's first layers only, with its embeddings and head (`shallow_view`).
        OFF: nothing.
    """

    FULL = "full"
    SAMPLED = "sampled"
    OFF = "off"

    @classmethod
    def parse(cls, name: str) -> Verification:
        """The verification with this name.

        Raises:
            CheckpointError: there is no such verification.
        """
        return choose(cls, name, "verification", CheckpointError)


def verify_export(
    folder: Path,
    digests: Mapping[str, Digest],
    manifest: Manifest,
    template: Template,
    verification: Verification,
    sentence_transformers: bool,
) -> None:
    """Verify an export. The exported model itself is not needed.

    Args:
        folder: the complete export.
        digests: of what was exported, by the tensors' names in the model.
        manifest: its manifest.
        template: its prompt template.
        verification: how much to verify.
        sentence_transformers: whether sentence-transformers must be able to load the folder.

    Raises:
        CheckpointError: something differs; the text says what.
    """
    if verification is Verification.OFF:
        return
    sampled = verification is Verification.SAMPLED
    with shallow_view(folder) if sampled else nullcontext(folder) as read:
        _verify_language_model(read, digests, manifest, sampled=sampled)
        if manifest.can_embed and sentence_transformers:
            verify_stock_vectors(read, manifest, template)


@torch.no_grad()
def verify_stock_vectors(folder: Path, manifest: Manifest, template: Template) -> None:
    """Check that sentence-transformers computes the same vectors as we do; warn if it is not installed.

    Args:
        folder: the complete export.
        manifest: its manifest.
        template: its prompt template.

    Raises:
        CheckpointError: its attention or its vectors differ.
    """
    if find_spec("sentence_transformers") is None:
        _log.warning(
            "sentence-transformers is not installed: the export was not checked with it (pip install sentence-transformers)"
        )
        return
    # One after the other, since each holds the model in float32.
    ours = _our_vectors(folder, manifest, template)
    _check_sentence_transformers(folder, manifest, template, ours)


@torch.no_grad()
def _verify_language_model(folder: Path, digests: Mapping[str, Digest], manifest: Manifest, *, sampled: bool) -> None:
    """Check what `AutoModelForCausalLM` loads from a folder."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    _check_weights(loaded, digests, folder, sampled=sampled)
    if manifest.can_generate or manifest.attention == "causal":
        _check_causal(loaded.float())


def _check_causal(loaded: PreTrainedModel) -> None:
    def logits(tokens: torch.Tensor) -> torch.Tensor:
        """int64 `[S, T]` to logits `[S, T, V]`."""
        return loaded(input_ids=tokens, use_cache=False).logits

    if _sees_future(logits, loaded):
        raise CheckpointError("the export would not generate causally: in AutoModelForCausalLM a token sees its future.")


def _vocabulary(model: PreTrainedModel) -> int:
    return int(cast(torch.Tensor, model.get_input_embeddings().weight).shape[0])


def _check_weights(loaded: PreTrainedModel, digests: Mapping[str, Digest], folder: Path, *, sampled: bool) -> None:
    # Compared after loading with transformers, not file by file, so that renamed and tied weights are checked as users get
    # them.
    state = loaded.state_dict()
    if (head := head_names(loaded)).isdisjoint(digests):  # of a model without one, which transformers fills at random
        state = {name: tensor for name, tensor in state.items() if name not in head}
    different = sorted(set(state) - set(digests) if sampled else set(state) ^ set(digests))
    if different:
        raise CheckpointError(f"{len(different)} tensors are only in the model or only in {folder}, e.g. '{different[0]}'.")
    for name, tensor in state.items():
        if not digests[name].is_of(tensor.cpu()):
            raise CheckpointError(
                f"tensor '{name}' differs after saving to and loading from {folder}: the family is not saved faithfully."
            )


def _sees_future(run: Any, model: PreTrainedModel) -> bool:
    """Whether changing the last of 12 tokens changes an earlier position; `run` maps `[1, 12]` to `[1, 12, ...]`."""
    vocabulary, limit = _vocabulary(model), max(LEAK, rounding_of(model, torch.float32))
    tokens = 3 + torch.arange(12)[None] * 7  # distinct, and past the special tokens of most vocabularies
    changed = tokens.clone()
    changed[0, -1] += vocabulary // 2
    before, after = run(tokens % vocabulary)[0], run(changed % vocabulary)[0]
    difference = (after - before).float().flatten(1).norm(dim=-1) / before.float().flatten(1).norm(dim=-1).clamp_min(1e-12)
    return bool(difference[:-1].max() > limit)


def _our_vectors(folder: Path, manifest: Manifest, template: Template) -> dict[str, torch.Tensor]:
    """Prompt name -> unit vectors `[3, D]` of the probe texts, computed with our own packed attention."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    encoder = PromptEncoder(template, AutoTokenizer.from_pretrained(folder, local_files_only=True))
    hidden_size = loaded.config.get_text_config().hidden_size
    head = embedding_head(load_projection(folder, manifest, hidden_size), load_standardizer(folder, manifest))
    try:
        backbone = Backbone(loaded, "sdpa")
    except ModelError:  # families without the attention interface
        backbone = Backbone(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"), "padded"
        )
    vectors = {}
    for name, instruction in {"query": "", "document": "", **manifest.instructions}.items():
        encoded = encoder.embed([(text, instruction) for text in _TEXTS], manifest.max_tokens)
        samples = [embedding_sample(item, manifest.attention) for item in encoded if isinstance(item, Encoded)]
        vectors[name] = embed_samples(
            backbone, samples, manifest.pooling, token_budget=4096, device="cpu", normalize=True, projection=head
        )
    return vectors


def load_projection(folder: Path, manifest: Manifest, hidden_size: int) -> Projection | None:
    """The linear head of an export, in float32, or None if it has none.

    Raises:
        CheckpointError: the manifest records one, and its file is missing, damaged, or of another size.
    """
    if manifest.projection_dim is None:
        return None
    path = folder / PROJECTION_FOLDER / "model.safetensors"
    try:
        tensors = load_file(path)
        sizes = list(tensors["linear.weight"].shape)
        if sizes != [manifest.projection_dim, hidden_size]:
            raise ValueError(f"its weight is {sizes}, expected [{manifest.projection_dim}, {hidden_size}]")
        projection = Projection(hidden_size, manifest.projection_dim)
        projection.load_state_dict(tensors)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the export's projection, {path}: {error}. Export the run again.") from error
    return projection.float().eval()


def _check_sentence_transformers(folder: Path, manifest: Manifest, template: Template, ours: dict[str, torch.Tensor]) -> None:
    from sentence_transformers import SentenceTransformer

    # Exactly what a user's first call does: no remote code, no other files.
    model = SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, trust_remote_code=False, model_kwargs={"dtype": torch.float32}
    )
    transformer = model[0]

    def states(tokens: torch.Tensor) -> torch.Tensor:
        """int64 `[S, T]` to hidden states `[S, T, D]`."""
        return transformer({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})["token_embeddings"]

    bidirectional = _sees_future(states, cast(PreTrainedModel, transformer.auto_model))
    if bidirectional != (manifest.attention == "bidirectional"):
        raise CheckpointError(
            f"the export would embed with the wrong attention: in sentence-transformers a token sees "
            f"{'its' if bidirectional else 'no'} future, but the model was trained with {manifest.attention} attention."
        )
    for name, expected in ours.items():
        vectors = model.encode(list(_TEXTS), prompt_name=name, convert_to_tensor=True, show_progress_bar=False)
        difference = float((F.normalize(vectors.float().cpu(), dim=-1) - expected).abs().max())
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"sentence-transformers computes other vectors for prompt '{name}' of template '{template.name}': they differ "
                f"by {difference:.1e}, allowed {TOLERANCE:.0e}."
            )
