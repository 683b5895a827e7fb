"""`unified-lm experts`: what experts of a MONET model are used for, which belong to a kind of text, and life without them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from unified_lm.cli.arguments import Command, command_parser, finite, positive, run_group, whole
from unified_lm.cli.evaluate_generation import read_domains
from unified_lm.cli.evaluate_model import add_model_options, find_model, progress_bar
from unified_lm.core.errors import ConfigError
from unified_lm.core.files import write_json
from unified_lm.core.outputs import check_file, check_folder, write_file, write_folder, write_json_file
from unified_lm.evaluation.generation.perplexity import BUILT_IN, Domain

if TYPE_CHECKING:
    from unified_lm.evaluation.experts.contexts import Contexts
    from unified_lm.evaluation.experts.features import Features
    from unified_lm.inference.unified import UnifiedLM

_FILE = "routing.safetensors"
_CONTEXT = 256
_FEATURES = ("experts", "neurons", "latents")

COMMANDS: Mapping[str, Command] = {
    "routing": Command("how much each expert is used", "unified_lm.cli.experts:routing"),
    "domains": Command("which experts belong to one kind of text, and masks without them", "unified_lm.cli.experts:domains"),
    "contexts": Command("the tokens that use each expert most, as parquet", "unified_lm.cli.experts:contexts"),
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
    _add_data(parser)
    parser.add_argument("--out", type=Path, required=True, help=f"the folder to write {_FILE} into")
    options = parser.parse_args(list(argv))
    check_folder(options.out)
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
            building / "routing.json",
            {
                "model": model_ref.name,
                "revision": model_ref.revision,
                "context": options.context,
                "tokens": dict(found.tokens),
                "documents": {domain.name: domain.key for domain in domains},
            },
        )

    write_folder(options.out, fill)
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
    check_folder(options.out)
    found = RoutingStatistics.load(options.statistics)
    names, owner = owners(found, options.ratio, options.min_tokens)
    masks = {
        name: mask_without(found, owner, number, f"without the experts of {name} (ratio {options.ratio:g})")
        for number, name in enumerate(names)
    }

    def fill(building: Path) -> None:
        """Write a mask for each kind, and the counts."""
        for name, mask in masks.items():
            if any(mask.num_left_out):
                mask.save(building / f"without-{name.replace('/', '-')}.safetensors")
        counts = {name: mask.num_left_out for name, mask in masks.items()}
        content = {"ratio": options.ratio, "tokens": dict(found.tokens), "experts_by_router": counts}
        write_json(building / "domains.json", content)

    write_folder(options.out, fill)
    table = Table(title=f"Experts of one kind of text: used {options.ratio:g} times as much as by any other")
    for column in ("kind", "tokens", "experts", "share", "by router"):
        table.add_column(column, justify="left" if column in ("kind", "by router") else "right")
    for name, mask in masks.items():
        own = mask.num_left_out
        share = f"{100 * sum(own) / mask.keep.size:.1f} %"
        table.add_row(name, f"{found.tokens[name]:,}", f"{sum(own):,}", share, ", ".join(f"{count:,}" for count in own))
    Console().print(table)
    print(options.out)


def contexts(argv: Sequence[str]) -> None:
    """Write the tokens that use each expert most, with what stands around them."""
    parser = command_parser(
        "experts contexts",
        "the tokens that use each expert most, and whether they are of one kind; neurons and latents to compare with",
        "runs/monet --data news=news.jsonl --out runs/monet/contexts.parquet",
    )
    _add_data(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the .parquet file to write")
    add("--top", type=positive, default=10, help="tokens of each expert (10)")
    add("--features", choices=_FEATURES, default=_FEATURES[0], help="what to look at: experts of a MONET model (the default), "
        "neurons of any decoder, or latents of sparse autoencoders over its layers' outputs (needs sae-lens)")  # fmt: skip
    add("--layers", type=whole, nargs="+", default=None, help="layers of neurons (all) or latents (the last but one)")
    add("--fit", nargs="+", default=None, metavar="NAME=FILE", help="texts to train the autoencoders on, others than --data")
    add("--latents", type=positive, default=4096, help="of an autoencoder (4096)")
    add("--active", type=positive, default=32, help="latents that a token may use (32)")
    options = parser.parse_args(list(argv))
    check_file(options.out)
    _check_features(options)
    kinds = read_domains(options.data, options.documents)
    model = find_model(options.model).load(options, template="plain")
    from unified_lm.evaluation.experts.contexts import chance_purity, purities, top_contexts

    features = _features(model, options)
    with progress_bar("tokens", None, Console(stderr=True)) as advance:
        found = top_contexts(
            model, features, _together(kinds), context=options.context, num_contexts=options.top, progress=advance
        )
    write_file(options.out, lambda path: _write_contexts(path, found, features, model))
    scores = purities(found)
    known = scores[~np.isnan(scores)]
    sort = f"{features.kind}s"
    print(f"{found.read:,} tokens; {known.size:,} of {scores.size:,} {sort} are used by {options.top} of them or more")
    if known.size:
        chance = chance_purity(found)
        same, drawn = 100 * known.mean(), 100 * chance
        print(f"of their {options.top} best tokens {same:.0f} % are the same one; of as many drawn {drawn:.0f} %")
    print(options.out)


def _check_features(options: argparse.Namespace) -> None:
    if options.features == "experts" and options.layers is not None:
        raise ConfigError("--layers: experts belong to routers, all of which are read; it is for neurons and latents.")
    if (options.features == "latents") != (options.fit is not None):
        raise ConfigError("--fit: names the texts that autoencoders are trained on; it goes with --features latents.")
    if options.features == "latents":
        from unified_lm.evaluation.experts.autoencoder import require_saelens

        require_saelens()


def _features(model: UnifiedLM, options: argparse.Namespace) -> Features:
    from unified_lm.evaluation.experts.features import Experts, Latents, Neurons

    if options.features == "experts":
        return Experts(model)
    if options.features == "neurons":
        return Neurons(model, options.layers)
    from unified_lm.evaluation.experts.autoencoder import AutoencoderSettings, train_autoencoders

    with model.borrow_backbone() as backbone:
        layers = options.layers or [max(0, int(backbone.causal_lm.config.num_hidden_layers) - 2)]
    settings = AutoencoderSettings(latents=options.latents, active=options.active)
    texts = _together(read_domains(options.fit, options.documents))
    trained = train_autoencoders(model, texts, layers, context=options.context, settings=settings)
    for layer, each in trained.items():
        print(f"layer {layer}: an autoencoder that explains {each.explained:.0%} of the variance, {each.dead:.0%} of it unused")
    return Latents(model, {layer: each.encode for layer, each in trained.items()}, options.latents)


def _together(kinds: Sequence[Domain]) -> Domain:
    return Domain("texts", tuple(document for kind in kinds for document in kind.documents))


def _write_contexts(path: Path, found: Contexts, features: Features, model: UnifiedLM) -> None:
    """A row group for each group of features; experts have their keys i and j too."""
    import pyarrow as pa
    from pyarrow import parquet

    from unified_lm.evaluation.experts.contexts import context_rows

    decode = model.prompt_encoder.tokenizer.backend_tokenizer.decode_batch
    writer = None
    for number, name in enumerate(features.groups):
        columns = context_rows(found, number, lambda ids: decode(ids, skip_special_tokens=False))
        columns = {"group": [name] * len(columns["feature"])} | columns
        if keys := getattr(features, "keys", 0):
            columns |= {"i": [n // keys for n in columns["feature"]], "j": [n % keys for n in columns["feature"]]}
        table = pa.table(columns)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None, "there is a group"
    writer.close()


def edit(argv: Sequence[str]) -> None:
    """Measure a mask on held-out texts of each kind."""
    parser = command_parser(
        "experts edit",
        "how much worse texts of each kind are predicted without some experts, beside as many random ones",
        "runs/monet --mask runs/monet/domains/without-news.safetensors --data news=held-out.jsonl pydocs/text",
    )
    _add_data(parser)
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


def _add_data(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument
    kinds = f"kinds of text: files or folders of texts or chats; or {', '.join(BUILT_IN)}"
    add("--data", nargs="+", required=True, metavar="NAME=FILE", help=kinds)
    add("--context", type=positive, default=_CONTEXT, help=f"tokens of a window ({_CONTEXT})")
    add("--documents", type=positive, default=None, help="at most this many documents of each kind, evenly spread")
