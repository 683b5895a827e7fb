"""What flows between data, models, objectives and engine. Imports nothing but `core`.

Shape legend, used across the package:

- T  tokens of a pack (all samples laid end to end, no padding)
- S  samples (sequences) of a pack
- E  pooled samples of a pack or a batch (those that yield an embedding)
- N  supervised positions of a pack (those that yield a token loss)
- G  groups of a contrastive batch; K samples per group (query, positive, hard negatives...)
- D  hidden size; H, H_kv query and key/value heads; d head size; V vocabulary
"""

from unified_lm.batch.loss import LossTerm, OutputHead, SequenceScores
from unified_lm.batch.pack import Batch, Pack, ScoredPacks, Supervision, empty_pack, make_batch, make_pack
from unified_lm.batch.plan import (
    AttentionMode,
    AttentionPlan,
    Block,
    ModeRun,
    attention_span,
    consecutive_blocks,
    seeing_attention,
)
from unified_lm.batch.sample import IGNORE, MISSING, Sample, SequenceLabel

__all__ = [
    "IGNORE",
    "MISSING",
    "AttentionMode",
    "AttentionPlan",
    "Batch",
    "Block",
    "LossTerm",
    "ModeRun",
    "OutputHead",
    "Pack",
    "Sample",
    "ScoredPacks",
    "SequenceLabel",
    "SequenceScores",
    "Supervision",
    "attention_span",
    "consecutive_blocks",
    "empty_pack",
    "make_batch",
    "make_pack",
    "seeing_attention",
]
