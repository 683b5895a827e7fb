"""What a MONET model is made of, in the fields of the published checkpoints (Park et al. 2025, arXiv:2412.04139)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from transformers import LlamaConfig

DECOMPOSITIONS = ("vertical", "horizontal")
SELECTIONS = ("threshold", "topk")
FEED_FORWARDS = ("monet", "dense", "smoe", "peer")


class MonetConfig(LlamaConfig):
    """A Llama skeleton whose feed-forward layers are mixtures of very many experts.

    Attributes:
        moe_experts: keys of one side, E. A layer has E * E experts.
        moe_dim: hidden channels of an expert, m.
        moe_heads: heads of a router, H.
        moe_topk: keys of a side that a head chooses of E, on average under the selection "threshold", exactly under "topk".
        moe_groups: layers that share one router, which the first of them has.
        moe_decompose: how an expert is put together of a bottom and a top (or left and right) half: "vertical" or
            "horizontal", as the paper calls it.
        moe_selection: "threshold" takes keys whose score, normalized by statistics of the training, exceeds the quantile that
            `moe_topk` means (the paper's); "topk" the best ones of each token.
        moe_masked: whether weights hold a mask of experts that are left out (`router.keep`).
        feed_forward: "monet", or a baseline of the paper in the same skeleton: "dense" (SwiGLU, `intermediate_size`),
            "smoe" (`num_experts` of `moe_dim` channels, `num_experts_per_tok` chosen) or "peer" (`num_experts`, a square
            number, of one channel; `moe_heads` heads choose `moe_topk` each).
        num_experts: of a layer of the baselines "smoe" and "peer".
        num_experts_per_tok: of a layer of the baseline "smoe".
    """

    model_type = "monet"

    def __init__(
        self,
        *,
        moe_experts: int = 512,
        moe_dim: int = 8,
        moe_heads: int = 8,
        moe_topk: int = 32,
        moe_groups: int = 4,
        moe_decompose: str = "vertical",
        moe_selection: str = "threshold",
        moe_masked: bool = False,
        feed_forward: str = "monet",
        num_experts: int | None = 64,
        num_experts_per_tok: int | None = 2,
        **values: Any,
    ) -> None:
        """See the class; other values are those of Llama.

        Raises:
            ValueError: values that do not fit together, one sentence each.
        """
        self.moe_experts = moe_experts
        self.moe_dim = moe_dim
        self.moe_heads = moe_heads
        self.moe_topk = moe_topk
        self.moe_groups = moe_groups
        self.moe_decompose = moe_decompose
        self.moe_selection = moe_selection
        self.moe_masked = moe_masked
        self.feed_forward = feed_forward
        self.num_experts: Any = num_experts if feed_forward in ("smoe", "peer") else None
        self.num_experts_per_tok: Any = num_experts_per_tok if feed_forward == "smoe" else None
        # Hidden channels that are at work on a token (of one expert, for smoe), by which memory is counted.
        widths = {"monet": moe_experts * moe_dim, "smoe": moe_dim, "peer": moe_heads * moe_topk}
        if feed_forward in widths:
            values.setdefault("intermediate_size", widths[feed_forward])
        values.setdefault("hidden_act", "silu" if feed_forward == "dense" else "relu2")
        super().__init__(**values)
        if problems := list(self.problems()):
            raise ValueError(" ".join(problems))

    @property
    def has_router(self) -> bool:
        """Whether there are routers that layers share."""
        return self.feed_forward == "monet"

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        choices = {"moe_decompose": DECOMPOSITIONS, "moe_selection": SELECTIONS, "feed_forward": FEED_FORWARDS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                yield f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}."
        positive = ["moe_experts", "moe_dim", "moe_heads", "moe_topk", "moe_groups"]
        positive += ["num_experts"] if self.feed_forward in ("smoe", "peer") else []
        positive += ["num_experts_per_tok"] if self.feed_forward == "smoe" else []
        counts = {name: getattr(self, name) for name in positive}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                yield f"{name}: got {value!r}, expected a whole number of at least 1."
                return
        if self.feed_forward == "monet":
            yield from self._monet_problems()
        elif self.feed_forward == "smoe" and counts["num_experts_per_tok"] > counts["num_experts"]:
            yield f"num_experts_per_tok: got {self.num_experts_per_tok}, expected at most num_experts={self.num_experts}."
        elif self.feed_forward == "peer" and self.num_experts:
            if math.isqrt(self.num_experts) ** 2 != self.num_experts:
                yield f"num_experts: got {self.num_experts}, expected a square number: product keys have two sides."
            if self.moe_topk > math.isqrt(self.num_experts):
                yield f"moe_topk: got {self.moe_topk}, expected at most {math.isqrt(self.num_experts)}, the keys of a side."
            if self.hidden_size % 2:
                yield f"hidden_size: got {self.hidden_size}, expected an even number: product keys see a half each."

    def _monet_problems(self) -> Iterator[str]:
        if self.num_hidden_layers % self.moe_groups:
            yield f"moe_groups: got {self.moe_groups}, which does not divide the {self.num_hidden_layers} layers."
        if self.hidden_act != "relu2":
            yield f"hidden_act: got {self.hidden_act!r}, expected relu2: MONET's experts square what they rectify."
        if self.moe_topk >= self.moe_experts:
            yield f"moe_topk: got {self.moe_topk}, expected less than moe_experts={self.moe_experts}, the keys of a side."
        if self.moe_decompose == "vertical":
            for name in ("moe_dim", "hidden_size"):
                if getattr(self, name) % 2:
                    yield f"{name}: got {getattr(self, name)}, expected an even number: vertical experts have two halves."
