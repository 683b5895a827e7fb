"""Why bidirectional attention breaks a decoder: the first token, what it sees, and who sees it, without any training.

Arms are masks and interventions on the untrained embedded model (or `--model`), mean pooling, no prompt unless said:

- causal, bidirectional, and bidirectional with the first 1, 2 or 4 tokens causal (the first of these is
  `bidirectional_keep_first`);
- the first token hidden from all others, under causal and bidirectional attention; and bidirectional with the second token
  alone in its place (masks of blocks);
- bidirectional, but every layer's key and value of the first token are those of a causal read: its own state is lost, what
  others read of it is not;
- bidirectional with a sink and no token: a logit in every softmax's denominator, the mean score that the first token has in
  a causal read, by layer and head;
- each of the plain ones with a begin-of-text token, and behind the prompt of GRIT's template, which is not pooled.

Measured: STS-B dev (Spearman times 100), held-out pydocs retrieval (nDCG@10 times 100), each with a 95 % interval (bootstrap
over items), and on 100 sentences the norm of the middle layer's states at the first token and at the others, and the share
of attention that others give to the first token (means over layers and heads).

Usage: python benchmarks/first_token.py STS_DEV.csv [--queries 300] [--pairs 1500] [--dtype float32] [--arms ...] [--out FILE]
    [--plot PNG] [--model NAME]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import MAX_TOKENS, Tasks, load_tasks
from scipy.stats import spearmanr

from unified_lm import UnifiedLM
from unified_lm.batch import Block, Pack, Sample, make_pack
from unified_lm.config.schema import ModelConfig
from unified_lm.inference.embedder import encode_texts
from unified_lm.models.attention import AutoKernel, Heads, SdpaKernel
from unified_lm.models.backbone import Backbone
from unified_lm.models.embedding import embed_samples
from unified_lm.models.loading import load_model
from unified_lm.objectives.ranking import ndcg_per_query

BUDGET = 4096
PROBED = 100


@dataclass(frozen=True)
class Arm:
    """One way to read texts.

    Attributes:
        mask: length -> `bidirectional` and `blocks` of a sample.
        intervention: "", "causal keys" or "sink".
        template: of the texts.
    """

    mask: Callable[[int], dict[str, Any]]
    intervention: str = ""
    template: str = "plain"


def _from(start: int) -> Callable[[int], dict[str, Any]]:
    return lambda length: {"bidirectional": (min(start, length), length) if length > start else (0, 0)}


def _hidden(*, bidirectional: bool, keep: bool = False) -> Callable[[int], dict[str, Any]]:
    """The first token is a block of its own; the others are one too, so none of them sees it."""
    rest = lambda length: (Block(1, length, bidirectional, keep and bidirectional),) if length > 1 else ()  # noqa: E731
    return lambda length: {"blocks": (Block(0, 1), *rest(length))}


ARMS: dict[str, Arm] = {
    "causal": Arm(lambda _: {}),
    "bidirectional": Arm(_from(0)),
    "first token alone": Arm(_from(1)),
    "first 2 causal": Arm(_from(2)),
    "first 4 causal": Arm(_from(4)),
    "causal, first token hidden": Arm(_hidden(bidirectional=False)),
    "bidirectional, first token hidden": Arm(_hidden(bidirectional=True)),
    "first hidden, second alone": Arm(_hidden(bidirectional=True, keep=True)),
    "bidirectional, causal keys of the first": Arm(_from(0), "causal keys"),
    "bidirectional, a sink": Arm(_from(0), "sink"),
    "causal, begin of text": Arm(lambda _: {}, template="plain_bos"),
    "bidirectional, begin of text": Arm(_from(0), template="plain_bos"),
    "begin of text alone": Arm(_from(1), template="plain_bos"),
    "causal, GRIT's prompt": Arm(lambda _: {}, template="grit"),
    "bidirectional, GRIT's prompt": Arm(_from(0), template="grit"),
    "GRIT's prompt, first token alone": Arm(_from(1), template="grit"),
}


class Recording:
    """A kernel that keeps, layer by layer, the first tokens' keys and values and the mean score that others give to them."""

    name = "recording"

    def __init__(self) -> None:
        self.kernel = AutoKernel()
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []

    def __call__(self, heads: Heads) -> torch.Tensor:
        """As the default kernel."""
        device = heads.k_TKd.device
        first = torch.tensor(heads.plan.offsets[:-1], device=device)
        self.keys.append(heads.k_TKd[first])
        self.values.append(heads.v_TKe[first])
        lengths = torch.tensor(heads.plan.lengths, device=device)
        of_token = torch.repeat_interleave(torch.arange(len(first), device=device), lengths)
        k = heads.k_TKd[first].repeat_interleave(heads.q_THd.shape[1] // heads.k_TKd.shape[1], 1)
        scores = (heads.q_THd * k[of_token]).sum(-1).float() * heads.scaling
        others = torch.ones(len(of_token), dtype=torch.bool, device=device).index_fill(0, first, value=False)
        self.scores.append(scores[others].mean(0) if others.any() else scores.mean(0))
        return self.kernel(heads)


class Intervened:
    """A kernel that gives each layer what a causal read of the same texts recorded."""

    name = "intervened"

    def __init__(self, recorded: Recording, intervention: str) -> None:
        self.kernel = SdpaKernel()
        self.recorded = recorded
        self.intervention = intervention
        self.layer = 0

    def __call__(self, heads: Heads) -> torch.Tensor:
        """The intervention in this layer."""
        layer, self.layer = self.layer, self.layer + 1
        if self.intervention == "sink":
            return self.kernel(replace(heads, sinks_H=self.recorded.scores[layer].to(heads.q_THd.dtype)))
        first = torch.tensor(heads.plan.offsets[:-1], device=heads.k_TKd.device)
        keys = heads.k_TKd.index_copy(0, first, self.recorded.keys[layer])
        values = heads.v_TKe.index_copy(0, first, self.recorded.values[layer])
        return self.kernel(replace(heads, k_TKd=keys, v_TKe=values))


class Attending:
    """A kernel that measures the share of attention that other tokens give to the first one they can see."""

    name = "attending"

    def __init__(self) -> None:
        self.kernel = SdpaKernel()
        self.shares: list[float] = []

    def __call__(self, heads: Heads) -> torch.Tensor:
        """As `SdpaKernel`."""
        share = heads.q_THd.shape[1] // heads.k_TKd.shape[1]
        for index, (start, stop) in enumerate(zip(heads.plan.offsets, heads.plan.offsets[1:], strict=False)):
            if stop - start < 3:
                continue
            q, k = heads.q_THd[start:stop].float(), heads.k_TKd[start:stop].float().repeat_interleave(share, 1)
            scores = torch.einsum("qhd,khd->hqk", q, k) * heads.scaling
            weights = scores.masked_fill(~heads.plan.mask(index).to(scores.device), -math.inf).softmax(-1)
            first = (
                1 if heads.plan.blocks[index] else 0
            )  # where the first token is hidden, the second is the first that is seen
            self.shares.append(float(weights[:, first + 1 :, first].mean()))
        return self.kernel(heads)


def read(backbone: Backbone, arm: Arm) -> Callable[[Pack], torch.Tensor]:
    """Pack -> states under an arm's intervention."""
    if not arm.intervention:
        return backbone

    def states(pack: Pack) -> torch.Tensor:
        """Read once causally, then again with what that recorded."""
        recorded = Recording()
        plain = [replace(sample, bidirectional=(0, 0)) for sample in pack.samples]
        backbone._run(make_pack(plain).to(pack.input_ids.device), attention_kernel=recorded)
        hidden: torch.Tensor = backbone._run(pack, attention_kernel=Intervened(recorded, arm.intervention)).last_hidden_state[0]
        return hidden

    return states


def samples_of(model: UnifiedLM, arm: Arm, texts: Sequence[str]) -> list[Sample]:
    """Texts as an arm reads them."""
    encoded = encode_texts(model.prompt_encoder, texts, "", MAX_TOKENS)
    return [Sample(input_ids=e.ids.astype(np.int64), stream="t", pool=e.spans[0], **arm.mask(len(e.ids))) for e in encoded]


def measure(model: UnifiedLM, arm: Arm, tasks: Tasks) -> dict[str, Any]:
    """Scores with intervals, and what the first token is like."""
    with model.borrow_backbone() as backbone:

        def vectors(texts: Sequence[str]) -> torch.Tensor:
            """Unit vectors of texts."""
            run = read(backbone, arm)
            return embed_samples(
                run, samples_of(model, arm, texts), "mean", token_budget=BUDGET, device=model.device, normalize=True
            )

        left, right = vectors([row[5] for row in tasks.sts]), vectors([row[6] for row in tasks.sts])
        cosines = (left * right).sum(-1).double().numpy()
        queries, documents = vectors([p.query.text for p in tasks.pairs]), vectors([p.positives[0].text for p in tasks.pairs])
        found = ndcg_per_query(queries @ documents.T, [{index} for index in range(len(tasks.pairs))], 10)
        ranked = np.array([float(score) for score in found])
        with torch.no_grad():
            inside = inner_life(backbone, arm, samples_of(model, arm, [row[5] for row in tasks.sts[:PROBED]]))
    gold = tasks.gold

    def spearman(chosen: np.ndarray) -> float:
        """Of some pairs, times 100."""
        return 100 * float(spearmanr(cosines[chosen], gold[chosen]).statistic)

    every = np.arange(len(gold))
    low, high = _interval(spearman, len(gold))
    return {
        "sts": [spearman(every), low, high],
        "retrieval": [100 * ranked.mean(), *_interval(lambda chosen: 100 * float(ranked[chosen].mean()), len(ranked))],
        **inside,
    }


def _interval(score: Callable[[np.ndarray], float], size: int, resamples: int = 1000) -> tuple[float, float]:
    random = np.random.default_rng(0)
    values = [score(random.integers(0, size, size)) for _ in range(resamples)]
    return float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))


def inner_life(backbone: Backbone, arm: Arm, samples: list[Sample]) -> dict[str, float]:
    """Norms in the middle layer, and attention on the first token."""
    if arm.intervention:
        return {}
    pack = make_pack(samples).to(backbone.causal_lm.device)
    states = backbone.layer_states(pack).cpu()
    middle = states[:, states.shape[1] // 2].float().norm(dim=-1)
    first = torch.tensor(pack.plan.offsets[:-1])
    others = torch.ones(len(middle), dtype=torch.bool).index_fill(0, first, value=False)
    attending = Attending()
    backbone._run(pack, attention_kernel=attending)
    return {
        "norm of the first": float(middle[first].median()),
        "norm of the others": float(middle[others].median()),
        "longest of the others": float(middle[others].max()),
        "attention on the first": 100 * float(np.mean(attending.shares)),
    }


def plot(results: dict[str, Any], file: Path) -> None:
    """Scores of all arms with their intervals, as bars."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    names = list(results)
    figure, panels = plt.subplots(1, 2, figsize=(11, 0.36 * len(names) + 1.2), sharey=True, layout="constrained")
    titles = (("sts", "STS-B dev, Spearman × 100"), ("retrieval", "pydocs, nDCG@10 × 100"))
    for panel, (task, title) in zip(panels, titles, strict=True):
        value, low, high = np.array([results[name][task] for name in names]).T
        alone = ["#3a9a5b" if "alone" in name else "#3b6fb6" if name.startswith("causal") else "#b9783f" for name in names]
        panel.barh(names, value, color=alone, xerr=(value - low, high - value), error_kw={"ecolor": "#555", "lw": 1})
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(file, dpi=130)


def main() -> None:
    """Measure the arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sts", type=Path)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=1500, help="of STS-B")
    parser.add_argument("--model", default=None, help="another model; the embedded one if left out")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None, help="a .png of the scores")
    options = parser.parse_args()
    tasks = load_tasks(options.sts, options.queries)
    tasks = replace(tasks, sts=tasks.sts[: options.pairs])
    results: dict[str, Any] = {}
    for name in options.arms:
        arm = ARMS[name]
        if options.model is None:
            loaded = load_model(ModelConfig(source="embedded", name="smollm2-135m", family="llama", dtype=options.dtype))
            model = UnifiedLM(loaded.causal_lm, loaded.tokenizer, template=arm.template)
        else:
            model = UnifiedLM.from_pretrained(options.model, template=arm.template, dtype=options.dtype)
        results[name] = measure(model, arm, tasks)
        (sts, *sts_interval), (ndcg, *ndcg_interval) = results[name]["sts"], results[name]["retrieval"]
        rest = ", ".join(f"{key} {value:,.1f}" for key, value in results[name].items() if key not in ("sts", "retrieval"))
        shown = [f"[{low:.1f}, {high:.1f}]" for low, high in (sts_interval, ndcg_interval)]
        print(f"{name:42} STS {sts:5.1f} {shown[0]}  retrieval {ndcg:5.1f} {shown[1]}  {rest}", flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(results, indent=2))
    if options.plot is not None:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
