"""G5: a query that was cached while it was embedded, and generation that continues from it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.parity.parity_case import Case
from unified_lm.batch import Sample, make_pack
from unified_lm.models.backbone import Backbone
from unified_lm.models.key_values import KeyValueReader
from unified_lm.models.pooling import pool

MODES = [("G5_kv_cache_llama", "causal"), ("G5_kv_cache_mistral", "causal"), ("G5_kv_cache_mistral", "bidirectional")]


@pytest.mark.parametrize(("name", "mode"), MODES, ids="-".join)
@torch.no_grad()
def test_g5_query_cache(shared_dir, name, mode):
    case = Case(shared_dir, name)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case.params["hf_config"]))
    model.load_state_dict(case.weights())
    reader = KeyValueReader(Backbone(model, "sdpa").eval())
    query, suffix = case["input/query_ids"], case["input/suffix_ids"]
    span = (0, query.shape[1]) if mode == "bidirectional" else (0, 0)
    hidden, (cache,) = reader.read(make_pack([Sample(input_ids=query[0].numpy(), stream="s", bidirectional=span)]))
    pooled = pool(hidden, torch.tensor([[0, len(hidden)]]), "mean")
    case.check(torch.nn.functional.normalize(pooled, dim=-1), f"embedding_{mode}")
    for index, (keys, values) in enumerate(cache.layers):
        case.check(keys[None], f"cache_{mode}/{index}/key")
        case.check(values[None], f"cache_{mode}/{index}/value")
    with reader.backbone.stock_attention() as stock:
        logits = stock(input_ids=suffix, past_key_values=cache.to_transformers(stock.config)).logits
    case.check(logits, f"logits_from_{mode}_cache")
    if mode == "causal":
        case.check(logits, "logits_full_prompt")
