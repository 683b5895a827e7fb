"""Corruption for masked next-token prediction (LLM2Vec, arXiv:2404.05961, section 2.1).

A masked token is predicted from the state one position *before* it, so position 0 can never be asked for. Departures from the
reference: random replacements are drawn from ordinary tokens only (it draws special ones too), and every sample asks for at
least one token (it can draw none, and then a whole sequence teaches nothing).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedTokenizerBase

from unified_lm.batch.sample import IGNORE
from unified_lm.core.errors import ConfigError, did_you_mean
from unified_lm.data.formats.running_text_config import MaskingConfig

SCHEMES = ("bert", "all_mask")
_MASKED, _RANDOM = 0.8, 0.1


def mask_token_id(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the ordinary token that serves as the mask. The tokenizer is not changed.

    Args:
        text: the token's text: its vocabulary entry, or what tokenizes to exactly one token, alone or after a space.
        tokenizer: the tokenizer.

    Raises:
        ConfigError: it is not a single token, or a special one.
    """
    vocabulary = tokenizer.get_vocab()
    candidates = [[vocabulary[form]] for form in (text, f"▁{text}", f"Ġ{text}") if form in vocabulary]
    candidates += [tokenizer(form, add_special_tokens=False)["input_ids"] for form in (text, f" {text}")]
    single = [ids[0] for ids in candidates if len(ids) == 1 and ids[0] != tokenizer.unk_token_id]
    if not single:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
        raise ConfigError(
            f"masking.mask_token {text!r} is not a single token of this tokenizer, which reads it as {pieces}. "
            "Choose the text of one ordinary, rare token, such as '_'."
        )
    ordinary = [index for index in single if index not in set(tokenizer.all_special_ids)]
    if not ordinary:
        raise ConfigError(
            f"masking.mask_token {text!r} is a special token of this tokenizer; the mask must be an ordinary one, so that the "
            "tokenizer that is exported stays as it is. Choose another, such as '_'."
        )
    return ordinary[0]


class Corruptor:
    """Chooses the tokens to predict and hides them.

    Args:
        config: share, scheme and mask token.
        tokenizer: gives the mask token and the ordinary vocabulary.
        special_ids: ids that are never chosen and never drawn.

    Raises:
        ConfigError: a probability outside (0, 1], an unknown scheme, or an impossible mask token.
    """

    def __init__(self, config: MaskingConfig, tokenizer: PreTrainedTokenizerBase, special_ids: Iterable[int]) -> None:
        if not 0.0 < config.probability <= 1.0:
            raise ConfigError(f"masking.probability is {config.probability}; expected more than 0 and at most 1")
        if config.scheme not in SCHEMES:
            raise ConfigError(f"unknown masking.scheme '{config.scheme}'.{did_you_mean(config.scheme, SCHEMES)}")
        self.config = config
        self.mask_id = mask_token_id(config.mask_token, tokenizer)
        self.special_ids = np.unique(np.fromiter(special_ids, dtype=np.int64))
        self.ordinary_ids = np.setdiff1d(np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64), self.special_ids)

    def maskable(self, ids: np.ndarray) -> np.ndarray:
        """The positions of `ids` `[T]` that may be predicted, int64: not the first, and no special token."""
        return 1 + np.flatnonzero(~np.isin(ids[1:], self.special_ids))

    def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Hide some tokens.

        Args:
            ids: int `[T]` with at least one maskable position.
            rng: the source of every choice.

        Returns:
            What the model reads, int64 `[T]`, and the labels, int64 `[T]`: the true token at chosen positions, `IGNORE`
            elsewhere.
        """
        read = np.array(ids, dtype=np.int64)
        labels = np.full(len(read), IGNORE, dtype=np.int64)
        positions = self.maskable(read)
        assert len(positions), "nothing to mask; such texts are rejected when they are tokenized"
        chosen = positions[rng.random(len(positions)) < self.config.probability]
        if not len(chosen):
            chosen = rng.choice(positions, size=1)
        labels[chosen] = read[chosen]
        fate = rng.random(len(chosen)) if self.config.scheme == "bert" else np.zeros(len(chosen))
        read[chosen[fate < _MASKED]] = self.mask_id
        replaced = chosen[(fate >= _MASKED) & (fate < _MASKED + _RANDOM)]
        read[replaced] = rng.choice(self.ordinary_ids, size=len(replaced))
        return read, labels
