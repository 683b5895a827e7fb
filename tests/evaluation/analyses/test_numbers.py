"""The numbers themselves: direct formulas, planted structure, and the control that must hold by construction."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.analyses.conftest import sentences
from unified_lm.core.errors import DataError, ModelError
from unified_lm.evaluation.analyses.anisotropy import cosine_contributions, describe, rogue_dimensions
from unified_lm.evaluation.analyses.base import AnalysisSettings
from unified_lm.evaluation.analyses.future import (
    FUTURE,
    Triple,
    check_control,
    encode_triples,
    gap_change,
    prefix_vectors,
    read_triples,
)
from unified_lm.evaluation.analyses.layers import LAYERS
from unified_lm.evaluation.analyses.norms import NORMS
from unified_lm.evaluation.analyses.states import layer_states, token_windows
from unified_lm.evaluation.analyses.uniformity import alignment, uniformity
from unified_lm.inference import UnifiedLM

TRIPLES = [
    Triple("the ship in the bay", "sails to the sea", "is at sea", "ran out of bread"),
    Triple("an oven", "is hot and the dough rises", "bakes two loaves", "fell from the ship"),
    Triple("the sand", "moves with the waves", "is wet from the sea", "in the oven burns"),
]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- future --------------------------------------------------------------------------------------------------------------


def test_the_causal_control_is_one_and_bidirectional_is_not(model: UnifiedLM) -> None:
    material = FUTURE.prepare(AnalysisSettings())
    material = type(material)(material.description, material.fingerprint, TRIPLES)
    numbers = FUTURE.measure(model, material, False)
    assert numbers["causal"]["similar"] == pytest.approx(1, abs=1e-6)
    assert numbers["causal"]["different"] == pytest.approx(1, abs=1e-6)
    assert numbers["causal_deviation"] < 1e-5
    both = numbers["bidirectional"]
    assert both["similar"] < 0.999
    assert both["gap"] == pytest.approx(np.mean(np.subtract(both["similar_by_triple"], both["different_by_triple"])), abs=1e-5)
    assert both["gap_low"] <= both["gap"] <= both["gap_high"]
    assert both["gap_by_layer"][0] == 0, "embeddings have seen nothing"
    assert len(both["gap_by_layer"]) == 3


def test_only_the_prefix_is_pooled(model: UnifiedLM) -> None:
    """By hand from the last hidden states, the begin of text left out."""
    sequences, spans = encode_triples(model, TRIPLES)
    start, stop = spans[0]
    assert start == 1, "the tiny tokenizer adds a begin of text"
    assert model.prompt_encoder.tokenizer.decode(sequences[0][start:stop]) == TRIPLES[0].prefix
    with model.borrow_backbone() as backbone, backbone.stock_attention() as causal_lm, torch.no_grad():
        ids = torch.from_numpy(sequences[2].astype(np.int64))[None]
        states = causal_lm.model(input_ids=ids, is_causal=False, use_cache=False).last_hidden_state[0]
    got = prefix_vectors(model, sequences, spans, "bidirectional")[0, 2, -1]
    np.testing.assert_allclose(got, states[start:stop].mean(0).numpy(), atol=1e-5)


def test_a_model_is_probed_with_the_attention_that_it_embeds_with(folder: Path) -> None:
    """A model whose first token sees itself alone is not read fully bidirectionally."""
    keeps = UnifiedLM.from_pretrained(folder, device="cpu", template="plain", attention="bidirectional_keep_first")
    material = FUTURE.prepare(AnalysisSettings())
    material = type(material)(material.description, material.fingerprint, TRIPLES)
    numbers = FUTURE.measure(keeps, material, False)
    assert numbers["attention"] == "bidirectional_keep_first"
    sequences, spans = encode_triples(keeps, TRIPLES)
    vectors = prefix_vectors(keeps, sequences, spans, "bidirectional_keep_first")[:, :, -1]
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    assert numbers["bidirectional"]["similar"] == pytest.approx((unit[:, 0] * unit[:, 1]).sum(-1).mean(), abs=1e-5)
    texts = type(material)({}, "texts", (sentences(3, words=14), 3, 12))
    states = LAYERS.measure(keeps, texts, False)
    assert states["attention"] == "bidirectional_keep_first"
    np.testing.assert_allclose(states["by_layer_first"], 1, atol=1e-5)  # the first token sees the same under both


def test_a_leak_fails_loudly(model: UnifiedLM) -> None:
    vectors = prefix_vectors(model, *encode_triples(model, TRIPLES), "bidirectional")
    with pytest.raises(ModelError, match="causal control failed"):
        check_control(model, vectors[:, 0], vectors[:, 1], vectors[:, 2])


def test_a_prefix_that_grows_into_its_continuation_is_refused() -> None:
    class PairEncoder:
        """Two characters are one token, so that an odd prefix ends inside one."""

        leading_ids = ()

        def running_text(self, texts: list[str]) -> list[np.ndarray]:
            return [np.array([hash(text[i : i + 2]) for i in range(0, len(text), 2)]) for text in texts]

    class Model:
        prompt_encoder = PairEncoder()

    ends = ("words", "texts", "ships")
    encode_triples(Model(), [Triple("even", *ends)])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"triple 2: .*merges the end of the prefix 'odd'"):
        encode_triples(Model(), [Triple("even", *ends), Triple("odd", *ends)])  # type: ignore[arg-type]


def test_the_packages_own_triples() -> None:
    triples = read_triples()
    assert len(triples) >= 35
    assert len({triple.prefix for triple in triples}) == len(triples)
    assert all(len({t.anchor, t.similar, t.different}) == 3 for t in triples)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prefix": "a", "anchor": "b", "similar": "c"}] * 2, "line 1, field 'different': got None"),
        ([{"prefix": "a", "anchor": "b", "similar": " ", "different": "d"}] * 2, "field 'similar'"),
        ([{"prefix": "a", "anchor": "b", "similar": "c", "different": "d"}], "at least 2"),
    ],
)
def test_bad_triples(tmp_path: Path, rows: list[dict[str, str]], expected: str) -> None:
    path = tmp_path / "triples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=expected):
        read_triples(path)


def test_a_change_of_the_gap_is_paired_by_triple() -> None:
    """Triples differ far more from each other than models do on one triple; the interval of the change must not see that."""
    hard = np.linspace(-0.2, 0.4, 30)
    wobble = 0.01 * np.sin(np.arange(30))
    first = {"similar_by_triple": (0.5 + hard).tolist(), "different_by_triple": [0.5] * 30}
    other = {"similar_by_triple": (0.55 + hard + wobble).tolist(), "different_by_triple": [0.53] * 30}
    change = gap_change(first, other)
    assert change.value == pytest.approx(0.02 + wobble.mean(), abs=1e-6)
    assert 0.01 < change.low < change.high < 0.03
    numbers = dict.fromkeys(("similar", "different", "gap", "gap_low", "gap_high"), 0.0)
    read = {"attention": "bidirectional_keep_first"}
    arms = {
        name: {**read, "causal": numbers, "bidirectional": numbers | values} for name, values in (("a", first), ("b", other))
    }
    rows = FUTURE.tabulate(arms, {"num_triples": 30, "triples": "own"}).rows
    assert [row[1] for row in rows] == ["causal", "bidirectional_keep_first"] * 2
    assert [row[7] for row in rows] == [None, None, None, pytest.approx(change.value, abs=1e-6)]


# --- layers and norms ----------------------------------------------------------------------------------------------------


def test_layers_against_two_stock_forwards(model: UnifiedLM) -> None:
    texts = sentences(3, words=14)
    material = LAYERS.prepare(AnalysisSettings())
    material = type(material)(material.description, material.fingerprint, (texts, 3, 12))
    numbers = LAYERS.measure(model, material, False)
    expected = np.zeros((3, 12))
    with model.borrow_backbone() as backbone, backbone.stock_attention() as causal_lm, torch.no_grad():
        for window in token_windows(model, texts, 12, 3):
            ids = torch.from_numpy(window.astype(np.int64))[None]
            states = [
                causal_lm.model(input_ids=ids, is_causal=causal, use_cache=False, output_hidden_states=True).hidden_states
                for causal in (True, False)
            ]
            pairs = zip(*states, strict=True)
            expected += np.stack([torch.cosine_similarity(a[0], b[0], dim=-1).numpy() for a, b in pairs]) / 3
    np.testing.assert_allclose(numbers["cosine"], expected, atol=2e-4)
    assert numbers["by_layer"][0] == pytest.approx(1)
    assert numbers["cosine"][1][-1] == pytest.approx(1, abs=1e-4), "in layer 1 the last position sees all in both"
    assert numbers["cosine"][1][0] < 0.99, "and the first one does not"
    assert numbers["by_layer_first"][2] == pytest.approx(expected[2, 0], abs=2e-4)


def test_norms_find_a_planted_sink(folder: Path) -> None:
    model = UnifiedLM.from_pretrained(folder, device="cpu", template="plain", attention="causal")
    windows = token_windows(model, sentences(4, words=14), 10, 4)
    with model.borrow_backbone() as backbone, torch.no_grad():
        backbone.causal_lm.get_input_embeddings().weight[windows[0][0]] *= 300  # the begin of text, first in every window
    material = NORMS.prepare(AnalysisSettings())
    material = type(material)(material.description, material.fingerprint, (sentences(4, words=14), 4, 10))
    numbers = NORMS.measure(model, material, False)
    assert numbers["attention"] == "causal"
    assert [sink["position"] for sink in numbers["sinks"]] == [0]
    assert numbers["sinks"][0]["layers"][0] == 0
    assert numbers["largest_ratio"]["position"] == 0
    _, states = next(iter(layer_states(model, windows[:1], "causal")))
    single = np.linalg.norm(states.numpy(), axis=-1).T
    assert numbers["norm"][0][0] == pytest.approx(single[0, 0], rel=1e-3)


def test_windows_need_long_texts(model: UnifiedLM) -> None:
    with pytest.raises(DataError, match="0 of 2 texts have 500 tokens"):
        token_windows(model, ["short", "also short"], 500, 2)


# --- anisotropy ----------------------------------------------------------------------------------------------------------


def test_contributions_add_up_to_the_mean_cosine() -> None:
    vectors = np.random.default_rng(0).normal(0.3, 1, (40, 16))
    unit = _unit(vectors)
    cosines = (unit @ unit.T)[np.triu_indices(40, k=1)]
    parts = cosine_contributions(vectors)
    assert parts.sum() == pytest.approx(cosines.mean())
    products = [unit[i, 3] * unit[j, 3] for i in range(40) for j in range(i)]
    assert parts[3] == pytest.approx(np.mean(products))
    with pytest.raises(DataError, match="1 of them zero"):
        cosine_contributions(np.stack([np.zeros(4), np.ones(4)]))


def test_a_planted_rogue_dimension_is_found() -> None:
    vectors = np.random.default_rng(1).normal(0, 1, (300, 64))
    assert rogue_dimensions(vectors) == []
    assert abs(describe(vectors)["mean_cosine"]) < 0.01
    vectors[:, 17] += 30
    vectors[:, 5] -= 60
    numbers = describe(vectors)
    assert [dimension["dimension"] for dimension in numbers["rogue"]] == [5, 17]
    assert numbers["mean_cosine"] > 0.9
    assert numbers["rogue_fraction"] > 0.99
    assert numbers["top"][0]["dimension"] == 5
    for key in ("mean_cosine_without_rogue", "mean_cosine_centered", "mean_cosine_standardized"):
        assert abs(numbers[key]) < 0.02, key


# --- uniformity ----------------------------------------------------------------------------------------------------------


def test_uniformity_and_alignment_by_hand() -> None:
    square = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    # of the six pairs four are at squared distance 2 and two at 4
    assert uniformity(square) == pytest.approx(np.log((4 * np.exp(-4) + 2 * np.exp(-8)) / 6))
    assert uniformity(np.ones((3, 1))) == pytest.approx(0), "a point is as far from uniform as can be"
    assert alignment(square, np.roll(square, 1, axis=0)) == pytest.approx(2)
    assert alignment(square, square) == 0
    points = _unit(np.random.default_rng(0).normal(size=(50, 8)))
    x = torch.from_numpy(points)
    assert uniformity(points) == pytest.approx(float(torch.pdist(x).pow(2).mul(-2).exp().mean().log())), "the authors' code"
    with pytest.raises(DataError):
        uniformity(points[:1])
