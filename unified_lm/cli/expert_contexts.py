"""`unified-lm experts contexts | explain | page`: what stands where an expert is used most."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from unified_lm.cli.arguments import command_parser, positive, whole
from unified_lm.cli.evaluate_generation import read_domains
from unified_lm.cli.evaluate_model import add_model_options, find_model, progress_bar
from unified_lm.cli.experts import add_data
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.core.outputs import check_file, write_file, write_text_file
from unified_lm.evaluation.generation.perplexity import Domain

if TYPE_CHECKING:
    from unified_lm.evaluation.experts.contexts import Contexts
    from unified_lm.evaluation.experts.features import Features
    from unified_lm.inference.unified import UnifiedLM

_FEATURES = ("experts", "neurons", "latents")
_MOST = 400
_FEATURES_AT_ONCE = 16384
_TEXTS = ("group", "before", "token", "after")
_WHOSE = "routers"
"""Key of the parquet file's metadata: `router_key` of the model that experts are of."""


def contexts(argv: Sequence[str]) -> None:
    """Write the tokens that use each expert most, with what stands around them."""
    parser = command_parser(
        "experts contexts",
        "the tokens that use each expert most, and whether they are of one kind; neurons and latents to compare with",
        "runs/monet --data news=news.jsonl --out runs/monet/contexts.parquet",
    )
    add_data(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the .parquet file to write")
    add("--top", type=positive, default=10, help="tokens of each expert (10)")
    add("--features", choices=_FEATURES, default=_FEATURES[0], help="what to look at: experts of a MONET model (the default), "
        "neurons of any decoder, or latents of sparse autoencoders over its layers' outputs (needs sae-lens)")  # fmt: skip
    add("--layers", type=whole, nargs="+", default=None, help="layers of neurons (all) or latents (the last but one)")
    add("--fit", nargs="+", default=None, metavar="NAME=FILE", help="texts to train the autoencoders on, others than --data")
    add("--latents", type=positive, default=None, help="of an autoencoder (4096)")
    add("--active", type=positive, default=None, help="latents that a token may use (32)")
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
    if options.features != "latents" and (options.latents or options.active):
        raise ConfigError("--latents, --active: belong to autoencoders (--features latents).")
    options.latents, options.active = options.latents or 4096, options.active or 32
    if options.active > options.latents:
        raise ConfigError(f"--active: got {options.active}, expected at most the {options.latents} latents there are.")
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
    """Some features at a time; experts have their keys i and j too, and the file says of which routers they are."""
    import pyarrow as pa
    from pyarrow import parquet

    from unified_lm.evaluation.experts.contexts import context_rows
    from unified_lm.evaluation.experts.features import Experts
    from unified_lm.models.monet.masks import router_key

    decode = model.prompt_encoder.tokenizer.backend_tokenizer.decode_batch
    writer = None
    with model.borrow_backbone() as backbone:
        whose = {_WHOSE: router_key(backbone.causal_lm)} if isinstance(features, Experts) else {}
    for number, name in enumerate(features.groups):
        for start in range(0, features.size, _FEATURES_AT_ONCE):
            part = slice(start, min(start + _FEATURES_AT_ONCE, features.size))
            columns = context_rows(found, number, part, lambda ids: decode(ids, skip_special_tokens=False))
            columns = {"group": [name] * len(columns["feature"])} | columns
            if isinstance(features, Experts):
                keys = features.keys
                columns |= {"i": [n // keys for n in columns["feature"]], "j": [n % keys for n in columns["feature"]]}
            schema = pa.schema(
                [(key, pa.float32() if key == "weight" else pa.string() if key in _TEXTS else pa.int32()) for key in columns],
                metadata=whose,
            )
            writer = writer or parquet.ParquetWriter(path, schema)
            writer.write_table(pa.table(columns, schema=schema))
    assert writer is not None, "there is a group"
    writer.close()


def explain(argv: Sequence[str]) -> None:
    """Ask a model what a word means whose embedding is the mean of an expert's tokens."""
    from unified_lm.evaluation.experts.explain import QUESTION, explain_tokens

    parser = command_parser(
        "experts explain",
        "what a model that answers questions says that an expert's tokens mean: the mean of their embeddings stands for a word",
        "runs/monet-chat --contexts runs/monet-chat/contexts.parquet --experts 0:12,45 3:7,7",
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--contexts", type=Path, required=True, help="what `unified-lm experts contexts` wrote for this model")
    add("--experts", nargs="+", required=True, metavar="ROUTER:I,J", help="which experts")
    add("--question", default=QUESTION, help=f"with X for the word ({QUESTION})")
    add("--max-new-tokens", type=positive, default=48, help="of an answer (48)")
    options = parser.parse_args(list(argv))
    tokens = {name: _tokens_of(options.contexts, name) for name in options.experts}
    model = find_model(options.model).load(options, template="plain")
    _check_whose(options.contexts, model)
    piece = token_texts(model.prompt_encoder.tokenizer)
    for name, ids in tokens.items():
        answer = explain_tokens(model, ids, question=options.question, max_new_tokens=options.max_new_tokens)
        said = " | ".join(dict.fromkeys(map(piece, ids)))
        print(f"{name} ({said}): {answer}")


def _tokens_of(path: Path, name: str) -> list[int]:
    """Ids of the best tokens of an expert.

    Raises:
        ConfigError: no such name of an expert.
        DataError: a file of another kind, or one that does not have the expert.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        router, i, j = map(int, name.replace(",", ":").split(":"))
    except ValueError as error:
        raise ConfigError(f"--experts: got '{name}', expected ROUTER:I,J, such as 0:12,45.") from error
    where = [("group", "=", f"router {router}"), ("i", "=", i), ("j", "=", j)]
    try:
        found = parquet.read_table(path, columns=["rank", "token_id"], filters=where).sort_by("rank")
    except (OSError, pa.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{path} holds no contexts of experts ({error}). `unified-lm experts contexts` writes them.") from error
    if not len(found):
        raise DataError(f"{path} has no expert {name}: no token that was read uses it.")
    ids: list[int] = found["token_id"].to_pylist()
    return ids


def _check_whose(path: Path, model: UnifiedLM) -> None:
    """Refuse contexts of another model: its tokens would be explained as this one's."""
    from pyarrow import parquet

    from unified_lm.models.monet.masks import router_key

    said = (parquet.read_schema(path).metadata or {}).get(_WHOSE.encode(), b"").decode()
    with model.borrow_backbone() as backbone:
        key = router_key(backbone.causal_lm)
    if said != key:
        raise DataError(
            f"{path} is of a model with other routers ({said or 'not said'}) than this one's ({key}). Read this model's: "
            "unified-lm experts contexts."
        )


def token_texts(tokenizer: Any) -> Callable[[int], str]:
    """What a token adds to a text, with the space that decoding it alone may lose."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = str(tokenizer.decode(anchor))

    @cache
    def text(token: int) -> str:
        """The text after another token's."""
        return str(tokenizer.decode([*anchor, token])).removeprefix(before)

    return text


def experts_page(argv: Sequence[str]) -> None:
    """Write a page with the experts of a model."""
    parser = command_parser(
        "experts page",
        "an HTML page to browse the experts of a MONET model: whose they are, and the tokens that use them",
        "runs/monet --data news=news.jsonl code=code/ --out runs/monet/experts.html",
    )
    add_data(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the .html file to write")
    add("--most", type=positive, default=_MOST, help=f"experts of a router on the page ({_MOST})")
    add("--top", type=positive, default=10, help="tokens of each expert (10)")
    options = parser.parse_args(list(argv))
    check_file(options.out)
    kinds = read_domains(options.data, options.documents)
    if len(kinds) < 2:
        raise ConfigError("--data: a page tells experts by the kind of text that uses them, and needs two kinds at least.")
    model_ref = find_model(options.model)
    model = model_ref.load(options, template="plain")
    from unified_lm.evaluation.experts.contexts import chance_purity, purities, top_contexts, windows
    from unified_lm.evaluation.experts.domains import RATIO, owners
    from unified_lm.evaluation.experts.features import Experts
    from unified_lm.evaluation.experts.statistics import routing_statistics
    from unified_lm.reporting import experts_page as pages

    features, together = Experts(model), _together(kinds)
    with progress_bar("tokens", None, Console(stderr=True)) as advance:
        reading: dict[str, Any] = {"context": options.context, "progress": advance}
        statistics = routing_statistics(model, kinds, **reading)
        found = top_contexts(model, features, together, num_contexts=options.top, **reading)
        scores = purities(found)
        _, owner = owners(statistics, RATIO, min_tokens=0)
        chosen = pages.choose_experts(statistics, owner, scores, options.most)
        around = windows(features, together, found, chosen, **reading)
    text = pages.experts_page(
        model=model_ref.name,
        statistics=statistics,
        owner=owner,
        purity=scores,
        chance=chance_purity(found) if np.isfinite(scores).any() else None,
        contexts=found,
        document_kinds=[kind.name for kind in kinds for _ in kind.documents],
        windows=around,
        piece=token_texts(model.prompt_encoder.tokenizer),
    )
    write_text_file(options.out, text)
    print(f"{sum(map(len, chosen)):,} of {owner.size:,} experts; {found.read:,} tokens read")
    print(options.out)
