"""DeepSpeed ZeRO under our own step: the one file that imports deepspeed.

ZeRO (Rajbhandari et al., 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv 1910.02054)
splits among ranks the optimizer state (stage 1), also the gradients (stage 2), also the weights (stage 3). What we hand over
and what we keep:

- DeepSpeed owns storage and communication. The update is torch's AdamW on DeepSpeed's float32 partitions, with the settings of
  `MasterAdamW`; clipping and the test for non-finite gradients are DeepSpeed's, over the global norm.
- Losses are already divided by counts of the whole step, so gradients are *summed* over ranks. Stages 0 to 2 can do that;
  stage 3 only averages, so its losses are multiplied by the number of ranks.
- Gradients of packs are added, and reduced over ranks, in float32, whatever the dtype of the weights.
- A step has as many backwards as it has packs. With `managed_gradient_accumulation` off, `engine.step` is the boundary and
  nobody has to know which pack is the last.
- In stages 2 and 3 every backward communicates, and in stage 3 every forward does. Ranks must therefore run the same
  sequence of forwards (`GradCacheStep` sees to it), and every forward must use every trained parameter (`_Module` does).
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from unified_lm.batch import LossTerm, Pack
from unified_lm.config.schema import OptimConfig, ParallelConfig
from unified_lm.core import distributed
from unified_lm.core.errors import ConfigError
from unified_lm.engine.backends.extension_locks import remove_stale_locks
from unified_lm.engine.backends.optimizer import MOMENTS, adamw_groups, check_names, read_shaped
from unified_lm.engine.training_module import PackOutput, TrainingModule

_OFFLOADED = "zero3_offload"


def check_available(parallel: ParallelConfig) -> None:
    """See before anything is loaded that DeepSpeed can do what is asked.

    Raises:
        ConfigError: DeepSpeed is not installed, or offloading lacks CUDA or the compiled optimizer.
    """
    deepspeed = _import_deepspeed(parallel.backend)
    if parallel.backend != _OFFLOADED:
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            "parallel.backend is 'zero3_offload', which moves weights and optimizer state from a GPU to the CPU, and there is "
            "no CUDA device. Use parallel=zero3."
        )
    builder = deepspeed.ops.op_builder.CPUAdamBuilder()
    if not builder.is_compatible(verbose=False):
        raise ConfigError(
            "parallel.backend is 'zero3_offload', and DeepSpeed's CPU optimizer cannot be compiled here (`ds_report` says why; "
            "it takes a C++ compiler, ninja and a CUDA toolkit of torch's version). Install them, or use parallel=zero3."
        )


def _import_deepspeed(backend: str) -> Any:
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"parallel.backend is '{backend}', and DeepSpeed is not installed ({error}). "
            "pip install 'unified_lm[deepspeed]', or use parallel=ddp."
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's own calls
    return deepspeed


def _start(parallel: ParallelConfig) -> Any:
    """DeepSpeed, ready to make engines in this process."""
    check_available(parallel)
    distributed.initialize_alone()
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed = _import_deepspeed(parallel.backend)
    remove_stale_locks()
    # An all-reduce for inference on CPUs. Nothing here calls it, and compiling it takes a minute and a lock on the cache.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return deepspeed


class _Module(nn.Module):
    """`TrainingModule` with one tensor for output.

    ZeRO-3's hooks see tensors only, and fetch this module's parameters once for each that a backward reaches: with a tensor
    per term, ranks whose packs hold other terms would communicate out of step. The forward of `TrainingModule` is not called:
    it would have hooks of its own. So the output head, which is used outside its module, is fetched for this one.
    """

    def __init__(self, trainable: TrainingModule) -> None:
        super().__init__()
        self.trainable = trainable
        self.shape = torch.Size()
        self.counts: dict[str, float] = {}
        self.read: dict[str, dict[str, torch.Size]] = {}

    def forward(self, pack: Pack, tokens: bool) -> torch.Tensor:
        """Embeddings, a loss sum for each of `counts`, readouts of the shapes in `read` and the anchor, laid end to end.

        Gradients reach DeepSpeed in the order of autograd, latest operation first, and ranks fill their buckets in that
        order. The head is therefore used before pooling whether the pack has labels or not.
        """
        states = self.trainable.states(pack, tokens=tokens)
        head = self.trainable.backbone.output_head()  # ZeRO-3: fetched in every forward of every rank
        terms, readouts = self.trainable.token_terms(states, pack), self.trainable.read(states, pack)
        anchor = states.hidden.new_zeros((), dtype=torch.float32)
        for tensor in (head.weight, head.bias):
            if states.head is None and tensor is not None and tensor.requires_grad:
                anchor = anchor + tensor.reshape(-1)[0] * 0.0
        embeddings = self.trainable.pool(states.hidden, pack)
        self.shape, self.counts = embeddings.shape, {name: term.count for name, term in terms.items()}
        self.read = {name: {key: tensor.shape for key, tensor in read.items()} for name, read in readouts.items()}
        sums = [term.sum[None] for term in terms.values()]
        read = [tensor.reshape(-1) for tensors in readouts.values() for tensor in tensors.values()]
        return torch.cat([embeddings.reshape(-1), *sums, *read, anchor[None]])


class ZeroSharding:
    """Splits parameters as ZeRO-3 does, while a model is being built (see `models.sharded`).

    Args:
        parallel: a ZeRO-3 backend.
    """

    def __init__(self, parallel: ParallelConfig) -> None:
        self._deepspeed = _start(parallel)
        self._parallel = parallel

    def initializing(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Parameters made within it are split as soon as their module is complete."""
        offloaded = self._parallel.backend == _OFFLOADED and self._parallel.offload_parameters
        context: AbstractContextManager[None] = self._deepspeed.zero.Init(
            # which says the dtype too; DeepSpeed 0.19 ignores one given beside it on devices without float16
            config_dict_or_path=settings(self._parallel, 3, dtype == torch.bfloat16),
            remote_device="cpu" if offloaded else None,
            mem_efficient_linear=False,  # it would replace torch's own linear function for the whole process
        )
        return context

    def filling(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Within it parameters are whole; what rank 0 writes to them is split among all on leaving."""
        context: AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
        return context


class DeepSpeedBackend:
    """ZeRO stages 0 to 3.

    Args:
        trainable: on its device (stage 3: made under `zero_init`, or whole; it is partitioned here).
        optim: optimizer settings.
        parallel: stage, buckets and offloading.

    Raises:
        ConfigError: see `check_available`.
    """

    def __init__(self, trainable: TrainingModule, optim: OptimConfig, parallel: ParallelConfig) -> None:
        self._deepspeed = _start(parallel)
        self.name = parallel.backend
        stage = parallel.zero_stage
        assert stage is not None, f"{parallel.backend} is no backend of DeepSpeed's"
        self.stage = stage
        self.equal_forwards = stage >= 2  # from there on every forward or backward communicates
        self.trainable = trainable
        self.parameters = {name: p for name, p in trainable.named_parameters() if p.requires_grad}
        self._shapes = {name: distributed.full_shape(p) for name, p in self.parameters.items()}
        dtypes = {p.dtype for p in trainable.parameters() if p.is_floating_point()}
        self._bfloat16 = torch.bfloat16 in dtypes
        if self.stage == 0 and self._bfloat16:
            raise ConfigError(
                "parallel.backend is 'zero0', and DeepSpeed's stage 0 adds bfloat16 gradients up in bfloat16. "
                "Use parallel=ddp or zero1, which add them up in float32, or model.dtype=float32."
            )
        self._module = _Module(trainable)
        if self.stage == 3:
            self._mark_experts()
        self._inner = self._make_optimizer(optim, parallel)
        self._engine, self._outer, _, _ = self._deepspeed.initialize(
            model=self._module,
            optimizer=self._inner,
            config=settings(parallel, stage, self._bfloat16),
            dist_init_required=False,
        )

    def _make_optimizer(self, optim: OptimConfig, parallel: ParallelConfig) -> torch.optim.Optimizer:
        groups = adamw_groups([(p, len(self._shapes[name])) for name, p in self.parameters.items()], optim.weight_decay)
        options: dict[str, Any] = {"lr": optim.learning_rate, "betas": tuple(optim.betas), "eps": optim.eps}
        if parallel.backend == _OFFLOADED:
            offloaded: torch.optim.Optimizer = self._deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
            return offloaded
        return torch.optim.AdamW(groups, fused=True, **options)

    def _mark_experts(self) -> None:
        """Fetch a layer's experts together: which of them a pack needs differs between ranks."""
        classes = {type(m) for m in self._module.modules() if isinstance(getattr(m, "experts", None), nn.Module)}
        if classes:
            self._deepspeed.utils.set_z3_leaf_modules(self._module, list(classes))

    def forward(self, pack: Pack, *, tokens: bool = True) -> PackOutput:
        """Run the module on one pack."""
        flat = self._engine(pack, tokens)
        shape, counts, read = self._module.shape, self._module.counts, self._module.read
        sizes = [size.numel() for tensors in read.values() for size in tensors.values()]
        embeddings, sums, *parts, anchor = flat.split([shape.numel(), len(counts), *sizes, 1])
        terms = {name: LossTerm(total, count) for (name, count), total in zip(counts.items(), sums, strict=True)}
        rest = iter(parts)
        readouts = {name: {key: next(rest).view(size) for key, size in tensors.items()} for name, tensors in read.items()}
        return PackOutput(embeddings.view(shape), terms, anchor[0], readouts)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar."""
        if self.stage == 0:
            self._engine.set_gradient_accumulation_boundary(False)
        if self.stage == 3:
            loss = loss * distributed.world_size()
        self._engine.backward(loss, scale_wrt_gas=False)

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """Sum gradients over ranks, clip, step, clear. Returns the global gradient norm before clipping."""
        for group in self._inner.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            return self._update_whole(max_grad_norm)
        self._outer.clip_grad = max_grad_norm
        if self.stage == 1:
            self._fill_gradients()
        self._engine.step()
        return float(self._outer._global_grad_norm)

    def _update_whole(self, max_grad_norm: float) -> float:
        """Stage 0 has no optimizer of DeepSpeed's, and its clipping does not know non-finite gradients."""
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(float(norm)):
            self._engine.zero_grad()
            return float(norm)
        if max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), max_grad_norm, norm)
        self._engine.step()
        return float(norm)

    def _fill_gradients(self) -> None:
        """Stage 1 reduces what has a gradient; a parameter that only another rank used would shift the buckets."""
        for parameter in self.parameters.values():
            if parameter.grad is None and not self._bfloat16:
                parameter.grad = torch.zeros_like(parameter)

    # --- state ---------------------------------------------------------------------------------------------------------

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Float32 weights and moments, each gathered to every rank in its turn."""
        stepped = bool(self._inner.state)
        if stepped:
            self._link_state()
        for name, parameter in self.parameters.items():
            yield f"weight/{name}", self._get(parameter, None)
            if stepped:
                yield f"step/{name}", self._step_count()
                for key in MOMENTS:
                    yield f"{key}/{name}", self._get(parameter, key)

    def _step_count(self) -> torch.Tensor:
        """The updates taken; the same for every parameter."""
        state = next(iter(self._inner.state.values()))
        return torch.as_tensor(state["step"], dtype=torch.float32).cpu().clone().reshape(())

    def _get(self, parameter: nn.Parameter, key: str | None) -> torch.Tensor:
        if self.stage == 0:
            value = parameter if key is None else self._inner.state[parameter][key]
            return value.detach()
        if key is None:
            found = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        else:
            found = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
        assert isinstance(found, torch.Tensor)
        return found.detach()

    @torch.no_grad()
    def load_optimizer_state(self, read: Callable[[str], torch.Tensor], names: frozenset[str]) -> None:
        """Put a saved state back; every rank reads all of it and keeps its part.

        Raises:
            CheckpointError: a trained weight is missing or of another shape.
        """
        check_names(names, self.parameters)
        stepped = any(name.startswith("step/") for name in names)
        self._inner.state.clear()
        for name, parameter in self.parameters.items():
            self._set(parameter, None, read_shaped(read, f"weight/{name}", self._shapes[name]))
            if not stepped:
                continue
            if not self._inner.state:
                self._make_state(read(f"step/{name}"))
            for key in MOMENTS:
                self._set(parameter, key, read_shaped(read, f"{key}/{name}", self._shapes[name]))
        if self.stage in (1, 2):
            self._outer.update_lp_params()

    def _make_state(self, step: torch.Tensor) -> None:
        """AdamW makes its state in its first step; a saved one needs it before."""
        for flat in self._partitions():
            count: Any = int(step) if self.name == _OFFLOADED else step.to(flat.device, torch.float32).clone().reshape(())
            self._inner.state[flat] = {"step": count, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        self._link_state()

    def _link_state(self) -> None:
        """Tell parameters where their moments are. Stages 1 and 2 do that after the first group's first step, when the second
        group has none yet."""
        if self.stage in (1, 2):
            self._outer._hp_optimizer_states_linked = False
            self._outer._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> Sequence[torch.Tensor]:
        """What AdamW updates on this rank."""
        if self.stage == 3:
            partitions: Sequence[torch.Tensor] = self._outer.fp32_partitioned_groups_flat
            return partitions
        return [p for group in self._inner.param_groups for p in group["params"]]

    def _set(self, parameter: nn.Parameter, key: str | None, value: torch.Tensor) -> None:
        value = value.to(distributed.local_device())
        if self.stage == 0:
            (parameter if key is None else self._inner.state[parameter][key]).copy_(value)
        elif self.stage == 3:
            self._set_partition(parameter, key, value)
        elif key is None:
            self._deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        else:
            self._deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)

    def _set_partition(self, parameter: Any, key: str | None, value: torch.Tensor) -> None:
        """This rank's part of a value, padded as DeepSpeed pads it (its `safe_set_full_*` do not)."""
        size = parameter.ds_tensor.numel()
        padded = value.new_zeros(size * distributed.world_size())
        padded[: value.numel()] = value.reshape(-1)
        part = padded.narrow(0, size * distributed.rank(), size)
        if key is None:
            self._deepspeed.utils.safe_set_local_fp32_param(parameter, part)
            with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if distributed.is_rank0():
                    parameter.data.copy_(value)
        else:
            self._deepspeed.utils.safe_set_local_optimizer_state(parameter, part, key)

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Within it these parameters hold their whole values on every rank."""
        if self.stage < 3:
            return nullcontext()
        context: AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters(list(parameters))
        return context

    def gathered(self) -> AbstractContextManager[None]:
        """Within it every parameter holds its whole value on rank 0, on the CPU."""
        return _gathered(self._deepspeed, self.trainable) if self.stage == 3 else nullcontext()

    def close(self) -> None:
        """Take off DeepSpeed's hooks and forget its global references, which would keep the module alive."""
        self._engine.destroy()
        stack = self._deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK
        stack[:] = [module for module in stack if module is not self._module]


def settings(parallel: ParallelConfig, stage: int, bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        parallel: buckets and offloading.
        stage: of ZeRO.
        bfloat16: whether the weights are bfloat16 (then their masters are float32), or float32.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": parallel.bucket_elements,
        "allgather_bucket_size": parallel.bucket_elements,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": parallel.bucket_elements,
            "stage3_param_persistence_threshold": parallel.persistence_threshold,
        }
    if parallel.backend == _OFFLOADED:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if parallel.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # never read: packs differ in size, and their losses are normalized by us
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": stage == 0,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "steps_per_print": None,
    }
    if stage < 3:
        config["gradient_allreduce_op"] = "sum"
    if bfloat16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
    return config


@contextmanager
def _gathered(deepspeed: Any, trainable: nn.Module) -> Iterator[None]:
    """Collect partitioned parameters on rank 0, one at a time, and take DeepSpeed's hooks off so that modules can be copied."""
    partitioned: dict[nn.Parameter, torch.Tensor] = {}
    for parameter in trainable.parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if distributed.is_rank0():
                partitioned[parameter] = parameter.data.detach().to("cpu", copy=True)
    if not distributed.is_rank0():
        yield
        return
    bare = [_without_hooks(module) for module in trainable.modules()]
    for parameter, whole in partitioned.items():
        partitioned[parameter], parameter.data = parameter.data, whole
    try:
        yield
    finally:
        for parameter, part in partitioned.items():
            parameter.data = part
        for restore in bare:
            restore()


_HOOKED = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_parameters",
)


def _without_hooks(module: nn.Module) -> Callable[[], None]:
    """Give a module plain dictionaries for its hooks and parameters; returns what undoes it."""
    taken = {name: module.__dict__[name] for name in module.__dict__ if name in _HOOKED}
    extra = {name: module.__dict__.pop(name) for name in _DEEPSPEED_ATTRIBUTES if name in module.__dict__}
    for name, value in taken.items():
        module.__dict__[name] = dict(value) if name == "_parameters" else type(value)()

    def restore() -> None:
        """Put back what was taken from the module."""
        module.__dict__.update(taken)
        module.__dict__.update(extra)

    return restore


_DEEPSPEED_ATTRIBUTES = (
    "_original_parameters",
    "_external_params",
    "ds_inflight_param_registry",
    "ds_recompute_parameters",
    "pre_bwd_fn",
    "post_bwd_fn",
)
