"""Whose experts are whose, and what a model is without them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from tests.inference.conftest import make_export
from unified_lm.batch import Sample, make_pack
from unified_lm.cli.main import main
from unified_lm.core.errors import DataError, ModelError
from unified_lm.evaluation.experts.contexts import chance_purity, purities, purity, top_contexts
from unified_lm.evaluation.experts.domains import mask_without, owners, random_mask
from unified_lm.evaluation.experts.edit import edit_effects, masked
from unified_lm.evaluation.experts.features import Experts
from unified_lm.evaluation.experts.statistics import RoutingStatistics, gates_of, routing_statistics
from unified_lm.evaluation.generation.perplexity import read_domain, tokenized
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.monet.masks import ExpertMask, apply_mask, router_key, routers_of
from unified_lm.models.tiny import tiny_model

KINDS = {
    "words": [f"the cat number {i} sat on a mat of {i}" for i in range(6)],
    "digits": [f"{i} 7 {i} 42 {i}9" for i in range(6)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kinds")
    for name, texts in KINDS.items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return made


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("exports") / "export", "monet")


@pytest.fixture
def model(export: Path) -> UnifiedLM:
    return UnifiedLM.from_pretrained(export, device="cpu")


def domains(folder: Path) -> list:
    return [read_domain(name, folder / f"{name}.jsonl") for name in KINDS]


@torch.no_grad()
def test_statistics_are_the_mean_of_what_each_token_does(model: UnifiedLM, folder: Path) -> None:
    found = routing_statistics(model, domains(folder), context=7)  # less than a document: several windows
    with model.borrow_backbone() as backbone:
        routers = routers_of(backbone.causal_lm)
        for domain in domains(folder):
            total = np.zeros((len(routers), 16, 16))
            count = 0
            for document in tokenized(model.prompt_encoder, domain):
                for start in range(0, len(document.ids), 7):
                    ids = document.ids[start : start + 7]
                    _, scores = backbone.router_logits(make_pack([Sample(input_ids=ids, stream="s")]))
                    for token in np.flatnonzero(document.scored[start : start + 7]):
                        count += 1
                        for number, router in enumerate(routers):
                            first, second = router.gates(scores[number][token])
                            for head in range(router.heads):
                                total[number] += torch.outer(first[head], second[head]).numpy()
            assert found.tokens[domain.name] == count
            np.testing.assert_allclose(found.means[domain.name], total / count, rtol=1e-4, atol=1e-6)
            assert found.means[domain.name].sum() == pytest.approx(routers[0].heads * len(routers), rel=1e-4)


def test_an_expert_belongs_to_who_uses_it_twice_as_much() -> None:
    means = {"a": [[0.4, 0.3], [0.2, 0.0]], "b": [[0.2, 0.2], [0.0, 0.0]], "c": [[0.1, 0.1], [0.3, 0.0]]}
    statistics = RoutingStatistics(
        {name: np.array([use], np.float32) for name, use in means.items()}, dict.fromkeys(means, 5000), "key"
    )
    names, owner = owners(statistics)
    assert names == ["a", "b", "c"]
    assert owner.tolist() == [[[0, -1], [-1, -1]]], "exactly twice counts, 1.5 times does not, nor does an expert of nobody"
    assert owners(statistics, ratio=1.4)[1].tolist() == [[[0, 0], [2, -1]]]
    mask = mask_without(statistics, owner, 0, "without a")
    assert mask.num_left_out == [1]
    assert not mask.keep[0, 0, 0]


def test_claims_from_too_little_are_refused() -> None:
    use = np.ones((1, 2, 2), np.float32)
    with pytest.raises(DataError, match="an expert of one kind is told by comparison"):
        owners(RoutingStatistics({"a": use}, {"a": 9999}, "k"))
    statistics = RoutingStatistics({"a": use, "b": use}, {"a": 9999, "b": 100}, "k")
    with pytest.raises(DataError, match=r"1 kinds of text have fewer than 2,000 tokens \(a 9,999, b 100\)"):
        owners(statistics)
    with pytest.raises(DataError, match=r"ratio: got 0\.5"):
        owners(statistics, ratio=0.5, min_tokens=0)


def test_random_masks_leave_out_as_many_and_as_used_ones() -> None:
    rng = np.random.default_rng(0)
    use = rng.lognormal(0, 3, (2, 32, 32)).astype(np.float32)
    keep = np.ones((2, 32, 32), bool)
    keep[0][use[0] > np.quantile(use[0], 0.9)] = False  # the most used ones
    keep[1].reshape(-1)[:7] = False
    mask = ExpertMask(keep, "k", "edit")
    plain, matched = random_mask(mask, 0), random_mask(mask, 0, [use])
    assert plain.num_left_out == matched.num_left_out == mask.num_left_out
    assert not np.array_equal(plain.keep, random_mask(mask, 1).keep)
    assert not (~matched.keep & ~mask.keep)[1].any(), "others than the edit's own, where there are as many"
    lost = [float(use[0][~each.keep[0]].sum() / use[0].sum()) for each in (mask, matched, plain)]
    assert lost[1] > 0.5 * lost[0] > 2 * lost[2], "as much use is lost as in the edit; not so at random"


def test_a_mask_is_a_small_file_that_changes_its_model(model: UnifiedLM, export: Path, tmp_path: Path) -> None:
    with model.borrow_backbone() as backbone:
        key = router_key(backbone.causal_lm)
    keep = np.random.default_rng(0).random((1, 16, 16)) > 0.5
    path = tmp_path / "mask.safetensors"
    ExpertMask(keep, key, "half of them").save(path)
    assert path.stat().st_size < 500
    loaded = ExpertMask.load(path)
    assert np.array_equal(loaded.keep, keep)
    assert (loaded.routers, loaded.note) == (key, "half of them")
    before = model.encode(["the cat"])
    without = UnifiedLM.from_pretrained(export, device="cpu", expert_mask=path)
    assert np.abs(without.encode(["the cat"]) - before).max() > 1e-3
    with masked(model, loaded):
        np.testing.assert_allclose(model.encode(["the cat"]), without.encode(["the cat"]), atol=1e-6)
    np.testing.assert_allclose(model.encode(["the cat"]), before, atol=1e-7)
    with without.borrow_backbone() as backbone:  # what is saved has them left out too
        backbone.causal_lm.save_pretrained(tmp_path / "saved")
        model.prompt_encoder.tokenizer.save_pretrained(tmp_path / "saved")
    again = UnifiedLM.from_pretrained(tmp_path / "saved", device="cpu", template="grit")
    np.testing.assert_allclose(again.encode(["the cat"]), without.encode(["the cat"]), atol=1e-6)
    assert model.embedding_key != without.embedding_key, "an index of one is none of the other"
    other = np.random.default_rng(1).random((1, 16, 16)) > 0.5
    ExpertMask(other, key).save(tmp_path / "other.safetensors")
    both = UnifiedLM.from_pretrained(
        tmp_path / "saved", device="cpu", template="grit", expert_mask=tmp_path / "other.safetensors"
    )
    with both.borrow_backbone() as backbone:
        assert np.array_equal(routers_of(backbone.causal_lm)[0].keep.numpy(), (keep & other)[0]), (
            "beside those left out already"
        )


def test_masks_that_do_not_fit_are_refused(model: UnifiedLM, tmp_path: Path) -> None:
    with model.borrow_backbone() as backbone:
        lm = backbone.causal_lm
        key = router_key(lm)
        with pytest.raises(ModelError, match=r"the mask is of \[1, 8, 8\] experts, and this model has \[1, 16, 16\]"):
            apply_mask(lm, ExpertMask(np.ones((1, 8, 8), bool), key))
        with pytest.raises(ModelError, match="made for a model with other routers"):
            apply_mask(lm, ExpertMask(np.ones((1, 16, 16), bool), "other"))
        with pytest.raises(ModelError, match="leaves router 0 no expert at all"):
            apply_mask(lm, ExpertMask(np.zeros((1, 16, 16), bool), key))
        assert not lm.config.moe_masked
        assert routers_of(lm)[0].keep is None
    with pytest.raises(ModelError, match="family 'llama' has no experts of product keys"):
        apply_mask(tiny_model("llama"), ExpertMask(np.ones((1, 16, 16), bool), key))
    (tmp_path / "x.safetensors").write_bytes(b"no")
    RoutingStatistics({"keep": np.ones((1, 2, 2), np.float32)}, {"keep": 1}, key).save(tmp_path / "statistics")
    with pytest.raises(DataError, match="holds no routing statistics"):
        RoutingStatistics.load(tmp_path / "x.safetensors")
    for path in (tmp_path / "x.safetensors", tmp_path / "statistics", tmp_path / "missing"):
        with pytest.raises(ModelError, match="is no mask of experts"):
            ExpertMask.load(path)


def test_an_edit_is_measured_beside_random_ones(model: UnifiedLM, folder: Path) -> None:
    kinds = domains(folder)
    statistics = routing_statistics(model, kinds, context=64)
    _, owner = owners(statistics, ratio=1.2, min_tokens=0)
    mask = mask_without(statistics, owner, 0, "edit")
    effects = edit_effects(model, kinds, mask, context=64, draws=2, use=list(statistics.means.values()))
    assert [effect.name for effect in effects] == list(KINDS)
    for effect in effects:
        assert len(effect.random) == len(effect.as_used) == 2
        assert effect.after != effect.before
    again = edit_effects(model, kinds, mask, context=64, draws=1)
    assert [(effect.before, effect.after) for effect in again] == [(effect.before, effect.after) for effect in effects]
    assert again[0].as_used == ()
    with masked(model, mask), pytest.raises(ModelError, match="leaves experts out already"):
        edit_effects(model, kinds, mask, context=64)


def test_the_commands(export: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", *(f"{name}={folder / name}.jsonl" for name in KINDS)]
    assert main(["experts", "routing", str(export), *data, "--out", str(tmp_path / "r"), "--device", "cpu"]) == 0
    statistics = tmp_path / "r" / "routing.safetensors"
    assert "tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / "r" / "routing.json").read_text())["tokens"].keys() == KINDS.keys()
    assert main(["experts", "domains", str(statistics), "--out", str(tmp_path / "d")]) == 2
    assert "fewer than 2,000 tokens" in capsys.readouterr().err
    built_in = RoutingStatistics.load(statistics)
    renamed = {f"pydocs/{name}": value for name, value in built_in.means.items()}
    RoutingStatistics(renamed, dict.fromkeys(renamed, 9999), built_in.routers).save(tmp_path / "slash.safetensors")
    assert (
        main(["experts", "domains", str(tmp_path / "slash.safetensors"), "--out", str(tmp_path / "s"), "--ratio", "1.2"]) == 0
    )
    assert (tmp_path / "s" / "without-pydocs-words.safetensors").is_file()
    clash = renamed | {next(iter(renamed)).replace("/", "-"): next(iter(renamed.values()))}
    RoutingStatistics(clash, dict.fromkeys(clash, 9999), built_in.routers).save(tmp_path / "clash.safetensors")
    capsys.readouterr()
    assert main(["experts", "domains", str(tmp_path / "clash.safetensors"), "--out", str(tmp_path / "c")]) == 2
    assert "would both have the mask without-pydocs-" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    capsys.readouterr()
    few = ["--min-tokens", "0", "--ratio", "1.2"]
    assert main(["experts", "domains", str(statistics), "--out", str(tmp_path / "d"), *few]) == 0
    mask = tmp_path / "d" / "without-words.safetensors"
    counted = json.loads((tmp_path / "d" / "domains.json").read_text())["experts_by_router"]
    assert ExpertMask.load(mask).num_left_out == counted["words"]
    out = tmp_path / "edit.json"
    command = ["experts", "edit", str(export), *data, "--mask", str(mask), "--draws", "1", "--device", "cpu"]
    assert main([*command, "--statistics", str(statistics), "--out", str(out)]) == 0
    assert [effect["name"] for effect in json.loads(out.read_text())["effects"]] == list(KINDS)
    capsys.readouterr()
    table = tmp_path / "contexts.parquet"
    assert main(["experts", "contexts", str(export), *data, "--out", str(table), "--top", "2", "--device", "cpu"]) == 0
    assert "of as many drawn" in capsys.readouterr().out
    rows = parquet.read_table(table).to_pylist()
    assert {(row["i"], row["j"]) for row in rows} <= {(i, j) for i in range(16) for j in range(16)}
    texts = [text for of_kind in KINDS.values() for text in of_kind]
    assert all(any(row["before"].removeprefix("<s>") + row["token"] + row["after"] in text for text in texts) for row in rows)
    assert main(["experts", "routing", "smollm2-135m", *data, "--out", str(tmp_path / "no"), "--device", "cpu"]) == 2
    assert "family 'llama' has no experts of product keys" in capsys.readouterr().err


@torch.no_grad()
def test_the_tokens_that_use_an_expert_most(model: UnifiedLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unified_lm.evaluation.experts.contexts._CHUNK_BYTES", 5 * 4 * 256)  # five tokens at a time
    (domain, _) = domains(folder)
    found = top_contexts(model, Experts(model), domain, context=9, num_contexts=3)
    every = {}
    for gates, where in gates_of(model, domain, 9):
        pairs = torch.einsum("nghi,nghj->ngij", gates[:, :, 0], gates[:, :, 1]).flatten(2)
        every |= dict(zip(where, pairs[:, 0], strict=True))
    places, weights = list(every), torch.stack(list(every.values()))
    assert found.read == len(places)
    best = weights.topk(3, dim=0)
    np.testing.assert_allclose(found.weights[0], best.values.numpy(), rtol=1e-5, atol=1e-7)
    used = (weights > 0).sum(0)
    assert int(used.min()) < 3 < int(used.max()), "some experts have fewer tokens"
    for expert in (int(used.argmax()), int(used.argmin())):
        expected = [float(weights[places.index(tuple(place)), expert]) for place in found.places[0, :, expert] if place[0] >= 0]
        np.testing.assert_allclose(expected, found.weights[0, :, expert][: len(expected)], rtol=1e-5)
        assert len(found.tokens(0, expert)) == min(3, int(used[expert]))
    scores = purities(found)
    for expert in range(0, 256, 17):
        tokens = found.tokens(0, expert)
        assert scores[0, expert] == pytest.approx(purity(tokens)) if len(tokens) == 3 else np.isnan(scores[0, expert])
    assert 0.3 < chance_purity(found, num_draws=200) < 0.7
