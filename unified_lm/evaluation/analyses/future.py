"""Does a token's state depend on the tokens after it? LLM2Vec (arXiv:2404.05961), section 4.

Three sentences share a prefix A: the continuations of A+B and A+C are similar, that of A+D is different. Only A's tokens are
pooled. A causal model cannot see B, C or D, so its three vectors are equal: this control is checked, and a difference is an
error. A bidirectional model that uses the continuation gives A+B and A+C a higher cosine than A+B and A+D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unified_lm.batch import seeing_attention
from unified_lm.core.errors import DataError, ModelError
from unified_lm.core.typed import half_pair
from unified_lm.data.rows.readers import read_rows
from unified_lm.evaluation.analyses.base import Analysis, AnalysisSettings, Material, Numbers, rounded
from unified_lm.evaluation.analyses.figure import MARKERS, PALETTE, arm_legend, finish, save, subplots
from unified_lm.evaluation.analyses.states import layer_states
from unified_lm.evaluation.analyses.texts import fingerprint
from unified_lm.evaluation.bootstrap import Interval, bootstrap_interval
from unified_lm.evaluation.result_table import ResultTable
from unified_lm.inference.unified import UnifiedLM

OWN_TRIPLES = "future_triples.jsonl"
"""The package's own sentences; most prefixes end in a word that the continuation disambiguates."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Dtype of the weights -> largest relative difference between causal vectors of a prefix that rounding explains."""


@dataclass(frozen=True)
class Triple:
    """A prefix (A) and its continuations: the anchor's (B), a similar one (C), a different one (D)."""

    prefix: str
    anchor: str
    similar: str
    different: str


def read_triples(path: Path | None = None) -> list[Triple]:
    """Read triples from a file with columns prefix, anchor, similar, different; None reads the package's own.

    Raises:
        DataError: not readable, a field missing or empty, or fewer than two triples.
    """
    if path is None:
        with as_file(files(__package__).joinpath(OWN_TRIPLES)) as own:
            return read_triples(own)
    names = [field.name for field in fields(Triple)]
    triples = []
    for where, row in read_rows(path):
        values = [row.get(name) if isinstance(row, dict) else None for name in names]
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, str) or not value.strip() or half_pair(value) is not None:
                raise DataError(f"{path}, {where}, field '{name}': got {value!r}, expected a Unicode text that is not empty.")
        triples.append(Triple(*(str(value).strip() for value in values)))
    if len(triples) < 2:
        raise DataError(f"{path} has {len(triples)} triples; the probe needs at least 2, the paper has 35.")
    return triples


def encode_triples(model: UnifiedLM, triples: list[Triple]) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """Token ids of A+B, A+C, A+D for every triple, without a template, and the span of A in them.

    Returns:
        3 sequences per triple, and per triple `[start, stop)` of A's tokens (without the beginning-of-text token).

    Raises:
        DataError: the tokenizer merges the end of A with what follows, so that A's tokens differ between the three.
    """
    encoder = model.prompt_encoder
    leading = np.asarray(encoder.leading_ids, np.int32)
    prefixes = encoder.running_text([triple.prefix for triple in triples])
    texts = [f"{t.prefix} {rest}" for t in triples for rest in (t.anchor, t.similar, t.different)]
    sequences, spans = [], []
    for index, ids in enumerate(encoder.running_text(texts)):
        prefix = prefixes[index // 3]
        if not np.array_equal(ids[: len(prefix)], prefix):
            raise DataError(
                f"triple {index // 3 + 1}: in {texts[index]!r} the tokenizer merges the end of the prefix "
                f"{triples[index // 3].prefix!r} with what follows. Let the prefix end with a word."
            )
        sequences.append(np.concatenate([leading, ids]))
        if index % 3 == 0:
            spans.append((len(leading), len(leading) + len(prefix)))
    return sequences, spans


def prefix_vectors(
    model: UnifiedLM, sequences: list[np.ndarray], spans: list[tuple[int, int]], attention: str, show_progress: bool = False
) -> np.ndarray:
    """Mean over A's tokens at every layer: float64 `[triples, 3, L + 1, D]`."""
    pooled: dict[int, np.ndarray] = {}
    for index, states in layer_states(model, sequences, attention, show_progress=show_progress):
        start, stop = spans[index // 3]
        pooled[index] = states[start:stop].double().mean(dim=0).numpy()
    flat = np.stack([pooled[index] for index in range(len(sequences))])
    return flat.reshape(len(spans), 3, *flat.shape[1:])


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def _prepare(settings: AnalysisSettings) -> Material:
    triples = read_triples(settings.triples)
    source = "own sentences" if settings.triples is None else settings.triples.name
    description = {"triples": source, "num_triples": len(triples)}
    return Material(description, fingerprint([astuple(triple) for triple in triples]), triples)


def _measure(model: UnifiedLM, material: Material, show_progress: bool) -> Numbers:
    """Cosines under both attentions.

    Raises:
        ModelError: the causal control fails, because a vector of A depends on what follows it.
    """
    sequences, spans = encode_triples(model, material.content)
    result: Numbers = {"attention": seeing_attention(model.attention)}
    for attention in ("causal", "bidirectional"):
        read = "causal" if attention == "causal" else seeing_attention(model.attention)
        vectors = prefix_vectors(model, sequences, spans, read, show_progress)
        anchor, similar, different = vectors[:, 0], vectors[:, 1], vectors[:, 2]
        if attention == "causal":
            result["causal_deviation"] = check_control(model, anchor, similar, different)
        result[attention] = _numbers(_cosine(anchor, similar), _cosine(anchor, different))
    return result


def check_control(model: UnifiedLM, anchor: np.ndarray, *others: np.ndarray) -> float:
    """The largest relative difference between causal vectors that must be equal.

    Raises:
        ModelError: the difference is larger than rounding explains.
    """
    deviation = max(float((np.linalg.norm(o - anchor, axis=-1) / np.linalg.norm(anchor, axis=-1)).max()) for o in others)
    with model.borrow_backbone() as backbone:
        dtype = next(backbone.causal_lm.parameters()).dtype
    if not deviation <= TOLERANCE[dtype]:  # written so that NaN fails too
        raise ModelError(
            f"the causal control failed: vectors of a prefix differ by {deviation:.1e} of their length with what follows it; "
            f"rounding in {dtype} explains at most {TOLERANCE[dtype]:.0e}. The attention of this model leaks from the future: "
            "its numbers mean nothing. Report it with the family and the attention kernel."
        )
    return deviation


def _numbers(similar: np.ndarray, different: np.ndarray) -> Numbers:
    """Summarize cosines `[triples, L + 1]`: the last layer with an interval of the gap, and the mean gap of every layer."""
    last_similar, last_different = similar[:, -1], different[:, -1]
    gap = bootstrap_interval(lambda a, b: float((a - b).mean()), last_similar, last_different)
    return {
        "similar": rounded(float(last_similar.mean())),
        "different": rounded(float(last_different.mean())),
        "gap": rounded(gap.value),
        "gap_low": rounded(gap.low),
        "gap_high": rounded(gap.high),
        "fraction_right": rounded(float((last_similar > last_different).mean())),
        "gap_by_layer": rounded((similar - different).mean(axis=0)),
        "similar_by_layer": rounded(similar.mean(axis=0)),
        "different_by_layer": rounded(different.mean(axis=0)),
        "similar_by_triple": rounded(last_similar),
        "different_by_triple": rounded(last_different),
    }


_ALIKE, _OTHER = "#111111", "#9a9a9a"  # outside the palette, so that no arm has these colors


def _draw(arms: Mapping[str, Numbers], material: Mapping[str, Any], path: Path) -> Path:
    rows = [(label, attention) for label in arms for attention in ("causal", "bidirectional")]
    height = max(3.4, 0.42 * len(rows) + 1.6)
    figure, axes = subplots(1, 3, 13.5, height, gridspec_kw={"width_ratios": [1.5, 1, 1.2]})
    _draw_cosines(axes[0][0], arms, rows)
    _draw_gaps(axes[0][1], arms, rows)
    for index, (_, numbers) in enumerate(arms.items()):
        gaps = numbers["bidirectional"]["gap_by_layer"]
        every = max(1, len(gaps) // 12)
        style = {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)], "markevery": every}
        axes[0][2].plot(range(len(gaps)), gaps, markersize=4, linewidth=1.6, **style)
    axes[0][2].axhline(0, color="#555555", linewidth=0.8)
    axes[0][2].xaxis.get_major_locator().set_params(integer=True)
    finish(axes[0][2], "gap by layer, not causal", "layer (0: embeddings)", "cosine similar − different")
    from matplotlib.lines import Line2D

    kinds = (("similar continuation", _ALIKE, "o"), ("different continuation", _OTHER, "s"))
    ends = [Line2D([], [], linestyle="", color=c, marker=m, markersize=5, label=name) for name, c, m in kinds]
    arm_legend(figure, list(arms), columns=6, extra=ends)
    return save(figure, path)


def _draw_cosines(axis: Any, arms: Mapping[str, Numbers], rows: list[tuple[str, str]]) -> None:
    """Draw every triple as a dot and the means as vertical bars: similar continuation above, different one below."""
    for row, (label, attention) in enumerate(rows):
        numbers = arms[label][attention]
        for key, color, shift, marker in (("similar", _ALIKE, -0.16, "o"), ("different", _OTHER, 0.16, "s")):
            values = numbers[f"{key}_by_triple"]
            axis.scatter(values, [row + shift] * len(values), s=10, color=color, alpha=0.35, linewidths=0, marker=marker)
            axis.plot([numbers[key]] * 2, [row + shift - 0.14, row + shift + 0.14], color=color, linewidth=2.4)
    _name_rows(axis, arms, rows)
    finish(axis, "the prefix, before a similar and a different end", "cosine of the prefix's vectors", "")


def _draw_gaps(axis: Any, arms: Mapping[str, Numbers], rows: list[tuple[str, str]]) -> None:
    labels = list(arms)
    for row, (label, attention) in enumerate(rows):
        numbers, index = arms[label][attention], labels.index(label)
        error = [[numbers["gap"] - numbers["gap_low"]], [numbers["gap_high"] - numbers["gap"]]]
        color, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
        axis.errorbar(numbers["gap"], row, xerr=np.maximum(error, 0), color=color, marker=marker, capsize=3, markersize=6)
    axis.axvline(0, color="#555555", linewidth=0.8)
    _name_rows(axis, arms, rows)
    axis.set_yticklabels([])
    finish(axis, "gap, 95% interval", "cosine similar − different", "")


def _read(numbers: Numbers, attention: str) -> str:
    """The attention of a row by name; "bidirectional" may be the one with the first token alone."""
    name: str = attention if attention == "causal" else numbers["attention"]
    return name


def _name_rows(axis: Any, arms: Mapping[str, Numbers], rows: list[tuple[str, str]]) -> None:
    axis.set_yticks(range(len(rows)), [f"{label}\n{_read(arms[label], attention)}" for label, attention in rows])
    axis.set_ylim(len(rows) - 0.45, -0.55)


def gap_change(first: Numbers, other: Numbers) -> Interval:
    """The difference between two models' gaps on the same triples, with a 95 % interval from a paired bootstrap.

    Two gaps can differ clearly although their own intervals overlap: a triple that is hard for one model is also hard for the
    other, and pairing cancels this.

    Args:
        first, other: measurements of `FUTURE` of two models, each under the attention that it sees with.
    """
    gaps = [np.subtract(numbers["similar_by_triple"], numbers["different_by_triple"]) for numbers in (first, other)]
    return bootstrap_interval(lambda change: float(change.mean()), gaps[1] - gaps[0])


def _tabulate(arms: Mapping[str, Numbers], material: Mapping[str, Any]) -> ResultTable:
    first = next(iter(arms))
    keys = ("similar", "different", "gap", "gap_low", "gap_high")
    rows: list[list[Any]] = []
    for label, numbers in arms.items():
        for attention in ("causal", "bidirectional"):
            row = [label, _read(numbers, attention), *(numbers[attention][key] for key in keys)]
            if label != first and attention == "bidirectional":
                change = gap_change(arms[first][attention], numbers[attention])
                row += [rounded(value) for value in (change.value, change.low, change.high)]
            rows.append(row + [None] * (len(keys) + 5 - len(row)))
    return ResultTable(
        title="Future-token probe: does a prefix know what follows it?",
        columns=("model", "attention", "similar", "different", "gap", "low", "high", "change", "change, low", "change, high"),
        rows=rows,
        note=f"{material['num_triples']} triples ({material['triples']}): mean cosines of the prefix's vectors before a "
        "similar and before a different continuation, last layer. 95 % interval of the gap: paired bootstrap over triples. "
        f"Change: of the gap against {first}, paired in the same way.",
    )


FUTURE = Analysis(
    name="future",
    summary="whether tokens know what follows them: cosine of a prefix before similar and different ends",
    version=3,
    prepare=_prepare,
    measure=_measure,
    draw=_draw,
    tabulate=_tabulate,
)
