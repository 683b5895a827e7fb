"""Does a freshly written export do, in stock tools, what it was trained to do?

Runs on the folder before it is renamed into place: an export that fails never replaces one that works.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from unified_lm.core.errors import CheckpointError, ModelError
from unified_lm.core.tables import choose
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder
from unified_lm.data.prompts.templates import Template
from unified_lm.export.manifest import Manifest
from unified_lm.export.samples import embedding_sample
from unified_lm.export.standardizer_files import load_standardizer
from unified_lm.models.backbone import Backbone
from unified_lm.models.embedding import embed_samples
from unified_lm.models.pooling import Projection
from unified_lm.models.standardizer import embedding_head

TOLERANCE = 1e-4
"""Largest difference between our vectors (of length 1) and those of sentence-transformers, both computed in float32.

Float32 itself differs by 1e-7 to 1e-5 between packed and padded attention, most in models whose states have massive
activations. Another prompt or pool span moves vectors by 1e-2 and more.
"""

LEAK = 1e-5
"""Relative change of a state from which on it counts as having seen a changed token; one that has not is equal to the bit."""

PROJECTION_FOLDER = "2_Dense"
"""Where the linear head on the pooled vector is kept, in the form that sentence-transformers reads."""

_TEXTS = ("a short text", "A longer text, so that the two are padded when they share a batch.", "Zwölf – 十二")
_log = logging.getLogger(__name__)


class Verification(Enum):
    """How much to prove about an export.

    Attributes:
        NONE: nothing.
        WEIGHTS: every tensor that transformers loads from the folder equals the model's, rounded to the export's type.
        STOCK: also, with stock tools and in float32: the language model is causal (a leak probe), the embedding model has the
            attention it was trained with (another), and sentence-transformers gives our vectors for every prompt. What
            needs sentence-transformers is left out, with a warning, where it is not installed.
    """

    NONE = "none"
    WEIGHTS = "weights"
    STOCK = "stock"

    @classmethod
    def parse(cls, name: str) -> Verification:
        """The verification of that name.

        Raises:
            CheckpointError: there is none.
        """
        return choose(cls, name, "verification", CheckpointError)


@torch.no_grad()
def verify_export(
    folder: Path,
    source: PreTrainedModel,
    manifest: Manifest,
    template: Template,
    verification: Verification,
    sentence_transformers: bool,
) -> None:
    """Check a written folder.

    Args:
        folder: the export, complete.
        source: the model it was written from.
        manifest: its manifest.
        template: its prompt template.
        verification: how much to check.
        sentence_transformers: whether the folder is meant to load there.

    Raises:
        CheckpointError: something differs. The text says what.
    """
    if verification is Verification.NONE:
        return
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    _check_weights(loaded, source, folder)
    if verification is Verification.WEIGHTS:
        return
    if manifest.can_generate or manifest.attention == "causal":
        _check_causal(loaded.float())
    if manifest.can_embed and sentence_transformers:
        verify_stock_vectors(folder, loaded, manifest, template)


@torch.no_grad()
def verify_stock_vectors(folder: Path, loaded: PreTrainedModel, manifest: Manifest, template: Template) -> None:
    """Check that sentence-transformers embeds with a folder as we do; warn where it is not installed.

    Args:
        folder: the export, complete.
        loaded: the language model in it, in evaluation mode. It is turned to float32.
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
    ours = _our_vectors(folder, loaded.float(), manifest, template)
    _check_sentence_transformers(folder, manifest, template, ours)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading bars off the terminal, and its reports that an embedding model leaves the head unused."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_causal(loaded: PreTrainedModel) -> None:
    def logits(tokens: torch.Tensor) -> torch.Tensor:
        """int64 `[S, T]` to logits `[S, T, V]`."""
        return loaded(input_ids=tokens, use_cache=False).logits

    if _sees_future(logits, _vocabulary(loaded)):
        raise CheckpointError("the export would not generate causally: in AutoModelForCausalLM a token sees its future.")


def _vocabulary(model: PreTrainedModel) -> int:
    return int(cast(torch.Tensor, model.get_input_embeddings().weight).shape[0])


def _check_weights(loaded: PreTrainedModel, source: PreTrainedModel, folder: Path) -> None:
    own = source.state_dict()
    state = loaded.state_dict()
    if set(own) != set(state):
        different = sorted(set(own) ^ set(state))
        raise CheckpointError(f"{len(different)} tensors are only in the model or only in {folder}, e.g. '{different[0]}'.")
    for name, tensor in state.items():
        expected = own[name].detach().cpu().to(tensor.dtype)
        if not torch.equal(expected, tensor.cpu()):
            raise CheckpointError(
                f"tensor '{name}' changed on its way through {folder}: the family's files are not written faithfully."
            )


def _sees_future(run: Any, vocabulary: int) -> bool:
    """Whether an earlier position notices that the last of 12 tokens changed; `run` maps `[1, 12]` to `[1, 12, ...]`."""
    tokens = 3 + torch.arange(12)[None] * 7
    changed = tokens.clone()
    changed[0, -1] += vocabulary // 2
    before, after = run(tokens % vocabulary)[0], run(changed % vocabulary)[0]
    difference = (after - before).float().flatten(1).norm(dim=-1) / before.float().flatten(1).norm(dim=-1).clamp_min(1e-12)
    return bool(difference[:-1].max() > LEAK)


def _our_vectors(folder: Path, loaded: PreTrainedModel, manifest: Manifest, template: Template) -> dict[str, torch.Tensor]:
    """Prompt name -> unit vectors `[3, D]` of the probe texts, through our own packed attention."""
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
    """The linear head that an export keeps beside its weights, in float32; None where it has none."""
    if manifest.projection_dim is None:
        return None
    projection = Projection(hidden_size, manifest.projection_dim)
    projection.load_state_dict(load_file(folder / PROJECTION_FOLDER / "model.safetensors"))
    return projection.float().eval()


def _check_sentence_transformers(folder: Path, manifest: Manifest, template: Template, ours: dict[str, torch.Tensor]) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(folder), device="cpu", local_files_only=True, trust_remote_code=False, model_kwargs={"dtype": torch.float32}
    )
    transformer = model[0]

    def states(tokens: torch.Tensor) -> torch.Tensor:
        """int64 `[S, T]` to hidden states `[S, T, D]`."""
        return transformer({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})["token_embeddings"]

    bidirectional = _sees_future(states, _vocabulary(cast(PreTrainedModel, transformer.auto_model)))
    if bidirectional != (manifest.attention == "bidirectional"):
        raise CheckpointError(
            f"the export would embed with the wrong attention: in sentence-transformers a token sees "
            f"{'its' if bidirectional else 'no'} future, and the model was trained with {manifest.attention} attention."
        )
    for name, expected in ours.items():
        vectors = model.encode(list(_TEXTS), prompt_name=name, convert_to_tensor=True, show_progress_bar=False)
        difference = float((F.normalize(vectors.float().cpu(), dim=-1) - expected).abs().max())
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"sentence-transformers gives other vectors for prompt '{name}' of template '{template.name}': they differ by "
                f"{difference:.1e}, allowed {TOLERANCE:.0e}."
            )
