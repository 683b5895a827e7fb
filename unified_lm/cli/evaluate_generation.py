"""`unified-lm eval perplexity` and `unified-lm eval lm`: evaluation under causal attention."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unified_lm.cli.arguments import add_device_options, command_parser, positive, whole
from unified_lm.cli.evaluate_model import add_model_options, find_model, plain_table, progress_bar
from unified_lm.core.errors import ConfigError, UserError
from unified_lm.core.files import cache_dir
from unified_lm.core.outputs import check_files, write_json_file
from unified_lm.core.user_files import user_path
from unified_lm.evaluation.generation.perplexity import BUILT_IN, CONTEXT, Domain, num_windows, perplexity, read_domain
from unified_lm.evaluation.result_table import FOLDER
from unified_lm.export.manifest import Manifest
from unified_lm.inference.loading import stock_dtype
from unified_lm.models.weights_hash import check_weights


def evaluate_perplexity(argv: Sequence[str]) -> None:
    """Compute perplexity by domain, reusing results of the result file for the same data and settings.

    Raises:
        UserError: an error in the arguments, the data or the model; arguments and data are checked first.
    """
    options = _perplexity_parser().parse_args(list(argv))
    domains = read_domains(options.data, options.documents)
    names = [domain.name for domain in domains]
    console = Console(stderr=True)
    model_ref = find_model(options.model)
    out = options.out or model_ref.beside / "perplexity.json"
    table_file = model_ref.beside / FOLDER / "perplexity.json"
    check_files([out, *([table_file] if model_ref.in_run else [])])
    settings = {name: getattr(options, name) for name in ("context", "stride", "dtype", "template")}
    result = _earlier(out, {"model": model_ref.name, "revision": model_ref.revision, "settings": settings})
    model = None
    for domain in domains:
        if result["domains"].get(domain.name, {}).get("key") == domain.key:
            console.print(f"{domain.name}: finished before", markup=False)
            continue
        model = model or model_ref.load(options, template="plain")
        total = num_windows(model, domain, options.context, options.stride)
        with progress_bar(f"{domain.name}: windows", total, console) as advance:
            scores = perplexity(model, domain, context=options.context, stride=options.stride, progress=advance)
        result["domains"][domain.name] = {"key": domain.key, **scores}
        write_json_file(out, result)
    chosen = {name: result["domains"][name] for name in names}
    table = _perplexity_table(chosen, f"Perplexity by domain: {model_ref.name} @ {model_ref.revision[:12]}")
    if model_ref.in_run:
        note = f"Read causally in windows of {options.context} tokens; 95 % intervals over documents."
        plain_table(table, note).save(table_file)
    Console().print(table)
    print(f"results: {out}")


def _perplexity_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "eval perplexity",
        "token and byte perplexity by domain, read causally",
        "runs/grit --data news=news.jsonl pydocs/text --context 2048",
    )
    add_model_options(parser)
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        required=True,
        metavar="NAME=FILE",
        help=f"files or folders of texts or chats; or {', '.join(BUILT_IN)}",
    )
    add("--context", type=positive, default=CONTEXT, help=f"tokens of a window ({CONTEXT})")
    add("--stride", type=positive, default=None, help="new tokens per further window of a long document; half the context")
    add("--documents", type=positive, default=None, help="at most this many documents per domain, evenly spread")
    add("--out", type=Path, default=None, help="result file (default: perplexity.json beside the export)")
    return parser


def read_domains(items: Sequence[str], limit: int | None) -> list[Domain]:
    """The domains that --data names.

    Args:
        items: each NAME=FILE, or a built-in domain.
        limit: documents of a domain, at most.

    Raises:
        UserError: two of one name, no such file, or rows that are neither texts nor chats.
    """
    domains = [_domain(item, limit) for item in items]
    names = [domain.name for domain in domains]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--data names {', '.join(twice)} more than once.")
    return domains


def _domain(item: str, limit: int | None) -> Domain:
    name, equals, path = item.partition("=")
    if equals and not (name and path):
        raise UserError(f"--data {item}: expected NAME=FILE.")
    domain = read_domain(name, user_path(path) if equals else None)
    if limit == 1:
        raise UserError("--documents 1: an interval needs at least 2 documents.")
    return domain if limit is None else domain.limited(limit)


def _earlier(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a result file if it belongs to the same model and settings, else an empty result."""
    fresh = {**header, "domains": {}}
    if not path.is_file():
        return fresh
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} exists but cannot be read as a result file ({error}). Remove it, or use --out.") from error
    same = isinstance(found, dict) and {name: found.get(name) for name in header} == dict(header)
    return found if same and isinstance(found.get("domains"), dict) else fresh


def _perplexity_table(domains: Mapping[str, Any], title: str) -> Table:
    table = Table("domain", "documents", "tokens", "token perplexity", "bits per byte", "byte perplexity", title=title)
    table.title_justify = "left"
    for name, scores in domains.items():
        cells = [
            f"{score['value']:.4f} [{score['low']:.4f}, {score['high']:.4f}]"
            for score in (scores["token_perplexity"], scores["bits_per_byte"])
        ]
        byte = f"{scores['byte_perplexity']['value']:.4f}"
        table.add_row(name, str(scores["documents"]), str(scores["tokens"]), *cells, byte)
    return table


def evaluate_lm(argv: Sequence[str]) -> None:
    """Run tasks of lm-eval, or the user's task files, on an export.

    Raises:
        UserError: an error in the arguments, the tasks or the model.
    """
    options = _lm_parser().parse_args(list(argv))
    try:
        from unified_lm.evaluation.generation import lm_eval_adapter
    except ImportError as error:
        raise ConfigError(f"this needs lm-eval ({error}): pip install 'unified_lm[lm-eval]'.") from error
    if options.include_path is not None and not options.include_path.is_dir():
        raise UserError(f"--include-path {options.include_path} is not a folder.")
    model_ref = find_model(options.model)
    out = options.out or model_ref.beside / "lm_eval" / f"{'+'.join(Path(task).stem for task in options.tasks)[:100]}.json"
    table_file = model_ref.beside / FOLDER / f"lm-{out.name}"
    check_files([out, *([table_file] if model_ref.in_run else [])])
    # lm-eval loads the folder itself, with stock tools, which only warn about missing weights
    check_weights(model_ref.folder, Manifest.load(model_ref.folder).weights_hash if model_ref.is_export else "")
    options.dtype = stock_dtype(model_ref.folder, options.dtype, options.device)
    settings = lm_eval_adapter.HarnessSettings(
        **{name: getattr(options, name) for name in lm_eval_adapter.HarnessSettings.__dataclass_fields__}
    )
    scores, raw = lm_eval_adapter.run_harness(model_ref.folder, settings, _answers(model_ref.revision, options))
    write_json_file(
        out, {"model": model_ref.name, "revision": model_ref.revision, "version": lm_eval_adapter.VERSION, "result": raw}
    )
    table = Table(
        "task", "metric", "score", "standard error", "questions", title=f"lm-eval: {model_ref.name} @ {model_ref.revision[:12]}"
    )
    table.title_justify = "left"
    for score in scores:
        deviation = "" if score.error is None else f"{score.error:.4f}"
        table.add_row(score.task, score.metric, f"{score.value:.4f}", deviation, str(score.num_questions or ""))
    if model_ref.in_run:
        plain_table(table, f"lm-eval {lm_eval_adapter.VERSION}; the model is read causally.").save(table_file)
    Console().print(table)
    print(f"results: {out}")


def _answers(revision: str, options: argparse.Namespace) -> Path:
    """The cache file of answers, named by the model's content and all settings that affect an answer besides the question."""
    described = f"{revision}:{options.dtype}:{options.device}:{options.seed}:{options.chat}"
    return cache_dir("lm_eval", blake2b(described.encode(), digest_size=12).hexdigest())


def _lm_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "eval lm",
        "run lm-eval on an export, through lm-eval's own Hugging Face model class",
        "runs/grit --tasks arc_easy hellaswag --limit 100",
    )
    add = parser.add_argument
    add("model", help="a run or its export folder, any causal model's folder or Hub name, or an embedded model's name")
    add("--tasks", nargs="+", required=True, metavar="TASK", help="lm-eval's tasks and groups, or paths of task files (.yaml)")
    add("--include-path", type=Path, default=None, metavar="FOLDER", help="task files of your own, by their names")
    add("--num-fewshot", type=whole, default=None, help="examples before each question; by default the task's own number")
    add("--limit", type=positive, default=None, help="at most this many questions per task, for a trial")
    add("--batch-size", type=positive, default=8, help="questions per forward (8)")
    add("--chat", action="store_true", help="put questions as messages, in the export's chat template")
    add_device_options(parser)
    add("--seed", type=whole, default=0, help="of few-shot examples and sampling (0)")
    add("--out", type=Path, default=None, help="result file (default: lm_eval/TASKS.json beside the export)")
    return parser
