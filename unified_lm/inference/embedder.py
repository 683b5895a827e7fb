"""Texts to vectors, and to what a model keeps of them: the half of `UnifiedLM` that embeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TypedDict

import torch
from torch import nn

from unified_lm.batch import Sample
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.core.typed import half_pair
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder, Rejection
from unified_lm.export.samples import embedding_sample
from unified_lm.models.backbone import Backbone
from unified_lm.models.embedding import embed_samples, read_samples
from unified_lm.models.identity import buffers_key, identity_key
from unified_lm.models.key_values import KeyValueCache, KeyValueReader
from unified_lm.models.moee import RoutedPooling, check_method, moee_head
from unified_lm.models.pooling import Pooling, Projection
from unified_lm.models.routing import Routers
from unified_lm.models.standardizer import Standardizer, embedding_head

TOKEN_BUDGET = 4096
"""Most tokens of one forward when embedding."""

_log = logging.getLogger(__name__)


class EncodeOptions(TypedDict, total=False):
    """What `UnifiedLM.encode` can be asked for beside its texts; it says what each means."""

    method: str | None
    normalize: bool | None
    max_tokens: int | None
    token_budget: int
    show_progress: bool


@dataclass(eq=False)
class Embedder:
    """How a model embeds.

    Attributes:
        backbone: the model.
        encoder: template and tokenizer.
        device: where the model runs.
        pooling: what becomes of the states of a text.
        attention: "bidirectional", "bidirectional_keep_first" or "causal".
        normalize: whether vectors are scaled to length 1, unless a call says otherwise.
        max_tokens: limit of a text with its prompt, unless a call says otherwise.
        projection: linear head on the pooled vector, or None.
        standardizer: applied after the head, or None; see `set_standardizer`.
        num_truncated: number of texts truncated so far.
        method: what a vector is made of, one of `models.moee.METHODS`, unless a call says otherwise.
        alpha: weight of the routing in method "moee_sum".
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
    method: str = "hs"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_method(self.method, self.alpha)

    @property
    def dim(self) -> int:
        """Dimensions of a vector."""
        if self.method == "hs":
            return self._states_dim
        return self.routers.num_features + self._states_dim * (self.method != "rw")

    @cached_property
    def routers(self) -> Routers:
        """What reads the routers of a mixture of experts.

        Raises:
            ModelError: the model is dense, or its routers are not understood.
        """
        return Routers(self.backbone)

    @property
    def _states_dim(self) -> int:
        return self.backbone.hidden_size if self.projection is None else self.projection.linear.out_features

    def set_standardizer(self, standardizer: Standardizer | None) -> None:
        """Replace the standardizer; moves it to the model's device.

        Args:
            standardizer: of the states, or, for the routing too, of the dimensions of method "moee_concat".

        Raises:
            ConfigError: it has another number of dimensions.
        """
        if standardizer is not None and standardizer.dim not in (dims := self._standardized_dims()):
            raise ConfigError(
                f"the standardizer has {standardizer.dim} dimensions, the embeddings have {' or '.join(map(str, dims))}."
            )
        self.standardizer = None if standardizer is None else standardizer.to(self.device).eval()

    def _standardized_dims(self) -> list[int]:
        states = self._states_dim
        return [states] if self.method == "hs" else [states, states + self.routers.num_features]

    def _pooling(self, method: str | None) -> tuple[Pooling | RoutedPooling, nn.Module | None]:
        """What pools, and what is applied to the pooled vectors."""
        method = self.method if method is None else method
        check_method(method, self.alpha)
        if method == "hs":
            fitted = self.standardizer
            if fitted is not None and fitted.dim != self._states_dim:
                fitted = fitted.part(0, self._states_dim)
            return self.pooling, embedding_head(self.projection, fitted)
        pooling = RoutedPooling(self.routers, self.pooling, self.projection, states=method != "rw")
        return pooling, moee_head(method, self.alpha, (self._states_dim, self.routers.num_features), self.standardizer)

    def samples(self, texts: Sequence[str], instruction: str, max_tokens: int | None, attention: str = "") -> list[Sample]:
        """What the model reads of each text; those that are cut are counted and logged.

        Args:
            texts: the texts.
            instruction: of them all, "" for none.
            max_tokens: limit of a text with its prompt, or None for the model's own.
            attention: another one than the model embeds with.

        Raises:
            DataError: a text is empty, not a string or no Unicode (the error names its index), or the instruction alone
                reaches the limit.
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
        method: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Vectors, float32 `[N, D]` on the CPU, in the order of the samples."""
        if not samples:
            return torch.zeros(0, self.dim)
        pooling, head = self._pooling(method)
        return embed_samples(
            self.backbone,
            samples,
            pooling,
            token_budget=token_budget,
            device=self.device,
            normalize=self.normalize if normalize is None else normalize,
            projection=head,
            progress=progress,
        )

    def read(self, samples: Sequence[Sample], *, token_budget: int) -> Iterator[tuple[int, torch.Tensor, KeyValueCache]]:
        """Index, vector `[D]`, and keys and values of each sample; longest first."""
        pooling, head = self._pooling(None)
        return read_samples(
            self.reader,
            samples,
            pooling,
            token_budget=token_budget,
            device=self.device,
            normalize=self.normalize,
            projection=head,
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
            f"{weights_hash}{buffers_key(self.backbone.causal_lm)}" if weights_hash else identity_key(self.backbone.causal_lm),
            self.encoder.template.signature,
            self.encoder.fingerprint,
        ]
        said += [self.pooling.value, self.attention, str(self.normalize)]
        said += [] if self.method == "hs" else [self.method, str(self.alpha)]
        digest = blake2b("\x1f".join(said).encode(), digest_size=16)
        head = embedding_head(self.projection, self.standardizer)
        for name, value in (head.state_dict() if head is not None else {}).items():
            digest.update(f"{name} {list(value.shape)}".encode() + value.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()


def encode_texts(encoder: PromptEncoder, texts: Sequence[str], instruction: str, max_tokens: int) -> list[Encoded]:
    """The tokens of texts to embed, in order; see `Embedder.samples`."""
    if half_pair(instruction) is not None:
        raise DataError(f"the instruction {instruction!r} has half of a surrogate pair, which is no Unicode text.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"texts[{index}] is a {type(text).__name__}, expected a string.")
        if (place := half_pair(text)) is not None:
            raise DataError(f"texts[{index}]: character {place} is half of a surrogate pair, which is no Unicode text.")
    encoded: list[Encoded] = []
    for index, item in enumerate(encoder.embed([(text, instruction) for text in texts], max_tokens)):
        if isinstance(item, Rejection):
            advice = " Leave it out, or give it content." if item is Rejection.EMPTY else ""
            raise DataError(f"texts[{index}] cannot be embedded: {item.value}.{advice}")
        encoded.append(item)
    return encoded
