"""Our model under mteb: equal to plain mteb and to a direct computation; registry names; resuming; every kind of task."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

pytest.importorskip("mteb")

from tests.evaluation.embedding import task_folders
from tests.inference.conftest import make_export
from unified_lm.config.schema import ModelConfig
from unified_lm.core.errors import DataError, OutputError
from unified_lm.data.prompts.templates import get_template
from unified_lm.evaluation.embedding import mteb_adapter as adapter
from unified_lm.evaluation.embedding.instructions import (
    Instructions,
    Role,
    instructions_of,
    load_table,
    require_known,
    roles_of,
)
from unified_lm.evaluation.embedding.offline import read_task
from unified_lm.evaluation.embedding.task_sets import RegistryTask, task_sets
from unified_lm.export.directory import export_model
from unified_lm.export.manifest import Manifest
from unified_lm.inference import UnifiedLM
from unified_lm.models.loading import load_model

SCRIPT = Path(__file__).with_name("plain_mteb.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("mteb") / "export")


@pytest.fixture(scope="module")
def model(folder: Path) -> UnifiedLM:
    return UnifiedLM.from_pretrained(folder, device="cpu")


def encoder(model: UnifiedLM, instructions: str = "export", revision: str = "abc") -> adapter.UnifiedEncoder:
    source: Instructions = instructions_of(instructions, model.manifest.instructions if model.manifest else {})
    settings = {"instructions": source.label} if source.label else {}
    return adapter.UnifiedEncoder(
        model, source, adapter.ModelIdentity(name="unified_lm/x", revision=revision, settings=settings)
    )


def score(model: UnifiedLM, task: Path, out: Path, instructions: str = "export") -> adapter.TaskScore:
    return adapter.run_tasks(encoder(model, instructions), [adapter.offline_task(read_task(task))], out)[0]


def plain_scores(folder: Path, sts: Path, retrieval: Path, prompts: dict[str, str] | None, work: Path) -> dict[str, float]:
    """The same rows under plain mteb, in a process that never imports unified_lm."""
    ranking = read_task(retrieval).ranking
    assert ranking is not None
    case = {
        "folder": str(folder),
        "out": str(work / "plain.json"),
        "prompts": prompts,
        "sts": read_task(sts).splits["test"],
        "ranking": {"queries": ranking.queries, "corpus": ranking.corpus, "relevant": ranking.relevant},
    }
    (work / "case.json").write_text(json.dumps(case))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), str(work / "case.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=work, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    scores: dict[str, float] = json.loads((work / "plain.json").read_text())
    return scores


def direct_spearman(model: UnifiedLM, sts: Path, instruction: str) -> float:
    columns = read_task(sts).splits["test"]
    left, right = (model.encode(columns[name], instruction, normalize=True) for name in ("sentence1", "sentence2"))
    return float(spearmanr((left * right).sum(1), columns["score"]).statistic)


@pytest.mark.parametrize(("instructions", "rows"), [("export", 120), pytest.param("e5", 200, marks=pytest.mark.slow)])
def test_stsb_ours_plain_and_direct_agree(
    model: UnifiedLM, folder: Path, tmp_path: Path, shared_dir: Path, instructions: str, rows: int
) -> None:
    """STS-B dev, and a retrieval task, whose queries and documents have different prompts."""
    sts, retrieval = task_folders.stsb(tmp_path, shared_dir, rows), task_folders.retrieval(tmp_path)
    ours = {task.name: score(model, task, tmp_path / "out", instructions) for task in (sts, retrieval)}
    tasks = [adapter.offline_task(read_task(task)) for task in (sts, retrieval)]
    prompts = adapter.model_prompts(model, instructions_of(instructions, {}), tasks) if instructions != "export" else None
    plain = plain_scores(folder, sts, retrieval, prompts, tmp_path)
    assert ours["stsb"].score == pytest.approx(plain["STSBenchmark"], abs=1e-4)
    assert ours["retrieval"].score == pytest.approx(plain["SciFact"], abs=1e-4)
    instruction = "" if instructions == "export" else "Retrieve semantically similar text."
    assert ours["stsb"].score == pytest.approx(direct_spearman(model, sts, instruction), abs=1e-4)
    other = "Find the passage." if instructions == "export" else ""
    assert abs(ours["stsb"].score - direct_spearman(model, sts, other)) > 1e-3, "another prompt must show"


def test_every_kind_runs_through_mteb(model: UnifiedLM, tmp_path: Path) -> None:
    got = {}
    for write in (
        task_folders.sts,
        task_folders.classification,
        task_folders.clustering,
        task_folders.pairs,
        task_folders.reranking,
        task_folders.retrieval,
    ):
        result = score(model, write(tmp_path), tmp_path / "out", "none")
        assert 0 <= abs(result.score) <= 1
        assert result.path.is_file()
        got[result.type] = (result.metric, result.score)
    assert set(got) == {"STS", "Classification", "Clustering", "PairClassification", "Reranking", "Retrieval"}
    assert got["PairClassification"] == ("max_ap", pytest.approx(1.0)), "equal texts come first"
    assert got["Reranking"] == ("map_at_1000", pytest.approx(1.0)), "the query itself comes first"


def test_retrieval_by_hand(model: UnifiedLM, tmp_path: Path) -> None:
    """nDCG@10 with one relevant document is 1 / log2(rank + 1)."""
    folder = task_folders.retrieval(tmp_path)
    ranking = read_task(folder).ranking
    assert ranking is not None
    texts = [text or title for text, title in zip(ranking.corpus["text"], ranking.corpus["title"], strict=True)]
    scores = model.similarity(model.encode(ranking.queries["text"], "Find the passage."), model.encode(texts))
    gains = []
    for row, query in zip(scores, ranking.queries["id"], strict=True):
        target = ranking.corpus["id"].index(next(iter(ranking.relevant[query])))
        rank = int((row > row[target]).sum()) + 1
        gains.append(1 / np.log2(rank + 1) if rank <= 10 else 0.0)
    assert score(model, folder, tmp_path / "out").score == pytest.approx(np.mean(gains), abs=1e-4)


class Recorder(adapter.UnifiedEncoder):
    """Notes how often texts are embedded."""

    calls = 0

    def encode(self, *args: Any, **kwargs: Any) -> np.ndarray:
        type(self).calls += 1
        return super().encode(*args, **kwargs)


def _calls(recorder: Recorder, tasks: Sequence[adapter.AbsTask], out: Path, **options: Any) -> tuple[int, list[bool]]:
    before = Recorder.calls
    resumed = [result.resumed for result in adapter.run_tasks(recorder, tasks, out, **options)]
    return Recorder.calls - before, resumed


@pytest.mark.parametrize("name", ["a task.json", "model_meta.json"])
@pytest.mark.parametrize("content", ['{"mine": 1}', "[1]", "mine", "{", None, "link"])
def test_what_is_in_the_place_of_a_result_stays(name: str, content: str | None, model: UnifiedLM, tmp_path: Path) -> None:
    task = adapter.offline_task(replace(read_task(task_folders.sts(tmp_path)), name="a task"))
    other = adapter.offline_task(replace(read_task(task_folders.sts(tmp_path / "more")), name="first"))
    recorder = Recorder(
        model, instructions_of("none", {}), adapter.ModelIdentity(name="unified_lm/x", revision="abc", settings={})
    )
    place = tmp_path / "out" / "results" / "unified_lm__x" / "abc" / name
    place.parent.mkdir(parents=True)
    (tmp_path / "mine").write_text("mine")
    if content is None:
        place.mkdir()
    elif content == "link":
        place.symlink_to(tmp_path / "mine")
    else:
        place.write_text(content)
    before = sorted(tmp_path.rglob("*"))
    calls = Recorder.calls
    with pytest.raises(OutputError, match="nothing was changed"):
        _calls(recorder, [other, task], tmp_path / "out")
    assert Recorder.calls == calls, "the first task has not run either"
    assert sorted(tmp_path.rglob("*")) == before
    assert content in (None, "link") or place.read_text() == content


def test_finished_tasks_are_skipped_but_not_those_of_other_data(model: UnifiedLM, tmp_path: Path) -> None:
    folder = task_folders.sts(tmp_path)

    def task() -> adapter.AbsTask:
        return adapter.offline_task(read_task(folder))

    def recorder(revision: str) -> Recorder:
        identity = adapter.ModelIdentity(name="unified_lm/x", revision=revision, settings={})
        return Recorder(model, instructions_of("none", {}), identity)

    out = tmp_path / "out"
    assert _calls(recorder("a"), [task()], out) == (2, [False])
    assert _calls(recorder("a"), [task()], out) == (0, [True])
    other = adapter.offline_task(replace(read_task(folder), name="another"))
    assert _calls(recorder("a"), [task(), other], out) == (2, [True, False]), "an interrupted run resumes"
    assert _calls(recorder("a"), [task()], out, overwrite=True) == (2, [False])
    assert _calls(recorder("b"), [task()], out) == (2, [False]), "another model"
    path = folder / "test.tsv"
    path.write_text(path.read_text().replace("0.5", "3.25", 1))
    assert _calls(recorder("a"), [task()], out) == (2, [False]), "other data"
    assert _calls(recorder("a"), [task()], out) == (0, [True])


def test_results_lie_in_mtebs_layout(model: UnifiedLM, tmp_path: Path) -> None:
    folder = task_folders.sts(tmp_path)
    plain = score(model, folder, tmp_path / "out")
    assert plain.path.relative_to(tmp_path / "out") == Path("results/unified_lm__x/abc/sts.json")
    meta = json.loads((plain.path.parent / "model_meta.json").read_text())
    assert (meta["name"], meta["revision"], meta["embed_dim"]) == ("unified_lm/x", "abc", 64)
    content = json.loads(plain.path.read_text())
    assert content["dataset_revision"] == read_task(folder).revision
    assert content["scores"]["test"][0]["main_score"] == pytest.approx(plain.score, abs=1e-5), "mteb rounds its files"
    apart = score(model, folder, tmp_path / "out", "e5").path
    assert apart.parent.parent.name == "experiments", "results of other instructions lie apart"


def test_empty_texts_are_zero_vectors_as_in_sentence_transformers(model: UnifiedLM, folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    vectors = encoder(model).encode(
        [{"text": ["a text", "", " "]}],  # type: ignore[arg-type]
        task_metadata=adapter.registry_task(RegistryTask(name="STS12")).metadata,
        hf_split="test",
        hf_subset="default",
    )
    np.testing.assert_allclose(vectors[0], model.encode("a text"), atol=1e-6)
    assert not vectors[1:].any()
    stock = SentenceTransformer(str(folder), device="cpu").encode(["a text", ""])
    np.testing.assert_allclose(vectors[:2], stock, atol=1e-5)


def test_task_sets_are_in_the_registry_and_have_instructions() -> None:
    sets = task_sets()
    assert {name: len(value.tasks) for name, value in sets.items()} == {"llm2vec15": 15, "grit56": 56, "moee19": 19}
    for value in sets.values():
        tasks = [adapter.registry_task(task) for task in value.tasks]
        assert all(len(task.hf_subsets) == 1 and len(task.eval_splits) == 1 for task in tasks)
        keys = [adapter.task_key(task.metadata) for task in adapter.leaf_tasks(tasks)]
        for table in ("e5", "llm2vec"):
            require_known(load_table(table), keys)
    assert {task.name for task in sets["llm2vec15"].tasks} | {task.name for task in sets["moee19"].tasks} <= {
        task.name for task in sets["grit56"].tasks
    }


def test_grit56_is_mtebs_own_english_benchmark() -> None:
    import mteb

    theirs = {
        (task.metadata.name, tuple(task.eval_splits), tuple(task.hf_subsets))
        for task in mteb.get_benchmark("MTEB(eng, v1)").tasks
    }
    ours = {
        (task.metadata.name, tuple(task.eval_splits), tuple(task.hf_subsets))
        for task in (adapter.registry_task(item) for item in task_sets()["grit56"].tasks)
    }
    assert ours == theirs


def test_the_e5_table_agrees_with_mtebs_prompts() -> None:
    """mteb keeps the same strings at its tasks; ours must not have drifted in typing."""
    table = load_table("e5")
    for item in task_sets()["grit56"].tasks:
        key = adapter.task_key(adapter.registry_task(item).metadata)
        if key.prompt is not None:
            role = roles_of(key.type)[0]
            prompt = key.prompt if isinstance(key.prompt, str) else key.prompt[role.value]
            assert table.find(key, role) == prompt, key.name


def test_unknown_tasks_splits_and_languages() -> None:
    with pytest.raises(DataError, match=r"unknown task 'STSBenchmrk'\. Did you mean 'STSBenchmark'"):
        adapter.registry_task(RegistryTask(name="STSBenchmrk"))
    with pytest.raises(DataError, match=r"it has no tset.*splits: test"):
        adapter.registry_task(RegistryTask(name="STS12", splits=("tset",)))
    with pytest.raises(DataError, match=r"No subsets were found.*deu"):
        adapter.registry_task(RegistryTask(name="STS12"), ["deu"])
    assert adapter.registry_task(RegistryTask(name="STS17"), ["eng"]).hf_subsets == ["en-en"]


def test_without_network_the_message_points_to_offline_tasks(
    model: UnifiedLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("STS12", "SciFact"):
        task = adapter.registry_task(RegistryTask(name=name))
        with pytest.raises(DataError, match=rf"data of task '{name}' cannot be loaded: (.|\n)*offline task"):
            adapter.run_tasks(encoder(model), [task], tmp_path)


def test_prompts_for_plain_mteb(model: UnifiedLM) -> None:
    tasks = [adapter.registry_task(RegistryTask(name=name)) for name in ("SciFact", "SciDocsRR", "STS12")]
    prompts = adapter.model_prompts(model, load_table("e5"), tasks)
    assert prompts["SciFact-document"] == "<|embed|>\n"
    assert prompts["SciFact-query"].startswith("<|user|>\nGiven a scientific claim")
    assert prompts["SciDocsRR-document"] == prompts["SciDocsRR-query"]
    assert prompts["STS12"] == "<|user|>\nRetrieve semantically similar text.\n<|embed|>\n"
    assert all(role in Role for role in roles_of("STS"))


@pytest.mark.slow
def test_stsb_with_the_embedded_model(tmp_path: Path, shared_dir: Path) -> None:
    """Untrained SmolLM2-135M, bidirectional, 200 pairs of STS-B dev."""
    loaded = load_model(ModelConfig(source="embedded", name="smollm2-135m", dtype="float32"))
    manifest = Manifest(
        recipe="none",
        base_model="smollm2-135m",
        family="llama",
        template="grit",
        template_fields={},
        instructions={"query": "Find the passage."},
        dtype="float32",
    )
    export_model(
        loaded.causal_lm, loaded.tokenizer, tmp_path / "export", manifest=manifest, template=get_template("grit"), verify="off"
    )
    model = UnifiedLM.from_pretrained(tmp_path / "export", device="cpu")
    sts, retrieval = task_folders.stsb(tmp_path, shared_dir, rows=200), task_folders.retrieval(tmp_path)
    ours = {task.name: score(model, task, tmp_path / "out").score for task in (sts, retrieval)}
    plain = plain_scores(tmp_path / "export", sts, retrieval, None, tmp_path)
    print(ours, plain)
    assert ours["stsb"] == pytest.approx(plain["STSBenchmark"], abs=1e-4)
    assert ours["stsb"] == pytest.approx(direct_spearman(model, sts, ""), abs=1e-4)
    assert ours["retrieval"] == pytest.approx(plain["SciFact"], abs=1e-4)
