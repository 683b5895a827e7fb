"""`unified-lm analyze NAME MODEL...` runs analyses; `unified-lm standardize EXPORT` writes a copy that standardizes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from unified_lm.cli.arguments import add_embedding_options, command_parser, device, embedding_options, from_zero, positive
from unified_lm.config.objectives import EMBEDDING_METHODS
from unified_lm.core.errors import ConfigError, UserError, did_you_mean
from unified_lm.core.outputs import check_folder
from unified_lm.core.user_files import user_path

GROUPED = {"all": "what any model has: the first six", "moee": "what a mixture of experts has: the last four"}
"""Summaries of `evaluation.analyses.GROUPS`, which is imported only when it is used."""


def analyze(argv: Sequence[str]) -> None:
    """Run the analysis named by the first argument, or all of them.

    Raises:
        UserError: a mistake in the arguments, the files or the models.
    """
    from unified_lm.evaluation.analyses import ANALYSES, GROUPS, AnalysisSettings
    from unified_lm.evaluation.analyses.arms import ArmSettings, parse_arms
    from unified_lm.evaluation.analyses.runner import run_analyses

    names = {name: analysis.summary for name, analysis in ANALYSES.items()}
    options = _analyze_parser(names).parse_args(list(argv))
    if options.name not in (*names, *GROUPS):
        raise UserError(f"unknown analysis '{options.name}'.{did_you_mean(options.name, (*names, *GROUPS))}")
    defaults = AnalysisSettings()
    settings = AnalysisSettings(
        texts=options.texts,
        num_texts=options.num_texts,
        num_windows=options.num_windows,
        positions=options.positions,
        triples=options.triples,
        sts=options.sts,
        num_pairs=options.num_pairs,
        retrieval=None if options.retrieval == "none" else options.retrieval,
        corpora=_corpora(options.corpus) or defaults.corpora,
        corpus_texts=options.corpus_texts,
        labels=options.labels,
        num_labeled=options.num_labeled,
        clusters=options.clusters,
    )
    arms = parse_arms(
        options.models,
        ArmSettings(device=options.device, dtype=options.dtype, **embedding_options(options)),
    )
    console = Console(stderr=True)
    outcomes = run_analyses(
        [ANALYSES[name] for name in GROUPS.get(options.name, (options.name,))],
        arms,
        settings,
        options.out,
        overwrite=options.overwrite,
        show_progress=sys.stderr.isatty(),
        report=lambda line: console.print(line, markup=False, highlight=False),
    )
    for outcome in outcomes:
        print(outcome.numbers)
        print(outcome.figure)


def standardize(argv: Sequence[str]) -> None:
    """Fit statistics on a reference corpus and write a copy of an export that applies them.

    Raises:
        UserError: no export, a corpus that is missing, too small or without variance, or a copy that stock tools misread.
    """
    options = _standardize_parser().parse_args(list(argv))
    from unified_lm.evaluation.analyses.texts import read_scored_pairs, read_texts
    from unified_lm.export.manifest import STANDARDIZED, StandardizerRecord
    from unified_lm.export.standardized import check_source, write_standardized
    from unified_lm.inference import UnifiedLM
    from unified_lm.inference.loading import model_folder
    from unified_lm.inference.standardize import fit_standardizer
    from unified_lm.models.standardizer import RELATIVE_EPS

    check_folder(options.out, STANDARDIZED)
    if options.tune_on is not None and (options.method != "moee_sum" or options.alpha is not None):
        raise ConfigError("--tune-on chooses alpha of --method moee_sum; give that method, and no --alpha.")
    if options.alpha is not None and options.method != "moee_sum":
        raise ConfigError(f"--alpha weighs the routing in --method moee_sum, and has no effect on {options.method}.")
    pairs = None if options.tune_on is None else read_scored_pairs(options.tune_on, None)
    source = model_folder(options.export, None)
    check_source(source)
    name, texts = read_texts(options.corpus, options.num_texts, split="train")
    model = UnifiedLM.from_pretrained(source, device=options.device, dtype=options.dtype, check_weights=True)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("embedding the corpus", total=len(texts))
        fitted = fit_standardizer(
            model,
            texts,
            instruction=options.instruction,
            routing=options.method != "hs",
            progress=lambda count: bar.update(task, advance=count),
        )
    alpha = 1.0 if options.alpha is None else options.alpha
    if pairs is not None:
        from unified_lm.evaluation.analyses.methods import tune_alpha

        alpha, scores = tune_alpha(model, pairs, fitted.standardizer)
        swept = ", ".join(f"{value:g}: {100 * score:.1f}" for value, score in scores.items())
        print(f"alpha {alpha:g} is best on {len(pairs.left)} pairs of {pairs.name} (Spearman by alpha: {swept})")
    record = StandardizerRecord(
        corpus=name,
        corpus_hash=fitted.corpus_hash,
        num_texts=fitted.num_texts,
        num_floored=fitted.num_floored,
        relative_eps=RELATIVE_EPS,
        instruction=options.instruction,
    )
    write_standardized(source, options.out, fitted.standardizer, record, method=options.method, alpha=alpha)
    print(f"{options.out}: standardized on {fitted.num_texts} texts of {name}")
    if fitted.num_floored:
        print(f"{fitted.num_floored} dimensions hardly vary; their deviation was raised to {RELATIVE_EPS:g} of the median one")


def _corpora(given: Sequence[str]) -> dict[str, str]:
    """Parse LABEL=CORPUS pairs; the default label is the name of the file.

    Raises:
        ConfigError: two corpora with the same label.
    """
    found: dict[str, str] = {}
    for text in given:
        label, separator, source = text.partition("=")
        if not separator or user_path(text).exists():
            label, source = Path(text).name.split(".")[0], text
        if label in found:
            raise ConfigError(f"two corpora are called '{label}'; tell them apart: LABEL=CORPUS.")
        found[label] = source
    return found


def _analyze_parser(names: dict[str, str]) -> argparse.ArgumentParser:
    listed = "".join(f"\n  {name:<15} {summary}" for name, summary in {**names, **GROUPED}.items())
    parser = command_parser(
        "analyze",
        f"numbers and a figure for each analysis; several models share one figure:{listed}",
        "anisotropy uni=embedded@causal bi=embedded@bidirectional tuned=runs/grit --out analysis",
    )
    add = parser.add_argument
    add("name", metavar="NAME", help=f"{', '.join((*names, *GROUPED))}")
    model_help = "[LABEL=]MODEL[@ATTENTION]: export, run, folder or Hub name of a causal model, or 'embedded'"
    add("models", nargs="+", metavar="MODEL", help=model_help)
    add("--out", type=Path, default=Path("analysis"), help="folder for NAME.json and NAME.png (analysis)")
    add("--overwrite", action="store_true", help="ignore existing measurements")
    add(
        "--texts",
        default="pydocs",
        help="texts to analyze: pydocs (default), a file or folder of texts, or an offline STS task",
    )
    add("--num-texts", type=positive, default=1000, help="texts of anisotropy and complementarity (1000)")
    add("--num-windows", type=positive, default=32, help="texts of layers and norms (32)")
    add("--positions", type=positive, default=64, help="tokens of each of those (64)")
    add("--triples", type=Path, default=None, help="prefixes with continuations for future, instead of the package's own")
    sts_help = "offline STS task or file (sentence1, sentence2, score), for uniformity, standardize and mixtures of experts"
    add("--sts", default=None, help=sts_help)
    add("--num-pairs", type=positive, default=500, help="sentence pairs and retrieval rows, at most (500)")
    retrieval_help = "retrieval pairs for standardize and mixtures of experts: pydocs (default), a file or folder, or none"
    add("--retrieval", default="pydocs", help=retrieval_help)
    labels_help = "labeled texts for methods: a file (text, label), or an offline task of classification or clustering"
    add("--labels", default=None, help=labels_help)
    add("--num-labeled", type=positive, default=1000, help="labeled texts, at most (1000)")
    add("--clusters", type=positive, default=20, help="clusters of complementarity (20)")
    corpus_help = "reference corpus, as --texts; several times for standardize, the others take the first (pydocs)"
    add("--corpus", action="append", default=[], metavar="[LABEL=]CORPUS", help=corpus_help)
    add("--corpus-texts", type=positive, default=1000, help="texts of each corpus, at most (1000)")
    _add_model_options(parser)
    add_embedding_options(parser, methods=False)  # `methods` compares them
    return parser


def _standardize_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "standardize",
        "write a copy of an export whose vectors are standardized per dimension",
        "runs/grit --corpus texts.txt --out runs/grit-standardized",
    )
    add = parser.add_argument
    add("export", help="the export folder of a run, or the run, or a Hub name")
    add("--corpus", required=True, help="reference texts: pydocs, a file or folder of texts, or an offline STS task")
    add("--out", type=Path, required=True, help="the folder to write")
    add("--num-texts", type=positive, default=None, help="texts of the corpus, at most; by default all")
    add("--instruction", default="", help="embed the corpus with this instruction; as documents if left out")
    add("--method", choices=EMBEDDING_METHODS, default="hs", help="what the copy makes vectors of; hidden states (hs)")
    add("--alpha", type=from_zero, default=None, help="weight of the routing in method moee_sum; 1 if left out")
    add("--tune-on", default=None, metavar="STS", help="choose alpha on scored sentence pairs: an offline STS task or a file")
    _add_model_options(parser)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=device, default=None, help="cpu, cuda...; the accelerator if there is one")
    parser.add_argument(
        "--dtype", default="float32", help="float32 (default), bfloat16...; the control of future is sharpest in float32"
    )
