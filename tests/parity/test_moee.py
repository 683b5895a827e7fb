"""E1 to E7: routing vectors, their standardization and their sums (the published code keeps logits; the paper says softmax)."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.parity.parity_case import Case
from unified_lm.batch import Sample, make_pack
from unified_lm.models.backbone import Backbone
from unified_lm.models.embedding import embed_samples
from unified_lm.models.moee import RoutedPooling, WeightedBlocks, standardize_batch
from unified_lm.models.pooling import Pooling
from unified_lm.models.routing import Gate, Routers

ALPHAS = (1.0, 0.37)
cosine = torch.nn.functional.cosine_similarity


def named(name: str, alpha: float) -> str:
    return f"{name}_alpha_{alpha}".replace(".", "_")


def block(alpha: float, *parts: torch.Tensor) -> torch.Tensor:
    return WeightedBlocks(parts[0].shape[-1], alpha)(torch.cat(parts, dim=-1))


def test_e1_softmax_over_all_experts(shared_dir):
    case = Case(shared_dir, "E1_gate_softmax")
    case.check(Gate.SOFTMAX(torch.nn.functional.linear(case["input/hidden"], case["weight/gate"])), "scores")


def load(case, folder):
    """The checkpoint as it was published, an expert a matrix, through transformers' own conversion."""
    AutoConfig.for_model(**case.params["hf_config"]).save_pretrained(folder)
    save_file(
        {key: value.contiguous() for key, value in case.weights().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return Backbone(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), "sdpa").eval()


def embed(backbone, ids, mask, **options):
    samples = [
        Sample(input_ids=row[real.bool()].numpy(), stream="s", pool=(0, int(real.sum())))
        for row, real in zip(ids, mask, strict=True)
    ]
    pooling = RoutedPooling(Routers(backbone), Pooling.LAST_TOKEN, **options)
    return embed_samples(backbone, samples, pooling, token_budget=1000, device="cpu")


@pytest.mark.parametrize("arch", ["olmoe", "qwen2_moe"])
@torch.no_grad()
def test_e2_the_reference_models(shared_dir, tmp_path, arch):
    case = Case(shared_dir, f"E2_router_logits_{arch}")
    backbone = load(case, tmp_path)
    ids, mask = case["input/input_ids"], case["input/attention_mask"]
    hidden = backbone.hidden_size
    softmax, logits = embed(backbone, ids, mask), embed(backbone, ids, mask, logits=True)
    case.check(softmax[:, :hidden], "hs")
    case.check(softmax[:, hidden:], "rw_softmax")
    case.check(logits[:, hidden:], "rw_raw")
    tolerance = case.entry["tolerance"]["concat_z"]["float32"]
    torch.testing.assert_close(standardize_batch(logits), case["output/concat_z"], **tolerance)
    rows = [int(real.sum()) for real in mask]
    for number, length in enumerate(rows):
        pack = make_pack([Sample(input_ids=ids[number][-length:].numpy(), stream="s")])
        _, layers = Routers(backbone).trace(pack, torch.arange(length))
        found = torch.stack([layer.logits for layer in layers])
        torch.testing.assert_close(found, case["output/router_logits"][number, :, -length:], rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", ["olmoe", "qwen2_moe"])
@torch.no_grad()
def test_e2b_stock_models_of_any_padding(shared_dir, tmp_path, arch, side):
    case = Case(shared_dir, f"E2b_moe_last_token_{arch}")
    backbone = load(case, tmp_path)
    where = case[f"input/{side}/input_ids"], case[f"input/{side}/attention_mask"]
    vectors = embed(backbone, *where)
    case.check(vectors[:, : backbone.hidden_size], "hs")
    case.check(vectors[:, backbone.hidden_size :], "rw_softmax")
    case.check(embed(backbone, *where, states=False, logits=True), "rw_logits")


def test_e3_layers_one_after_the_other(shared_dir):
    """Exact: what a `RoutedPooling` does with the layers that it heard."""
    case = Case(shared_dir, "E3_layer_major_concat")
    router = case["input/router"]
    size, layers, tokens, experts = router.shape
    pooling = RoutedPooling.__new__(RoutedPooling)
    pooling._routers = type("Routers", (), {"names": range(layers)})()  # type: ignore[assignment]
    pooling._method, pooling._projection, pooling._states = Pooling.LAST_TOKEN, None, True
    pooling._layers = {layer: router[:, layer, -1] for layer in reversed(range(layers))}
    spans = torch.arange(size)[:, None] * tokens + torch.tensor([0, tokens])
    vectors = pooling(case["input/last_layer_hidden"].flatten(0, 1), spans)
    case.check(vectors[:, -layers * experts :], "rw")
    case.check(vectors[:, : -layers * experts], "hs")


def test_e4_standardized_by_the_batch(shared_dir):
    case = Case(shared_dir, "E4_batch_zscore")
    both = torch.cat([case["input/hs"], case["input/rw"]], dim=1)
    case.check(standardize_batch(both), "concat_z")
    case.check(standardize_batch(both[:2]), "concat_z_first_two")
    assert not torch.allclose(case["output/concat_z"][:2], case["output/concat_z_first_two"]), "a vector depends on its batch"


@pytest.mark.parametrize("alpha", ALPHAS)
def test_e6_e7_sums_are_dot_products(shared_dir, alpha):
    case = Case(shared_dir, "E6_sum_sts")
    one, other = (block(alpha, case[f"input/hs{side}"], case[f"input/rw{side}"]) for side in (1, 2))
    case.check((one * other).sum(1), named("sum", alpha))
    case = Case(shared_dir, "E6_sum_pair")
    one, other = (block(alpha, case[f"input/hs{side}"], case[f"input/rw{side}"]) for side in (1, 2))
    case.check((one * other).sum(1), named("cosine", alpha))
    case = Case(shared_dir, "E6_sum_summarisation")
    human, machine = (block(alpha, case[f"input/{who}_hs"], case[f"input/{who}_rw"]) for who in ("human", "machine"))
    scores = machine.reshape(2, 4, -1) @ human.reshape(2, 3, -1).transpose(1, 2)
    case.check(scores.amax(-1), named("score", alpha))
    case = Case(shared_dir, "E7_block_vector")
    one, other = (block(alpha, case[f"input/hs{side}"], case[f"input/rw{side}"]) for side in (1, 2))
    case.check(one, named("block1", alpha))
    case.check(other, named("block2", alpha))
    case.check((one * other).sum(1), named("sum", alpha))


def test_e6_the_best_sub_query_is_found_for_both_at_once(shared_dir):
    """A deliberate departure: a vector has one best sub-query, the reference takes one for states and another for routing."""
    case = Case(shared_dir, "E6_sum_rerank")
    queries, documents = (block(1.0, case[f"input/{who}_hs"], case[f"input/{who}_rw"]) for who in ("q", "d"))
    ours, theirs = (documents @ queries.T).amax(1), case["output/sum_alpha_1_0"]
    assert (ours <= theirs + 1e-12).all()
    parts = [case[f"input/{who}_{what}"] for what in ("hs", "rw") for who in ("d", "q")]
    best = [cosine(parts[i][:, None], parts[i + 1][None], dim=-1).amax(1) for i in (0, 2)]
    case.check(best[0] + best[1], "sum_alpha_1_0")
