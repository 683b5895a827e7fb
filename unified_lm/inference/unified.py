"""`UnifiedLM`: one model that embeds and generates.

Embedding runs in packs through our attention, generation through transformers' own. The switch between them is in the model's
configuration, so a lock keeps threads from doing both at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unified_lm.core.errors import CheckpointError, ConfigError, did_you_mean
from unified_lm.data.prompts.encoding import PromptEncoder
from unified_lm.data.prompts.templates import Template, get_template
from unified_lm.export.manifest import ATTENTIONS, MODES, Manifest
from unified_lm.inference.embedder import TOKEN_BUDGET, Embedder, EncodeOptions
from unified_lm.inference.generation import Messages, conversation_turns, generate_text
from unified_lm.inference.loading import load_parts
from unified_lm.inference.search import Hit, best_hits, cosine_similarity
from unified_lm.models.backbone import Backbone
from unified_lm.models.embedding import progress_bar
from unified_lm.models.key_values import KeyValueCache, KeyValueReader
from unified_lm.models.pooling import Pooling, Projection
from unified_lm.models.standardizer import Standardizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class UnifiedLM:
    """A causal language model that also embeds.

    Attributes:
        manifest: the export's manifest; None for a model that was not exported by this package.
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
        method: str = "hs",
        alpha: float = 1.0,
        instructions: Mapping[str, str] | None = None,
        max_tokens: int = 512,
        modes: Sequence[str] = MODES,
        attention_kernel: str = "auto",
        manifest: Manifest | None = None,
    ) -> None:
        """Wrap a loaded model; `from_pretrained` loads an export.

        Args:
            causal_lm: on the device that it runs on. From now on its attention goes through our kernels.
            tokenizer: its fast tokenizer.
            template: prompt template, or its name.
            pooling: "mean", "weighted_mean", "last_token" or "cls".
            attention: for embedding texts, "bidirectional", "bidirectional_keep_first" or "causal".
            normalize: whether `encode` scales vectors to length 1 by default.
            projection: linear head on the pooled vector, or None.
            standardizer: applied after the head and before scaling to length 1, or None.
            method: what `encode` makes vectors of; see there.
            alpha: weight of the routing in method "moee_sum".
            instructions: prompt name -> instruction; `search` embeds queries with "query".
            max_tokens: limit of an embedded text with its prompt, in tokens.
            modes: what the model was exported for: "embed", "generate".
            attention_kernel: see `Backbone`.
            manifest: stored for the caller.

        Raises:
            ConfigError: unknown attention or pooling, or a template that does not match the tokenizer.
            ModelError: the kernel does not support the model.
        """
        if attention not in ATTENTIONS:
            raise ConfigError(f"unknown attention '{attention}'.{did_you_mean(attention, ATTENTIONS)}")
        self._backbone = Backbone(causal_lm.eval(), attention_kernel)
        self._device = next(causal_lm.parameters()).device
        self._template = get_template(template) if isinstance(template, str) else template
        self._encoder = PromptEncoder(self._template, tokenizer)
        self._tokenizer = tokenizer
        self._embedder = Embedder(
            self._backbone,
            self._encoder,
            self._device,
            Pooling.parse(pooling),
            attention,
            normalize,
            max_tokens,
            None if projection is None else projection.to(self._device).eval(),
            method=method,
            alpha=alpha,
        )
        self._embedder.set_standardizer(standardizer)
        self._instructions = dict(instructions or {})
        self._modes = tuple(modes)
        self._lock = threading.Lock()  # guards the attention switch in the configuration, and evaluation mode of borrowers
        self.manifest = manifest

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = "auto",
        attention_kernel: str = "auto",
        revision: str | None = None,
        template: str | Template | None = None,
        pooling: str | None = None,
        attention: str | None = None,
        method: str | None = None,
        alpha: float | None = None,
        max_tokens: int | None = None,
        expert_mask: str | Path | None = None,
        check_weights: bool | None = None,
    ) -> UnifiedLM:
        """Load an export, or any causal language model together with a template.

        Args:
            name_or_path: a folder, or a Hub name.
            device: where to run; None takes the accelerator if there is one.
            dtype: of the weights in memory; None for the stored one, "auto" for that, but float32 where bfloat16 is emulated.
            attention_kernel: see `Backbone`.
            revision: Hub revision.
            template: replaces the export's prompt template. Required if the model is not an export.
            pooling: replaces the export's, as `attention`, `method`, `alpha` and `max_tokens` do; without an export the
                defaults are those of the constructor.
            expert_mask: of MONET, a file of experts to leave out (`models.monet.masks`); the export's own mask if None.
            check_weights: whether to compare weights with the hash that an export records; None does up to 2 GiB.

        Raises:
            CheckpointError: no such model, a damaged export, or neither an export nor a template.
            ConfigError: unknown template, pooling or attention.
            ModelError: the kernel does not support the model, weights are missing, or are not those that were exported.
        """
        where: dict[str, Any] = {"device": device, "dtype": dtype, "revision": revision, "expert_mask": expert_mask}
        parts = load_parts(name_or_path, **where, needs_manifest=template is None, check_weights=check_weights)
        manifest = parts.manifest
        given: dict[str, Any] = {"template": template, "pooling": pooling, "attention": attention}
        given |= {"method": method, "alpha": alpha, "max_tokens": max_tokens}
        chosen = {key: value for key, value in given.items() if value is not None}
        if manifest is not None:
            recorded = ("pooling", "attention", "normalize", "method", "alpha", "instructions", "max_tokens", "modes")
            own = {name: getattr(manifest, name) for name in recorded}
            own |= {"template": parts.template or manifest.template, "manifest": manifest}
            chosen = {**own, "projection": parts.projection, "standardizer": parts.standardizer, **chosen}
        return cls(parts.causal_lm, parts.tokenizer, attention_kernel=attention_kernel, **chosen)

    @property
    def query_instruction(self) -> str:
        """The default instruction for queries, "" for none."""
        return self._instructions.get("query", "")

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._device

    @property
    def attention(self) -> str:
        """Attention for embedding texts, "bidirectional", "bidirectional_keep_first" or "causal"."""
        return self._embedder.attention

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """The template bound to the tokenizer; it turns texts and conversations into tokens."""
        return self._encoder

    @property
    def standardizer(self) -> Standardizer | None:
        """The module that standardizes vectors, or None. It may be set, for comparisons.

        Raises:
            ConfigError: when set to a standardizer with a different number of dimensions.
        """
        return self._embedder.standardizer

    @standardizer.setter
    def standardizer(self, standardizer: Standardizer | None) -> None:
        """Replace the standardizer; moves it to the model's device."""
        self._embedder.set_standardizer(standardizer)

    @property
    def num_truncated(self) -> int:
        """Number of texts that were truncated since loading."""
        return self._embedder.num_truncated

    @contextmanager
    def borrow_backbone(self) -> Iterator[Backbone]:
        """Context with exclusive access to the backbone, in evaluation mode; other threads of this process wait.

        The borrower must restore whatever it changes.
        """
        with self._lock:
            yield self._backbone

    def embedding_prompt(self, instruction: str = "") -> str:
        """The string that precedes a text with this instruction, as stock tools need it."""
        return self._template.embedding_prompt(self._tokenizer, instruction)

    @overload
    def encode(
        self,
        texts: str | Sequence[str],
        instruction: str = ...,
        *,
        output: Literal["numpy"] = ...,
        **options: Unpack[EncodeOptions],
    ) -> np.ndarray: ...

    @overload
    def encode(
        self,
        texts: str | Sequence[str],
        instruction: str = ...,
        *,
        output: Literal["torch"],
        **options: Unpack[EncodeOptions],
    ) -> torch.Tensor: ...

    def encode(
        self,
        texts: str | Sequence[str],
        instruction: str = "",
        *,
        output: Literal["numpy", "torch"] = "numpy",
        method: str | None = None,
        normalize: bool | None = None,
        max_tokens: int | None = None,
        token_budget: int = TOKEN_BUDGET,
        show_progress: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Embed texts, in packs of similar lengths.

        Args:
            texts: one text, or several. White space around a text is removed.
            instruction: the task, for queries; "" for documents. The model reads it, but it is not pooled.
            output: "numpy" or "torch" (on the CPU).
            method: "hs", or of a mixture of experts "rw", "moee_concat" or "moee_sum" (`models.moee`); None: the model's own.
            normalize: whether to scale vectors to length 1; None takes the export's setting.
            max_tokens: limit of a text with its prompt, in tokens; longer texts are truncated and counted in `num_truncated`.
            token_budget: the most tokens of one forward; a longer text gets a forward of its own.
            show_progress: show a progress bar on stderr.

        Returns:
            float32: `[D]` for one text, `[N, D]` for several, in their order.

        Raises:
            DataError: a text is empty or not a string (the error names its index), or the instruction alone reaches the limit.
            ConfigError: unknown output or method; ModelError: routing of a dense model; CheckpointError: it only generates.
        """
        if output not in ("numpy", "torch"):
            raise ConfigError(f"unknown output '{output}'.{did_you_mean(output, ('numpy', 'torch'))}")
        self.require("embed")
        text_list = [texts] if isinstance(texts, str) else list(texts)
        samples = self._embedder.samples(text_list, instruction, max_tokens)
        with self._lock, progress_bar(len(samples), show_progress) as advance:
            options: dict[str, Any] = {"normalize": normalize, "method": method, "progress": advance}
            vectors = self._embedder.embed(samples, token_budget=token_budget, **options)
        vectors = vectors[0] if isinstance(texts, str) else vectors
        return vectors.numpy() if output == "numpy" else vectors

    def read(
        self,
        texts: Sequence[str],
        instruction: str = "",
        *,
        attention: str | None = None,
        max_tokens: int | None = None,
        token_budget: int = TOKEN_BUDGET,
    ) -> Iterator[tuple[int, np.ndarray, KeyValueCache]]:
        """Embed texts and keep what was computed for it: an answer can be read from it later (`retrieval`).

        Args:
            texts: see `encode`, as `instruction`, `max_tokens` and `token_budget`.
            attention: a name as of `attention`; None as the model embeds. Vectors are what `encode` gives only then.

        Yields:
            The index of a text, its vector, float32 `[D]`, and its keys and values on the model's device; longest texts first.
            The model is held until the last one: other threads wait.

        Raises:
            DataError, CheckpointError: see `encode`.
            ModelError: the model's keys and values cannot be kept (`models.key_values`).
        """
        self.require("embed")
        samples = self._embedder.samples(texts, instruction, max_tokens, attention or "")
        with self._lock:
            for index, vector, cache in self._embedder.read(samples, token_budget=token_budget):
                yield index, vector.numpy(), cache

    @contextmanager
    def borrow_reader(self) -> Iterator[KeyValueReader]:
        """Like `borrow_backbone`, with what moves and joins the keys and values of `read`; ModelError where none are kept."""
        with self._lock:
            yield self._embedder.reader

    @property
    def embedding_key(self) -> str:
        """A hash of all that a vector of `encode` depends on beside text and instruction, 32 hexadecimal digits."""
        return self._embedder.key(self.manifest.weights_hash if self.manifest is not None else "")

    @property
    def max_tokens(self) -> int:
        """The limit of an embedded text with its prompt, in tokens."""
        return self._embedder.max_tokens

    @property
    def embedding_dim(self) -> int:
        """Dimensions of an embedding."""
        return self._embedder.dim

    @property
    def embedder(self) -> Embedder:
        """What turns texts into vectors; it says how, and has the routers of a mixture of experts."""
        return self._embedder

    def similarity(self, left: np.ndarray | torch.Tensor, right: np.ndarray | torch.Tensor) -> np.ndarray:
        """Cosine similarities, float32 `[N, M]`, of vectors `[N, D]` (or `[D]`) and `[M, D]` (or `[D]`)."""
        return cosine_similarity(left, right)

    def search(
        self, queries: str | Sequence[str], documents: Sequence[str] | np.ndarray, k: int = 10, instruction: str | None = None
    ) -> list[list[Hit]]:
        """Find the documents most similar to each query.

        Args:
            queries: one query or several.
            documents: texts, or their vectors `[M, D]` from `encode`.
            k: hits per query, at most.
            instruction: for the queries; None takes the export's own.

        Returns:
            For each query its hits, best first.
        """
        query_list = [queries] if isinstance(queries, str) else list(queries)
        vectors = documents if isinstance(documents, np.ndarray) else self.encode(documents)
        query_vectors = self.encode(query_list, self.query_instruction if instruction is None else instruction)
        return best_hits(cosine_similarity(query_vectors, vectors), k)

    def generate(
        self,
        messages: str | Messages,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_text: Callable[[str], None] | None = None,
        **options: Any,
    ) -> str:
        """Answer a conversation.

        Args:
            messages: the conversation, or one user message.
            max_new_tokens: limit of the answer, in tokens.
            temperature: 0 for greedy decoding; otherwise logits are divided by it and tokens are drawn (seed them with
                `torch.manual_seed`).
            top_p: draw from the most likely tokens whose probabilities sum to this.
            on_text: called with each piece of the answer as soon as it is there.
            options: further arguments of transformers' `generate`; they override the above.

        Returns:
            The answer, without end tokens and without white space around it.

        Raises:
            DataError: a message without role or content, or an empty conversation.
            ConfigError: the template has no conversation turns, or the limit is below 1.
            CheckpointError: the model was exported for embedding only.
        """
        self.require("generate")
        # Tokens, not text: chat markers must be encoded exactly as in training.
        prompt = self._encoder.generation_prompt(conversation_turns(messages, self._template))
        with self._lock, self._backbone.stock_attention() as causal_lm:
            return generate_text(
                causal_lm,
                self._encoder,
                torch.from_numpy(prompt.astype(np.int64)),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                on_text=on_text,
                **options,
            )

    def require(self, mode: str) -> None:
        """Raise CheckpointError where the model was not exported for a mode, "embed" or "generate"."""
        if mode not in self._modes:
            raise CheckpointError(f"this model was exported to {' and '.join(self._modes)} only, so it cannot {mode}.")
