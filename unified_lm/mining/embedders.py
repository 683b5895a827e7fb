"""One interface to embedding models: exports of this package, and sentence-transformers folders (teachers)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from unified_lm.core.errors import CheckpointError, ConfigError
from unified_lm.data.rows.records import Text
from unified_lm.export.manifest import FILE_NAME
from unified_lm.inference.loading import model_folder, weights_dtype
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.load_errors import explain
from unified_lm.models.precision import AUTO, auto_inference_dtype

_READ_BYTES = 1 << 22


class Embedder(Protocol):
    """Embeds queries and documents."""

    @property
    def key(self) -> str:
        """Identifies everything that affects the vectors: content of the model, prompts, limits."""
        ...

    def queries(self, texts: Sequence[Text]) -> np.ndarray:
        """float32 `[texts, D]`, of length 1."""
        ...

    def documents(self, texts: Sequence[Text]) -> np.ndarray:
        """float32 `[texts, D]`, of length 1."""
        ...


def load_embedder(
    name_or_path: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    max_tokens: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    batch_size: int = 32,
) -> Embedder:
    """Load an embedding model.

    Args:
        name_or_path: an export of this package or its run, a sentence-transformers folder, or the Hub name of either.
        device: None selects the accelerator if there is one.
        dtype: dtype of the weights in memory; None keeps the stored one, as "auto" does unless the machine would emulate it.
        max_tokens: limit in tokens of a text with its prompt; None uses the model's own.
        query_prompt: prefix of queries for sentence-transformers models; ``{instruction}`` is replaced by the row's
            instruction. None uses the model's own query prompt and ignores the rows' instructions.
        document_prompt: the same for documents.
        batch_size: texts per forward (sentence-transformers only; exports of this package pack by tokens).

    Raises:
        CheckpointError, ModelError: no such model, or one that cannot be loaded.
        ConfigError: prompts for an export of this package, which has its own template.
    """
    folder = model_folder(name_or_path, None)
    content = folder_hash(folder)
    if (folder / FILE_NAME).is_file():
        if query_prompt is not None or document_prompt is not None:
            raise ConfigError(f"{name_or_path} is an export with its own template: leave out the prompts.")
        ours = UnifiedLM.from_pretrained(folder, device=device, dtype=dtype, check_weights=True)
        with ours.borrow_backbone() as backbone:
            dtype = str(backbone.causal_lm.dtype) if dtype == AUTO else dtype  # which differs between machines
        return _Unified(ours, f"{content}:{dtype}:{max_tokens}", max_tokens)
    # A malformed prompt fails here, before the model loads for minutes.
    for name, prompt in (("query", query_prompt), ("document", document_prompt)):
        _fill(prompt or "", "x", name)
    model = _sentence_transformer(folder, device, dtype)
    if max_tokens is not None:
        model.max_seq_length = max_tokens
    dtype = str(model.dtype) if dtype == AUTO else dtype
    key = f"{content}:{dtype}:{max_tokens}:{query_prompt!r}:{document_prompt!r}"
    return _SentenceTransformers(model, key, query_prompt, document_prompt, batch_size)


def folder_hash(folder: Path) -> str:
    """Hash of the names and contents of all files of a folder, except hidden ones."""
    digest = blake2b(digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        digest.update(f"\x00{name}\x00{path.stat().st_size}\x00".encode())
        with open(path, "rb") as handle:
            while block := handle.read(_READ_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _sentence_transformer(folder: Path, device: str | None, dtype: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise CheckpointError(
            f"{folder} is not an export of this package, and sentence-transformers, which might load it, is not installed: "
            "pip install 'unified_lm[sentence-transformers]'."
        ) from error
    if not (folder / "modules.json").is_file():
        raise CheckpointError(
            f"{folder} has neither {FILE_NAME} (an export of this package) nor modules.json (sentence-transformers), so how it "
            "embeds is unknown. Give the 'export' folder of a run, or a sentence-transformers folder."
        )
    options = {"dtype": weights_dtype(dtype)}
    with explain(str(folder), "sentence-transformers model", is_hub=False):
        model = SentenceTransformer(str(folder), device=device, model_kwargs=options)
    stored: torch.dtype = model.dtype or torch.float32
    if dtype == AUTO and (wider := auto_inference_dtype(stored, model.device)) is not stored:
        model.to(wider)
    return model


@dataclass(frozen=True)
class _Unified:
    """An export of this package: its template places the rows' instructions; a query without one gets the export's own."""

    model: UnifiedLM
    key: str
    max_tokens: int | None

    def queries(self, texts: Sequence[Text]) -> np.ndarray:
        """See `Embedder.queries`."""
        default = self.model.query_instruction
        return self._encode([text if text.instruction else Text(text.text, default) for text in texts])

    def documents(self, texts: Sequence[Text]) -> np.ndarray:
        """See `Embedder.documents`."""
        return self._encode(texts)

    def _encode(self, texts: Sequence[Text]) -> np.ndarray:
        def encode(several: list[str], instruction: str) -> np.ndarray:
            """Embed texts that share an instruction."""
            return self.model.encode(several, instruction, normalize=True, max_tokens=self.max_tokens)

        return _by_instruction(texts, encode)


@dataclass(frozen=True)
class _SentenceTransformers:
    """A sentence-transformers model."""

    model: Any
    key: str
    query_prompt: str | None
    document_prompt: str | None
    batch_size: int

    def queries(self, texts: Sequence[Text]) -> np.ndarray:
        """See `Embedder.queries`."""
        return self._encode(texts, self.query_prompt, self.model.encode_query, "query")

    def documents(self, texts: Sequence[Text]) -> np.ndarray:
        """See `Embedder.documents`."""
        return self._encode(texts, self.document_prompt, self.model.encode_document, "document")

    def _encode(self, texts: Sequence[Text], prompt: str | None, own: Callable[..., np.ndarray], role: str) -> np.ndarray:
        settings = {"normalize_embeddings": True, "batch_size": self.batch_size, "show_progress_bar": False}
        if prompt is None:
            return own([text.text for text in texts], **settings)

        def encode(several: list[str], instruction: str) -> np.ndarray:
            """Embed texts that share an instruction, with the chosen prompt."""
            return self.model.encode(several, prompt=_fill(prompt, instruction, role), **settings)

        return _by_instruction(texts, encode)


def _fill(prompt: str, instruction: str, role: str) -> str:
    """Insert the instruction into a prompt.

    Raises:
        ConfigError: the prompt has another field.
    """
    try:
        return prompt.format(instruction=instruction)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"the {role} prompt {prompt!r} has a field that is not {{instruction}}: {error}.") from error


def _by_instruction(texts: Sequence[Text], encode: Callable[[list[str], str], np.ndarray]) -> np.ndarray:
    """Encode texts in groups that share an instruction; the result is in the order of `texts`."""
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        groups.setdefault(text.instruction, []).append(index)
    order: list[int] = []
    parts = []
    for instruction, indices in groups.items():
        parts.append(np.asarray(encode([texts[i].text for i in indices], instruction), np.float32))
        order.extend(indices)
    vectors = np.empty((len(texts), parts[0].shape[1]), np.float32)
    vectors[order] = np.concatenate(parts)
    return vectors
