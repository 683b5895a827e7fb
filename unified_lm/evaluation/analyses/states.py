"""Model outputs for analyses: hidden states by layer from the packed forward, and pooled vectors of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from unified_lm.batch import Sample, attention_span
from unified_lm.core.errors import DataError
from unified_lm.data.rows.records import Text
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.embedding import sample_states

TOKEN_BUDGET = 1024
"""Maximum tokens per forward; the states of all layers of a pack are in memory at once."""


def layer_states(
    model: UnifiedLM, sequences: Sequence[np.ndarray], attention: str | Sequence[str], *, show_progress: bool = False
) -> Iterator[tuple[int, torch.Tensor]]:
    """Run sequences through the model.

    Args:
        model: only its backbone is used, not its template, pooling or head.
        sequences: int `[T]` each.
        attention: "causal", "bidirectional" or "bidirectional_keep_first", for all sequences or one per sequence.
        show_progress: draw a progress bar on stderr.

    Yields:
        The index of a sequence and float32 `[T, L + 1, D]` on the CPU (see `Backbone.layer_states`), longest sequence first.
        Adjacent sequences of equal length are yielded close together.
    """
    attentions = [attention] * len(sequences) if isinstance(attention, str) else list(attention)
    samples = [
        Sample(
            input_ids=np.asarray(ids, np.int64),
            stream="analysis",
            bidirectional=attention_span(mode, len(ids)),
        )
        for ids, mode in zip(sequences, attentions, strict=True)
    ]
    with (
        Progress(console=Console(stderr=True), disable=not show_progress, transient=True) as bar,
        model.borrow_backbone() as backbone,
    ):
        task = bar.add_task("forward", total=len(samples))
        for index, states in sample_states(backbone.layer_states, samples, token_budget=TOKEN_BUDGET, device=model.device):
            yield index, states.float().cpu()
            bar.advance(task)


def pooled_vectors(model: UnifiedLM, texts: Sequence[Text], show_progress: bool, method: str | None = None) -> np.ndarray:
    """Embed texts, each with its instruction: float32 `[N, D]`, pooled and not normalized; `method` as of `encode`."""
    order: list[int] = []
    blocks = []
    for instruction in dict.fromkeys(text.instruction for text in texts):
        chosen = [i for i, text in enumerate(texts) if text.instruction == instruction]
        said = [texts[i].text for i in chosen]
        blocks.append(model.encode(said, instruction, normalize=False, show_progress=show_progress, method=method))
        order += chosen
    vectors = np.concatenate(blocks)
    vectors[order] = vectors.copy()
    return vectors


def token_windows(model: UnifiedLM, texts: Sequence[str], positions: int, count: int) -> list[np.ndarray]:
    """The first `positions` tokens of each text that is long enough, including a beginning-of-text token if one is added.

    Args:
        model: only its tokenizer is used, without a template.
        texts: in order of preference.
        positions: tokens per window.
        count: number of windows.

    Raises:
        DataError: fewer than two texts are long enough.
    """
    encoder = model.prompt_encoder
    leading = np.asarray(encoder.leading_ids, np.int32)
    windows = []
    for ids in encoder.running_text(list(texts)):
        whole = np.concatenate([leading, ids])
        if len(whole) >= positions:
            windows.append(whole[:positions])
        if len(windows) == count:
            break
    if len(windows) < 2:
        raise DataError(
            f"{len(windows)} of {len(texts)} texts have {positions} tokens; at least 2 are needed. Give longer texts (--texts) "
            "or fewer --positions."
        )
    return windows
