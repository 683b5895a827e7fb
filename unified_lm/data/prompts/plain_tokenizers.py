"""Copies of a fast tokenizer that read special tokens as ordinary text."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer


@lru_cache(maxsize=2)
def plain_tokenizers(description: str) -> tuple[Tokenizer, Tokenizer]:
    """Two copies of a tokenizer that read special tokens as ordinary text: for the start of a string and for its continuation.

    They differ if the tokenizer marks only the first word of a string (sentencepiece's Metaspace, "first"). Offsets are exact:
    they include white space. The copies are cached and shared, which is safe because encoding does not change them.

    Args:
        description: the tokenizer as JSON (`backend_tokenizer.to_str()`).
    """
    at_start = json.loads(description)
    _rewrite(at_start, lambda node: node.update(trim_offsets=False) if "trim_offsets" in node else None)
    pre_tokenizer = deepcopy(at_start["pre_tokenizer"])
    _rewrite(pre_tokenizer, lambda node: node.update(prepend_scheme="never") if node.get("prepend_scheme") == "first" else None)
    first = _plain_tokenizer(at_start)
    if pre_tokenizer == at_start["pre_tokenizer"]:
        return first, first
    return first, _plain_tokenizer({**at_start, "pre_tokenizer": pre_tokenizer})


def _plain_tokenizer(description: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _rewrite(node: Any, change: Callable[[dict[str, Any]], None]) -> None:
    """Apply `change` to every component of a tokenizer description, except its vocabulary."""
    if isinstance(node, dict):
        change(node)
        for key, child in node.items():
            if key not in ("vocab", "merges", "added_tokens"):
                _rewrite(child, change)
    elif isinstance(node, list):
        for child in node:
            _rewrite(child, change)
