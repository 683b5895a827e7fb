"""Texts to vectors, and to what a model keeps of them: the half of `UnifiedLM` that embeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import torch

from unified_lm.batch import Sample
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder, Rejection
from unified_lm.export.samples import embedding_sample
from unified_lm.models.backbone import Backbone
from unified_lm.models.embedding import embed_samples, read_samples
from unified_lm.models.identity import identity_key
from unified_lm.models.key_values import KeyValueCache, KeyValueReader
from unified_lm.models.pooling import Pooling, Projection
from unified_lm.models.standardizer import Standardizer, embedding_head

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Embedder:
    """How a model embeds.

    Attributes:
        backbone: the model.
        encoder: template and tokenizer.
        device: where the model runs.
        pooling: what becomes of the states of a text.
        attention: "bidirectional" or "causal".
        normalize: whether vectors are scaled to length 1, unless a call says otherwise.
        max_tokens: limit of a text with its prompt, unless a call says otherwise.
        projection: linear head on the pooled vector, or None.
        standardizer: applied after the head, or None; see `set_standardizer`.
        num_truncated: number of texts truncated so far.
    """

    backbone: Backbone
    encoder: PromptEncoder
    device: torch.device
    pooling: Pooling
    attention: str
    normalize: bool
    max_tokens: int
    projection: Projection | None = None
    standardizer: Standardizer | None = None
    num_truncated: int = 0

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        return self.backbone.hidden_size if self.projection is None else self.projection.linear.out_features

    def set_standardizer(self, standardizer: Standardizer | None) -> None:
        """Replace the standardizer; moves it to the model's device.

        Raises:
            ConfigError: it has another number of dimensions.
        """
        if standardizer is not None and standardizer.dim != self.dim:
            raise ConfigError(f"the standardizer has {standardizer.dim} dimensions, the embeddings have {self.dim}.")
        self.standardizer = None if standardizer is None else standardizer.to(self.device).eval()

    def samples(self, texts: Sequence[str], instruction: str, max_tokens: int | None, attention: str = "") -> list[Sample]:
        """What the model reads of each text; those that are cut are counted and logged.

        Args:
            texts: the texts.
            instruction: of them all, "" for none.
            max_tokens: limit of a text with its prompt, or None for the model's own.
            attention: another one than the model embeds with.

        Raises:
            DataError: a text is empty or not a string (the error names its index), or the instruction alone reaches the limit.
        """
        limit = self.max_tokens if max_tokens is None else max_tokens
        encoded = encode_texts(self.encoder, texts, instruction, limit)
        if truncated := sum(item.truncated for item in encoded):
            self.num_truncated += truncated
            _log.warning("%d of %d texts were cut to %d tokens", truncated, len(texts), limit)
        return [embedding_sample(item, attention or self.attention) for item in encoded]

    def embed(
        self,
        samples: Sequence[Sample],
        *,
        token_budget: int,
        normalize: bool | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Vectors, float32 `[N, D]` on the CPU, in the order of the samples."""
        if not samples:
            return torch.zeros(0, self.dim)
        return embed_samples(
            self.backbone,
            samples,
            self.pooling,
            token_budget=token_budget,
            device=self.device,
            normalize=self.normalize if normalize is None else normalize,
            projection=embedding_head(self.projection, self.standardizer),
            progress=progress,
        )

    def read(self, samples: Sequence[Sample], *, token_budget: int) -> Iterator[tuple[int, torch.Tensor, KeyValueCache]]:
        """Index, vector `[D]`, and keys and values of each sample; longest first."""
        return read_samples(
            self.reader,
            samples,
            self.pooling,
            token_budget=token_budget,
            device=self.device,
            normalize=self.normalize,
            projection=embedding_head(self.projection, self.standardizer),
        )

    @cached_property
    def reader(self) -> KeyValueReader:
        """What reads, moves and joins keys and values.

        Raises:
            ModelError: the model's keys and values cannot be kept.
        """
        return KeyValueReader(self.backbone)

    def key(self, weights_hash: str = "") -> str:
        """A hash of all that a vector depends on beside text and instruction, 32 hexadecimal digits.

        Args:
            weights_hash: of the model, where it is known; else its weights are read.
        """
        said = [
            weights_hash or identity_key(self.backbone.causal_lm),
            self.encoder.template.signature,
            self.encoder.fingerprint,
        ]
        said += [self.pooling.value, self.attention, str(self.normalize)]
        digest = blake2b("\x1f".join(said).encode(), digest_size=16)
        head = embedding_head(self.projection, self.standardizer)
        for name, value in (head.state_dict() if head is not None else {}).items():
            digest.update(f"{name} {list(value.shape)}".encode() + value.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()


def encode_texts(encoder: PromptEncoder, texts: Sequence[str], instruction: str, max_tokens: int) -> list[Encoded]:
    """The tokens of texts to embed, in order; see `Embedder.samples`."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"texts[{index}] is a {type(text).__name__}, expected a string.")
    encoded: list[Encoded] = []
    for index, item in enumerate(encoder.embed([(text, instruction) for text in texts], max_tokens)):
        if isinstance(item, Rejection):
            advice = " Leave it out, or give it content." if item is Rejection.EMPTY else ""
            raise DataError(f"texts[{index}] cannot be embedded: {item.value}.{advice}")
        encoded.append(item)
    return encoded
