"""Documents that are longer than what the model reads of one: cut, or split into documents of their own."""

from __future__ import annotations

from dataclasses import replace

from unified_lm.core.errors import DataError
from unified_lm.inference import UnifiedLM
from unified_lm.retrieval.documents import Document

OVERLAP = 0.1
"""Share of a part that repeats the end of the part before it, so that a sentence at the border is whole in one of them."""


def fit(model: UnifiedLM, document: Document, max_tokens: int, on_long: str) -> tuple[list[Document], int]:
    """A document as the model reads it.

    Args:
        model: its tokenizer and template count.
        document: the document.
        max_tokens: limit of a text with its prompt.
        on_long: "cut", or "split": the parts have ids "ID#1", "ID#2", ...

    Returns:
        One document, or several, each within the limit, and the tokens of them all without prompts.

    Raises:
        DataError: the prompt alone reaches the limit.
    """
    tokenizer = model.prompt_encoder.tokenizer
    prompt = tokenizer(model.embedding_prompt())["input_ids"]
    room = max_tokens - len(prompt) - (model.prompt_encoder.appended_end is not None)
    if room < 1:
        raise DataError(
            f"the prompt of a document takes {len(prompt)} tokens, and the limit is {max_tokens}. Raise max_tokens."
        )
    text = document.text.strip()
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= room:
        return [document], len(offsets)
    step = room if on_long == "cut" else max(1, round(room * (1 - OVERLAP)))
    starts = [0] if on_long == "cut" else range(0, len(offsets) - (room - step), step)
    parts = []
    for number, start in enumerate(starts, start=1):
        part = offsets[start : start + room]
        # Cut where a token ends: that may be in a word, and what a block would hold is in the same place.
        piece = text[part[0][0] : part[-1][1]]
        origin = f"{document.origin}, part {number}".removeprefix(", ")
        parts.append(replace(document, text=piece) if on_long == "cut" else Document(f"{document.id}#{number}", piece, origin))
    return [part for part in parts if part.text.strip()], min(len(offsets), room) if on_long == "cut" else len(offsets)
