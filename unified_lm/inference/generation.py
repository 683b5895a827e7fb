"""What `generate` needs around the model: checked conversations, and settings for transformers' own method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from unified_lm.config.checks import above, at_least
from unified_lm.core.errors import ConfigError, DataError, did_you_mean
from unified_lm.core.typed import half_pair
from unified_lm.data.prompts.encoding import PromptEncoder
from unified_lm.data.prompts.templates import Template
from unified_lm.export.directory import stop_token_ids
from unified_lm.models.headless import require_head
from unified_lm.models.positions import learned_positions

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
        DataError: a message without role or content or with no Unicode text, an unknown role, or an empty conversation.
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
        if half_pair(message["content"]) is not None:
            raise DataError(f"messages[{index}] has half of a surrogate pair, which is no Unicode text.")
        turns.append((message["role"], message["content"]))
    if not turns:
        raise DataError("messages is empty, expected at least one turn.")
    return turns


def generate_text(
    causal_lm: PreTrainedModel,
    encoder: PromptEncoder,
    prompt: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    past: Cache | None = None,
    on_text: Callable[[str], None] | None = None,
    **options: Any,
) -> str:
    """Generate after a prompt, with transformers' own attention.

    Args:
        causal_lm: in its stock state (`Backbone.stock_attention`).
        encoder: its template, whose answers' end stops generation, and its tokenizer.
        prompt: int64 `[T]`, on the CPU.
        max_new_tokens: limit of the answer, in tokens; where positions are learned, also that there are.
        temperature: see `generation_settings`, as `top_p`.
        past: keys and values of the first tokens of the prompt, at most of all but one; they are not read again.
        on_text: called with each piece of the answer as soon as it is there.
        options: further arguments of transformers' `generate`; they override the above.

    Returns:
        The answer, without end tokens and without white space around it.

    Raises:
        ConfigError: a number is out of its range.
        DataError: the prompt takes all the positions that the model has learned.
        ModelError: the model has no language-model head.
    """
    require_head(causal_lm)
    settings = generation_settings(
        encoder.template,
        encoder.tokenizer,
        causal_lm.generation_config,
        max_new_tokens=_within_positions(causal_lm, len(prompt), max_new_tokens),
        temperature=temperature,
        top_p=top_p,
    )
    settings |= {"past_key_values": past} if past is not None else {}
    settings |= {"streamer": _Pieces(encoder.tokenizer, on_text)} if on_text is not None else {}
    ids = prompt[None].to(causal_lm.device)
    generate = cast("Callable[..., torch.Tensor]", causal_lm.generate)
    with torch.inference_mode():
        answer = generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{**settings, **options})
    return str(encoder.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _within_positions(causal_lm: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> int:
    """The limit of an answer that ends with the model's last learned position."""
    limit = learned_positions(causal_lm)
    if limit is None:
        return max_new_tokens
    if prompt_tokens >= limit.tokens:
        raise DataError(f"the prompt has {prompt_tokens} tokens, but {limit.reason}: no room for an answer. Shorten it.")
    return min(max_new_tokens, limit.tokens - prompt_tokens)


class _Pieces(TextStreamer):
    """Hands over text where the base class prints it: whole words, as soon as they are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on a piece."""
        if text:
            self._on_text(text)


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
