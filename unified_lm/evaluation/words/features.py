"""One vector per word from a frozen model, computed in packs and kept on disk.

Shapes: T tokens of a sentence, W words, D hidden size. A sentence is read without any prompt, behind one start token: the one
that the tokenizer adds by itself, else its begin or end of text, so that every word has a position before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock

from unified_lm.batch import Sample
from unified_lm.core.errors import ConfigError, DataError, did_you_mean
from unified_lm.core.files import cache_dir, write_array
from unified_lm.data.prompts.encoding import PromptEncoder
from unified_lm.data.prompts.plain_tokenizers import plain_tokenizers
from unified_lm.evaluation.words.data import Sentence
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.embedding import sample_states

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

MAX_TOKENS = 512
"""Tokens of one context, the start token included (LLM2Vec's limit in testing). Longer sentences are read in parts."""

_VERSION = 1  # raise it when anything below changes the numbers, so that old files are not read
_CHUNK = 256  # sentences per file
_TOKEN_BUDGET = 4096


class NamedChoice(Enum):
    """An enumeration whose members a command line names by their value."""

    @classmethod
    def parse(cls, name: str | Self) -> Self:
        """The member with that value; a member stands for itself.

        Raises:
            ConfigError: there is none.
        """
        try:
            return cls(name)
        except ValueError:
            names = [member.value for member in cls]
            raise ConfigError(f"unknown {cls.__name__.lower()} '{name}'.{did_you_mean(str(name), names)}") from None


class Alignment(NamedChoice):
    """Which position stands for a token of a word.

    SAME_TOKEN is the token's own. NEXT_TOKEN is the one before it, whose state predicts the token: LLM2Vec (section 4.1) reads
    its models after MNTP there, because that objective is trained there.
    """

    SAME_TOKEN = "same_token"
    NEXT_TOKEN = "next_token"


class Subtoken(NamedChoice):
    """What stands for a word of several tokens: the mean of its tokens' states (LLM2Vec's `merge_subwords`), or one of them."""

    MEAN = "mean"
    FIRST = "first"
    LAST = "last"


@dataclass(frozen=True)
class Window:
    """A stretch of a sentence that one context holds.

    Attributes:
        ids: int64 `[T]`, start token first.
        words: per word the positions of its tokens in `ids`, at least one, none of them 0.
    """

    ids: np.ndarray
    words: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class FeatureSettings:
    """What decides a word's vector besides model and words.

    Attributes:
        attention: "causal" or "bidirectional".
        subtoken: how a word's tokens become one vector.
        max_tokens: see `MAX_TOKENS`.
    """

    attention: str
    subtoken: Subtoken = Subtoken.MEAN
    max_tokens: int = MAX_TOKENS


def word_features(
    model: UnifiedLM,
    sentences: Sequence[Sentence],
    alignments: Sequence[Alignment],
    settings: FeatureSettings,
    *,
    cache_key: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[Alignment, np.ndarray]:
    """The vectors of all words, in evaluation mode and without gradients. One forward serves all alignments.

    Args:
        model: whose last hidden states are read.
        sentences: their words give the rows, in order.
        alignments: those wanted.
        settings: see `FeatureSettings`.
        cache_key: hash of the model's content. Vectors are then kept in the cache folder (float32, 4 D bytes a word), and a
            killed run goes on where it stopped. None keeps nothing.
        progress: called after every chunk with the number of its sentences.

    Returns:
        float32 `[W, D]` for each alignment.

    Raises:
        ConfigError: the tokenizer has no token that could stand first.
        DataError: a word becomes no token or too many, or the disk refused.
    """
    parts: dict[Alignment, list[np.ndarray]] = {alignment: [] for alignment in alignments}
    for start in range(0, len(sentences), _CHUNK):
        chunk = sentences[start : start + _CHUNK]
        if cache_key is None:
            vectors: Mapping[Alignment, np.ndarray] = _compute(model, chunk, alignments, settings)
        else:
            vectors = _cached(model, chunk, alignments, settings, cache_key)
        for alignment in alignments:
            parts[alignment].append(vectors[alignment])
        if progress is not None:
            progress(len(chunk))
    return {alignment: np.concatenate(rows) for alignment, rows in parts.items()}


def windows(encoder: PromptEncoder, sentences: Sequence[Sentence], max_tokens: int = MAX_TOKENS) -> list[list[Window]]:
    """Tokenize sentences as whole strings and find the tokens of every word by their offsets.

    A token that lies across two words (sentencepiece may have some) stands for both.

    Args:
        encoder: whose tokenizer is used; its template is not.
        sentences: what to tokenize.
        max_tokens: a longer sentence is cut between words into several windows, each with a context of its own.

    Raises:
        ConfigError, DataError: see `word_features`.
    """
    texts, spans = zip(*(sentence.text() for sentence in sentences), strict=True)
    tokenizer = plain_tokenizers(encoder.tokenizer.backend_tokenizer.to_str())[0]
    start = start_ids(encoder)
    result = []
    for sentence, borders, encoding in zip(
        sentences, spans, tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True
    ):
        tokens = _tokens_of_words(borders, encoding.offsets)
        for word, own in zip(sentence.words, tokens, strict=True):
            if not own or len(start) + len(own) > max_tokens:
                raise DataError(
                    f"the word {word[:60]!r} in {' '.join(sentence.words)[:80]!r} becomes {len(own)} tokens; expected at least "
                    f"1 and no more than fit into {max_tokens} (--max-tokens). Mend or leave out the sentence."
                )
        result.append(_split(encoding.ids, tokens, start, max_tokens))
    return result


def start_ids(encoder: PromptEncoder) -> list[int]:
    """What stands before running text that is to be judged from its first token on.

    Returns:
        The tokens that the tokenizer puts first by itself; where it puts none, its begin of text, or else its end of text.

    Raises:
        ConfigError: it has none of these.
    """
    tokenizer = encoder.tokenizer
    if encoder.leading_ids:
        return encoder.leading_ids
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise ConfigError("the tokenizer has neither a begin nor an end of text, so the first word has no position before it.")


def _tokens_of_words(words: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Per word the tokens that overlap it; both lists ascend."""
    result = []
    first = 0
    for start, stop in words:
        while first < len(offsets) and offsets[first][1] <= start:
            first += 1
        last = first
        while last < len(offsets) and offsets[last][0] < stop:
            last += 1
        result.append(tuple(i for i in range(first, last) if offsets[i][1] > start))
    return result


def _split(ids: Sequence[int], words: Sequence[tuple[int, ...]], start: Sequence[int], max_tokens: int) -> list[Window]:
    """Windows of as many whole words as fit; a window's tokens are those from its first word's to its last word's."""
    if len(start) + len(ids) <= max_tokens:
        words_in = tuple(tuple(len(start) + token for token in word) for word in words)
        return [Window(np.asarray([*start, *ids], np.int64), words_in)]
    room = max_tokens - len(start)
    result: list[Window] = []
    held: list[tuple[int, ...]] = []
    for word in [*words, None]:
        if held and (word is None or word[-1] + 1 - held[0][0] > room):
            begin, end = held[0][0], held[-1][-1] + 1
            moved = tuple(tuple(token - begin + len(start) for token in own) for own in held)
            result.append(Window(np.asarray([*start, *ids[begin:end]], np.int64), moved))
            held = []
        if word is not None:
            held.append(word)
    return result


def _compute(
    model: UnifiedLM, sentences: Sequence[Sentence], alignments: Sequence[Alignment], settings: FeatureSettings
) -> dict[Alignment, np.ndarray]:
    parts = [window for several in windows(model.prompt_encoder, sentences, settings.max_tokens) for window in several]
    whole = settings.attention == "bidirectional"
    samples = [Sample(input_ids=part.ids, stream="words", bidirectional=(0, len(part.ids) if whole else 0)) for part in parts]
    rows: dict[Alignment, list[np.ndarray]] = {alignment: [np.empty(0)] * len(parts) for alignment in alignments}
    with model.borrow_backbone() as backbone:
        for index, states in sample_states(backbone, samples, token_budget=_TOKEN_BUDGET, device=model.device):
            for alignment in alignments:
                rows[alignment][index] = align(states, parts[index].words, alignment, settings.subtoken).cpu().numpy()
    return {alignment: np.concatenate(vectors) for alignment, vectors in rows.items()}


def align(
    states: torch.Tensor, words: Sequence[tuple[int, ...]], alignment: Alignment, subtoken: Subtoken = Subtoken.MEAN
) -> torch.Tensor:
    """Vectors of words from the states of their tokens.

    Args:
        states: `[T, D]`.
        words: per word the positions of its tokens, all above 0.
        alignment: which position stands for a token.
        subtoken: what stands for several. With NEXT_TOKEN the mean is over the positions before each token, so that of a long
            word holds the word's first tokens, as in the reference; FIRST holds nothing of the word itself under a causal mask.

    Returns:
        float32 `[W, D]`.
    """
    shift = 1 if alignment is Alignment.NEXT_TOKEN else 0
    if subtoken is not Subtoken.MEAN:
        pick = 0 if subtoken is Subtoken.FIRST else -1
        chosen = torch.tensor([word[pick] - shift for word in words], device=states.device)
        return states.index_select(0, chosen).float()
    positions = torch.tensor([token - shift for word in words for token in word], device=states.device)
    lengths = torch.tensor([len(word) for word in words], device=states.device)
    owners = torch.repeat_interleave(torch.arange(len(words), device=states.device), lengths)
    sums = torch.zeros(len(words), states.shape[1], device=states.device)
    sums.index_add_(0, owners, states.index_select(0, positions).float())
    return sums / lengths[:, None]


# -- disk -------------------------------------------------------------------------------------------------------------


def _cached(
    model: UnifiedLM, sentences: Sequence[Sentence], alignments: Sequence[Alignment], settings: FeatureSettings, key: str
) -> dict[Alignment, np.ndarray]:
    """Read a chunk's files, after computing those that are not there in one forward.

    Raises:
        DataError: the disk refused.
    """
    folder = cache_dir("words")
    paths = {alignment: folder / f"{_digest(model, sentences, alignment, settings, key)}.npy" for alignment in alignments}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        missing = [alignment for alignment, path in paths.items() if not path.exists()]
        if missing:
            with FileLock(paths[missing[0]].with_suffix(".lock")):
                missing = [alignment for alignment in missing if not paths[alignment].exists()]
                for alignment, vectors in (_compute(model, sentences, missing, settings) if missing else {}).items():
                    write_array(paths[alignment], vectors)
        return {alignment: np.load(path, mmap_mode="r") for alignment, path in paths.items()}
    except OSError as error:
        raise DataError(f"cannot use the cache of word vectors, {folder}: {error}. Set UNIFIED_LM_CACHE.") from error


def _digest(model: UnifiedLM, sentences: Sequence[Sentence], alignment: Alignment, settings: FeatureSettings, key: str) -> str:
    digest = blake2b(digest_size=16)
    encoder = model.prompt_encoder
    with model.borrow_backbone() as backbone:
        kind = f"{next(backbone.parameters()).dtype}:{model.device.type}"
    described = (_VERSION, key, kind, encoder.fingerprint, start_ids(encoder), alignment.value)
    digest.update(repr((*described, settings.attention, settings.subtoken.value, settings.max_tokens)).encode())
    for sentence in sentences:
        digest.update(repr((sentence.words, sorted(sentence.breaks))).encode())
    return digest.hexdigest()
