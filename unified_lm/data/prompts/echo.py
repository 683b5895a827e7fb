"""Echo embeddings: a prompt contains its text twice, and only the second copy is pooled.

Springer et al. 2024, "Repetition improves language model embeddings" (arXiv:2402.15449): under a causal mask the tokens of
the second copy attend to the whole text, so that a model embeds it without bidirectional attention and without training.

A text beyond the limit is truncated once, at a token of the first copy, and both copies contain the truncated text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding

from unified_lm.core.errors import DataError


@dataclass(frozen=True)
class EchoPrompt:
    """The text around the two copies: `before` TEXT `between` TEXT."""

    before: str
    between: str

    def string(self, text: str) -> str:
        """The complete prompt of a text."""
        return f"{self.before}{text}{self.between}{text}"

    def second_copy(self, text: str) -> int:
        """Start of the second copy, in characters."""
        return len(self.before) + len(text) + len(self.between)


@dataclass(frozen=True, eq=False)
class EchoTokens:
    """A tokenized prompt.

    Attributes:
        ids: int32 `[T]`, without the tokens that the tokenizer adds around every text.
        start: index of the first token of the second copy, which ends with the last token. None if a token straddles the
            boundary.
        truncated: whether the text was truncated.
    """

    ids: np.ndarray
    start: int | None
    truncated: bool


def encode_echo(prompt: EchoPrompt, text: str, limit: int, encode: Callable[[Sequence[str]], list[Encoding]]) -> EchoTokens:
    """Encode one text twice within `limit` tokens.

    Args:
        prompt: the text around the copies.
        text: stripped, not empty.
        limit: maximum number of tokens of the complete prompt.
        encode: tokenizes whole strings, with offsets that leave no character out.

    Raises:
        DataError: no token of the text fits.
    """
    (encoding,) = encode([prompt.string(text)])
    kept = text
    # A loop, since the shortened string may tokenize differently; every round removes at least one character.
    while len(encoding.ids) > limit:
        kept = _shorter(prompt, kept, len(encoding.ids) - limit, encoding)
        if not kept:
            raise DataError(
                f"the echo prompt {prompt.string('...')!r} leaves no room for text under the limit of {limit} tokens; raise it."
            )
        (encoding,) = encode([prompt.string(kept)])
    return EchoTokens(np.asarray(encoding.ids, dtype=np.int32), _start(prompt, kept, encoding), truncated=kept != text)


def _shorter(prompt: EchoPrompt, text: str, excess: int, encoding: Encoding) -> str:
    """The text without its last tokens that exceed the limit; every token removed saves two, one in each copy."""
    first = len(prompt.before)
    ends = [min(stop, first + len(text)) - first for _, stop in encoding.offsets if first < stop <= first + len(text)]
    keep = max(0, len(ends) - (excess + 1) // 2)
    # several tokens may end at one character (the bytes of an emoji): remove at least that character
    return text[: max((end for end in ends[:keep] if end < len(text)), default=0)].rstrip()


def _start(prompt: EchoPrompt, text: str, encoding: Encoding) -> int | None:
    """Index of the first token with a character of the second copy. It may also contain the space before, but nothing else."""
    border = prompt.second_copy(text)
    for index, (start, stop) in enumerate(encoding.offsets):
        if stop > border:
            own_space = start == border - 1 and prompt.between.endswith(" ")
            return index if start >= border or own_space else None
    return None
