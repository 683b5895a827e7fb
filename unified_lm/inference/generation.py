"""What `generate` needs around the model: checked conversations, and settings for transformers' own method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from unified_lm.config.checks import above, at_least
from unified_lm.core.errors import ConfigError, DataError, did_you_mean
from unified_lm.data.prompts.templates import Template
from unified_lm.export.directory import stop_token_ids

Messages = Sequence[Mapping[str, str]]
"""A conversation: `{"role": ..., "content": ...}` per turn; the last turn is the one to answer."""

# None removes the sampling options of a model's own generation config, about which transformers warns when it does not sample.
_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def conversation_turns(messages: str | Messages, template: Template) -> list[tuple[str, str]]:
    """Check a conversation; returns (role, content) per turn.

    Args:
        messages: the conversation, or one user message.
        template: the prompt template, which says what roles there are.

    Raises:
        DataError: a message without role or content, an unknown role, or an empty conversation.
        ConfigError: the template has no turns.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    template.require_chat()
    turns = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f'messages[{index}] is {message!r}, expected {{"role": ..., "content": ...}} with two strings.')
        if message["role"] not in template.turns:
            raise DataError(
                f"messages[{index}]: unknown role '{message['role']}'.{did_you_mean(message['role'], template.turns)}"
            )
        turns.append((message["role"], message["content"]))
    if not turns:
        raise DataError("messages is empty, expected at least one turn.")
    return turns


def generation_settings(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig | None,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> dict[str, Any]:
    """Keyword arguments of transformers' `generate`.

    Args:
        template: the prompt template; its answers' end stops generation.
        tokenizer: of the model.
        config: the model's own generation config, or None.
        max_new_tokens: limit of the answer, in tokens.
        temperature: 0 for greedy decoding; otherwise logits are divided by it and tokens are drawn.
        top_p: draw from the most likely tokens whose probabilities sum to this.

    Raises:
        ConfigError: a number is out of its range.
    """
    problems = [
        *at_least("max_new_tokens", max_new_tokens, 1),
        *at_least("temperature", temperature, 0),
        *above("top_p", top_p, 0),
        *([f"top_p: got {top_p}, expected at most 1."] if top_p > 1 else []),
    ]
    if problems:
        raise ConfigError(problems)
    stops = stop_token_ids(template, tokenizer, config.eos_token_id if config is not None else None)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else _GREEDY
    return {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stops or None,
        # one conversation needs no padding, but `generate` warns without a pad token
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0],
        "use_cache": True,
        **sampling,
    }
