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
        self._readouts: dict[str, dict[str, torch.Size]] = {}

    def forward(self, pack: Pack, tokens: bool) -> torch.Tensor:
        """Run one pack.

        Args:
            pack: on the module's device.
            tokens: whether to compute token losses and readouts of labels.

        Returns:
            1-D: embeddings, one loss sum per token term, readouts and the anchor (see `PackOutput`), concatenated.
        """
        states = self.trainable.states(pack, tokens=tokens)
        # DeepSpeed receives gradients in the order of autograd, latest operation first, and ranks fill their buckets in that
        # order. The head is therefore used before pooling on every rank, whether its pack has labels or not.
        head = self.trainable.backbone.output_head()
        terms, readouts = self.trainable.token_terms(states, pack), self.trainable.read(states, pack)
        anchor = states.hidden.new_zeros((), dtype=torch.float32)
        for tensor in (head.weight, head.bias):
            if states.head is None and tensor is not None and tensor.requires_grad:
                # One element times zero puts the head into the graph without computing logits.
                anchor = anchor + tensor.reshape(-1)[0] * 0.0
        embeddings = self.trainable.pool(states.hidden, pack)
        self._shape, self._counts = embeddings.shape, {name: term.count for name, term in terms.items()}
        self._readouts = {name: {key: tensor.shape for key, tensor in read.items()} for name, read in readouts.items()}
        sums = [term.sum[None] for term in terms.values()]
        read = [tensor.reshape(-1) for tensors in readouts.values() for tensor in tensors.values()]
        return torch.cat([embeddings.reshape(-1), *sums, *read, anchor[None]])

    def unpack(self, flat: torch.Tensor) -> PackOutput:
        """Cut up the vector of the last forward.

        Args:
            flat: what the last `forward` returned, possibly through hooks that kept its values.
        """
        sizes = [size.numel() for tensors in self._readouts.values() for size in tensors.values()]
        embeddings, sums, *parts, anchor = flat.split([self._shape.numel(), len(self._counts), *sizes, 1])
        terms = {name: LossTerm(total, count) for (name, count), total in zip(self._counts.items(), sums, strict=True)}
        rest = iter(parts)
        readouts = {name: {key: next(rest).view(size) for key, size in of.items()} for name, of in self._readouts.items()}
        return PackOutput(embeddings.view(self._shape), terms, anchor[0], readouts)
