"""Single rows of the embedding table, and of the output head, that are trained while everything else is frozen.

Adapters leave both tables as they are, so a token whose row was never trained (one reserved by a base model, which a template
now uses) can neither be told apart nor be predicted. peft's layer of this kind copies the table in every forward and knows
ZeRO-3 on CUDA only; here a lookup replaces the states of the tokens concerned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from unified_lm.models.modes import GatherParameters, no_gathering

_SAMPLED_ROWS = 4096
_NEGLIGIBLE = 1e-3
"""Norm of a row, as a share of the table's median one, below which it looks as if it had never been trained."""


class _TrainedRows(nn.Module):
    """A frozen table, some rows of which are taken from a trained parameter.

    Args:
        base_layer: the table.
        ids: int64 `[n]`, the tokens of the trained rows, ascending.
        rows: `[n, D]`, the trained rows.

    Attributes:
        is_disabled: whether the table's own rows are used.
    """

    ids: torch.Tensor

    def __init__(self, base_layer: nn.Module, ids: torch.Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rows = rows
        self.register_buffer("ids", ids, persistent=False)
        self.is_disabled = False


class TokenRows(_TrainedRows):
    """An embedding table with trained rows."""

    @property
    def weight(self) -> Any:
        """The frozen table `[V, D]`, without the trained rows."""
        return self.base_layer.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids `[...]` to states `[..., D]`."""
        states: torch.Tensor = self.base_layer(tokens)
        if self.is_disabled:
            return states
        found = tokens[..., None].eq(self.ids)
        rows = F.embedding(found.int().argmax(-1), self.rows)
        scale = getattr(self.base_layer, "embed_scale", None)  # Gemma's table multiplies what it looks up
        rows = rows if scale is None else rows * scale.to(rows.dtype)
        return torch.where(found.any(-1, keepdim=True), rows.to(states.dtype), states)


class TokenRowsHead(_TrainedRows):
    """An output head with trained rows. Where it is tied to the table, both have the same parameter."""

    @property
    def weight(self) -> Any:
        """The whole weight `[V, D]` with the trained rows in it, differentiable: what losses use (`Backbone.output_head`)."""
        stored: Any = self.base_layer.weight
        return stored if self.is_disabled else stored.index_copy(0, self.ids, self.rows.to(stored.dtype))

    @property
    def bias(self) -> Any:
        """The head's bias `[V]`, or None; it is not trained."""
        return getattr(self.base_layer, "bias", None)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[..., D]` to what the head computes, `[..., V]`."""
        # The frozen layer is called, not its weight used: under ZeRO-3 its own hooks gather it.
        logits: torch.Tensor = self.base_layer(hidden)
        if self.is_disabled:
            return logits
        own = F.linear(hidden, self.rows, None if self.bias is None else self.bias[self.ids])
        return logits.index_copy(-1, self.ids, own.to(logits.dtype))


def train_token_rows(causal_lm: PreTrainedModel, tokens: Collection[int], whole: GatherParameters = no_gathering) -> None:
    """Make the rows of some tokens trainable, in the table and in the output head, in place. They start as they are.

    Args:
        causal_lm: all of whose parameters are frozen.
        tokens: their ids, at least one.
        whole: gathers parameters that are partitioned (ZeRO-3). Collective there.
    """
    table: Any = causal_lm.get_input_embeddings()
    head: Any = causal_lm.get_output_embeddings()
    ids = torch.tensor(sorted(set(tokens)), device=table.weight.device)
    rows = _copy(table.weight, ids, whole)
    if head is not None:
        head_rows = rows if head.weight is table.weight else _copy(head.weight, ids, whole)
        _replace(causal_lm, head, TokenRowsHead(head, ids, head_rows))
    _replace(causal_lm, table, TokenRows(table, ids, rows))


def _copy(weight: nn.Parameter, ids: torch.Tensor, whole: GatherParameters) -> nn.Parameter:
    with whole([weight]), torch.no_grad():
        return nn.Parameter(weight.detach()[ids].clone())


def _replace(causal_lm: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, module in causal_lm.named_modules() if module is old)
    parent, _, child = name.rpartition(".")
    setattr(causal_lm.get_submodule(parent), child, new.train(old.training))


def token_row_layers(causal_lm: nn.Module) -> Iterator[TokenRows | TokenRowsHead]:
    """The wrapped table and head; nothing where no row is trained."""
    return (module for module in causal_lm.modules() if isinstance(module, TokenRows | TokenRowsHead))


@torch.no_grad()
def merge_token_rows(causal_lm: nn.Module) -> None:
    """Write the trained rows into the tables, exactly but for a rounding to the tables' dtype."""
    for layer in token_row_layers(causal_lm):
        stored: Any = layer.base_layer.weight
        stored.index_copy_(0, layer.ids, layer.rows.to(stored.dtype))


def remove_token_rows(causal_lm: nn.Module) -> None:
    """Put the tables back, in place, as they are stored."""
    for layer in list(token_row_layers(causal_lm)):
        _replace(causal_lm, layer, layer.base_layer)


@torch.no_grad()
def untrained_tokens(
    causal_lm: PreTrainedModel, tokens: Mapping[str, int], reserved: Collection[int], whole: GatherParameters = no_gathering
) -> list[str]:
    """Tokens whose rows look as if they had never been trained, in the table or in the output head, where these are frozen.

    Such a row is next to 0, or equal to that of another reserved token or of a row beyond the vocabulary.

    Args:
        causal_lm: without storage (`meta`), nothing is known and nothing found.
        tokens: those to look at, with their ids.
        reserved: ids of tokens that may never have been used (special ones, rows beyond the vocabulary).
        whole: see `train_token_rows`.
    """
    layers: Iterable[Any] = filter(None, (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()))
    weights = {id(weight): weight for layer in layers for weight in (getattr(layer, "base_layer", layer).weight,)}
    found: set[str] = set()
    for weight in weights.values():
        if weight.requires_grad or weight.is_meta:
            continue
        with whole([weight]):
            stored = weight.detach()
            typical = stored[:: max(1, len(stored) // _SAMPLED_ROWS)].float().norm(dim=1).median()
            for name, index in tokens.items():
                row = stored[index]
                others = torch.tensor(sorted(set(reserved) - {index}), dtype=torch.int64, device=stored.device)
                if float(row.float().norm()) <= _NEGLIGIBLE * float(typical) or bool((stored[others] == row).all(1).any()):
                    found.add(name)
    return [name for name in tokens if name in found]
