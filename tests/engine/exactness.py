"""What the processes of `test_zero.py` run: five steps of every recipe's kind under a backend, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from transformers import PreTrainedModel

from tests.engine.tiny import make_samples
from unified_lm.batch import IGNORE, MISSING, Batch, Pack, Sample, SequenceLabel, make_batch
from unified_lm.batch.normalization import normalize
from unified_lm.config.schema import LoraConfig, OptimConfig, ParallelConfig
from unified_lm.core import distributed
from unified_lm.engine.backends.backend import Backend, make_backend
from unified_lm.engine.backends.buffers import trained_buffers
from unified_lm.engine.coupled import CoupledTerm
from unified_lm.engine.embedding_term import EmbeddingTerm
from unified_lm.engine.routed_embedding import RoutedEmbeddingTerm, RoutingVectors
from unified_lm.engine.router_balance import RouterBalance, RoutingReadout
from unified_lm.engine.routing_spread import RoutingSpread, SpreadReadout, product_key_routers
from unified_lm.engine.sequences import SequenceReadout, SequenceScoring
from unified_lm.engine.step import GradCacheStep
from unified_lm.engine.training_module import PackOutput, TrainingModule
from unified_lm.models.backbone import Backbone
from unified_lm.models.lora import apply_lora
from unified_lm.models.pooling import Projection
from unified_lm.models.routing import Routers
from unified_lm.models.tiny import tiny_model
from unified_lm.objectives import OBJECTIVES, ContrastiveConfig, KTOConfig, build_objective
from unified_lm.objectives.load_balancing import expert_fraction

OPTIM = OptimConfig(eps=1e-3, weight_decay=0.1)  # an epsilon that does not amplify rounding
RATE = 1e-3
ONE_PACK, MANY_PACKS = 10_000, 70
KINDS = ("grit", "mntp", "simcse", "supervised")
WEIGHTS = {"embedding": 1.0, "generation": 0.7, "preference": 20.0}  # the last: of the size of the others' gradients

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        backend: name of the backend.
        kind: of the data and objectives, one of `KINDS`, or "kto": contrastive pairs and preferences, with LoRA.
        budget: tokens of a pack.
        family: of the tiny model.
        dropout: of the attention.
        dtype: of the weights.
        projection: dimensions of a projection, or None.
        averaged: whether to normalize token losses per rank and average, which is wrong.
        own_baseline: whether every rank takes the baseline of KTO from its own controls, which is wrong.
        retain_all: whether to keep the graph of every pack: direct gradients instead of GradCache.
        steps: optimizer steps.
        balance: factor of the router balance over generative tokens.
        adapted: whether to train adapters only.
        checkpointing: whether layers are recomputed in the backward.
        float32_routers: whether routers are float32 beside weights of `dtype`.
        own_choices: whether every rank balances by its own choices of experts, which is wrong.
        vectors: what is compared (`models.moee`).
        spread: factor of the uniformity and the ambiguity of MONET's routers over generative tokens.
    """

    backend: str
    kind: str = "grit"
    budget: int = ONE_PACK
    family: str = "llama"
    dropout: float = 0.0
    dtype: str = "float32"
    projection: int | None = None
    averaged: bool = False
    own_baseline: bool = False
    retain_all: bool = False
    steps: int = 5
    balance: float = 0.0
    adapted: bool = False
    checkpointing: bool = False
    float32_routers: bool = False
    own_choices: bool = False
    vectors: str = "hs"
    spread: float = 0.0


def make_trainable(case: Case) -> TrainingModule:
    model = tiny_model(case.family, dtype=getattr(torch, case.dtype), attention_dropout=case.dropout)
    if case.kind == "kto":
        adapt(model, dropout=case.dropout)
        return TrainingModule(Backbone(model, "sdpa"), "mean", {}, readouts=[SequenceReadout({"preference"})])
    if case.adapted:
        adapt(model)
    if case.float32_routers:
        keep_routers_float32(model)
    objective = "masked_next_token" if case.kind == "mntp" else "next_token"
    torch.manual_seed(0)
    projection = Projection(64, case.projection) if case.projection else None
    backbone = Backbone(model, "sdpa")
    if case.checkpointing:
        backbone.enable_gradient_checkpointing()
    return TrainingModule(
        backbone,
        "mean",
        {"generation": build_objective(OBJECTIVES[objective]())},
        projection,
        readouts=[
            *([RoutingReadout(["generation"], backbone.experts()[1])] if case.balance else []),
            *([RoutingVectors(Routers(backbone))] if case.vectors != "hs" else []),
            *([SpreadReadout(["generation"], product_key_routers(backbone))] if case.spread else []),
        ],
    )


def keep_routers_float32(model: PreTrainedModel) -> None:
    """Give a Mixtral what other families have in their code: float32 routers, computed in float32."""
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.float().register_forward_pre_hook(lambda _, inputs: tuple(value.float() for value in inputs))


def adapt(model: PreTrainedModel, dropout: float = 0.0) -> None:
    """Give a model adapters that do something, as after some training; the rows of some tokens are trained too."""
    apply_lora(model, LoraConfig(r=4, alpha=16.0, dropout=dropout), 0, {str(index): index for index in (5, 9, 40)})
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) * 0.05)


def make_preferences(num_rows: int, seed: int) -> list[Sample]:
    """Prompts with completions of uneven lengths, and each with the completion of the row after it."""
    random = np.random.default_rng(seed)
    prompts, completions = (
        [random.integers(3, 200, size=random.integers(3, most)) for _ in range(num_rows)] for most in (8, 20)
    )
    samples = []
    for row in range(num_rows):
        for slot, completion in enumerate((completions[row], completions[(row + 1) % num_rows])):
            ids = np.concatenate([prompts[row], completion])
            labels = np.where(np.arange(len(ids)) >= len(prompts[row]), ids, IGNORE)
            label = SequenceLabel(desirable=None if slot else row % 3 != 0)
            samples.append(
                Sample(
                    input_ids=ids,
                    stream="preference",
                    labels=labels,
                    group=row,
                    slot=slot,
                    sequence=label,
                )
            )
    return samples


def draw(kind: str, seed: int) -> tuple[list[Sample], Mapping[str, float]]:
    """One step's samples, of uneven lengths, and what their loss sums are divided by."""
    if kind == "grit":
        return make_samples(num_groups=7, num_chats=5, seed=seed)
    if kind == "supervised":  # with queries that occur twice, on different ranks, and rows without their hard negative
        pairs = make_samples(num_groups=7, num_chats=0, seed=seed)[0]
        return [replace(s, text_id=_text_id(s)) for s in pairs], {}
    if kind == "kto":
        pairs = make_samples(num_groups=7, num_chats=0, seed=seed)[0]
        return [*pairs, *make_preferences(9, seed)], {"preference": 9.0}
    random = np.random.default_rng(seed)
    texts = [random.integers(3, 200, size=random.integers(6, 20)) for _ in range(8)]
    if kind == "simcse":
        return [
            Sample(input_ids=ids, stream="embedding", bidirectional=(0, len(ids)), pool=(0, len(ids)), group=group, slot=slot)
            for group, ids in enumerate(texts)
            for slot in range(2)
        ], {}
    masked = []
    for group, ids in enumerate(texts):
        hidden = random.random(len(ids)) < 0.3
        hidden[[0, 3]] = False, True
        masked.append(
            Sample(
                input_ids=np.where(hidden, 9, ids),
                stream="generation",
                bidirectional=(0, len(ids)),
                labels=np.where(hidden, ids, IGNORE),
                group=group,
            )
        )
    masked, count = normalize(masked, "token")
    return masked, {"generation": count}


def _text_id(sample: Sample) -> int:
    if sample.slot == 2 and sample.group % 3 == 1:
        return MISSING
    return 1 + (sample.group % 4 if sample.slot == 0 else 10 * sample.group + 10 + sample.slot)


def share(case: Case, seed: int) -> Batch:
    """This rank's part of a step: groups are dealt unevenly on purpose."""
    samples, counts = draw(case.kind, seed)
    rank, ranks = distributed.rank(), distributed.world_size()
    cuts = {1: (0, 1), 2: (0, 0.3, 1), 4: (0, 0.15, 0.4, 0.6, 1)}[ranks]
    mine = []
    for stream in ("embedding", "generation", "preference"):
        members = [s for s in samples if s.stream == stream]
        groups = 1 + max((s.group for s in members), default=-1)
        mine += [s for s in members if int(cuts[rank] * groups) <= s.group < int(cuts[rank + 1] * groups)]
    batch = make_batch(mine, case.budget, counts)
    if case.averaged:
        local = {name: float(sum(s.num_supervised for s in mine if s.stream == name)) for name in counts}
        batch = replace(batch, counts={name: count * ranks for name, count in local.items()})
    return batch


def make_step(case: Case, backend: Backend) -> GradCacheStep:
    published = {"gradient_scale": "inverse_world_size", "reference_world_size": 4} if case.kind == "supervised" else {}
    contrastive = build_objective(ContrastiveConfig(temperature=0.1, **published))
    terms: list[CoupledTerm] = []
    if case.vectors != "hs":
        terms.append(RoutedEmbeddingTerm({"embedding": contrastive}, WEIGHTS, method=case.vectors, alpha=0.5))
    elif case.kind != "mntp":
        terms.append(EmbeddingTerm({"embedding": contrastive}, WEIGHTS))
    retained = 1000 if case.retain_all else 1
    if case.kind == "kto":
        scoring = _OwnBaseline if case.own_baseline else SequenceScoring
        kto = build_objective(KTOConfig(beta=0.3, desirable_weight=1.25))
        trainable = backend.trainable  # type: ignore[attr-defined]
        terms.append(scoring(backend.forward, trainable, {"preference": kto}, WEIGHTS, backend.equal_forwards))
    if case.balance:
        terms.append(_make_balance(case, backend))
    if case.spread:
        routers = product_key_routers(backend.trainable.backbone)  # type: ignore[attr-defined]
        terms.append(RoutingSpread({"generation": (case.spread, case.spread)}, routers))
    return GradCacheStep(backend.forward, backend.backward, WEIGHTS, terms, retained, backend.equal_forwards)


def _make_balance(case: Case, backend: Backend) -> RouterBalance:
    made_by = _OwnChoices if case.own_choices else RouterBalance
    return made_by({"generation": case.balance}, *backend.trainable.backbone.experts())  # type: ignore[attr-defined]


class _OwnChoices(RouterBalance):
    def couple(self, batch: Batch, seen: Sequence[tuple[Pack, PackOutput]]) -> None:
        super().couple(batch, seen)
        (rows,) = (rows for _, rows in self._fractions.values())
        load = torch.stack([output.readouts[RoutingReadout.name]["generation"][0] for _, output in seen]).sum(0)
        self._fractions = {"generation": (expert_fraction(load, self.top_k)[0], rows)}


class _OwnBaseline(SequenceScoring):
    def _of_all_ranks(self, own: torch.Tensor) -> torch.Tensor:
        return super()._of_all_ranks(own) if own.ndim > 1 else own


def start(case: Case) -> Backend:
    # a threshold of 0: on a tiny model nothing would be partitioned otherwise
    parallel = ParallelConfig(backend=case.backend, persistence_threshold=0, bucket_elements=20_000)
    return make_backend(make_trainable(case), OPTIM, parallel)


def copy_state(backend: Backend) -> State:
    state = chain(backend.optimizer_state(), trained_buffers(backend.trainable))  # type: ignore[attr-defined]
    return {name: value.detach().cpu().clone() for name, value in state}


class SavedState(State):
    """A copied state, read as a checkpoint is; notes how many elements were read."""

    num_read = 0

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self)

    def __call__(self, name: str) -> torch.Tensor:
        self.num_read += self[name].numel()
        return self[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def part(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.num_read += stop - start
        return self[name].reshape(-1)[start:stop]


def run(case: Case) -> State:
    """Train; returns the first step's gradients ("gradient/..."), the final state, and "loss" and "norm" of every step."""
    backend = start(case)
    backend.trainable.train()  # type: ignore[attr-defined]
    step = make_step(case, backend)
    torch.manual_seed(100 + distributed.rank())
    losses, norms, result = [], [], {}
    for index in range(case.steps):
        losses.append(step(share(case, index)).total)
        norms.append(backend.update(RATE, 0.0 if index == 0 else 1.0))  # the norms are above 1: later steps are clipped
        if index == 0:
            moments = copy_state(backend)
            prefix = "exp_avg/"
            result = {
                f"gradient/{name.removeprefix(prefix)}": value / (1 - OPTIM.betas[0])
                for name, value in moments.items()
                if name.startswith(prefix)
            }
    result |= copy_state(backend)
    backend.close()
    return result | {"loss": torch.tensor(losses), "norm": torch.tensor(norms)}


def distance(first: State, second: State, prefix: str) -> float:
    """Norm of the difference of all tensors with a prefix, relative to the norm of the second's."""
    names = [name for name in second if name.startswith(prefix)]
    assert names
    assert names == [name for name in first if name.startswith(prefix)]
    difference = sum((first[name].double() - second[name].double()).square().sum() for name in names)
    return float((difference / sum(second[name].double().square().sum() for name in names)).sqrt())


def held_bytes(case: Case) -> dict[str, int]:
    """Bytes of weights, summed gradients and optimizer state that a rank really holds after the backwards of a second step."""
    backend = start(case)
    step = make_step(case, backend)
    step(share(case, 0))
    backend.update(RATE, 1.0)
    step(share(case, 1))
    outer, inner = backend._outer, backend._inner  # type: ignore[attr-defined]
    parameters = list(backend.trainable.parameters())  # type: ignore[attr-defined]
    stage = backend.stage  # type: ignore[attr-defined]
    gradients: list[torch.Tensor] = []
    if stage < 2:
        gradients = [p.grad for p in parameters if p.grad is not None]
        gradients += getattr(outer, "fp32_groups_gradients_flat", [])
    elif stage == 2:
        accumulated = [*outer.all_grad_tensors.values(), *outer.averaged_gradients.values()]
        gradients = [t for group in accumulated if group is not None for t in group if t is not None]
    else:
        gradients = [outer.grad_partitions_flat_buffer]
    masters = [p for group in inner.param_groups for p in group["params"]] if 0 < stage < 3 else []
    masters += outer.fp32_partitioned_groups_flat if stage == 3 else []
    found = {
        "weights": [*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))],
        "gradients": gradients,
        "optimizer": [*masters, *(t for state in inner.state.values() for t in state.values() if t.ndim)],
    }
    result = {
        part: sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())
        for part, tensors in found.items()
    }
    backend.close()
    return result
