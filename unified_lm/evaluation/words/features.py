"""One vector per word from a frozen model, computed in packs and kept on disk.

Shapes: T tokens of a sentence, W words, D hidden size. A sentence is read without a prompt, after one start token (the one
that the tokenizer adds by itself, else its BOS or EOS token), so that every word has a position before it.
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

from unified_lm.batch import Sample, attention_span
from unified_lm.core.errors import ConfigError, DataError, did_you_mean
from unified_lm.core.files import cache_dir, read_array, write_array
from unified_lm.data.prompts.encoding import PromptEncoder
from unified_lm.data.prompts.plain_tokenizers import plain_tokenizers
from unified_lm.evaluation.words.data import Sentence
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.embedding import sample_states

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

MAX_TOKENS = 512
"""Maximum tokens per context, including the start token (LLM2Vec's limit in testing). Longer sentences are split."""

_VERSION = 1  # increase when a change below alters the vectors, so that old files are not reused
_CHUNK = 256  # sentences per file
_TOKEN_BUDGET = 4096


class NamedChoice(Enum):
    """An enumeration whose members a command line names by their value."""

    @classmethod
    def parse(cls, name: str | Self) -> Self:
        """The member with that value; a member is returned unchanged.

        Raises:
            ConfigError: there is no such member.
        """
        try:
            return cls(name)
        except ValueError:
            names = [member.value for member in cls]
            raise ConfigError(f"unknown {cls.__name__.lower()} '{name}'.{did_you_mean(str(name), names)}") from None


class Alignment(NamedChoice):
    """The position whose state represents a token of a word.

    SAME_TOKEN is the token's own position. NEXT_TOKEN is the position before it, whose state predicts the token: LLM2Vec
    (section 4.1) reads its models there after MNTP, since that objective trains these states.
    """

    SAME_TOKEN = "same_token"
    NEXT_TOKEN = "next_token"


class Subtoken(NamedChoice):
    """How a word of several tokens becomes one vector: the mean of its states (LLM2Vec's `merge_subwords`), or one of them."""

    MEAN = "mean"
    FIRST = "first"
    LAST = "last"


@dataclass(frozen=True)
class Window:
    """A part of a sentence that fits in one context.

    Attributes:
        ids: int64 `[T]`, start token first.
        words: per word, the indices of its tokens in `ids`: at least one, and none of them 0.
    """

    ids: np.ndarray
    words: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class FeatureSettings:
    """Settings that decide a word's vector, besides model and words.

    Attributes:
        attention: "causal", "bidirectional" or "bidirectional_keep_first".
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
    """Compute the vectors of all words, in evaluation mode and without gradients; one forward serves all alignments.

    Args:
        model: its last hidden states are used.
        sentences: their words, in order, are the rows of the result.
        alignments: the alignments to compute.
        settings: see `FeatureSettings`.
        cache_key: hash of the model's content. With it, vectors are stored in the cache folder (float32, 4 D bytes per word),
            and a killed run resumes where it stopped. None stores nothing.
        progress: called after every chunk with the number of its sentences.

    Returns:
        float32 `[W, D]` for each alignment.

    Raises:
        ConfigError: the tokenizer has no token that could serve as start token.
        DataError: a word has no token or too many, or the cache cannot be written.
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

    A token that overlaps two words, which sentencepiece may produce, belongs to both.

    Args:
        encoder: only its tokenizer is used, not its template.
        sentences: what to tokenize.
        max_tokens: a longer sentence is cut between words into several windows, each with a context of its own.

    Raises:
        ConfigError, DataError: see `word_features`.
    """
    texts, spans = zip(*(sentence.text() for sentence in sentences), strict=True)
    # Special tokens spelled out in a sentence must stay text, or their characters would belong to no word.
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
                    f"1 and no more than fit into {max_tokens} (--max-tokens). Fix or remove the sentence."
                )
        result.append(_split(encoding.ids, tokens, start, max_tokens))
    return result


def start_ids(encoder: PromptEncoder) -> list[int]:
    """The tokens before running text whose first token is to be predicted or represented as well.

    Returns:
        The tokens that the tokenizer itself puts first; if there are none, its BOS token, or else its EOS token.

    Raises:
        ConfigError: the tokenizer has none of these.
    """
    tokenizer = encoder.tokenizer
    if encoder.leading_ids:
        return encoder.leading_ids
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise ConfigError("the tokenizer has neither a BOS nor an EOS token, so the first word has no position before it.")


def _tokens_of_words(words: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Per word, the indices of the tokens that overlap it. Words and offsets must be in ascending order."""
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
    """Split into windows of as many whole words as fit. A window spans the tokens from its first word to its last."""
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
    samples = [
        Sample(input_ids=part.ids, stream="words", bidirectional=attention_span(settings.attention, len(part.ids)))
        for part in parts
    ]
    rows: dict[Alignment, list[np.ndarray]] = {alignment: [np.empty(0)] * len(parts) for alignment in alignments}
    with model.borrow_backbone() as backbone:
        for index, states in sample_states(backbone, samples, token_budget=_TOKEN_BUDGET, device=model.device):
            for alignment in alignments:
                rows[alignment][index] = align(states, parts[index].words, alignment, settings.subtoken).cpu().numpy()
    return {alignment: np.concatenate(vectors) for alignment, vectors in rows.items()}


def align(
    states: torch.Tensor, words: Sequence[tuple[int, ...]], alignment: Alignment, subtoken: Subtoken = Subtoken.MEAN
) -> torch.Tensor:
    """Compute the vectors of words from the states of their tokens.

    Args:
        states: `[T, D]`.
        words: per word, the indices of its tokens, all above 0.
        alignment: which position represents a token.
        subtoken: how several tokens are combined. With NEXT_TOKEN the mean is over the positions before each token, so for a
            long word it includes states of the word's own first tokens, as in the reference; FIRST then contains nothing of
            the word itself under a causal mask.

    Returns:
        float32 `[W, D]`.
    """
    shift = 1 if alignment is Alignment.NEXT_TOKEN else 0
    if subtoken is not Subtoken.MEAN:
        pick = 0 if subtoken is Subtoken.FIRST else -1
        chosen = torch.tensor([word[pick] - shift for word in words], device=states.device)
        return states.index_select(0, chosen).float()
    # Segment sum by index_add_: one kernel for all words, where a loop would launch several per word.
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
    """Read the files of a chunk, after computing missing ones in one forward.

    Raises:
        DataError: the cache cannot be read or written.
    """
    folder = cache_dir("words")
    paths = {alignment: folder / f"{_digest(model, sentences, alignment, settings, key)}.npy" for alignment in alignments}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = {alignment: read_array(path) for alignment, path in paths.items()}
        missing = [alignment for alignment, vectors in found.items() if vectors is None]
        if missing:
            with FileLock(paths[missing[0]].with_suffix(".lock")):
                found |= {alignment: read_array(paths[alignment]) for alignment in missing}
                missing = [alignment for alignment, vectors in found.items() if vectors is None]
                for alignment, vectors in (_compute(model, sentences, missing, settings) if missing else {}).items():
                    write_array(paths[alignment], vectors)
                    found[alignment] = read_array(paths[alignment])
        return {alignment: vectors for alignment, vectors in found.items() if vectors is not None}
    except OSError as error:
        raise DataError(f"cannot use the cache of word vectors, {folder}: {error}. Set UNIFIED_LM_CACHE.") from error


def _digest(model: UnifiedLM, sentences: Sequence[Sentence], alignment: Alignment, settings: FeatureSettings, key: str) -> str:
    digest = blake2b(digest_size=16)
    encoder = model.prompt_encoder
    # Dtype and device are part of the key: the same weights give slightly different vectors in bfloat16 or on a GPU.
    with model.borrow_backbone() as backbone:
        kind = f"{next(backbone.parameters()).dtype}:{model.device.type}"
    described = (_VERSION, key, kind, encoder.fingerprint, start_ids(encoder), alignment.value)
    digest.update(repr((*described, settings.attention, settings.subtoken.value, settings.max_tokens)).encode())
    for sentence in sentences:
        digest.update(repr((sentence.words, sorted(sentence.breaks))).encode())
    return digest.hexdigest()
