"""A smaller vocabulary of the same tokenizer, for small models that are pretrained.

Byte-pair encoding learns its merges in order, and numbers the tokens that they make in that order too. So the first N tokens
and the merges among them are what training the tokenizer to N tokens would have given. Any text is still encoded, only longer.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from unified_lm.core.errors import ModelError


def cut_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> PreTrainedTokenizerBase:
    """The tokenizer with its first tokens only.

    Args:
        tokenizer: a byte-level BPE whose tokens are numbered in the order of its merges; changed in place.
        size: tokens to keep.

    Returns:
        The tokenizer.

    Raises:
        ModelError: it is another kind of tokenizer, or a special or a single byte's token is beyond them.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    model = state.get("model") or {}
    refusal = f"model.architecture: vocab_size is {size}, the tokenizer has {len(tokenizer)} tokens, and "
    if model.get("type") != "BPE":
        raise ModelError(f"{refusal}only the vocabulary of a BPE tokenizer can be cut. Set vocab_size to {len(tokenizer)}.")
    vocabulary: dict[str, int] = model["vocab"]
    made = ["".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in model["merges"]]
    numbers = [vocabulary[token] for token in made]
    needed = [index for token, index in vocabulary.items() if len(token) == 1] + [
        added["id"] for added in state["added_tokens"]
    ]
    least = max(needed, default=0)
    if numbers != sorted(numbers):
        raise ModelError(f"{refusal}its tokens are not in the order of its merges. Set vocab_size to {len(tokenizer)}.")
    if size <= least:
        raise ModelError(f"{refusal}its bytes and special tokens alone need {least + 1}. Raise vocab_size.")
    model["vocab"] = {token: index for token, index in vocabulary.items() if index < size}
    model["merges"] = [merge for merge, number in zip(model["merges"], numbers, strict=True) if number < size]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return tokenizer
