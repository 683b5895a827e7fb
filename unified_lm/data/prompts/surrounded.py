"""Prompts that go on after their text: with a question about it, or with the text once more.

- A suffix makes a causal model say what a text means, as PromptEOL does (Jiang et al. 2023, arXiv:2307.16645): This sentence :
  "TEXT" means in one word:" . The last token is pooled.
- Echo embeddings (Springer et al. 2024, "Repetition improves language model embeddings", arXiv:2402.15449) contain the text
  twice: under a causal mask the tokens of the second copy attend to the whole text, and only they are pooled.

The whole string is tokenized at once. A text beyond the limit is cut, once, and the prompt stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding

from unified_lm.core.errors import DataError


@dataclass(frozen=True)
class SurroundedPrompt:
    """`before` TEXT `after`, and the text again if it `repeats`."""

    before: str
    after: str
    repeats: bool

    def string(self, text: str) -> str:
        """The complete prompt of a text."""
        return f"{self.before}{text}{self.after}{text if self.repeats else ''}"

    def pooled_from(self, text: str) -> int:
        """Where the pooled text begins, in characters."""
        return len(self.before) + (len(text) + len(self.after)) * self.repeats


@dataclass(frozen=True, eq=False)
class SurroundedTokens:
    """A tokenized prompt.

    Attributes:
        ids: int32 `[T]`, without the tokens that the tokenizer adds around every text.
        start: index of the first pooled token; all that follow are pooled. None if a token straddles the boundary of a second
            copy. Before a suffix such a token (a quotation mark and a letter, say) belongs to the text.
        truncated: whether the text was truncated.
    """

    ids: np.ndarray
    start: int | None
    truncated: bool


def encode_surrounded(
    prompt: SurroundedPrompt, text: str, limit: int, encode: Callable[[Sequence[str]], list[Encoding]]
) -> SurroundedTokens:
    """Encode one text with what surrounds it within `limit` tokens.

    Args:
        prompt: what surrounds the text.
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
                f"the prompt {prompt.string('...')!r} leaves no room for text under the limit of {limit} tokens; raise it."
            )
        (encoding,) = encode([prompt.string(kept)])
    return SurroundedTokens(np.asarray(encoding.ids, dtype=np.int32), _start(prompt, kept, encoding), truncated=kept != text)


def _shorter(prompt: SurroundedPrompt, text: str, excess: int, encoding: Encoding) -> str:
    """The text without its last tokens that exceed the limit; every token removed saves one in each copy."""
    first = len(prompt.before)
    ends = [min(stop, first + len(text)) - first for _, stop in encoding.offsets if first < stop <= first + len(text)]
    keep = max(0, len(ends) - (-(-excess // 2) if prompt.repeats else excess))
    # several tokens may end at one character (the bytes of an emoji): remove at least that character
    return text[: max((end for end in ends[:keep] if end < len(text)), default=0)].rstrip()


def _start(prompt: SurroundedPrompt, text: str, encoding: Encoding) -> int | None:
    """Index of the first token with a pooled character. That of a second copy may contain the space before, and no more."""
    border = prompt.pooled_from(text)
    for index, (start, stop) in enumerate(encoding.offsets):
        if stop > border:
            own_space = start == border - 1 and prompt.after.endswith(" ")
            return index if start >= border or own_space or not prompt.repeats else None
    return None
