"""A page to browse the experts of a MONET model: what they are used for, and the tokens that use them, colored by how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unified_lm.evaluation.experts.contexts import Contexts, Window
from unified_lm.evaluation.experts.statistics import RoutingStatistics
from unified_lm.reporting.pages import made_by, page, page_data


def choose_experts(statistics: RoutingStatistics, owner: np.ndarray, purity: np.ndarray, most: int) -> list[list[int]]:
    """The experts of a page, for each router: those of each kind of text that are used most, then the purest, then others.

    Args:
        statistics: of several kinds.
        owner: int64 `[G, E, E]`, number of the kind that an expert belongs to, or -1 (`domains.owners`).
        purity: float64 `[G, E * E]`, NaN where too few tokens use an expert (`contexts.purities`).
        most: experts of a router.
    """
    names = sorted(statistics.means)
    chosen = []
    for group in range(len(owner)):
        use = np.stack([statistics.means[name][group].reshape(-1) for name in names])
        belongs = owner[group].reshape(-1)
        ranked = [
            np.flatnonzero(belongs == number)[np.argsort(-use[number][belongs == number], kind="stable")]
            for number in range(len(names))
        ]
        share = most // (2 * len(names))
        own = [int(expert) for of_kind in ranked for expert in of_kind[:share]]
        pure = np.argsort(-np.nan_to_num(purity[group], nan=-1.0) - 1e-9 * use.sum(0), kind="stable")
        pure = pure[~np.isnan(purity[group][pure])]
        used = np.argsort(-use.sum(0), kind="stable")
        used = used[use.sum(0)[used] > 0]
        order = dict.fromkeys([*own, *pure[: most // 4].tolist(), *used[: most // 4].tolist(), *pure.tolist(), *used.tolist()])
        chosen.append(list(order)[:most])
    return chosen


def experts_page(
    *,
    model: str,
    statistics: RoutingStatistics,
    owner: np.ndarray,
    purity: np.ndarray,
    chance: float | None,
    contexts: Contexts,
    document_kinds: Sequence[str],
    windows: Sequence[dict[int, list[Window]]],
    piece: Callable[[int], str],
) -> str:
    """The page, as HTML without anything from elsewhere.

    Args:
        model: its name.
        statistics: how much each kind of text uses each expert.
        owner: see `choose_experts`.
        purity: see `choose_experts`.
        chance: `contexts.chance_purity`; None where no expert is used enough.
        contexts: what `windows` were made of.
        document_kinds: the kind of each document of the contexts.
        windows: of the chosen experts of each router.
        piece: token id -> its text.
    """
    names = sorted(statistics.means)
    keys = owner.shape[1]
    pieces: dict[int, int] = {}
    experts: list[dict[str, Any]] = []
    for group, of_group in enumerate(windows):
        for expert, found in of_group.items():
            i, j = divmod(expert, keys)
            use = [float(statistics.means[name][group, i, j]) for name in names]
            score = float(purity[group, expert])
            experts.append(
                {
                    "r": group,
                    "i": i,
                    "j": j,
                    "kind": int(owner[group, i, j]),
                    "use": [round(value / (sum(use) or 1), 4) for value in use],
                    "total": sum(use) / len(use),
                    "purity": None if np.isnan(score) else round(score, 3),
                    "at": [_shown(window, names.index(document_kinds[window.document]), pieces) for window in found],
                }
            )
    known = purity[~np.isnan(purity)]
    summary = {
        "experts": int(owner.size),
        "routers": len(owner),
        "tokens": contexts.read,
        "kinds": [
            {"name": name, "tokens": statistics.tokens[name], "own": int((owner == number).sum())}
            for number, name in enumerate(names)
        ],
        "purity": float(known.mean()) if known.size else None,
        "measured": int(known.size),
        "chance": chance,
        "top": contexts.weights.shape[1],
    }
    data = {"kinds": names, "pieces": [piece(token) for token in pieces], "experts": experts}
    return page("experts.html.jinja", title=f"experts of {model}", summary=summary, data=page_data(data), made=made_by())


def _shown(window: Window, kind: int, pieces: dict[int, int]) -> list[Any]:
    """A window as `[kind, number of the best token, numbers of pieces, weights of 0 to 99]`."""
    numbers = [pieces.setdefault(int(token), len(pieces)) for token in window.ids]
    top = float(window.weights.max()) or 1.0
    return [kind, window.center, numbers, [round(99 * float(weight) / top) for weight in window.weights]]
