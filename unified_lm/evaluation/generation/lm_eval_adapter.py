"""lm-eval (EleutherAI's evaluation harness) on an exported folder. The only file that imports it.

The export is an ordinary causal language model, so the harness loads it through its own Hugging Face class, without code of
this package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from unified_lm.core.distributed import local_device
from unified_lm.core.errors import ConfigError, DataError, did_you_mean

VERSION = str(lm_eval.__version__)
"""Version of the harness, recorded in results."""


@dataclass(frozen=True, kw_only=True)
class HarnessSettings:
    """Settings of a harness run.

    Attributes:
        tasks: names of tasks or groups, or paths of task files (.yaml).
        include_path: folder of further task files, whose task names become available.
        num_fewshot: examples before each question; None uses the task's own number.
        limit: maximum questions per task; None for all. A limit is for trials only: the scores are not comparable.
        batch_size: questions per forward; it changes scores only by rounding.
        chat: whether questions are formatted as messages in the export's chat template.
        device: None selects the accelerator if there is one.
        dtype: dtype of the weights in memory; None keeps the stored one (`inference.loading.stock_dtype` gives it a name).
        seed: seed of few-shot examples and sampling.
    """

    tasks: Sequence[str]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    chat: bool = False
    device: str | None = None
    dtype: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task.

    Attributes:
        task: name of the task.
        metric: name of the metric, with the filter applied to the answers unless that is "none".
        value: the score.
        error: its standard error, or None if the harness reports none.
        num_questions: number of questions asked.
    """

    task: str
    metric: str
    value: float
    error: float | None
    num_questions: int | None


def run_harness(
    folder: Path, settings: HarnessSettings, answers: Path | None = None
) -> tuple[list[HarnessScore], dict[str, Any]]:
    """Run tasks on an exported folder.

    Args:
        folder: the export.
        settings: see `HarnessSettings`.
        answers: where the harness stores the model's answers, so that a killed run resumes where it stopped. The name must
            identify the content of the folder and the settings. None stores nothing.

    Returns:
        The scores, and the harness's own result without individual answers, as JSON values.

    Raises:
        DataError: an unknown task, an unreadable task file, or unavailable data; raised before the model is loaded.
        ConfigError: the folder's tokenizer has no chat template.
    """
    manager = TaskManager(include_path=None if settings.include_path is None else str(settings.include_path))
    _check_tasks(manager, settings.tasks)
    model = HFLM(
        pretrained=str(folder),
        backend="causal",
        device=settings.device or str(local_device()),
        dtype=settings.dtype or "auto",
        batch_size=settings.batch_size,
        trust_remote_code=False,
    )
    if settings.chat and not model.tokenizer.chat_template:
        raise ConfigError(f"{folder} has no chat template. Leave out --chat.")
    if answers is not None:
        answers.parent.mkdir(parents=True, exist_ok=True)
    result = lm_eval.simple_evaluate(
        model=model,
        tasks=list(settings.tasks),
        task_manager=manager,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        log_samples=False,
        use_cache=None if answers is None else str(answers),
        apply_chat_template=settings.chat,
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
    )
    assert result is not None, "only ranks other than 0 get nothing"
    plain = json.loads(json.dumps(result, default=handle_non_serializable))
    return _scores(plain), plain


def _check_tasks(manager: TaskManager, names: Sequence[str]) -> None:
    """Load every task once, which reads its file and its data.

    Raises:
        DataError: see `run_harness`.
    """
    known = set(manager.all_tasks)
    for name in names:
        if name not in known and not Path(name).is_file():
            hint = did_you_mean(name, known)  # a list of all names would be thousands long
            close = hint if "Did you" in hint else ""
            raise DataError(
                f"unknown task '{name}'.{close} Tasks of your own: --include-path FOLDER, or the path of a .yaml file."
            )
    try:
        manager.load(list(names))
    except Exception as error:  # task files may name any class and any data, so anything may be raised
        raise DataError(f"lm-eval cannot load {', '.join(names)}: {type(error).__name__}: {str(error).strip()}") from error


def _scores(result: Mapping[str, Any]) -> list[HarnessScore]:
    """Every metric of every task and group; the harness uses the keys "name,filter" and "name_stderr,filter"."""
    scores = []
    for task, metrics in result["results"].items():
        count = result.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            name, comma, filtered = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{name}_stderr,{filtered}")
            label = name if filtered == "none" else f"{name} ({filtered})"
            scores.append(HarnessScore(task, label, float(value), error if isinstance(error, int | float) else None, count))
    return scores
