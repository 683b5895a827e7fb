"""How long a sample may be: within the limit it is the same alone and in any pack, beyond it an error comes before training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.small_run import small_run
from unified_lm.assembly import build_run
from unified_lm.batch import Sample, make_pack
from unified_lm.composition.compose import compose_run
from unified_lm.core.errors import ConfigError, ModelError
from unified_lm.models.backbone import Backbone
from unified_lm.models.positions import check_lengths, position_limit
from unified_lm.models.tiny import TINY_FAMILIES, tiny_model

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 128,
}
FOLLOW_THE_PACK = [
    pytest.param(
        "llama",
        {"max_position_embeddings": 128, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}},
        127,
        id="dynamic",
    ),
    pytest.param("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 128}, 128, id="longrope"),
]


def states(backbone: Backbone, *lengths: int) -> torch.Tensor:
    """The states of the last of several samples."""
    rng = np.random.default_rng(0)
    samples = [Sample(input_ids=rng.integers(3, 200, length), stream=str(i)) for i, length in enumerate(lengths)]
    pack = make_pack(samples)
    return backbone(pack)[pack.plan.offsets[-2] :]


@pytest.mark.parametrize(("family", "values", "limit"), FOLLOW_THE_PACK)
@torch.no_grad()
def test_samples_are_independent_up_to_the_limit(family: str, values: dict[str, Any], limit: int) -> None:
    model = tiny_model(family, **values)
    found = position_limit(model)
    assert found is not None
    assert found.tokens == limit
    backbone = Backbone(model, "sdpa")
    short = Sample(input_ids=np.arange(3, 93), stream="short")
    alone = backbone(make_pack([short]))
    long = Sample(input_ids=np.arange(limit) % 200 + 3, stream="long")
    torch.testing.assert_close(backbone(make_pack([short, long]))[:90], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match=f"a sample has {limit + 1} tokens, but beyond {limit} tokens its"):
        states(backbone, 9, limit + 1)
    # What the limit is for: without it the neighbor's length shows.
    backbone._limit = None
    longer = Sample(input_ids=np.arange(4 * limit) % 200 + 3, stream="long")
    assert (backbone(make_pack([short, longer]))[:90] - alone).norm() > 1e-2 * alone.norm()


@pytest.mark.parametrize("family", TINY_FAMILIES)
@torch.no_grad()
def test_tables_of_positions_are_found(family: str) -> None:
    """A family has a limit exactly if a longer sample breaks it."""
    model = tiny_model(family)
    limit = position_limit(model)
    ids = torch.zeros(1, 2, dtype=torch.long)
    beyond = torch.tensor([[0, 5000]])
    if limit is None:
        if family != "bloom":  # has no positions at all
            model.get_decoder()(input_ids=ids, position_ids=beyond, use_cache=False)
        return
    assert limit.tokens == 1024
    model.get_decoder()(input_ids=ids, position_ids=torch.tensor([[0, limit.tokens - 1]]), use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        model.get_decoder()(input_ids=ids, position_ids=beyond, use_cache=False)


def test_every_setting_over_the_limit_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        check_lengths(
            tiny_model("gpt2"), {"streams.a.max_tokens": 1025, "streams.b.max_tokens": 4000, "streams.c.max_tokens": 9}
        )
    assert [problem.partition(":")[0] for problem in error.value.problems] == ["streams.a.max_tokens", "streams.b.max_tokens"]
    assert "'gpt2' has a table of 1024 positions. Lower it to 1024 or less" in error.value.problems[0]


def test_a_run_over_the_limit_is_refused_before_training(tmp_path: Path) -> None:
    arguments = small_run(tmp_path, tmp_path / "run", "model.family=gpt2", "streams.embedding.max_document_tokens=1025")
    with pytest.raises(ConfigError, match=r"streams\.embedding\.max_document_tokens: got 1025.*table of 1024 positions"):
        build_run(compose_run(arguments))


def test_parts_of_a_sample_count_together(tmp_path: Path) -> None:
    """A question, its documents and the turn are each within the table; the sample that holds them all is not."""
    rows = tmp_path / "grounded.jsonl"
    row = {"query": "what?", "pos": ["it"], "neg": ["no"], "answers": ["a"]}
    rows.write_text("".join(json.dumps(row | {"query": f"what is {i}?"}) + "\n" for i in range(9)))
    limits = {"max_query_tokens": 128, "max_document_tokens": 256, "max_turn_tokens": 512, "num_documents": 3}
    arguments = small_run(
        tmp_path,
        tmp_path / "run",
        "model.family=gpt2",
        "streams.g={format: grounded, objective: {name: next_token}}",
        f"streams.g.sources=[{{path: {rows}}}]",
        *(f"streams.g.{key}={limit}" for key, limit in limits.items()),
    )
    with pytest.raises(ConfigError) as refusal:
        build_run(compose_run(arguments))
    (problem,) = refusal.value.problems
    assert "streams.g, max_query_tokens, max_document_tokens, max_turn_tokens of one sample together: got 1408" in problem
    assert "table of 1024 positions. Lower it to 1024 or less" in problem
    build_run(compose_run([*arguments, "streams.g.max_turn_tokens=128"]))  # 128 + 3 * 256 + 128
