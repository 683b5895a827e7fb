"""Analyses of a mixture of experts: the numbers against direct computations, the files, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from tests.evaluation.analyses.conftest import sentences
from tests.inference.conftest import make_export
from unified_lm.cli.analyze import analyze
from unified_lm.cli.main import main
from unified_lm.core.errors import ConfigError, DataError, ModelError
from unified_lm.evaluation.analyses import GROUPS
from unified_lm.evaluation.analyses.complementarity import misranked, overlap, pair_similarities
from unified_lm.evaluation.analyses.methods import ALPHAS, RAW, STANDARDIZED, tune_alpha
from unified_lm.evaluation.analyses.prompts import PROMPTS
from unified_lm.evaluation.analyses.routed import embed_parts, fit_parts, prompted
from unified_lm.evaluation.analyses.texts import read_labeled, read_scored_pairs
from unified_lm.inference import UnifiedLM
from unified_lm.models.moee import METHODS
from unified_lm.models.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts that is no export."""
    path = tmp_path_factory.mktemp("tiny") / "sparse"
    tiny_model("mixtral").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def mixture(sparse: Path) -> UnifiedLM:
    return UnifiedLM.from_pretrained(sparse, device="cpu", dtype="float32", template="plain")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    rows = [{"text": text, "label": "sea" if "sea" in text else "land"} for text in sentences(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _arguments(files: dict[str, Path], labels: Path, out: Path) -> list[str]:
    data = {"texts": "texts", "sts": "sts", "retrieval": "pairs", "corpus": "texts"}
    given = [word for option, name in data.items() for word in (f"--{option}", str(files[name]))]
    return [*given, "--labels", str(labels), "--num-pairs", "20", "--clusters", "4", "--device", "cpu", "--out", str(out)]


@pytest.fixture(scope="module")
def out(sparse: Path, files: dict[str, Path], labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("analysis")
    analyze(["moee", f"bi={sparse}", f"causal={sparse}@causal", *_arguments(files, labels, out)])
    return out


@pytest.mark.parametrize("name", GROUPS["moee"])
def test_every_analysis_writes_numbers_and_a_figure(out: Path, name: str) -> None:
    result = json.loads((out / f"{name}.json").read_text())
    assert list(result["arms"]) == ["bi", "causal"]
    assert result["arms"]["bi"]["gate"] == "softmax"
    assert "NaN" not in (out / f"{name}.json").read_text()
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_parts_make_the_vectors_of_encode(sparse: Path) -> None:
    model = UnifiedLM.from_pretrained(sparse, device="cpu", dtype="float32", template="plain", method="moee_concat")
    texts = sentences(30)
    parts = embed_parts(model, texts)
    for standardizer in (None, fit_parts(parts)):
        model.standardizer = standardizer
        for method in METHODS:
            expected = model.encode(texts, method=method)
            np.testing.assert_allclose(parts.vectors(method, 1.0, standardizer), expected, atol=1e-5)
        assert np.array_equal(embed_parts(model, texts).states, parts.states), "the model's own standardizer is left out"


def test_scores_are_those_of_the_vectors(out: Path, mixture: UnifiedLM, files: dict[str, Path]) -> None:
    arm = json.loads((out / "methods.json").read_text())["arms"]["bi"]
    pairs = read_scored_pairs(str(files["sts"]), 20)
    left, right = embed_parts(mixture, pairs.left), embed_parts(mixture, pairs.right)
    for method in METHODS:
        cosines = (left.vectors(method) * right.vectors(method)).sum(axis=1)
        assert arm["scores"][RAW]["spearman"][method]["value"] == pytest.approx(spearmanr(cosines, pairs.scores)[0], abs=1e-4)
    assert set(arm["scores"][STANDARDIZED]["accuracy"]) == {*METHODS, "fused"}
    assert "change" not in arm["scores"][RAW]["spearman"]["hs"]
    sweep = dict(arm["alpha"][RAW]["spearman"])
    assert list(sweep) == list(ALPHAS)
    assert sweep[0.0] == pytest.approx(arm["scores"][RAW]["spearman"]["hs"]["value"], abs=1e-5)
    assert sweep[1.0] == pytest.approx(arm["scores"][RAW]["spearman"]["moee_sum"]["value"], abs=1e-5)
    assert arm["tuned"][RAW]["spearman"]["alpha"] in ALPHAS


def test_prompts_read_the_last_token_of_a_causal_text(out: Path, mixture: UnifiedLM, files: dict[str, Path]) -> None:
    arm = json.loads((out / "prompts.json").read_text())["arms"]["bi"]
    assert list(arm["spearman"]["hs"]) == list(PROMPTS)
    assert len(PROMPTS) == 9
    pairs = read_scored_pairs(str(files["sts"]), 20)
    behind = prompted(mixture, PROMPTS[3])
    assert behind.attention == "causal"
    left, right = (behind.encode(side) for side in (pairs.left, pairs.right))
    expected = spearmanr((left * right).sum(axis=1), pairs.scores)[0]
    assert arm["spearman"]["hs"][PROMPTS[3]] == pytest.approx(expected, abs=1e-4)
    matrix = np.array(arm["matrix"]["rw"])
    off = matrix[~np.eye(9, dtype=bool)]
    assert arm["across_prompts"]["rw-rw"] == pytest.approx(off.mean(), abs=1e-5)


def test_layers_and_tokens(out: Path, mixture: UnifiedLM, files: dict[str, Path]) -> None:
    arm = json.loads((out / "routing_layers.json").read_text())["arms"]["bi"]
    pairs = read_scored_pairs(str(files["sts"]), 20)
    left, right = embed_parts(mixture, pairs.left), embed_parts(mixture, pairs.right)  # mean pooling: all tokens

    def spearman(a: np.ndarray, b: np.ndarray) -> float:
        a, b = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (a, b))
        return float(spearmanr((a * b).sum(axis=1), pairs.scores)[0])

    found = arm["spearman"]
    assert found["hs, last layer"]["all"]["raw"] == pytest.approx(spearman(left.states, right.states), abs=1e-4)
    assert found["rw, all layers"]["all"]["raw"] == pytest.approx(spearman(left.routing, right.routing), abs=1e-4)
    size = mixture.embedder.routers.sizes[0]
    first = spearman(left.routing[:, :size], right.routing[:, :size])
    assert arm["rw_by_layer"]["all"][0] == pytest.approx(first, abs=1e-4)
    assert found["rw, last layer"]["all"]["raw"] == arm["rw_by_layer"]["all"][-1]
    assert all(0 < value <= 1 for value in arm["entropy_by_layer"])
    assert all(1 <= value <= 2 for value in arm["largest_load_by_layer"]), "two of four experts: at most twice the mean"
    assert arm["unused_by_layer"] == [0, 0]
    last = prompted(mixture, "plain")
    causal = json.loads((out / "routing_layers.json").read_text())["arms"]["causal"]["spearman"]
    expected = spearman(last.encode(pairs.left), last.encode(pairs.right))
    assert causal["hs, last layer"]["last"]["raw"] == pytest.approx(expected, abs=1e-4)


def test_errors_and_pairs_by_hand() -> None:
    assert misranked(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 0]), 0.25).tolist() == [False, False, False, True]
    found = overlap(np.array([True, True, False, False]), np.array([True, False, False, False]))
    assert found == {"hs": 0.5, "rw": 0.25, "both": 0.25, "by_chance": 0.125, "jaccard": 0.5}
    assert pair_similarities(np.eye(3)).tolist() == [0, 0, 0]
    assert len(pair_similarities(np.eye(40), most=100)) == 100


@pytest.mark.parametrize("name", GROUPS["moee"])
def test_a_dense_model_is_refused(folder: Path, files: dict[str, Path], labels: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"'llama' has no router.*mixtral.*olmoe"):
        analyze([name, str(folder), *_arguments(files, labels, tmp_path)])


def test_missing_data_is_said_before_a_model_is_loaded(sparse: Path, files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("prompts", "routing_layers"):
        with pytest.raises(ConfigError, match=f"{name} needs scored sentence pairs: --sts"):
            analyze([name, str(sparse), "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="nothing to score: give --sts, --retrieval, --labels"):
        analyze(["methods", str(sparse), "--retrieval", "none", "--out", str(tmp_path)])
    with pytest.raises(DataError, match=r"60 texts of .* cannot form 60 clusters"):
        analyze(["complementarity", str(sparse), "--texts", str(files["texts"]), "--clusters", "60", "--out", str(tmp_path)])


def test_labels_from_a_file_or_a_task(labels: Path, tmp_path: Path) -> None:
    found = read_labeled(str(labels), None)
    assert found.name == "labels"
    assert set(found.labels) == {"sea", "land"}
    assert len(read_labeled(str(labels), 7).texts) == 7
    task = tmp_path / "task"
    task.mkdir()
    (task / "task.yaml").write_text("type: clustering\n")
    (task / "test.jsonl").write_bytes(labels.read_bytes())
    assert read_labeled(str(task), None).texts == found.texts
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "a text", "label": "x"}) + "\n")
    with pytest.raises(DataError, match="all 1 texts have the label 'x'"):
        read_labeled(str(tmp_path / "one.jsonl"), None)


def test_the_tuned_weight_is_the_best_of_the_sweep(mixture: UnifiedLM, files: dict[str, Path]) -> None:
    pairs = read_scored_pairs(str(files["sts"]), 20)
    standardizer = fit_parts(embed_parts(mixture, sentences(40)))
    alpha, scores = tune_alpha(mixture, pairs, standardizer)
    assert list(scores) == list(ALPHAS)
    assert scores[alpha] == max(scores.values())
    assert len(set(scores.values())) > 1


def test_an_export_with_a_tuned_weight(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = make_export(tmp_path / "export", "mixtral")
    (tmp_path / "corpus.txt").write_text("\n".join(sentences(120)) + "\n")
    corpus = ["--corpus", str(tmp_path / "corpus.txt")]
    arguments = ["standardize", str(export), *corpus, "--device", "cpu", "--out", str(tmp_path / "out")]
    for wrong in (["--alpha", "0.5"], ["--method", "rw"]):
        assert main([*arguments, "--method", "moee_sum", *wrong, "--tune-on", str(files["sts"])]) == 2
        assert "--tune-on chooses alpha of --method moee_sum" in capsys.readouterr().err
    assert main([*arguments, "--method", "rw", "--alpha", "0.5"]) == 2
    assert "--alpha weighs the routing in --method moee_sum, and has no effect on rw" in capsys.readouterr().err
    assert main([*arguments, "--method", "moee_sum", "--tune-on", str(files["sts"])]) == 0
    said = capsys.readouterr().out
    alpha = json.loads((tmp_path / "out" / "unified_lm.json").read_text())["alpha"]
    assert f"alpha {alpha:g} is best on 59 pairs of sts" in said


def test_rare_labels_are_refused_before_anything_is_embedded(sparse: Path, labels: Path, tmp_path: Path) -> None:
    rows = labels.read_text() + json.dumps({"text": "a moon", "label": "space"}) + "\n"
    (tmp_path / "rare.jsonl").write_text(rows)
    with pytest.raises(DataError, match=r"label 'space' has 1 texts.*--num-labeled"):
        analyze(["methods", str(sparse), "--labels", str(tmp_path / "rare.jsonl"), "--out", str(tmp_path)])


def test_standardize_refuses_vectors_that_are_weighed(files: dict[str, Path], tmp_path: Path) -> None:
    export = make_export(tmp_path / "export", "mixtral", changes={"method": "moee_sum"})
    with pytest.raises(ConfigError, match="standardize fits statistics on vectors before they are weighed"):
        analyze(["standardize", str(export), "--sts", str(files["sts"]), "--num-pairs", "20", "--out", str(tmp_path / "out")])
