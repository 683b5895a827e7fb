"""The only file that imports mteb: our model as an mteb encoder, offline tasks as mteb tasks, and the evaluation loop.

Scores, file layout and caching are mteb's own (2.x), so results are comparable with its leaderboard and readable by its tools.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import mteb
import numpy as np
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError
from httpx import HTTPError
from mteb import ResultCache, TaskMetadata, TaskResult
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import Licenses, PromptType
from torch.utils.data import DataLoader

from unified_lm.core.errors import DataError, OutputError
from unified_lm.core.outputs import check_file
from unified_lm.core.user_files import parse_json
from unified_lm.evaluation.embedding.instructions import Instructions, Role, TaskKey
from unified_lm.evaluation.embedding.offline import Kind, OfflineTask
from unified_lm.evaluation.embedding.task_results import ModelIdentity, TaskScore
from unified_lm.evaluation.embedding.task_sets import RegistryTask
from unified_lm.inference.unified import UnifiedLM

_log = logging.getLogger(__name__)


class UnifiedEncoder(AbsEncoder):
    """`UnifiedLM` as mteb sees a model."""

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        model: UnifiedLM,
        instructions: Instructions,
        identity: ModelIdentity,
        *,
        show_progress: bool = False,
    ) -> None:
        """Wrap a model.

        Args:
            model: the model; it packs texts itself, so mteb's batch size has no effect.
            instructions: which instruction precedes which text.
            identity: the name under which results are filed.
            show_progress: draw a progress bar per call on stderr.
        """
        self.model = model
        self.mteb_model_meta = _model_meta(model, identity)
        self._instructions = instructions
        self._show_progress = show_progress

    def encode(
        self,
        inputs: DataLoader[Any],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embed the texts of a task, float32 `[N, D]`.

        An empty text, which some corpora have, becomes the zero vector, as in sentence-transformers, which pools no token.

        Raises:
            DataError: there is no instruction for this task.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        instruction = self._instructions.find(task_key(task_metadata), Role(prompt_type.value) if prompt_type else Role.TEXT)
        if instruction is None:
            raise DataError(f"the instructions '{self._instructions.label}' have none for {task_metadata.name}.")
        filled = [index for index, text in enumerate(texts) if text.strip()]
        vectors = np.zeros((len(texts), self.model.embedding_dim), np.float32)
        if len(filled) < len(texts):
            _log.warning("%s: %d of %d texts are empty", task_metadata.name, len(texts) - len(filled), len(texts))
        if filled:
            chosen = [texts[index] for index in filled]
            vectors[filled] = self.model.encode(chosen, instruction, show_progress=self._show_progress)
        return vectors


def task_key(metadata: TaskMetadata) -> TaskKey:
    """The key by which the instruction of a task is found."""
    return TaskKey(metadata.name, metadata.type, cast("str | Mapping[str, str] | None", metadata.prompt))


def leaf_tasks(tasks: Iterable[AbsTask]) -> list[AbsTask]:
    """The tasks, with aggregates (CQADupstack) replaced by their parts."""
    leaves: list[AbsTask] = []
    for task in tasks:
        leaves += leaf_tasks(task.metadata.tasks) if isinstance(task, AbsTaskAggregate) else [task]
    return leaves


def in_registry(name: str) -> bool:
    """Whether mteb knows a task of this name."""
    try:
        mteb.get_task(name)
    except KeyError:
        return False
    return True


def registry_task(wanted: RegistryTask, languages: Sequence[str] = ()) -> AbsTask:
    """Get a task of mteb's registry.

    Args:
        wanted: its name, splits and subsets.
        languages: codes ("eng"); only subsets entirely in these languages are kept. Empty keeps all.

    Raises:
        DataError: unknown name, split or subset.
    """
    try:
        task = mteb.get_task(wanted.name, eval_splits=list(wanted.splits) or None)
    except KeyError as error:
        close = re.search("Did you mean: '(.*)'", str(error))
        hint = f"Did you mean '{close[1]}'?" if close else f"mteb {mteb.__version__} has none of a similar name."
        raise DataError(f"unknown task '{wanted.name}'. {hint} An offline task is named by its folder, as ./mytask.") from error
    absent = [split for split in wanted.splits if split not in task.metadata.eval_splits]
    absent += [subset for subset in wanted.subsets if subset not in task.metadata.hf_subsets]
    try:
        if absent:
            raise ValueError(f"it has no {', '.join(absent)}")
        return task.filter_languages(
            list(languages) or None, hf_subsets=list(wanted.subsets) or None, exclusive_language_filter=bool(languages)
        )
    except ValueError as error:
        raise DataError(
            f"task '{wanted.name}' cannot be narrowed to what was asked for: {error}. Its splits: "
            f"{', '.join(task.metadata.eval_splits)}; its subsets: {', '.join(task.metadata.hf_subsets_to_langscripts)}."
        ) from error


def run_tasks(
    encoder: UnifiedEncoder,
    tasks: Sequence[AbsTask],
    out: Path,
    *,
    overwrite: bool = False,
    report: Callable[[TaskScore], None] = lambda score: None,
) -> list[TaskScore]:
    """Evaluate task by task. Every result is saved at once, so that an interrupted run resumes with the next task.

    A finished task is skipped if its result is for the same data; mteb itself would also accept a result for other data.

    Args:
        encoder: the model.
        tasks: what to run.
        out: mteb's cache folder; files go to `out/results/MODEL/REVISION/TASK.json`.
        overwrite: run finished tasks again.
        report: called after each task.

    Raises:
        DataError: a task's data cannot be loaded.
        OutputError: something else is in the place of a result; nothing was run.
    """
    cache = ResultCache(out)
    _check_places(cache, tasks, encoder.mteb_model_meta)
    scores = []
    for task in tasks:
        before = None if overwrite else _finished(cache, task, encoder.mteb_model_meta)
        result = before or _evaluate(encoder, task, cache, overwrite)
        score = TaskScore(
            name=task.metadata.name,
            type=task.metadata.type,
            metric=task.metadata.main_score,
            score=float(result.get_score()),
            seconds=float(result.evaluation_time or 0.0),
            resumed=before is not None,
            path=cache.get_task_result_path(task.metadata.name, encoder.mteb_model_meta),
        )
        report(score)
        scores.append(score)
    return scores


def _check_places(cache: ResultCache, tasks: Sequence[AbsTask], meta: ModelMeta) -> None:
    """Refuse what is in the place of a file that mteb writes and is none of its own, whoever wrote it."""
    results = [cache.get_task_result_path(task.metadata.name, meta) for task in (*tasks, *leaf_tasks(tasks))]
    places: dict[Path, Callable[[Path], object]] = dict.fromkeys(results, TaskResult.from_disk)
    places |= {path.parent / "model_meta.json": lambda path: parse_json(path.read_bytes())["revision"] for path in results}
    for path, read in places.items():
        if path.is_symlink() or not path.is_file():
            check_file(path)
            continue
        try:
            read(path)
        except Exception as error:  # mteb's readers raise anything, KeyError included
            raise OutputError(
                f"{path} is in the place of a result, and mteb has not written it ({type(error).__name__}); "
                "nothing was changed. Move it away, or name another --out."
            ) from error


def _finished(cache: ResultCache, task: AbsTask, meta: ModelMeta) -> TaskResult | None:
    result = cache.load_task_result(task.metadata.name, meta)
    if result is None or result.dataset_revision != task.metadata.revision or result.get_missing_evaluations(task):
        return None
    return result


def _evaluate(encoder: UnifiedEncoder, task: AbsTask, cache: ResultCache, overwrite: bool) -> TaskResult:
    """Run one task. A result for other data is overwritten, not merged."""
    old = cache.load_task_result(task.metadata.name, encoder.mteb_model_meta)
    stale = old is not None and old.dataset_revision != task.metadata.revision
    try:
        for leaf in leaf_tasks([task]):
            leaf.load_data()
    except (OSError, HTTPError, DatasetsError) as error:
        raise DataError(
            f"the data of task '{task.metadata.name}' cannot be loaded: {str(error) or type(error).__name__}\n"
            "It comes from the Hugging Face Hub. Without network (or with HF_HUB_OFFLINE=1) only what is in the local cache "
            "can run; make an offline task of files you have: a folder with a task.yaml, see docs/evaluation.md."
        ) from error
    results = mteb.evaluate(
        cast("Any", encoder),
        task,
        cache=cache,
        overwrite_strategy="always" if overwrite or stale else "only-missing",
        co2_tracker=False,
        show_progress_bar=False,
    )
    for leaf in leaf_tasks([task]):
        if not isinstance(leaf, _Offline):  # an offline task could not load its data again
            leaf.unload_data()
    return results.task_results[0]


def _model_meta(model: UnifiedLM, identity: ModelIdentity) -> ModelMeta:
    manifest = model.manifest
    license_name = manifest.base_license if manifest else ""
    return ModelMeta.create_empty(
        overwrites={
            "name": identity.name,
            "revision": identity.revision,
            "embed_dim": model.embedding_dim,
            "max_tokens": model.max_tokens,
            "license": license_name if license_name in get_args(Licenses) else None,
            "framework": ["Sentence Transformers", "PyTorch"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": True,
            "adapted_from": manifest.base_model if manifest else None,
            "experiment_kwargs": dict(identity.settings) or None,
        }
    )


class _Offline(AbsTask):
    """Common part of offline tasks: metadata from the folder, and data that is already in memory."""

    def __init__(self, source: OfflineTask) -> None:
        self.metadata = _metadata(source)
        self.source = source
        super().__init__()

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        """Assign the folder's rows to the attribute that mteb reads."""
        self.dataset = self._tables()
        self.data_loaded = True

    def _tables(self) -> Any:
        """Split -> rows."""
        return DatasetDict({name: Dataset.from_dict(dict(columns)) for name, columns in self.source.splits.items()})


class OfflineSTS(_Offline, AbsTaskSTS):
    """Spearman correlation of cosine similarities with scores."""

    def __init__(self, source: OfflineTask) -> None:
        super().__init__(source)
        scores = source.splits["test"]["score"]
        self.min_score, self.max_score = min(scores), max(scores)


class OfflineClassification(_Offline, AbsTaskClassification):
    """Accuracy of a logistic regression on 8 examples per class, mean of 10 draws."""

    def _tables(self) -> Any:
        names = sorted({label for columns in self.source.splits.values() for label in columns["label"]})
        number = {name: index for index, name in enumerate(names)}
        return DatasetDict(
            {
                split: Dataset.from_dict({"text": columns["text"], "label": [number[label] for label in columns["label"]]})
                for split, columns in self.source.splits.items()
            }
        )


class OfflineClustering(_Offline, AbsTaskClustering):
    """V-measure of k-means over samples of the texts. All texts are embedded; mteb's default keeps 4 % of them."""

    max_fraction_of_documents_to_embed = None

    def _tables(self) -> Any:
        columns = self.source.splits["test"]
        self.max_documents_per_cluster = min(AbsTaskClustering.max_documents_per_cluster, len(columns["text"]))
        return DatasetDict({"test": Dataset.from_dict({"sentences": columns["text"], "labels": columns["label"]})})


class OfflinePairClassification(_Offline, AbsTaskPairClassification):
    """Average precision of classifying pairs by their similarity."""

    def _tables(self) -> Any:
        columns = self.source.splits["test"]
        return DatasetDict(
            {
                "test": Dataset.from_dict(
                    {"sentence1": columns["sentence1"], "sentence2": columns["sentence2"], "labels": columns["label"]}
                )
            }
        )


class OfflineRetrieval(_Offline, AbsTaskRetrieval):
    """nDCG@10 over a corpus; with candidates per query, mean average precision of their ranking (reranking)."""

    def _tables(self) -> Any:
        ranking = self.source.ranking
        assert ranking is not None, "read_task fills it for these kinds"
        return {
            "default": {
                "test": {
                    "corpus": Dataset.from_dict(dict(ranking.corpus)),
                    "queries": Dataset.from_dict(dict(ranking.queries)),
                    "relevant_docs": {query: dict(documents) for query, documents in ranking.relevant.items()},
                    "top_ranked": None if ranking.candidates is None else dict(ranking.candidates),
                }
            }
        }


_CLASSES: Mapping[Kind, tuple[type[_Offline], str, str]] = {
    Kind.STS: (OfflineSTS, "STS", "cosine_spearman"),
    Kind.CLASSIFICATION: (OfflineClassification, "Classification", "accuracy"),
    Kind.CLUSTERING: (OfflineClustering, "Clustering", "v_measure"),
    Kind.PAIR_CLASSIFICATION: (OfflinePairClassification, "PairClassification", "max_ap"),
    Kind.RERANKING: (OfflineRetrieval, "Reranking", "map_at_1000"),
    Kind.RETRIEVAL: (OfflineRetrieval, "Retrieval", "ndcg_at_10"),
}
"""Kind -> class, mteb's task type, main score (as in mteb's own tasks)."""


def offline_task(source: OfflineTask) -> AbsTask:
    """Turn a folder into a task of mteb's own classes."""
    return _CLASSES[source.kind][0](source)


def _metadata(source: OfflineTask) -> TaskMetadata:
    _, task_type, main_score = _CLASSES[source.kind]
    return TaskMetadata(
        name=source.name,
        description=source.description,
        prompt=cast("Any", source.prompt),
        type=cast("Any", task_type),
        dataset={"path": f"offline/{source.name}", "revision": source.revision},
        category="t2t",
        eval_splits=["test"],
        eval_langs=list(source.languages),
        main_score=main_score,
    )


def model_prompts(model: UnifiedLM, instructions: Instructions, tasks: Sequence[AbsTask]) -> dict[str, str]:
    """The prompts with which plain mteb reproduces our scores: `SentenceTransformerEncoderWrapper(..., model_prompts=...)`.

    Keys follow mteb: TASK, TASK-query, TASK-document.
    """
    prompts = {}
    for task in leaf_tasks(tasks):
        key = task_key(task.metadata)
        for role in Role:
            instruction = instructions.find(key, role)
            if instruction is not None:
                prompts[key.name if role is Role.TEXT else f"{key.name}-{role.value}"] = model.embedding_prompt(instruction)
    return prompts
