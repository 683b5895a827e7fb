"""Encoded texts as samples, as an export embeds them: shared by verification and inference, which must not differ."""

from __future__ import annotations

from unified_lm.batch import Sample, attention_span
from unified_lm.data.prompts.encoding import Encoded


def embedding_sample(encoded: Encoded, attention: str) -> Sample:
    """A sample of an encoded text: all tokens attend, and those of its only span are pooled.

    Args:
        encoded: prompt and text as tokens, from `PromptEncoder.embed`.
        attention: one of `export.manifest.ATTENTIONS`.
    """
    return Sample(
        input_ids=encoded.ids.astype("int64"),
        stream="embed",
        bidirectional=attention_span(attention, len(encoded.ids)),
        pool=encoded.spans[0],
        truncated=encoded.truncated,
    )
