"""Run as a script, without unified_lm: what does plain mteb say about an export?

Usage: python plain_mteb.py CASE.json, {"folder", "out", "prompts": {...} or null, "sts": {columns}, "ranking": {...}}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer


def metadata(name: str, kind: str, score: str) -> mteb.TaskMetadata:
    return mteb.TaskMetadata(
        name=name,
        description=name,
        type=kind,
        dataset={"path": "offline/x", "revision": "1"},
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=score,
    )


class Similarity(AbsTaskSTS):
    metadata = metadata("STSBenchmark", "STS", "cosine_spearman")


class Search(AbsTaskRetrieval):
    metadata = metadata("SciFact", "Retrieval", "ndcg_at_10")


def main(case: dict[str, Any]) -> None:
    similarity, search = Similarity(), Search()
    similarity.dataset = DatasetDict({"test": Dataset.from_dict(case["sts"])})
    ranking = case["ranking"]
    split = {
        "corpus": Dataset.from_dict(ranking["corpus"]),
        "queries": Dataset.from_dict(ranking["queries"]),
        "relevant_docs": ranking["relevant"],
        "top_ranked": None,
    }
    search.dataset = {"default": {"test": split}}
    scores = {}
    model = SentenceTransformer(case["folder"], device="cpu", trust_remote_code=False)
    if case["prompts"]:
        model = SentenceTransformerEncoderWrapper(model, model_prompts=case["prompts"])
    for task in (similarity, search):
        task.data_loaded = True
        result = mteb.evaluate(model, task, cache=None, show_progress_bar=False, co2_tracker=False)
        scores[task.metadata.name] = result.task_results[0].get_score()
    Path(case["out"]).write_text(json.dumps(scores))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    assert not any(name.partition(".")[0] == "unified_lm" for name in sys.modules), "unified_lm was imported"
