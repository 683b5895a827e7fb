"""`UnifiedLM`: one model that embeds and generates.

Embedding runs in packs through our attention, generation through transformers' own. The switch between the two is in the
model's configuration, so the two take turns under a lock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unified_lm.core.errors import CheckpointError, ConfigError, DataError, did_you_mean
from unified_lm.data.prompts.encoding import Encoded, PromptEncoder, Rejection
from unified_lm.data.prompts.templates import Template, get_template
from unified_lm.export.directory import stop_token_ids
from unified_lm.export.manifest import ATTENTIONS, MODES, Manifest
from unified_lm.export.samples import embedding_sample
from unified_lm.inference.loading import load_parts
from unified_lm.models.backbone import Backbone
from unified_lm.models.embedding import embed_samples
from unified_lm.models.pooling import Pooling, Projection
from unified_lm.models.standardizer import Standardizer, embedding_head

TOKEN_BUDGET = 4096
"""The most tokens of one forward when embedding."""

Messages = Sequence[Mapping[str, str]]
"""A conversation: `{"role": ..., "content": ...}` per turn, the last one to be answered."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """One result of a search.

    Attributes:
        index: place of the document among those searched.
        score: cosine similarity with the query.
    """

    index: int
    score: float


class UnifiedLM:
    """A causal language model that also embeds.

    Attributes:
        manifest: what the export says about itself; None for a model that was not exported by this package.
        num_truncated: texts that `encode` cut to their limit, since loading.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | Template,
        pooling: str = "mean",
        attention: str = "bidirectional",
        normalize: bool = True,
        projection: Projection | None = None,
        standardizer: Standardizer | None = None,
        instructions: Mapping[str, str] | None = None,
        max_tokens: int = 512,
        modes: Sequence[str] = MODES,
        attention_kernel: str = "auto",
        manifest: Manifest | None = None,
    ) -> None:
        """Wrap a loaded model; `from_pretrained` loads an export.

        Args:
            causal_lm: on the device that it will run on. Its attention is routed through our kernels from now on.
            tokenizer: its fast tokenizer.
            template: prompt template, or its name.
            pooling: "mean", "weighted_mean", "last_token" or "cls".
            attention: how texts are embedded, "bidirectional" or "causal".
            normalize: whether `encode` scales vectors to length 1 unless told otherwise.
            projection: linear head on the pooled vector, or None.
            standardizer: applied after the head and before scaling to length 1, or None.
            instructions: prompt name -> instruction; "query" is what `search` embeds queries with.
            max_tokens: limit of an embedded text with its prompt, in tokens.
            modes: what the model may be asked for: "embed", "generate".
            attention_kernel: see `Backbone`.
            manifest: kept for the reader.

        Raises:
            ConfigError: unknown attention or pooling, or a template that does not fit the tokenizer.
            ModelError: the kernel cannot run the model.
        """
        if attention not in ATTENTIONS:
            raise ConfigError(f"unknown attention '{attention}'.{did_you_mean(attention, ATTENTIONS)}")
        self._backbone = Backbone(causal_lm.eval(), attention_kernel)
        self._device = next(causal_lm.parameters()).device
        self._template = get_template(template) if isinstance(template, str) else template
        self._encoder = PromptEncoder(self._template, tokenizer)
        self._tokenizer = tokenizer
        self._pooling = Pooling.parse(pooling)
        self._attention = attention
        self._normalize = normalize
        self._projection = None if projection is None else projection.to(self._device).eval()
        self.standardizer = standardizer
        self._instructions = dict(instructions or {})
        self._max_tokens = max_tokens
        self._modes = tuple(modes)
        self._turn = threading.Lock()
        self.manifest = manifest
        self.num_truncated = 0

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attention_kernel: str = "auto",
        revision: str | None = None,
        template: str | Template | None = None,
        pooling: str | None = None,
        attention: str | None = None,
    ) -> UnifiedLM:
        """Load an export, or any causal language model if told how to embed with it.

        Args:
            name_or_path: a folder, or a Hub name.
            device: where to run; None takes the accelerator if there is one.
            dtype: type of the weights in memory ("float32", "bfloat16"...); None takes the stored one.
            attention_kernel: see `Backbone`.
            revision: Hub revision.
            template: prompt template in place of the export's. Needed where the folder is no export.
            pooling: in place of the export's; "mean" where the folder is no export.
            attention: in place of the export's; "bidirectional" where the folder is no export.

        Raises:
            CheckpointError: nothing there, a damaged export, or no export and no template given.
            ConfigError: unknown template, pooling or attention.
            ModelError: the kernel cannot run the model.
        """
        parts = load_parts(name_or_path, device=device, dtype=dtype, revision=revision, needs_manifest=template is None)
        manifest = parts.manifest
        if manifest is None:
            assert template is not None, "load_parts refuses a folder without a manifest then"
            return cls(
                parts.causal_lm,
                parts.tokenizer,
                template=template,
                pooling=pooling or "mean",
                attention=attention or "bidirectional",
                attention_kernel=attention_kernel,
            )
        return cls(
            parts.causal_lm,
            parts.tokenizer,
            template=template or parts.template or manifest.template,
            pooling=pooling or manifest.pooling,
            attention=attention or manifest.attention,
            normalize=manifest.normalize,
            projection=parts.projection,
            standardizer=parts.standardizer,
            instructions=manifest.instructions,
            max_tokens=manifest.max_tokens,
            modes=manifest.modes,
            attention_kernel=attention_kernel,
            manifest=manifest,
        )

    @property
    def query_instruction(self) -> str:
        """The instruction that queries are embedded with by default, "" for none."""
        return self._instructions.get("query", "")

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._device

    @property
    def attention(self) -> str:
        """How texts are embedded unless told otherwise, "bidirectional" or "causal"."""
        return self._attention

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """The template bound to the tokenizer: what turns texts and conversations into tokens."""
        return self._encoder

    @property
    def standardizer(self) -> Standardizer | None:
        """What standardizes vectors; None where they stay as the model gives them. May be set, for comparisons.

        Raises:
            ConfigError: on setting one of another number of dimensions.
        """
        return self._standardizer

    @standardizer.setter
    def standardizer(self, standardizer: Standardizer | None) -> None:
        if standardizer is not None and standardizer.dim != self.embedding_dim:
            raise ConfigError(f"the standardizer has {standardizer.dim} dimensions, the embeddings have {self.embedding_dim}.")
        self._standardizer = None if standardizer is None else standardizer.to(self._device).eval()

    @contextmanager
    def borrow_backbone(self) -> Iterator[Backbone]:
        """Lend out the backbone, in evaluation mode, while no other thread of this process may use it.

        Yields:
            It, on `device`; whoever borrows it leaves it as it was.
        """
        with self._turn:
            yield self._backbone

    def embedding_prompt(self, instruction: str = "") -> str:
        """The string that stands before a text with this instruction, as stock tools must be given it."""
        return self._template.embedding_prompt(self._tokenizer, instruction)

    @overload
    def encode(
        self,
        texts: str | Sequence[str],
        instruction: str = ...,
        *,
        output: Literal["numpy"] = ...,
        normalize: bool | None = ...,
        max_tokens: int | None = ...,
        token_budget: int = ...,
        show_progress: bool = ...,
    ) -> np.ndarray: ...

    @overload
    def encode(
        self,
        texts: str | Sequence[str],
        instruction: str = ...,
        *,
        output: Literal["torch"],
        normalize: bool | None = ...,
        max_tokens: int | None = ...,
        token_budget: int = ...,
        show_progress: bool = ...,
    ) -> torch.Tensor: ...

    def encode(
        self,
        texts: str | Sequence[str],
        instruction: str = "",
        *,
        output: Literal["numpy", "torch"] = "numpy",
        normalize: bool | None = None,
        max_tokens: int | None = None,
        token_budget: int = TOKEN_BUDGET,
        show_progress: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Embed texts, in packs of similar lengths.

        Args:
            texts: one text, or several. White space around a text is not part of it.
            instruction: the task, for queries; "" for documents. It is read but not pooled.
            output: "numpy" or "torch" (on the CPU).
            normalize: whether to scale vectors to length 1; None does what the export says.
            max_tokens: limit of a text with its prompt, in tokens; longer texts are cut, counted in `num_truncated`.
            token_budget: the most tokens of one forward; a longer text gets one of its own.
            show_progress: draw a bar on stderr.

        Returns:
            float32: `[D]` for one text, `[N, D]` for several, in their order.

        Raises:
            DataError: a text is empty or no string (the error names its index), or the instruction leaves no room.
            ConfigError: unknown output.
            CheckpointError: the model is exported for generation only.
        """
        if output not in ("numpy", "torch"):
            raise ConfigError(f"unknown output '{output}'.{did_you_mean(output, ('numpy', 'torch'))}")
        self._require("embed")
        several = [texts] if isinstance(texts, str) else list(texts)
        encoded = self._encode_prompts(several, instruction, self._max_tokens if max_tokens is None else max_tokens)
        samples = [embedding_sample(item, self._attention) for item in encoded]
        with self._turn, _progress(len(samples), show_progress) as advance:
            vectors = embed_samples(
                self._backbone,
                samples,
                self._pooling,
                token_budget=token_budget,
                device=self._device,
                normalize=self._normalize if normalize is None else normalize,
                projection=embedding_head(self._projection, self._standardizer),
                progress=advance,
            )
        if not samples:
            vectors = vectors.reshape(0, self.embedding_dim)
        vectors = vectors[0] if isinstance(texts, str) else vectors
        return vectors.numpy() if output == "numpy" else vectors

    @property
    def embedding_dim(self) -> int:
        """Dimensions of an embedding."""
        return self._backbone.hidden_size if self._projection is None else self._projection.linear.out_features

    def similarity(self, left: np.ndarray | torch.Tensor, right: np.ndarray | torch.Tensor) -> np.ndarray:
        """Cosine similarities, float32 `[N, M]`, of vectors `[N, D]` (or `[D]`) and `[M, D]` (or `[D]`)."""
        a, b = (F.normalize(torch.atleast_2d(torch.as_tensor(side)).float(), dim=-1) for side in (left, right))
        return (a @ b.T).numpy()

    def search(
        self, queries: str | Sequence[str], documents: Sequence[str] | np.ndarray, k: int = 10, instruction: str | None = None
    ) -> list[list[Hit]]:
        """Find the documents most similar to each query.

        Args:
            queries: one query or several.
            documents: texts, or their vectors `[M, D]` from `encode`.
            k: results per query, at most.
            instruction: for the queries; None takes the export's own.

        Returns:
            Per query its hits, best first.
        """
        asked = [queries] if isinstance(queries, str) else list(queries)
        vectors = documents if isinstance(documents, np.ndarray) else self.encode(documents)
        scores = self.similarity(self.encode(asked, self.query_instruction if instruction is None else instruction), vectors)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [[Hit(int(index), float(row[index])) for index in order] for row, order in zip(scores, best, strict=True)]

    def generate(
        self,
        messages: str | Messages,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        **options: Any,
    ) -> str:
        """Answer a conversation.

        Args:
            messages: the conversation, or one user message.
            max_new_tokens: the answer's limit, in tokens.
            temperature: 0 always takes the likeliest token; otherwise logits are divided by it and the answer is drawn (seed it
                with `torch.manual_seed`).
            top_p: draw among the likeliest tokens that hold this share of the probability.
            options: anything else that transformers' `generate` takes.

        Returns:
            The answer, without the tokens that end it and without white space around it.

        Raises:
            DataError: a message without role or content, or an empty conversation.
            ConfigError: the template cannot write conversations, or a limit below 1.
            CheckpointError: the model is exported for embedding only.
        """
        self._require("generate")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected at least 1.")
        prompt = self._encoder.generation_prompt(self._turns(messages))
        tokens = torch.from_numpy(prompt.astype(np.int64))[None].to(self._device)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else _GREEDY
        with self._turn, self._backbone.stock_attention() as causal_lm, torch.inference_mode():
            known = causal_lm.generation_config.eos_token_id if causal_lm.generation_config is not None else None
            stops = stop_token_ids(self._template, self._tokenizer, known)
            settings = {
                "max_new_tokens": max_new_tokens,
                "eos_token_id": stops or None,
                "pad_token_id": self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else (stops or [0])[0],
                "use_cache": True,
                **sampling,
                **options,
            }
            generate = cast("Callable[..., torch.Tensor]", causal_lm.generate)
            answer = generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings)
        return str(self._tokenizer.decode(answer[0, tokens.shape[1] :], skip_special_tokens=True)).strip()

    def _require(self, mode: str) -> None:
        if mode not in self._modes:
            raise CheckpointError(f"this model was exported to {' and '.join(self._modes)} only, so it cannot {mode}.")

    def _encode_prompts(self, texts: Sequence[str], instruction: str, max_tokens: int) -> list[Encoded]:
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"texts[{index}] is a {type(text).__name__}, expected a string.")
        encoded: list[Encoded] = []
        for index, item in enumerate(self._encoder.embed([(text, instruction) for text in texts], max_tokens)):
            if isinstance(item, Rejection):
                advice = " Leave it out, or give it content." if item is Rejection.EMPTY else ""
                raise DataError(f"texts[{index}] cannot be embedded: {item.value}.{advice}")
            encoded.append(item)
        truncated = sum(item.truncated for item in encoded)
        if truncated:
            self.num_truncated += truncated
            _log.warning("%d of %d texts were cut to %d tokens", truncated, len(texts), max_tokens)
        return encoded

    def _turns(self, messages: str | Messages) -> list[tuple[str, str]]:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        self._template.require_chat()
        turns = []
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise DataError(f'messages[{index}] is {message!r}, expected {{"role": ..., "content": ...}} with two strings.')
            if message["role"] not in self._template.turns:
                raise DataError(
                    f"messages[{index}]: unknown role '{message['role']}'.{did_you_mean(message['role'], self._template.turns)}"
                )
            turns.append((message["role"], message["content"]))
        if not turns:
            raise DataError("messages is empty, expected at least one turn.")
        return turns


_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr that counts texts, or None."""
    if not show:
        yield None
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("embedding", total=total)
        yield lambda count: bar.update(task, advance=count)
