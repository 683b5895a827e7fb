"""Models without a language-model head: decoders that are published to embed (E5-mistral, Qwen3-Embedding, SFR, Linq).

In memory they have one like any other model, of zeros, since all of our code takes a causal language model. Nothing is computed
with it, and it is saved nowhere: an export of such a model has no head either. A tied head is the embedding table, which is
always there.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from unified_lm.core.errors import ModelError


def head_names(causal_lm: PreTrainedModel) -> set[str]:
    """Names of the tensors of a model's output head."""
    head = causal_lm.get_output_embeddings()
    return set() if head is None else {f"{_prefix(causal_lm)}.{name}" for name in head.state_dict()}


@torch.no_grad()
def empty_head(causal_lm: PreTrainedModel) -> None:
    """Make the head one of zeros: transformers fills a missing one at random."""
    for parameter in causal_lm.get_output_embeddings().parameters():
        parameter.zero_()
    mark_headless(causal_lm)


def mark_headless(causal_lm: PreTrainedModel) -> None:
    """Keep the head out of training, and out of everything that is saved of the model."""
    causal_lm.get_output_embeddings().requires_grad_(False)
    causal_lm._keys_to_ignore_on_save = {*(causal_lm._keys_to_ignore_on_save or ()), *head_names(causal_lm)}


def is_headless(causal_lm: PreTrainedModel) -> bool:
    """Whether the model came without a head, whatever adapts it now."""
    ignored = set(causal_lm._keys_to_ignore_on_save or ())
    return bool(ignored) and f"{_prefix(causal_lm)}.weight" in ignored


def _prefix(causal_lm: PreTrainedModel) -> str | None:
    head = causal_lm.get_output_embeddings()
    return next((name for name, module in causal_lm.named_modules() if module is head), None)


def require_head(causal_lm: PreTrainedModel) -> None:
    """Refuse to compute logits of a model that has none.

    Raises:
        ModelError: it came without a head.
    """
    if is_headless(causal_lm):
        raise ModelError(
            f"this {type(causal_lm).__name__} came without a language-model head: it embeds, and has no logits to generate or "
            "to be measured with. Load the causal language model, not its bare decoder."
        )
