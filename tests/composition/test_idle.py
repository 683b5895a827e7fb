"""Settings that decide nothing in a run are told where they were given; a new setting must say whether there are such runs."""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.engine.small_run import small_run
from unified_lm.assembly import build_run
from unified_lm.composition.compose import compose_run
from unified_lm.composition.convert import schema_keys
from unified_lm.composition.idle import EFFECTIVE, IDLE, STREAM_IDLE

GENERATIVE = "recipe=generative_only"
SMALL = "recipe=grit_smollm2"
CASES: dict[str, tuple[list[str], list[str], str]] = {
    "model.source": ([SMALL, "model.init_from=runs/a"], ["model.source=embedded"], "model.init_from"),
    "model.name": ([SMALL, "model.init_from=runs/a"], ["model.name=org/model"], "model.init_from"),
    "model.revision": ([SMALL], ["model.revision=abc"], "model.source is embedded"),
    "model.architecture": ([SMALL], ["model.architecture.rope_theta=5e5"], "weights bring their own configuration"),
    "model.init_seed": ([SMALL], ["model.init_seed=3"], "loaded, not drawn"),
    "model.tokenizer": (
        ["recipe=monet_tiny", "model.init_from=runs/a"],
        ["model.tokenizer=org/model"],
        "that of model.init_from",
    ),
    "model.trust_remote_code": ([SMALL], ["model.trust_remote_code=true"], "model.source is embedded"),
    "model.pooling": ([GENERATIVE], ["model.pooling=cls"], "no stream trains embeddings"),
    "model.normalize": ([GENERATIVE], ["model.normalize=false"], "no stream trains embeddings"),
    "parallel.bucket_elements": ([SMALL, "parallel=ddp"], ["parallel.bucket_elements=9"], "parallel.backend is ddp"),
    "parallel.persistence_threshold": ([SMALL, "parallel=zero1"], ["parallel.persistence_threshold=9"], "is zero1"),
    "parallel.offload_parameters": ([SMALL, "parallel=zero3"], ["parallel.offload_parameters=false"], "is zero3;"),
    "logging.wandb_project": ([SMALL], ["logging.wandb_project=mine"], "wandb is disabled"),
    "logging.wandb_entity": ([SMALL], ["logging.wandb_entity=me"], "wandb is disabled"),
    "logging.wandb_group": ([SMALL], ["logging.wandb_group=g"], "wandb is disabled"),
    "logging.wandb_name": ([SMALL], ["logging.wandb_name=n"], "wandb is disabled"),
    "logging.wandb_tags": ([SMALL], ["logging.wandb_tags=[a]"], "wandb is disabled"),
    "checkpoint.keep_every": ([SMALL], ["checkpoint={keep_every: 10}"], "checkpoint.every is 0"),
    "validation.every": ([SMALL, "~validation.sources", "~validation.retrieval"], ["validation.every=3"], "no rows"),
    "validation.num_batches": ([SMALL, "~validation.sources"], ["validation.num_batches=3"], "no rows"),
    "validation.normalization": ([SMALL, "~validation.sources.generation"], ["validation.normalization=token"], "over tokens"),
    "export.private": ([SMALL], ["export.private=false"], "names no repository"),
}
"""Setting -> a run in which it decides nothing, how it is given, and what is said."""

USED = {
    "model.source": [SMALL, "model.name=org/m"],
    "model.name": [SMALL, "model.source=hub"],
    "model.revision": [SMALL, "model.source=hub", "model.name=org/m"],
    "model.architecture": [SMALL, "dry_run=true"],
    "model.init_seed": ["recipe=monet_tiny"],
    "model.tokenizer": [SMALL, "model.tiny_random=true"],
    "model.trust_remote_code": [SMALL, "model.source=hub", "model.name=org/m"],
    "model.pooling": [GENERATIVE, "export.modes=[embed,generate]"],
    "model.normalize": [SMALL],
    "parallel.bucket_elements": [SMALL, "parallel=zero1", "model.dtype=bfloat16"],
    "parallel.persistence_threshold": [SMALL, "parallel=zero3"],
    "parallel.offload_parameters": [SMALL, "parallel=zero3_offload"],
    **{key: [SMALL, "logging.wandb=offline"] for key in IDLE if key.startswith("logging")},
    "checkpoint.keep_every": [SMALL, "checkpoint.every=10"],
    "validation.every": [SMALL, "~validation.sources"],
    "validation.num_batches": [SMALL],
    "validation.normalization": [SMALL],
    "export.private": [SMALL, "export.push_to_hub=org/m"],
}
"""Setting -> a run in which it decides something."""


def notices(arguments: list[str]) -> list[str]:
    return [notice for notice in compose_run(arguments).notices if "no effect here" in notice]


def test_every_setting_says_whether_it_can_be_idle() -> None:
    """Settings below a stream or a source belong to their format, objective or kind, which refuses what it cannot honor."""
    undecided = [key for key in schema_keys() if key not in IDLE and not any(fnmatchcase(key, entry) for entry in EFFECTIVE)]
    assert not undecided, "a new setting: does it decide something in every run? Add it to IDLE or to EFFECTIVE"
    assert set(IDLE) <= set(schema_keys())
    assert not [key for key in IDLE if any(fnmatchcase(key, entry) for entry in EFFECTIVE)]
    assert set(CASES) == set(USED) == set(IDLE)


@pytest.mark.parametrize("key", IDLE)
def test_a_setting_that_decides_nothing_is_told_where_it_is_given(key: str) -> None:
    run, given, reason = CASES[key]
    (notice,) = notices([*run, *given])
    assert notice.startswith(f"{key} " if key == "model.architecture" else f"{key}=")
    assert reason in notice
    assert not notices(run), "a recipe's own values, and defaults, are not told"
    assert not notices([*USED[key], *given]), "where it decides something nothing is said"


NEGATIVES = "streams.embedding.num_hard_negatives"
STREAM_CASES = {
    "on_few_negatives": ("skip", f"{NEGATIVES}=0", f"{NEGATIVES}=1"),
    "objective.reference_world_size": ("8", "seed=7", "streams.embedding.objective.gradient_scale=inverse_world_size"),
}
"""Setting of a stream -> a value, an argument with which it decides nothing, and one with which it does."""


@pytest.mark.parametrize("key", STREAM_IDLE)
def test_a_setting_of_a_stream_that_decides_nothing_is_told(key: str) -> None:
    value, idle, used = STREAM_CASES[key]
    given = f"streams.embedding.{key}={value}"
    (notice,) = notices([SMALL, idle, given])
    assert notice.startswith(f"{given} has no effect here: ")
    assert not notices([SMALL, used, given])
    assert not notices([SMALL, idle])


def test_shares_of_a_single_source_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How many sources there are is known once they are open: a folder holds several."""
    arguments = small_run(tmp_path, tmp_path / "run", "streams.generation.source_temperature=0.5")
    build_run(compose_run([*arguments, "streams.embedding.sources.0.weight=3", "streams.embedding.mix_sources=true"]))
    told = capsys.readouterr().err
    assert "streams.generation.source_temperature=0.5 has no effect here: the stream has one source" in told
    assert "streams.embedding.sources.0.weight=3 has no effect here" in told
    assert "streams.embedding.mix_sources=true has no effect here" in told
    (tmp_path / "chats").mkdir()
    for name in ("a", "b"):
        shutil.copy(tmp_path / "chats.jsonl", tmp_path / "chats" / f"{name}.jsonl")
    folder = f"streams.generation.sources=[{{path: {tmp_path}/chats}}]"
    build_run(compose_run([*arguments, folder, f"run_dir={tmp_path}/another"]))
    assert "no effect" not in capsys.readouterr().err
