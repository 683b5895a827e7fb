"""DeepSpeed ZeRO under our own step: the one file that imports deepspeed.

ZeRO (Rajbhandari et al., 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv 1910.02054)
partitions the optimizer state across ranks (stage 1), then also the gradients (stage 2), then also the weights (stage 3). What
is left to DeepSpeed and what is not:

- DeepSpeed owns storage and communication. The update is torch's AdamW on DeepSpeed's float32 partitions, with the settings of
  `MasterAdamW`; clipping and the test for non-finite gradients are DeepSpeed's, over the global norm.
- Losses are already divided by counts of the whole step, so gradients are *summed* over ranks. Stages 0 to 2 can do that;
  stage 3 only averages, so its losses are multiplied by the number of ranks.
- Gradients of packs are accumulated, and reduced over ranks, in float32, whatever the dtype of the weights.
- A step has as many backwards as it has packs. With `managed_gradient_accumulation` off, `engine.step` is the accumulation
  boundary, so no caller needs to know which pack is the last.
- In stages 2 and 3 every backward communicates, and in stage 3 every forward does. Ranks must therefore run the same
  sequence of forwards (`GradCacheStep` ensures it), and every forward must use every trained parameter (`FlatModule` does).
- Float32 parameters of a bfloat16 model are kept out of the engine (`float32_parameters`), which would cast them.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from unified_lm.batch import Pack
from unified_lm.config.schema import OptimConfig, ParallelConfig
from unified_lm.core import distributed
from unified_lm.core.errors import ConfigError
from unified_lm.engine.backends.extension_locks import remove_stale_locks
from unified_lm.engine.backends.flat_module import FlatModule
from unified_lm.engine.backends.float32_parameters import Float32Parameters, gather_only_partitions
from unified_lm.engine.backends.optimizer import StateReader, adamw_groups
from unified_lm.engine.backends.zero_state import ZeroState
from unified_lm.engine.backends.zero_unpartition import unpartitioned
from unified_lm.engine.training_module import PackOutput, TrainingModule

_OFFLOADED = "zero3_offload"


def check_available(parallel: ParallelConfig) -> None:
    """Check, before anything is loaded, that DeepSpeed can do what the configuration asks for.

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
    """Import DeepSpeed and make it ready to create engines in this process."""
    check_available(parallel)
    distributed.initialize_alone()
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed = _import_deepspeed(parallel.backend)
    remove_stale_locks()
    # This op is an all-reduce for inference on CPUs. Nothing here calls it, and compiling it takes a minute and a cache lock.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Prints the memory in use, whatever the level of logging.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return deepspeed


class ZeroSharding:
    """Partitions parameters as ZeRO-3 does while a model is being built (see `models.sharded`).

    Args:
        parallel: a ZeRO-3 backend.
    """

    def __init__(self, parallel: ParallelConfig) -> None:
        self._deepspeed = _start(parallel)
        self._parallel = parallel

    def initializing(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Context in which each new module's parameters are partitioned as soon as the module is complete."""
        offloaded = self._parallel.backend == _OFFLOADED and self._parallel.offload_parameters
        context: AbstractContextManager[None] = self._deepspeed.zero.Init(
            # The config also carries the dtype: DeepSpeed 0.19 ignores the `dtype` argument on devices without float16.
            config_dict_or_path=settings(self._parallel, 3, dtype == torch.bfloat16),
            remote_device="cpu" if offloaded else None,
        )
        return context

    def filling(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Context in which parameters are whole; what rank 0 writes to them is partitioned again on leaving."""
        context: AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
        return context


class DeepSpeedBackend:
    """ZeRO stages 0 to 3.

    Args:
        trainable: on its device (stage 3: built by `models.sharded`, or whole; a whole one is partitioned here).
        optim: optimizer settings.
        parallel: stage, buckets and offloading.

    Raises:
        ConfigError: see `check_available`.
    """

    def __init__(self, trainable: TrainingModule, optim: OptimConfig, parallel: ParallelConfig) -> None:
        self._deepspeed = _start(parallel)
        self.name = parallel.backend
        stage = parallel.zero_stage
        assert stage is not None, f"{parallel.backend} is not a DeepSpeed backend"
        self.stage = stage
        self.equal_forwards = stage >= 2  # from stage 2 on, every forward or backward communicates
        self.trainable = trainable
        self.parameters = {name: p for name, p in trainable.named_parameters() if p.requires_grad}
        self._shapes = {name: distributed.full_shape(p) for name, p in self.parameters.items()}
        dtypes = {p.dtype for p in trainable.parameters() if p.is_floating_point()}
        self._bfloat16 = torch.bfloat16 in dtypes
        if self.stage == 0 and self._bfloat16:
            # A pack's gradient below about 1/256 of the sum would be rounded away.
            raise ConfigError(
                "parallel.backend is 'zero0', and DeepSpeed's stage 0 accumulates bfloat16 gradients in bfloat16. "
                "Use parallel=ddp or zero1, which accumulate them in float32, or model.dtype=float32."
            )
        self._module = FlatModule(trainable)
        if self.stage == 3:
            self._mark_experts()
            gather_only_partitions(self._deepspeed.runtime.zero.partitioned_param_coordinator)
        self._float32 = Float32Parameters(trainable, optim, bfloat16=self._bfloat16)
        self._inner = self._make_optimizer(optim, parallel)
        with self._float32.hidden():
            self._engine, self._outer, _, _ = self._deepspeed.initialize(
                model=self._module,
                optimizer=self._inner,
                config=settings(parallel, stage, self._bfloat16),
                dist_init_required=False,
            )
        self._float32.join_norm(self._outer, stage)
        self._state = ZeroState(
            self._deepspeed,
            stage,
            self.parameters,
            self._shapes,
            self._inner,
            self._outer,
            self._float32.optimizer,
            counts_on_host=parallel.backend == _OFFLOADED,
        )

    def _make_optimizer(self, optim: OptimConfig, parallel: ParallelConfig) -> torch.optim.Optimizer:
        shared = {name: p for name, p in self.parameters.items() if name not in self._float32.names}
        groups = adamw_groups([(p, len(self._shapes[name])) for name, p in shared.items()], optim.weight_decay)
        options: dict[str, Any] = {"lr": optim.learning_rate, "betas": tuple(optim.betas), "eps": optim.eps}
        if parallel.backend == _OFFLOADED:
            offloaded: torch.optim.Optimizer = self._deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
            return offloaded
        return torch.optim.AdamW(groups, fused=True, **options)

    def _mark_experts(self) -> None:
        """Gather the experts of a layer together.

        By default a submodule is gathered when its forward runs. Packs of different ranks visit different experts, so ranks
        would wait for each other in different collectives.
        """
        modules = list(self._module.modules())
        classes = {type(m) for m in modules if isinstance(getattr(m, "experts", None), nn.Module)}
        classes |= {type(m) for m in modules if getattr(m, "uses_weights_of_parts", False)}
        if classes:
            self._deepspeed.utils.set_z3_leaf_modules(self._module, list(classes))

    def forward(self, pack: Pack, *, tokens: bool = True) -> PackOutput:
        """Run the module on one pack."""
        return self._module.unpack(self._engine(pack, tokens))

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a scalar to those of the step."""
        if self.stage == 0:
            # Until `_update_whole` says otherwise, more packs follow: do not reduce over ranks yet.
            self._engine.set_gradient_accumulation_boundary(False)
        if self.stage == 3:
            loss = loss * distributed.world_size()  # undoes the average over ranks, see above
        self._engine.backward(loss, scale_wrt_gas=False)

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """Sum gradients over ranks, clip, step, clear; returns the global gradient norm before clipping."""
        # The schedule is the engine's, not DeepSpeed's: one schedule for all backends.
        for group in self._inner.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            return self._update_whole(max_grad_norm)
        self._outer.clip_grad = max_grad_norm
        if self.stage == 1:
            self._fill_gradients()
        self._float32.sum_gradients(scaled_by=distributed.world_size() if self.stage == 3 else 1)
        self._engine.step()
        norm = float(self._outer._global_grad_norm)
        self._float32.update(learning_rate, max_grad_norm, norm)
        return norm

    def _update_whole(self, max_grad_norm: float) -> float:
        """The update of stage 0, where DeepSpeed has no own optimizer and clips without checking for non-finite norms."""
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm_value = float(norm)
        if not math.isfinite(norm_value):
            self._engine.zero_grad()
            return norm_value
        if max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), max_grad_norm, norm)
        self._engine.step()
        return norm_value

    def _fill_gradients(self) -> None:
        """Give every parameter a gradient, zero where the rank's packs did not use it.

        Stage 1 fills its buckets with the gradients that exist, so a parameter that only some ranks used would shift the
        buckets against each other. With bfloat16 weights DeepSpeed accumulates in an attribute of its own, not in `grad`.
        """
        for parameter in self.parameters.values():
            if parameter.grad is None and not self._bfloat16:
                parameter.grad = torch.zeros_like(parameter)

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Float32 weights and moments, each gathered to every rank in turn."""
        return self._state.read()

    def load_optimizer_state(self, read: StateReader) -> None:
        """Restore a saved state; every rank reads the part that it keeps.

        Raises:
            CheckpointError: a trained weight is missing or has another shape.
        """
        self._state.write(read)

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Context in which these parameters hold their whole values on every rank."""
        if self.stage < 3:
            return nullcontext()
        context: AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters(list(parameters))
        return context

    def gathered(self, module: nn.Module, *, weights: bool = True) -> AbstractContextManager[None]:
        """Context in which a part of the module is an ordinary one on rank 0, its weights whole, on the CPU."""
        if self.stage < 3:
            return nullcontext()
        return unpartitioned(self._deepspeed, module, weights=weights)

    def close(self) -> None:
        """Remove DeepSpeed's hooks, and its global references, which would keep the module in memory."""
        self._engine.destroy()
        # A global list that `destroy` does not clear.
        stack = self._deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK
        stack[:] = [module for module in stack if module is not self._module]


def settings(parallel: ParallelConfig, stage: int, bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        parallel: buckets and offloading.
        stage: of ZeRO.
        bfloat16: whether the weights are bfloat16, with float32 master copies; False means float32 weights.
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
            # True replaces torch's linear function for the whole process and for good, by one that adds biases after rounding.
            # Only here: `zero.Init` lets the configuration override its argument.
            "memory_efficient_linear": False,
        }
    if parallel.backend == _OFFLOADED:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if parallel.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # required but unused: packs differ in size, and losses come normalized
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": stage == 0,  # stage 0: `backward` and `_update_whole` set the boundary
        "gradient_clipping": 0.0,  # set per step in `update`
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "steps_per_print": None,
    }
    if stage < 3:  # stage 3 has no such option; `backward` makes up for it
        config["gradient_allreduce_op"] = "sum"
    if bfloat16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
    return config
