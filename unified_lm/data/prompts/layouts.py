"""Prompts of answers that are grounded in documents: which parts are blocks, and what the user's turn after them says.

A block holds the tokens of an embedded text, exactly as they are embedded, and sees nothing outside itself: what the forward
that embedded it left in the layers is what an answer needs of it. What the user's turn says is read after the blocks, causally,
and sees them all. One table says both, for training (`data.formats.grounded`) and for answering (`retrieval`).

Source: the formats with and without caching of GRIT (arXiv:2402.09906, section 4 and appendix). The wording is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unified_lm.core.errors import ConfigError, did_you_mean

QUESTION, DOCUMENTS = "question", "documents"
"""What a block may hold."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parts of a prompt.

    Attributes:
        blocks: `QUESTION`, and `DOCUMENTS` (each document is a block of its own), in the order in which they are read.
        turn: what the user's turn after them says, with "{question}" and "{documents}" for those that are not blocks.
    """

    blocks: tuple[str, ...] = ()
    turn: str

    @property
    def retrieves(self) -> bool:
        """Whether documents are part of the prompt."""
        return DOCUMENTS in self.blocks or self.writes_documents

    @property
    def writes_documents(self) -> bool:
        """Whether documents are written into the user's turn."""
        return f"{{{DOCUMENTS}}}" in self.turn

    def say(self, question: str, documents: Sequence[str]) -> str:
        """What the user says.

        Args:
            question: the question.
            documents: the documents, in order.
        """
        # One pass over the wording, so that braces in a text stay what they are.
        return self.turn.format_map({QUESTION: question.strip(), DOCUMENTS: "\n\n".join(text.strip() for text in documents)})


_FROM_ABOVE = "Answer from the text above: {question}"
_FROM_HERE = "{documents}\n\nAnswer the question above from this text."
_FROM_BOTH = "Answer the question above from the text above."

LAYOUTS: Mapping[str, Layout] = {
    "no_retrieval": Layout(turn="{question}"),
    "query_then_document": Layout(turn="{question}\n\n{documents}\n\nAnswer the question above from this text."),
    "document_then_query": Layout(turn="{documents}\n\n" + _FROM_ABOVE),
    "query_cache": Layout(blocks=(QUESTION,), turn=_FROM_HERE),
    "document_cache": Layout(blocks=(DOCUMENTS,), turn=_FROM_ABOVE),
    "query_document_cache": Layout(blocks=(QUESTION, DOCUMENTS), turn=_FROM_BOTH),
    "document_query_cache": Layout(blocks=(DOCUMENTS, QUESTION), turn=_FROM_BOTH),
}
"""Layouts by name. The first three have no blocks: an ordinary conversation."""


def get_layout(name: str) -> Layout:
    """The layout with that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"there is no layout '{name}'.{did_you_mean(name, LAYOUTS)} Layouts: {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]
