"""The decoder as the rest of the package sees it: a pack in, hidden states out.

A stock transformers model is wrapped, not changed: its attention goes through our registered function, and through
transformers' own inside `stock_attention()`. Legend: `batch/__init__.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from unified_lm.batch import OutputHead, Pack
from unified_lm.core import distributed
from unified_lm.core.errors import ModelError, did_you_mean
from unified_lm.models import families
from unified_lm.models.attention import ATTENTION_NAME, KERNELS, AttentionKernel, Heads, register
from unified_lm.models.attention.padded import pad
from unified_lm.models.positions import position_limit
from unified_lm.models.token_rows import TokenRowsHead

logger = logging.getLogger(__name__)

_PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._grouped_mm.default]
"""Products with weights, of experts too. Those of attention scores are cheap beside what they would take to keep."""

PADDED = "padded"
"""Name of the way to run families without the attention interface: padded rows with a 4-D mask."""


class Backbone(nn.Module):
    """A causal language model whose decoder runs packs.

    Attributes:
        causal_lm: the wrapped model, possibly with LoRA layers in it.
        kernel: name of the attention kernel.
        hidden_size: D.
        vocab_size: V, rows of the output head.
    """

    def __init__(self, causal_lm: PreTrainedModel, kernel: str | AttentionKernel = "auto") -> None:
        """Wrap a model and route its attention through a kernel.

        Args:
            causal_lm: a transformers causal language model; it may be moved to its device later.
            kernel: "auto", "sdpa", "flash", "flex", "reference", "padded", or a kernel object.

        Raises:
            ModelError: the kernel is unknown or unavailable, or does not support the family.
        """
        super().__init__()
        self.causal_lm = causal_lm
        self._config = families.text_config(causal_lm)
        self._limit = position_limit(causal_lm)
        self._attention: AttentionKernel | None = None
        self._stock = _stock_implementation(causal_lm)
        if kernel == PADDED:
            families.check_padded(causal_lm)
            logger.warning("attention kernel 'padded': every pack is padded to its longest sample, which costs time and memory")
            # Families without the interface choose their attention classes when they are built.
            self._packed = "eager" if families.has_interface(causal_lm) else self._stock
        else:
            families.check_packed(causal_lm)
            self._attention = _make_kernel(kernel)
            self._packed = ATTENTION_NAME
            register()
        _set_attention(causal_lm, self._packed)
        self.kernel = PADDED if self._attention is None else self._attention.name
        self.hidden_size = int(self._config.hidden_size)
        self.vocab_size = distributed.full_shape(self.head_weight)[0]

    def forward(self, pack: Pack) -> torch.Tensor:
        """Run the decoder over a pack.

        Args:
            pack: on the model's device.

        Returns:
            `[T, D]`, the last hidden states after the final norm.
        """
        return self._run(pack).last_hidden_state[0]

    def layer_states(self, pack: Pack) -> torch.Tensor:
        """Run the decoder over a pack and return the output of every layer.

        Args:
            pack: on the model's device.

        Returns:
            `[T, L + 1, D]`: the token embeddings, then the output of each of the L layers, the last one after the final norm.

        Raises:
            ModelError: the family does not return its layers' outputs.
        """
        states = getattr(self._run(pack, output_hidden_states=True), "hidden_states", None)
        expected = int(self._config.num_hidden_layers) + 1
        if not states or len(states) != expected:
            raise ModelError(
                f"family '{self._config.model_type}' returns the outputs of {len(states or ())} layers, expected {expected}: "
                "its layers cannot be compared."
            )
        return torch.stack([layer[0] for layer in states], dim=1)

    def key_values(self, pack: Pack) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Run the decoder over a pack and return what its layers attend to.

        Args:
            pack: on the model's device.

        Returns:
            The hidden states `[T, D]`, and for each layer its keys `[T, K, d]`, at their positions, and values `[T, K, e]`.

        Raises:
            ModelError: a layer has no keys (state-space layers, for example), or the model runs padded.
        """
        if self._attention is None:
            raise ModelError(f"kernel '{PADDED}' keeps no keys and values. Use a family with the attention interface.")
        recorder = _Recorder(self._attention)
        hidden = self._run(pack, attention_kernel=recorder).last_hidden_state[0]
        if len(recorder.layers) != int(self._config.num_hidden_layers):
            raise ModelError(
                f"family '{self._config.model_type}' has keys and values in {len(recorder.layers)} of "
                f"{self._config.num_hidden_layers} layers: what it has read cannot be cached."
            )
        return hidden, recorder.layers

    def check_length(self, tokens: int) -> None:
        """Refuse a sample, or a prompt joined of cached ones, that the model's positions cannot serve.

        Raises:
            ModelError: it has more tokens than `models.positions.position_limit` allows.
        """
        if self._limit is not None and tokens > self._limit.tokens:
            limit = self._limit
            raise ModelError(f"a sample has {tokens} tokens, but {limit.reason}. Cut texts to {limit.tokens} tokens.")

    def router_logits(self, pack: Pack) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Run the decoder of a mixture of experts and return its router logits.

        Args:
            pack: on the model's device.

        Returns:
            The hidden states `[T, D]`, and for each layer with a router its raw logits `[T, E]`, before any softmax (MONET:
            float32 `[T, 2, H, E]`).

        Raises:
            ModelError: the model has no routers, or runs padded.
        """
        self.require_routers()
        outputs = self._run(pack, output_router_logits=True)
        logits = getattr(outputs, "router_logits", None)
        if not logits:
            raise ModelError(f"family '{self._config.model_type}' returns no router logits: it has no mixture of experts.")
        return outputs.last_hidden_state[0], tuple(of_layer[0] if of_layer.ndim == 5 else of_layer for of_layer in logits)

    def experts(self) -> tuple[int, int]:
        """Number of experts of a layer, and number of experts per token; for the router balance loss.

        Raises:
            ModelError: the family has no router balance loss, or runs padded.
        """
        self._require_packed_routers()
        return families.experts(self.causal_lm)

    def output_head(self) -> OutputHead:
        """The language-model head, as weights that a loss can use without calling the module.

        Raises:
            ModelError: the model has no plain linear head (none at all, or an adapter wraps it).
        """
        head = self._plain_head()
        return OutputHead(
            weight=head.weight,
            bias=getattr(head, "bias", None),
            scale=families.logit_scale(self._config),
            softcap=families.logit_softcap(self._config),
        )

    @property
    def head_weight(self) -> nn.Parameter:
        """The stored weight of the output head `[V, D]`, without the rows that are trained apart (`models.token_rows`).

        Raises:
            ModelError: as `output_head`.
        """
        head = self._plain_head()
        weight: nn.Parameter = getattr(head, "base_layer", head).weight
        return weight

    def _plain_head(self) -> Any:
        head = self.causal_lm.get_output_embeddings()
        own_rows = isinstance(head, TokenRowsHead)
        # An adapter's wrapper has a weight too, but the loss would use it without the adapter. (Not asked for its weight here:
        # that of `TokenRowsHead` is computed.)
        linear = own_rows or (isinstance(getattr(head, "weight", None), torch.Tensor) and not hasattr(head, "base_layer"))
        if not linear:
            raise ModelError(
                f"{type(self.causal_lm).__name__} has no plain linear output head (got {type(head).__name__}). "
                "Adapt other layers than the head (lora.target_modules)."
            )
        return head

    @contextmanager
    def stock_attention(self) -> Iterator[PreTrainedModel]:
        """Context in which the model uses transformers' own attention, for `generate` and for its own logits.

        The switch is in the model's configuration, so no pack may run at the same time: threads need a lock.

        Yields:
            The wrapped model.
        """
        _set_attention(self.causal_lm, self._stock)
        try:
            yield self.causal_lm
        finally:
            _set_attention(self.causal_lm, self._packed)

    def enable_gradient_checkpointing(self, keep_products: bool = False) -> None:
        """Recompute each layer in the backward instead of storing its activations. Takes effect in training mode only.

        Args:
            keep_products: whether to store the matrix products with weights, so that only the rest is computed again.
        """
        # Reentrant checkpointing would lose the gradients of router logits, and those of layers above frozen embeddings.
        options: dict[str, Any] = {"use_reentrant": False}
        if keep_products:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _PRODUCTS)
        if hasattr(self.causal_lm, "activation_checkpointing_enable"):
            self.causal_lm.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            self.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def require_routers(self) -> None:
        """Refuse what has no router logits.

        Raises:
            ModelError: the model is dense, or runs padded.
        """
        if not families.router_places(self.causal_lm):
            raise ModelError(f"family '{self._config.model_type}' returns no router logits: it has no mixture of experts.")
        self._require_packed_routers()

    def _require_packed_routers(self) -> None:
        if self._attention is None:
            raise ModelError(
                "router logits need packed attention; kernel padded mixes in those of padding tokens. "
                "Choose another model.attention_kernel."
            )

    def _run(self, pack: Pack, **options: Any) -> Any:
        self.check_length(pack.plan.max_seqlen)
        # The decoder without the head: losses compute logits themselves, at supervised positions only.
        decoder = self.causal_lm.get_decoder()
        if self._attention is None:
            batch = pad(pack, self._config, self.causal_lm.dtype)
            outputs = decoder(
                input_ids=batch.input_ids,
                attention_mask=batch.mask,
                position_ids=batch.position_ids,
                use_cache=False,
                **options,
            )

            def packed(hidden: torch.Tensor) -> torch.Tensor:
                """Padded states `[S, L, D]` to `[1, T, D]`, in the pack's order."""
                return hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.rows)[None]

            outputs.last_hidden_state = packed(outputs.last_hidden_state)
            if getattr(outputs, "hidden_states", None):
                outputs.hidden_states = tuple(map(packed, outputs.hidden_states))
            return outputs
        return decoder(
            input_ids=pack.input_ids[None],
            attention_mask=None,
            position_ids=pack.position_ids[None],
            use_cache=False,  # with a cache transformers treats the pack as one growing sequence
            plan=pack.plan,
            **{"attention_kernel": self._attention, **options},
        )


class _Recorder:
    """A kernel that keeps the keys and values that pass through it, layer after layer."""

    def __init__(self, kernel: AttentionKernel) -> None:
        self.kernel = kernel
        self.name = kernel.name
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, heads: Heads) -> torch.Tensor:
        """Return `[T, H, e]`; see `AttentionKernel`."""
        self.layers.append((heads.k_TKd, heads.v_TKe))
        return self.kernel(heads)


def _make_kernel(kernel: str | AttentionKernel) -> AttentionKernel:
    if not isinstance(kernel, str):
        return kernel
    if kernel not in KERNELS:
        raise ModelError(f"unknown attention kernel '{kernel}'.{did_you_mean(kernel, (*KERNELS, PADDED))}")
    return KERNELS[kernel]()


def _stock_implementation(causal_lm: PreTrainedModel) -> str:
    """The transformers attention that the model was loaded with, or its default if it has been wrapped before."""
    current = causal_lm.config._attn_implementation
    if current not in (None, ATTENTION_NAME):
        return str(current)
    return "sdpa" if causal_lm._supports_sdpa else "eager"


def _set_attention(causal_lm: PreTrainedModel, name: str) -> None:
    """Switch every attention layer, and check that it took effect: transformers only warns if it did not.

    Raises:
        ModelError: a layer's configuration still names another implementation.
    """
    found: list[Any] = [getattr(module, "config", None) for module in causal_lm.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    if not families.has_interface(causal_lm) and name == causal_lm.config._attn_implementation:
        return  # nothing to switch: these families choose their attention classes when they are built
    causal_lm.set_attn_implementation(name)
    unchanged = {config._attn_implementation for config in configs.values()} - {name}
    if unchanged:
        raise ModelError(
            f"family '{causal_lm.config.model_type}' keeps attention {sorted(map(str, unchanged))} instead of '{name}'. "
            "Set model.attention_kernel=padded."
        )
