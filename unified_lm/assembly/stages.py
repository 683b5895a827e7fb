"""One run of one recipe: build it, fit it, export it. The calls of `train.py`, and of any program that trains.

With `composition.compose` before them they are the public interface; `docs/python-api.md` shows how to use it. Chains and
ablations are several such runs (`assembly.session`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from unified_lm.assembly.build import Run, RunResult, assemble_run
from unified_lm.assembly.continuation import check_continuation, earlier_settings
from unified_lm.assembly.machine import settle_backend, settle_dtype, settle_retained
from unified_lm.assembly.publish import Trained, check_export, write_export
from unified_lm.assembly.run_folder import occupy
from unified_lm.assembly.run_record import record_what_was_read, write_record
from unified_lm.assembly.same_inputs import require_same, setting_facts
from unified_lm.composition.compose import to_yaml
from unified_lm.composition.locate import RESOLVED_NAME
from unified_lm.config.schema import RunConfig
from unified_lm.core import distributed
from unified_lm.core.agreement import broadcast_object, run_on_rank0
from unified_lm.core.errors import CheckpointError, ConfigError
from unified_lm.core.files import write_text
from unified_lm.core.reading_once import reading_once
from unified_lm.core.tracing import trace_span, traced
from unified_lm.core.watchdog import run_long_on_rank0
from unified_lm.data.prompts.templates import WITH_EOS
from unified_lm.engine.fit import fit
from unified_lm.engine.interruption import stop_message
from unified_lm.engine.reference_scores import ReferenceCache
from unified_lm.engine.wandb_run import check_wandb
from unified_lm.models.identity import identity_key
from unified_lm.models.pooling import Pooling


def build_run(config: RunConfig, console: Console | None = None) -> Run:
    """Make a run ready to train: model, data, objectives and backend, in memory; its folder, configuration and record on disk.

    Whatever could refuse the run does so here, before its first step. Collective.

    Args:
        config: one composed run. An empty `run_dir` becomes runs/RECIPE-TIME.
        console: for messages; None takes stderr, on rank 0.

    Returns:
        The run: `run.training` holds the parts that `fit_run` works with, `run.run_dir` its folder.

    The folder of the run is locked until the end of its job (`assembly.job`), or of this process.

    Raises:
        CheckpointError: `run_dir` already holds a run and nothing was said about resuming it, or another process writes there.
        OutputError: the run would write over files that are not of a run.
        ConfigError: the configuration is of several runs or a dry one, or asks for what this machine or model cannot do.
        DataError: a source cannot be read.
        ModelError: the model cannot be loaded, or does not keep to the attention that is asked of it.
    """
    _require_one_run(config)
    console = console or rank0_console()
    print_notices(config, console)
    config = replace(config, run_dir=broadcast_object(config.run_dir or default_run_dir(config.recipe)))
    require_same(setting_facts(config))
    run_dir = Path(config.run_dir)
    if notice := run_on_rank0(lambda: occupy(config, run_dir)):
        console.print(f"note: {notice}", highlight=False, soft_wrap=True)
    run_on_rank0(lambda: check_wandb(config.logging))
    earlier = run_on_rank0(lambda: earlier_settings(config, run_dir))
    config, notices = settle_dtype(config, earlier)
    if earlier is not None:
        notices += check_continuation(earlier, config)
    placed, chosen = settle_backend(config)
    placed, kept = settle_retained(placed, earlier)
    if config.model.compile:
        config = replace(config, packing=placed.packing)
    _say([*notices, *chosen, *kept], console)
    with reading_once():
        run = assemble_run(placed, run_dir, console)
    _report(run, console)
    if config.export.enabled:
        check_export(Trained.of(run))
    _score_references(run)
    run_on_rank0(lambda: write_record(run))  # first: it says that what else is here is a run's
    if distributed.is_rank0():
        # with what devices decide as it was given: a restart may have others, and gives the same bits on any
        write_text(run_dir / RESOLVED_NAME, to_yaml(config))
    return run


def fit_run(run: Run) -> bool:
    """Train to `max_steps`, from the start or from the checkpoint to resume: `engine.fit`. Collective.

    SIGTERM or SIGUSR1, on any rank, ends it after the step under way, with a checkpoint.

    Returns:
        Whether the run goes on to its export. False when a signal came, be it during the last step: then the export is left to
        the start that goes on with `resume=auto`.

    Raises:
        CheckpointError: the run has been trained before, or a checkpoint could not be written or read.
        ModelError: too many steps in a row without a finite loss and gradient.
    """
    if run.trained is not None:
        raise CheckpointError(
            f"{run.run_dir}: this run has been trained, and its weights and data are no longer those of its start. "
            "Build it again: with resume=auto it goes on from its newest checkpoint."
        )
    config, run.trained = run.training.config, False
    with run.stop as stop:
        run.trained = fit(run.training, stop)
        stopped_by = stop.agree()
    if run.training.loader.reads_along:
        run_on_rank0(lambda: record_what_was_read(run))
        _report_rows(run, rank0_console())
    if run.trained and config.export.enabled:
        if stopped_by is None:
            return True
        after = f"step {config.max_steps}, the last one, which is saved; the export is not written"
        rank0_console().print(stop_message(stopped_by, after), highlight=False, soft_wrap=True)
    is_finished = run.trained and not config.export.enabled
    run.result = RunResult(run.run_dir, is_finished, stopped_by)
    return is_finished


def export_run(run: Run) -> Path | None:
    """Merge, verify and write `run_dir/export`, and upload it where the recipe asks for that. Collective.

    Returns:
        The folder of the export; None where the recipe wants none (`export.enabled=false`).

    Raises:
        CheckpointError: the run has not taken its last step, or the export is not what was trained.
    """
    if not run.trained:
        raise CheckpointError(
            f"{run.run_dir}: the last step of this run is not taken, and its export would say that it is. "
            "Call fit_run first; `unified-lm export RUN` exports a checkpoint of an earlier step."
        )
    if not run.training.config.export.enabled:
        return None
    with run.stop as stop:
        trained = Trained.of(run)
        if not distributed.is_rank0():
            trained.parts().finish()
        target = run_long_on_rank0(lambda: write_export(trained, rank0_console()), "export")
        run.result = RunResult(run.run_dir, is_finished=True, stopped_by=stop.agree())
    return target


def rank0_console() -> Console:
    """Messages go to stderr, from one rank."""
    return Console(stderr=True, quiet=not distributed.is_rank0())


def print_notices(config: RunConfig, console: Console) -> None:
    """Say what composition changed, or wants to be known."""
    _say(config.notices, console)


def _say(notices: Iterable[str], console: Console) -> None:
    for notice in notices:
        console.print(f"note: {notice}", highlight=False, soft_wrap=True)


def default_run_dir(recipe: str) -> str:
    """The folder of a run, or a chain, that names none."""
    return f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"


def _require_one_run(config: RunConfig) -> None:
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"recipe '{config.recipe}' is of several runs, and build_run takes one. "
            "Take each from the jobs of a training_session, or name a single recipe."
        )
    if config.dry_run:
        raise ConfigError("dry_run=true asks not to build anything. A training_session prints the dry run; or leave it out.")


def _score_references(run: Run) -> None:
    """Give every stream that needs them the log-probabilities of its rows; what the cache lacks is computed. Collective.

    It takes one forward of whole sources, so it comes when nothing is left that could refuse the run; and before the first
    update and before a checkpoint is read, since the weights as loaded are the reference.
    """
    if not run.scored:
        return
    training, model = run.training, run.training.config.model
    backbone = training.trainable.backbone
    with trace_span("hash the weights"):
        key = identity_key(backbone.causal_lm, training.backend.whole)
    cache = ReferenceCache(
        traced("forward", training.backend.forward),
        training.trainable,
        f"{key} {model.dtype} {model.autocast} {backbone.kernel}",
        training.config.packing.token_budget,
        equal_forwards=training.backend.equal_forwards,
        progress=training.config.logging.progress,
    )
    for stream in run.scored:
        cache.attach(stream)


def _report(run: Run, console: Console) -> None:
    """Say what became of every source's rows, and what loading and adapting changed."""
    _say((*run.loaded.provenance["notices"], *(run.lora.notices if run.lora else ()), *_pooling_notices(run)), console)
    _say(_single_source_notices(run), console)
    _report_rows(run, console)


def _report_rows(run: Run, console: Console) -> None:
    for name, stream in run.streams.items():
        stats = stream.stats
        for entry in stream.entries:
            count = "rows are read along" if entry.rows is None else f"{entry.rows:,} rows"
            cut = f", {entry.truncated:,} texts cut to their limit" if entry.truncated else ""
            keys = ", ".join(f"{key} ({number:,})" for key, number in sorted(entry.ignored.items()))
            not_read = f"; not read: {keys}" if keys else ""
            console.print(f"{name}: {entry.name}, {count}{cut}{not_read}", highlight=False, soft_wrap=True, markup=False)
        for reason, rejected in stats.rejected.items():
            console.print(f"{name}: {rejected:,} left out: {reason}", highlight=False, soft_wrap=True)


def _single_source_notices(run: Run) -> Iterator[str]:
    """Say where shares of draws are set and there is nothing to share; how many sources a folder holds is known only now."""
    for name, stream in run.streams.items():
        config = stream.config
        shares = {"source_temperature": config.source_temperature, "sources.0.weight": config.sources[0].weight}
        given = {key: f"{value:g}" for key, value in shares.items() if value != 1}
        if getattr(config, "mix_sources", False):
            given["mix_sources"] = "true"
        for key, value in given.items() if len(stream.entries) == 1 else ():
            yield f"streams.{name}.{key}={value} has no effect here: the stream has one source."


def _pooling_notices(run: Run) -> Iterator[str]:
    """Say where the last token that is pooled is one of the text itself, a truncated text's among them."""
    if Pooling.parse(run.training.config.model.pooling) is not Pooling.LAST_TOKEN:
        return
    for name, stream in run.streams.items():
        if stream.pooled and not stream.encoder.ends_texts:
            yield (
                f"stream {name}: pooling last_token takes a text's own last word, since neither tokenizer nor template ends "
                f"texts with a token for it; streams.{name}.template={stream.config.template}{WITH_EOS} adds the end of text."
            )
