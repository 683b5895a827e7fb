"""Trained rows of the embedding table and the head: as if the table itself held them, and nothing else is trained."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from unified_lm.batch import IGNORE, OutputHead, Sample, make_pack
from unified_lm.config.schema import LoraConfig
from unified_lm.export.merge import has_adapters, merge_lora
from unified_lm.models.backbone import Backbone
from unified_lm.models.lora import apply_lora, remove_lora, without_adapters
from unified_lm.models.probe import probe_attention
from unified_lm.models.tiny import tiny_model
from unified_lm.models.token_rows import TokenRowsHead, token_row_layers, untrained_tokens
from unified_lm.objectives.cross_entropy import linear_cross_entropy

IDS = (2, 9, 40)
TOKENS = torch.tensor([[3, 9, 40, 2, 17, 9, 2, 5]])
KINDS = [("llama", False), ("llama", True), ("gemma3_text", True), ("gpt2", True), ("phi3", False), ("gptj", False)]


def with_rows(family: str, tied: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model with fresh adapters, whose rows are trained, and moved already."""
    model = tiny_model(family, dtype=dtype, tie_word_embeddings=tied)
    report = apply_lora(model, LoraConfig(r=2, alpha=4.0, dropout=0.0), 0, {str(index): index for index in IDS})
    assert report.tokens == ("2", "9", "40")
    random = torch.Generator().manual_seed(1)
    for layer in token_row_layers(model):
        layer.rows.data += torch.randn(layer.rows.shape, generator=random).to(dtype) * 0.3
    return model.eval()


def in_tables(model: PreTrainedModel, tied: bool) -> PreTrainedModel:
    """The plain model with the same rows in its tables."""
    plain = tiny_model(model.config.model_type, tie_word_embeddings=tied)
    for layer, table in (
        (model.get_input_embeddings(), plain.get_input_embeddings()),
        (model.get_output_embeddings(), plain.get_output_embeddings()),
    ):
        table.weight.data[list(IDS)] = layer.rows.data
    return plain


@pytest.mark.parametrize(("family", "tied"), KINDS)
def test_outputs_and_gradients_are_those_of_the_tables(family: str, tied: bool) -> None:
    model = with_rows(family, tied)
    plain = in_tables(model, tied)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (table.rows is head.rows) == tied
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name}
    assert len(trained) == (1 if tied else 2)
    logits, expected = model(TOKENS).logits, plain(TOKENS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for run in (model, plain):
        backbone = Backbone(run, "padded" if family == "gptj" else "sdpa")
        labels = TOKENS[0].numpy().copy()
        labels[0] = IGNORE
        pack = make_pack([Sample(input_ids=TOKENS[0].numpy(), stream="a", labels=labels)])
        part = pack.supervised["a"]
        linear_cross_entropy(backbone(pack)[part.positions], backbone.output_head(), part.targets, part.weights).backward()
    for layer, own in ((table, plain.get_input_embeddings()), (head, plain.get_output_embeddings())):
        torch.testing.assert_close(layer.rows.grad, own.weight.grad[list(IDS)], rtol=1e-4, atol=1e-5)
        assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_probe_and_the_head_know_the_rows(tied: bool) -> None:
    backbone = Backbone(with_rows("llama", tied), "sdpa")
    probe_attention(backbone)
    head = backbone.output_head()
    assert isinstance(head, OutputHead)
    assert torch.equal(head.weight[list(IDS)], backbone.causal_lm.get_output_embeddings().rows)
    assert not torch.equal(head.weight, backbone.head_weight)
    assert backbone.vocab_size == len(head.weight)


@torch.no_grad()
def test_switched_off_with_the_adapters_and_removed_with_them() -> None:
    model, plain = with_rows("llama", False), tiny_model("llama", tie_word_embeddings=False)
    with without_adapters(model):
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
        assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert not torch.allclose(model(TOKENS).logits, plain(TOKENS).logits, atol=1e-2)
    remove_lora(model)
    assert not list(token_row_layers(model))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        name: tuple(p.shape) for name, p in plain.named_parameters()
    }
    assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "tied"), KINDS[:3])
@torch.no_grad()
def test_merged_exactly(family: str, tied: bool, dtype: torch.dtype) -> None:
    model = with_rows(family, tied, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = merge_lora(model)
    assert not has_adapters(merged)
    assert has_adapters(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for layer, table in (
        (model.get_input_embeddings(), merged.get_input_embeddings()),
        (model.get_output_embeddings(), merged.get_output_embeddings()),
    ):
        assert table.weight.dtype == dtype
        assert torch.equal(table.weight[list(IDS)], layer.rows)
        others = [index for index in range(len(table.weight)) if index not in IDS]
        assert torch.equal(table.weight[others], layer.base_layer.weight[others])
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    if dtype == torch.float32:
        torch.testing.assert_close(merged(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_wrong_merge_of_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from unified_lm.core.errors import CheckpointError
    from unified_lm.export import merge

    monkeypatch.setattr(merge, "merge_token_rows", lambda model: None)
    with pytest.raises(CheckpointError, match="differs from the model with its adapter"):
        merge_lora(with_rows("llama", False))


@torch.no_grad()
def test_rows_that_look_untrained() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tokens = {"zero": 4, "twin": 5, "head": 6, "trained": 7, "same as an ordinary one": 8}
    table[4] = 1e-6
    table[5] = table[30]
    head[6] = 0.0
    table[8] = table[60]
    assert untrained_tokens(model, tokens, [4, 5, 6, 7, 8, 30]) == [], "every row is trained"
    head.requires_grad_(False)
    assert untrained_tokens(model, tokens, [4, 5, 6, 7, 8, 30]) == ["head"]
    table.requires_grad_(False)
    assert untrained_tokens(model, tokens, [4, 5, 6, 7, 8, 30]) == ["zero", "twin", "head"]
    assert untrained_tokens(model, {"trained": 7}, [7]) == []
    assert isinstance(with_rows("llama", True).get_output_embeddings(), TokenRowsHead)
