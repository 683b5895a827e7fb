"""Features of other sorts, what stands around their best places, correlation with a score, explanations, and the page."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tests.inference.conftest import make_export
from unified_lm.batch import Sample, make_pack
from unified_lm.cli.expert_contexts import token_texts
from unified_lm.cli.main import main
from unified_lm.core.errors import DataError, ModelError
from unified_lm.data.rows.records import TextRecord
from unified_lm.evaluation.experts.contexts import purities, top_contexts, windows
from unified_lm.evaluation.experts.correlation import Correlation, score_correlation
from unified_lm.evaluation.experts.explain import explain_tokens
from unified_lm.evaluation.experts.features import Experts, Latents, Neurons, layer_outputs
from unified_lm.evaluation.experts.statistics import RoutingStatistics, gates_of
from unified_lm.evaluation.generation.perplexity import Domain, tokenized
from unified_lm.inference.unified import UnifiedLM
from unified_lm.reporting.experts_page import choose_experts

TEXTS = Domain("texts", tuple(TextRecord(f"the cat number {i} sat on {'a mat ' * (i % 3)}of {i}") for i in range(8)))
MADE: dict[str, Path] = {}


@pytest.fixture
def load(tmp_path_factory: pytest.TempPathFactory):
    def load(family: str, **config: Any) -> UnifiedLM:
        if family not in MADE:
            MADE[family] = make_export(tmp_path_factory.mktemp(family) / "export", family, **config)
        return UnifiedLM.from_pretrained(MADE[family], device="cpu")

    return load


@torch.no_grad()
def by_token(model: UnifiedLM, context: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Weights of all experts of the first router `[tokens, E * E]`, and places, the naive way."""
    weights, places = [], []
    for gates, where in gates_of(model, TEXTS, context):
        weights.append(torch.einsum("nhi,nhj->nij", gates[:, 0, 0], gates[:, 0, 1]).flatten(1))
        places += where
    return torch.cat(weights), places


def test_windows_show_what_an_expert_does_around_its_best_places(load) -> None:
    model = load("monet")
    weights, places = by_token(model, 9)
    index = {place: number for number, place in enumerate(places)}
    features = Experts(model)
    found = top_contexts(model, features, TEXTS, context=9, num_contexts=3)
    chosen = [[5, 200, int(weights.sum(0).argmax())]]
    (of_router,) = windows(features, TEXTS, found, chosen, context=9, reach=4)
    assert list(of_router) == chosen[0]
    for expert, shown in of_router.items():
        assert len(shown) == int((found.weights[0, :, expert] > 0).sum())
        for rank, window in enumerate(shown):
            document, place = found.places[0, rank, expert].tolist()
            assert window.document == document
            first = place - window.center
            assert first == max(0, place - 4)
            np.testing.assert_array_equal(window.ids, found.documents[document].ids[first : place + 5])
            expected = [
                float(weights[index[document, first + k], expert]) if (document, first + k) in index else 0.0
                for k in range(len(window.ids))
            ]
            np.testing.assert_allclose(window.weights, expected, rtol=1e-5, atol=1e-7)
            assert window.weights[window.center] == pytest.approx(found.weights[0, rank, expert], rel=1e-5)


def test_correlation_is_that_of_every_token(load) -> None:
    model = load("monet")
    scores = [0.1 * i**2 for i in range(8)]
    found = score_correlation(model, TEXTS, scores, context=9)
    weights, places = by_token(model, 9)
    of_token = np.array([scores[document] for document, _ in places])
    assert (found.tokens, found.texts) == (len(places), 8)
    for expert in range(0, 256, 7):
        w = weights[:, expert].double().numpy()
        expected = np.corrcoef(w, of_token)[0, 1] if w.std() > 0 else 0.0
        assert found.values[0].reshape(-1)[expert] == pytest.approx(expected, abs=2e-4)
    mask = found.mask_above(0.05, "note")
    assert mask.num_left_out == [int((found.values > 0.05).sum())]
    assert mask.num_left_out[0] > 0


def test_scores_that_say_nothing_are_refused(load, tmp_path) -> None:
    model = load("monet")
    for scores, message in (
        ([1.0] * 8, "all have the same score"),
        ([1.0] * 3, "3 scores for 8 texts"),
        ([float("nan"), *range(7)], "expected a finite number for each"),
    ):
        with pytest.raises(DataError, match=message):
            score_correlation(model, TEXTS, scores, context=9)
    (tmp_path / "x").write_bytes(b"no")
    with pytest.raises(DataError, match="holds no correlation of experts"):
        Correlation.load(tmp_path / "x")
    saved = Correlation(np.zeros((1, 2, 2), np.float32), 5, 2, "k")
    saved.save(tmp_path / "c")
    assert Correlation.load(tmp_path / "c").tokens == 5


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_neurons_are_the_inputs_of_the_second_matrix(load, family) -> None:
    model = load(family)
    features = Neurons(model, [1])
    readings = list(features.read(TEXTS, 64))
    places = [place for reading in readings for place in reading.places]
    values = torch.cat([reading.of(0, slice(None)) for reading in readings])
    assert values.shape == (len(places), features.size)
    assert features.groups == ["layer 1"]
    document = tokenized(model.prompt_encoder, TEXTS)[3]
    with model.borrow_backbone() as backbone:
        layer = next(m for name, m in backbone.causal_lm.named_modules() if name.endswith(("layers.1.mlp", "h.1.mlp")))
        seen: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        backbone(make_pack([Sample(input_ids=document.ids, stream="s")]))
        hook.remove()
        if family == "gpt2":
            hidden = layer.act(layer.c_fc(seen[0]))
        else:
            hidden = layer.act_fn(layer.gate_proj(seen[0])) * layer.up_proj(seen[0])
    rows = [number for number, (doc, _) in enumerate(places) if doc == 3]
    order = sorted(rows, key=lambda number: places[number][1])
    expected = hidden[0][[places[number][1] for number in order]].clamp_min(0)
    torch.testing.assert_close(values[order], expected, rtol=1e-4, atol=1e-6)
    found = top_contexts(model, features, TEXTS, context=64, num_contexts=3)
    assert np.isfinite(purities(found)).any()


def test_models_and_layers_without_such_features_are_refused(load) -> None:
    with pytest.raises(ModelError, match="family 'llama' has no experts of product keys"):
        Experts(load("llama"))
    with pytest.raises(ModelError, match="layer 9: the model has 2 layers"):
        Neurons(load("llama"), [9])
    with pytest.raises(ModelError, match="layer -1: the model has 2 layers"):
        next(layer_outputs(load("llama"), TEXTS, 64, [-1]))
    for family in ("mixtral", "qwen2_moe", "deepseek_v2"):
        with pytest.raises(ModelError, match="does not have one dense hidden layer, always of the same width"):
            Neurons(load(family))


def test_latents_are_read_from_the_outputs_of_layers(load) -> None:
    model = load("llama")
    states = torch.cat([states[:, 0] for states, _ in layer_outputs(model, TEXTS, 64, [0])])
    features = Latents(model, {0: lambda rows: (rows @ torch.eye(states.shape[1])[:, :5]).clamp_min(0)}, 5)
    found = top_contexts(model, features, TEXTS, context=64, num_contexts=2)
    np.testing.assert_allclose(found.weights[0], states[:, :5].clamp_min(0).topk(2, dim=0).values.numpy(), rtol=1e-5)


@pytest.mark.slow
def test_autoencoders_of_saelens_explain_states(load) -> None:
    pytest.importorskip("sae_lens", reason="needs sae-lens")
    from unified_lm.evaluation.experts.autoencoder import AutoencoderSettings, train_autoencoders

    model = load("llama")
    texts = Domain("many", tuple(TextRecord(f"the cat number {i} sat on a mat of {i * 7}") for i in range(100)))
    settings = AutoencoderSettings(latents=64, active=8, passes=20)
    trained = train_autoencoders(model, texts, [1], context=64, settings=settings)[1]
    assert 0.5 < trained.explained <= 1
    states = torch.cat([states[:, 0] for states, _ in layer_outputs(model, texts, 64, [1])])
    latents = trained.encode(states)
    assert latents.shape == (len(states), 64)
    assert float(latents.min()) == 0.0
    assert int((latents > 0).sum(1).max()) <= 8


def test_an_explanation_reads_the_mean_of_embeddings(load) -> None:
    model = load("monet")
    with model.borrow_backbone() as backbone:
        table = backbone.causal_lm.get_input_embeddings().weight.data
    first, second, third = 70, 95, 120
    table[third] = (table[first] + table[second]) / 2
    mean = explain_tokens(model, [first, second], max_new_tokens=12)
    assert mean == explain_tokens(model, [third], max_new_tokens=12)
    assert len({mean, *(explain_tokens(model, [token], max_new_tokens=12) for token in (first, second))}) == 3
    for tokens, question in (([], "an X"), ([70], "none")):
        with pytest.raises(DataError, match="expected at least one, and an X in it"):
            explain_tokens(model, tokens, question=question)


def test_a_page_shows_experts_of_every_kind_first() -> None:
    use = {"a": np.zeros((1, 4, 4), np.float32), "b": np.zeros((1, 4, 4), np.float32)}
    use["a"][0, 0, :3] = (0.1, 0.3, 0.2)
    use["b"][0, 1, 0] = 0.05
    use["a"][0, 3, 3] = use["b"][0, 3, 3] = 1.0
    owner = np.full((1, 4, 4), -1)
    owner[0, 0, :3], owner[0, 1, 0] = 0, 1
    purity = np.full((1, 16), np.nan)
    purity[0, [0, 15]] = 0.2, 0.9
    chosen = choose_experts(RoutingStatistics(use, dict.fromkeys(use, 100), "k"), owner, purity, 8)
    assert chosen == [[1, 2, 4, 15, 0]], "the two of a used most, that of b, the purest, those used at all"


def test_the_commands(load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("monet"), load("llama")
    for name, words in (("a", "the cat sat on a mat"), ("b", "7 42 19 3 5")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{words} {i}"}) + "\n" for i in range(6)))
    data = ["--data", f"a={tmp_path}/a.jsonl", f"b={tmp_path}/b.jsonl", "--device", "cpu"]
    page = tmp_path / "experts.html"
    assert main(["experts", "page", str(MADE["monet"]), *data, "--out", str(page), "--most", "20", "--top", "3"]) == 0
    html = page.read_text()
    content = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert content["kinds"] == ["a", "b"]
    assert len(content["experts"]) == 20
    for expert in content["experts"]:
        assert sum(expert["use"]) == pytest.approx(1, abs=1e-3)
        for kind, center, numbers, weights in expert["at"]:
            assert len(numbers) == len(weights) <= 25
            assert 0 <= center < len(numbers)
            assert max(weights) == 99
            text = "".join(content["pieces"][number] for number in numbers)
            assert ("cat" in text or "mat" in text) == (kind == 0) or len(numbers) < 8
    assert "http" not in html.split("<script")[0].lower(), "nothing from elsewhere"

    table = tmp_path / "contexts.parquet"
    assert main(["experts", "contexts", str(MADE["monet"]), *data, "--out", str(table), "--top", "2"]) == 0
    row = parquet.read_table(table).to_pylist()[0]
    name = f"{row['group'].split()[1]}:{row['i']},{row['j']}"
    capsys.readouterr()
    ask = ["experts", "explain", str(MADE["monet"]), "--contexts", str(table), "--device", "cpu", "--max-new-tokens", "4"]
    assert main([*ask, "--experts", name]) == 0
    assert capsys.readouterr().out.startswith(f"{name} (")
    for wrong, message in (("1:2", "expected ROUTER:I,J"), ("9:0,0", "has no expert 9:0,0")):
        assert main([*ask, "--experts", wrong]) == 2
        assert message in capsys.readouterr().err
    other = make_export(tmp_path / "other", "monet", hidden_size=48)
    assert main([*ask[:2], str(other), *ask[3:], "--experts", name]) == 2
    assert "is of a model with other routers" in capsys.readouterr().err
    assert main(["experts", "page", str(MADE["monet"]), *data[:2], "--out", str(tmp_path / "p.html"), "--device", "cpu"]) == 2
    assert "needs two kinds at least" in capsys.readouterr().err
    neurons = tmp_path / "neurons.parquet"
    assert main(["experts", "contexts", str(MADE["llama"]), *data, "--out", str(neurons), "--features", "neurons"]) == 0
    assert "neurons are used by 10 of them or more" in capsys.readouterr().out
    assert {row["group"] for row in parquet.read_table(neurons).to_pylist()} == {"layer 0", "layer 1"}
    assert main([*ask[:3], "--contexts", str(neurons), "--experts", "0:0,0", "--device", "cpu"]) == 2
    assert "holds no contexts of experts" in capsys.readouterr().err
    for more, message in (
        (["--layers", "1"], "--layers: experts belong to routers"),
        (["--latents", "64"], "--latents, --active: belong to autoencoders"),
        (["--features", "latents", "--fit", "a", "--active", "9999"], "--active: got 9999, expected at most the 4096"),
        (["--features", "latents"], "--fit: names the texts"),
        (["--fit", f"a={tmp_path}/a.jsonl"], "--fit: names the texts"),
    ):
        assert main(["experts", "contexts", str(MADE["llama"]), *data, "--out", str(tmp_path / "x.parquet"), *more]) == 2
        assert message in capsys.readouterr().err

    scored = tmp_path / "scored.jsonl"
    scored.write_text("".join(json.dumps({"text": f"the cat {i}", "bad": i / 10}) + "\n" for i in range(6)))
    correlate = ["experts", "correlate", str(MADE["monet"]), "--data", str(scored), "--device", "cpu"]
    out = tmp_path / "c"
    assert main([*correlate, "--score", "bad", "--out", str(out), "--above", "0.1", "2"]) == 0
    assert {path.name for path in out.glob("*.safetensors")} == {"correlation.safetensors", "without-above-0.1.safetensors"}
    assert "above 2: 0 of 256 experts" in capsys.readouterr().out
    table = tmp_path / "scored.csv"
    table.write_text("text,bad\n" + "".join(f"the cat {i},{i / 10}\n" for i in range(6)))
    assert main([*correlate[:4], str(table), *correlate[5:], "--score", "bad", "--out", str(tmp_path / "t")]) == 0
    first, second = (Correlation.load(tmp_path / name / "correlation.safetensors") for name in "ct")
    assert np.array_equal(first.values, second.values)
    capsys.readouterr()
    table.write_text("text,bad\nthe cat,often\n")
    assert main([*correlate[:4], str(table), *correlate[5:], "--score", "bad", "--out", str(tmp_path / "u")]) == 2
    assert "line 2, field 'bad': got 'often' (str), expected a finite number" in capsys.readouterr().err
    assert main([*correlate, "--score", "good", "--out", str(tmp_path / "d")]) == 2
    assert "line 1: expected the columns 'text' and 'good', got text, bad" in capsys.readouterr().err


def test_texts_of_tokens_keep_their_spaces() -> None:
    words = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "▁a": 4, "a": 5}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([2]) == "cat", "alone it loses its space"
    assert "".join(map(token_texts(tokenizer), [1, 2, 3])) == " the cats"


def test_autoencoders_without_saelens_say_what_to_install(load, tmp_path, monkeypatch, capsys) -> None:
    load("llama")
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    (tmp_path / "a.txt").write_text("a text\n")
    data = ["--data", f"a={tmp_path}/a.txt", "--fit", f"a={tmp_path}/a.txt", "--features", "latents"]
    assert main(["experts", "contexts", str(MADE["llama"]), *data, "--out", str(tmp_path / "x.parquet")]) == 2
    assert "pip install sae-lens" in capsys.readouterr().err
