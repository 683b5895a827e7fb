"""`TrainingModule` behind a forward with one output tensor, which is the shape of module that ZeRO's hooks can follow.

ZeRO-3's hooks see tensors only, and gather this module's parameters once for each output tensor that a backward reaches. With
one tensor per loss term, ranks whose packs hold different terms would issue different collectives and wait for each other
forever. So everything that a pack yields is flattened into one vector, and `FlatModule.unpack` cuts it up again.
"""

from __future__ import annotations

import torch
from torch import nn

from unified_lm.batch import LossTerm, Pack
from unified_lm.engine.training_module import PackOutput, TrainingModule
from unified_lm.objectives.balance import Routing


class FlatModule(nn.Module):
    """`TrainingModule` with one tensor as output.

    The forward of `TrainingModule` is not called, because its own hooks would gather and release parameters a second time.
    The output head, which is used outside its module, is therefore gathered for this module.

    Args:
        trainable: the module whose parts are run.
    """

    def __init__(self, trainable: TrainingModule) -> None:
        super().__init__()
        self.trainable = trainable
        # The layout of the last forward's vector: `unpack` runs after ZeRO's hooks, which pass nothing but tensors through.
        self._shape = torch.Size()
        self._counts: dict[str, float] = {}
        self._num_scores: dict[str, int] = {}
        self._routing_sizes: list[int] = []

    def forward(self, pack: Pack, tokens: bool) -> torch.Tensor:
        """Run one pack.

        Args:
            pack: on the module's device.
            tokens: whether to compute token losses and scores.

        Returns:
            1-D: embeddings, one loss sum per token term, scores, routing and the anchor (see `PackOutput`), concatenated.
        """
        hidden, routing = self.trainable.routed_states(pack)
        # DeepSpeed receives gradients in the order of autograd, latest operation first, and ranks fill their buckets in that
        # order. The head is therefore used before pooling on every rank, whether its pack has labels or not.
        head = self.trainable.backbone.output_head()
        terms = self.trainable.token_terms(hidden, pack) if tokens else {}
        scores = self.trainable.sequence_scores(hidden, pack) if tokens else {}
        anchor = hidden.new_zeros((), dtype=torch.float32)
        for tensor in (head.weight, head.bias):
            if not (terms or scores) and tensor is not None and tensor.requires_grad:
                # One element times zero puts the head into the graph without computing logits.
                anchor = anchor + tensor.reshape(-1)[0] * 0.0
        embeddings = self.trainable.pool(hidden, pack)
        self._shape, self._counts = embeddings.shape, {name: term.count for name, term in terms.items()}
        self._num_scores = {name: len(values) for name, values in scores.items()}
        sums = [term.sum[None] for term in terms.values()]
        routed = [part for of_stream in routing.values() for part in (of_stream.load, of_stream.probability)]
        self._routing_sizes = [len(part) for part in routed]
        return torch.cat([embeddings.reshape(-1), *sums, *scores.values(), *routed, anchor[None]])

    def unpack(self, flat: torch.Tensor) -> PackOutput:
        """Cut up the vector of the last forward.

        Args:
            flat: what the last `forward` returned, possibly through hooks that kept its values.
        """
        sizes = [self._shape.numel(), len(self._counts), *self._num_scores.values(), *self._routing_sizes, 1]
        embeddings, sums, *parts, anchor = flat.split(sizes)
        scores, routed = parts[: len(self._num_scores)], parts[len(self._num_scores) :]
        terms = {name: LossTerm(total, count) for (name, count), total in zip(self._counts.items(), sums, strict=True)}
        # Loads are counts of tokens. They came as constants, but a slice of a vector with a graph carries one.
        loads, probabilities = (load.detach() for load in routed[::2]), routed[1::2]
        routing = {
            name: Routing(load, probability)
            for name, load, probability in zip(self.trainable.balanced_streams, loads, probabilities, strict=True)
        }
        scores_by_stream = dict(zip(self._num_scores, scores, strict=True))
        return PackOutput(embeddings.view(self._shape), terms, anchor[0], scores_by_stream, routing)
