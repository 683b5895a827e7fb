"""`unified-lm experts`: what experts of a MONET model are used for, which belong to a kind of text, and life without them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from unified_lm.cli.arguments import Command, command_parser, finite, positive, run_group, whole
from unified_lm.cli.evaluate_generation import read_domains
from unified_lm.cli.evaluate_model import add_model_options, find_model, progress_bar
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.core.files import write_json
from unified_lm.core.outputs import FolderKind, check_file, check_folder, write_folder, write_json_file
from unified_lm.core.typed import half_pair
from unified_lm.data.rows.readers import read_rows
from unified_lm.data.rows.records import TextRecord
from unified_lm.data.rows.violations import describe
from unified_lm.evaluation.generation.perplexity import BUILT_IN, Domain

_FILE = "routing.safetensors"
ROUTING = FolderKind("use of experts", "routing.json")
DOMAINS = FolderKind("experts by kind of text", "domains.json")
CORRELATION = FolderKind("correlation of experts", "correlation.safetensors")
CONTEXT = 256
"""Default number of tokens of a window."""

COMMANDS: Mapping[str, Command] = {
    "routing": Command("how much each expert is used", "unified_lm.cli.experts:routing"),
    "domains": Command("which experts belong to one kind of text, and masks without them", "unified_lm.cli.experts:domains"),
    "correlate": Command("which experts go with a score of texts, and masks without them", "unified_lm.cli.experts:correlate"),
    "contexts": Command("the tokens that use each expert most, as parquet", "unified_lm.cli.expert_contexts:contexts"),
    "explain": Command("what a model says that an expert's tokens mean", "unified_lm.cli.expert_contexts:explain"),
    "page": Command("an HTML page to browse experts", "unified_lm.cli.expert_contexts:experts_page"),
    "edit": Command("what a mask changes, beside random ones", "unified_lm.cli.experts:edit"),
}


def experts(argv: Sequence[str]) -> None:
    """Run a sub-command.

    Raises:
        UserError: a mistake in the arguments, the texts or the model.
    """
    run_group(
        "experts",
        "read and edit the experts of a MONET model",
        COMMANDS,
        "routing runs/monet --data news=news.jsonl code=code/ --out runs/monet/experts",
        argv,
    )


def routing(argv: Sequence[str]) -> None:
    """Sum up how much each expert is used by texts of several kinds."""
    parser = command_parser(
        "experts routing",
        "how much each expert of a MONET model is used by texts of several kinds, read causally",
        "runs/monet --data news=news.jsonl code=code/ --out runs/monet/experts",
    )
    add_data(parser)
    parser.add_argument("--out", type=Path, required=True, help=f"the folder to write {_FILE} into")
    options = parser.parse_args(list(argv))
    check_folder(options.out, ROUTING)
    domains = read_domains(options.data, options.documents)
    model_ref = find_model(options.model)
    model = model_ref.load(options, template="plain")
    from unified_lm.evaluation.experts.statistics import routing_statistics

    with progress_bar("tokens", None, Console(stderr=True)) as advance:
        found = routing_statistics(model, domains, context=options.context, progress=advance)

    def fill(building: Path) -> None:
        """Write the statistics, and whose they are."""
        found.save(building / _FILE)
        write_json(
            building / ROUTING.mark,
            {
                "model": model_ref.name,
                "revision": model_ref.revision,
                "context": options.context,
                "tokens": dict(found.tokens),
                "documents": {domain.name: domain.key for domain in domains},
            },
        )

    write_folder(options.out, ROUTING, fill)
    for name, count in found.tokens.items():
        print(f"{name}: {count:,} tokens, {int((found.means[name] > 0).sum()):,} of {found.means[name].size:,} experts used")
    print(options.out / _FILE)


def domains(argv: Sequence[str]) -> None:
    """Tell whose experts are whose, and write a mask without those of each kind."""
    from unified_lm.evaluation.experts.domains import MIN_TOKENS, RATIO, mask_without, owners
    from unified_lm.evaluation.experts.statistics import RoutingStatistics

    parser = command_parser(
        "experts domains",
        "which experts belong to one kind of text, and masks that leave them out",
        f"runs/monet/experts/{_FILE} --out runs/monet/domains",
    )
    add = parser.add_argument
    add("statistics", type=Path, help="what `unified-lm experts routing` wrote")
    add("--out", type=Path, required=True, help="the folder to write masks and domains.json into")
    ratio_help = f"an expert belongs to a kind that uses it so many times as much as any other ({RATIO})"
    add("--ratio", type=finite, default=RATIO, help=ratio_help)
    add("--min-tokens", type=whole, default=MIN_TOKENS, help=f"refuse kinds of fewer tokens ({MIN_TOKENS})")
    options = parser.parse_args(list(argv))
    check_folder(options.out, DOMAINS)
    found = RoutingStatistics.load(options.statistics)
    names, owner = owners(found, options.ratio, options.min_tokens)
    files = _mask_files(names)
    masks = {
        name: mask_without(found, owner, number, f"without the experts of {name} (ratio {options.ratio:g})")
        for number, name in enumerate(names)
    }

    def fill(building: Path) -> None:
        """Write a mask for each kind, and the counts."""
        for name, mask in masks.items():
            if any(mask.num_left_out):
                mask.save(building / files[name])
        counts = {name: mask.num_left_out for name, mask in masks.items()}
        content = {"ratio": options.ratio, "tokens": dict(found.tokens), "experts_by_router": counts}
        write_json(building / DOMAINS.mark, content)

    write_folder(options.out, DOMAINS, fill)
    table = Table(title=f"Experts of one kind of text: used {options.ratio:g} times as much as by any other")
    for column in ("kind", "tokens", "experts", "share", "by router"):
        table.add_column(column, justify="left" if column in ("kind", "by router") else "right")
    for name, mask in masks.items():
        own = mask.num_left_out
        share = f"{100 * sum(own) / mask.keep.size:.1f} %"
        table.add_row(name, f"{found.tokens[name]:,}", f"{sum(own):,}", share, ", ".join(f"{count:,}" for count in own))
    Console().print(table)
    print(options.out)


def correlate(argv: Sequence[str]) -> None:
    """Correlate experts with a score of texts, and write masks without those that go with it."""
    parser = command_parser(
        "experts correlate",
        "which experts of a MONET model go with a score of texts (how toxic they are, say)",
        "runs/monet --data comments.jsonl --score toxicity --above 0.2 0.1 0.05 --out runs/monet/toxicity",
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="rows with a text and a score")
    add("--score", required=True, metavar="COLUMN", help="the column with the score, a number")
    add("--text", default="text", metavar="COLUMN", help="the column with the text (text)")
    add("--above", type=finite, nargs="+", default=[0.2, 0.1, 0.05], help="a mask without experts above each (0.2 0.1 0.05)")
    add("--context", type=positive, default=CONTEXT, help=f"tokens of a window ({CONTEXT})")
    add("--out", type=Path, required=True, help="the folder to write correlation.safetensors and masks into")
    options = parser.parse_args(list(argv))
    check_folder(options.out, CORRELATION)
    texts, scores = _scored_rows(options.data, options.text, options.score)
    model = find_model(options.model).load(options, template="plain")
    from unified_lm.evaluation.experts.correlation import score_correlation

    with progress_bar("tokens", None, Console(stderr=True)) as advance:
        found = score_correlation(model, texts, scores, context=options.context, progress=advance)
    masks = {limit: found.mask_above(limit, f"without experts above {limit:g} with {options.score}") for limit in options.above}

    def fill(building: Path) -> None:
        """Write the correlation and the masks."""
        found.save(building / CORRELATION.mark)
        for limit, mask in masks.items():
            if any(mask.num_left_out):
                mask.save(building / f"without-above-{limit:.15g}.safetensors")

    write_folder(options.out, CORRELATION, fill)
    print(f"{found.texts:,} texts, {found.tokens:,} tokens; correlation {found.values.min():+.3f} to {found.values.max():+.3f}")
    for limit, mask in masks.items():
        count = sum(mask.num_left_out)
        print(f"above {limit:g}: {count:,} of {mask.keep.size:,} experts ({100 * count / mask.keep.size:.2f} %)")
    print(options.out)


def _mask_files(names: Sequence[str]) -> dict[str, str]:
    """Kind of text -> the file of the mask without its experts.

    Raises:
        DataError: two kinds would have one file.
    """
    kinds: dict[str, str] = {}
    for name in names:
        file = f"without-{name.replace('/', '-')}.safetensors"
        if file in kinds:
            raise DataError(
                f"the kinds {kinds[file]} and {name} would both have the mask {file}; give one of them another name when "
                "`unified-lm experts routing` reads them (--data NAME=FILE)."
            )
        kinds[file] = name
    return {name: file for file, name in kinds.items()}


def _scored_rows(path: Path, text: str, score: str) -> tuple[Domain, list[float]]:
    """Texts and their scores.

    Raises:
        DataError: a row without one of the columns, or with a score that is no finite number.
    """
    texts: list[TextRecord] = []
    scores: list[float] = []
    for location, row in read_rows(path):
        if not isinstance(row, Mapping) or not {text, score} <= row.keys():
            there = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise DataError(
                f"{path}, {location}: expected the columns '{text}' and '{score}', got {there}. Name them with --text and "
                "--score."
            )
        said = row[text]
        if not isinstance(said, str) or not said.strip() or half_pair(said) is not None:
            raise DataError(f"{path}, {location}, field '{text}': got {describe(said)}, expected a Unicode text.")
        try:
            number = float("nan") if isinstance(row[score], bool) else float(row[score])  # a table has numbers as texts
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if not math.isfinite(number):
            raise DataError(f"{path}, {location}, field '{score}': got {describe(row[score])}, expected a finite number.")
        texts.append(TextRecord(said))
        scores.append(number)
    return Domain(path.name, tuple(texts)), scores


def edit(argv: Sequence[str]) -> None:
    """Measure a mask on held-out texts of each kind."""
    parser = command_parser(
        "experts edit",
        "how much worse texts of each kind are predicted without some experts, beside as many random ones",
        "runs/monet --mask runs/monet/domains/without-news.safetensors --data news=held-out.jsonl pydocs/text",
    )
    add_data(parser)
    add = parser.add_argument
    add("--mask", type=Path, required=True, help="what `unified-lm experts domains` wrote")
    use_help = "compare also with random experts that are used as much: what `unified-lm experts routing` wrote"
    add("--statistics", type=Path, default=None, help=use_help)
    add("--draws", type=positive, default=3, help="random masks of each sort (3)")
    add("--out", type=Path, default=None, help="a .json file for the results")
    options = parser.parse_args(list(argv))
    if options.out is not None:
        check_file(options.out)
    from unified_lm.evaluation.experts.edit import edit_effects
    from unified_lm.evaluation.experts.statistics import RoutingStatistics
    from unified_lm.models.monet.masks import ExpertMask

    mask = ExpertMask.load(options.mask)
    use = None
    if options.statistics is not None:
        statistics = RoutingStatistics.load(options.statistics)
        if statistics.routers != mask.routers:
            raise ConfigError(f"{options.statistics} and {options.mask} are of models with different routers.")
        use = list(statistics.means.values())
    kinds = read_domains(options.data, options.documents)
    model = find_model(options.model).load(options, template="plain")
    console = Console(stderr=True)
    effects = edit_effects(
        model,
        kinds,
        mask,
        context=options.context,
        draws=options.draws,
        use=use,
        report=lambda line: console.print(f"reading with: {line}", markup=False, highlight=False),
    )
    table = Table(title=f"{mask.note}: {sum(mask.num_left_out):,} of {mask.keep.size:,} left out; nats a token")
    for column in ("kind", "before", "edit", "random", *(["as used"] if use is not None else [])):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for effect in effects:
        changes = [[effect.after], effect.random, *([effect.as_used] if use is not None else [])]
        table.add_row(effect.name, f"{effect.before:.3f}", *(_change(values, effect.before) for values in changes))
    Console().print(table)
    if options.out is not None:
        content = {"mask": str(options.mask), "note": mask.note, "left_out": mask.num_left_out}
        write_json_file(options.out, content | {"effects": [asdict(effect) for effect in effects]})
        print(options.out)


def _change(values: Sequence[float], before: float) -> str:
    """Mean change, with the range of several."""
    changes = [value - before for value in values]
    spread = f" [{min(changes):+.3f}, {max(changes):+.3f}]" if len(changes) > 1 else ""
    return f"{sum(changes) / len(changes):+.3f}{spread}"


def add_data(parser: argparse.ArgumentParser) -> None:
    """Options of a command that reads kinds of text with a model."""
    add_model_options(parser)
    add = parser.add_argument
    kinds = f"kinds of text: files or folders of texts or chats; or {', '.join(BUILT_IN)}"
    add("--data", nargs="+", required=True, metavar="NAME=FILE", help=kinds)
    add("--context", type=positive, default=CONTEXT, help=f"tokens of a window ({CONTEXT})")
    add("--documents", type=positive, default=None, help="at most this many documents of each kind, evenly spread")
