"""What a prompt becomes: ids with spans, put together from the tokens of its pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from tokenizers import Encoding


class Rejection(Enum):
    """Why a text cannot become a sample."""

    EMPTY = "text empty after stripping"
    STRADDLES = "a token straddles the border between prompt and text"
    NO_ROOM = "the prompt leaves no room for an answer within the limit"
    SHORT = "fewer than two tokens"


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tokenized text.

    Attributes:
        ids: int32 `[T]`.
        spans: `[start, stop)` of the tokens that are pooled (one span for an embedding) or learned (one span per answer of a
            conversation, with its end token unless it is cut); empty for running text.
        truncated: whether the text was truncated.
    """

    ids: np.ndarray
    spans: tuple[tuple[int, int], ...] = ()
    truncated: bool = False


@dataclass(frozen=True)
class Fragment:
    """A piece of a prompt: special tokens are recognized in `template` text only; `answer` marks text that is learned."""

    text: str
    template: bool
    answer: bool = False


_Atom = Any


def assemble(atoms: Sequence[_Atom], encoding_of: Callable[[int], Encoding]) -> Encoded | Rejection:
    """Concatenate atoms into ids with an answer flag per token; the spans of the answers follow from the flags."""
    ids: list[int] = []
    learned: list[bool] = []
    for index, atom in enumerate(atoms):
        if isinstance(atom, tuple):
            ids.append(atom[0])
            learned.append(atom[1])
            continue
        encoding = encoding_of(index)
        flags = _token_flags(atom, encoding)
        if flags is None:
            return Rejection.STRADDLES
        ids += encoding.ids
        learned += flags
    # The flags change at the starts and stops of spans, which therefore alternate.
    edges = np.flatnonzero(np.diff([0, *learned, 0]))
    spans = tuple((int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True))
    return Encoded(np.asarray(ids, dtype=np.int32), spans)


def _token_flags(stretch: Sequence[tuple[str, bool]], encoding: Encoding) -> list[bool] | None:
    """Per token, whether it belongs to an answer; None if a token straddles the boundary of an answer."""
    flags = [False] * len(encoding.ids)
    borders = list(accumulate((len(text) for text, _ in stretch), initial=0))
    answers = [(a, b) for (a, b), (_, answer) in zip(pairwise(borders), stretch, strict=True) if answer and b > a]
    for start, stop in answers:
        for index, (first, last) in enumerate(encoding.offsets):
            if first < stop and last > start:  # the token overlaps the answer, so it must lie inside
                if first < start or last > stop:
                    return None
                flags[index] = True
    return flags


def truncate_chat(encoded: Encoded | Rejection, limit: int) -> Encoded | Rejection:
    """Truncate to `limit` tokens: inside the answer that crosses it, or after the last whole answer.

    A cut answer has no end token: it would teach to stop in the middle of a sentence.
    """
    if isinstance(encoded, Rejection) or len(encoded.ids) <= limit:
        return encoded
    spans = []
    for start, stop in encoded.spans:
        if stop <= limit:
            spans.append((start, stop))
            continue
        if start < limit:
            return Encoded(encoded.ids[:limit], (*spans, (start, limit)), truncated=True)
        break
    return Encoded(encoded.ids[: spans[-1][1]], tuple(spans), truncated=True) if spans else Rejection.NO_ROOM
