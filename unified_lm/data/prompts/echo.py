"""Echo embeddings: a text stands twice in its prompt, and only the second copy is pooled.

Springer et al. 2024, "Repetition improves language model embeddings" (arXiv:2402.15449): under a causal mask the tokens of
the second copy have read the whole text, so that a model embeds it without bidirectional attention and without training.

A text beyond the limit is cut once, at a token of the first copy, and what is left stands in both places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding

from unified_lm.core.errors import DataError


@dataclass(frozen=True)
class EchoPrompt:
    """What stands around the two copies: `before` TEXT `between` TEXT."""

    before: str
    between: str

    def string(self, text: str) -> str:
        """The whole prompt of a text."""
        return f"{self.before}{text}{self.between}{text}"

    def second_copy(self, text: str) -> int:
        """Where the second copy starts, in characters."""
        return len(self.before) + len(text) + len(self.between)


@dataclass(frozen=True, eq=False)
class EchoTokens:
    """A prompt that became tokens.

    Attributes:
        ids: int32 `[T]`, without what the tokenizer adds around every text.
        start: the second copy's first token; it ends with the last one. None where a token straddles that border.
        truncated: whether the text was cut.
    """

    ids: np.ndarray
    start: int | None
    truncated: bool


def encode_echo(prompt: EchoPrompt, text: str, limit: int, encode: Callable[[Sequence[str]], list[Encoding]]) -> EchoTokens:
    """Encode one text twice within `limit` tokens.

    Args:
        prompt: what stands around the copies.
        text: stripped, not empty.
        limit: the most tokens of the whole prompt.
        encode: tokenizes whole strings, with offsets that leave no character out.

    Raises:
        DataError: not a single token of the text fits.
    """
    (encoding,) = encode([prompt.string(text)])
    kept = text
    while len(encoding.ids) > limit:
        kept = _shorter(prompt, kept, len(encoding.ids) - limit, encoding)
        if not kept:
            raise DataError(
                f"the echo prompt {prompt.string('...')!r} leaves no room for text under the limit of {limit} tokens; raise it."
            )
        (encoding,) = encode([prompt.string(kept)])
    return EchoTokens(np.asarray(encoding.ids, dtype=np.int32), _start(prompt, kept, encoding), truncated=kept != text)


def _shorter(prompt: EchoPrompt, text: str, excess: int, encoding: Encoding) -> str:
    """The text without the tokens of its end that are too many; each costs two, one in either copy."""
    first = len(prompt.before)
    ends = [min(stop, first + len(text)) - first for _, stop in encoding.offsets if first < stop <= first + len(text)]
    keep = max(0, len(ends) - (excess + 1) // 2)
    # several tokens may end at one character (the bytes of an emoji): cut at least that one
    return text[: max((end for end in ends[:keep] if end < len(text)), default=0)].rstrip()


def _start(prompt: EchoPrompt, text: str, encoding: Encoding) -> int | None:
    """The first token with a character of the second copy; the space before the copy may belong to it, no more."""
    border = prompt.second_copy(text)
    for index, (start, stop) in enumerate(encoding.offsets):
        if stop > border:
            own_space = start == border - 1 and prompt.between.endswith(" ")
            return index if start >= border or own_space else None
    return None
