"""Tokens whose embedding rows matter beside adapters: those that are trained, and those that should be."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from unified_lm.config.schema import TEMPLATE_TOKENS, RunConfig
from unified_lm.core.errors import ConfigError, did_you_mean
from unified_lm.data.prompts.templates import get_template, special_tokens, template_tokens
from unified_lm.models.loading import LoadedModel
from unified_lm.models.modes import GatherParameters
from unified_lm.models.token_rows import untrained_tokens


def trained_tokens(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens of `lora.trainable_tokens` with their ids; none without adapters.

    Raises:
        ConfigError: a text that is not one token of the tokenizer, or templates without a special token.
    """
    if config.lora is None or not config.lora.trainable_tokens:
        return {}
    if config.lora.trainable_tokens == TEMPLATE_TOKENS:
        found = _used_tokens(config, tokenizer)
        if not found:
            raise ConfigError(
                "lora.trainable_tokens=template, and the templates of the streams have no special token. "
                "Name tokens, or remove it."
            )
        return found
    wanted = config.lora.trainable_tokens
    return {text: _token_id(text, tokenizer) for text in ((wanted,) if isinstance(wanted, str) else wanted)}


def untrained_notices(
    config: RunConfig, loaded: LoadedModel, trained: dict[str, int], whole: GatherParameters
) -> Iterator[str]:
    """Name the special tokens of the templates whose rows look untrained, where training would leave them so. Collective.

    After adapters are applied and weights frozen.
    """
    if config.lora is None and not config.optim.frozen:
        return
    tokenizer, rows = loaded.tokenizer, loaded.causal_lm.config.get_text_config().vocab_size
    left = {text: index for text, index in _used_tokens(config, tokenizer).items() if index not in trained.values()}
    reserved = {*special_tokens(tokenizer).values(), *range(len(tokenizer), rows)}
    if found := untrained_tokens(loaded.causal_lm, left, reserved, whole):
        fix = (
            "adapters leave it so; lora.trainable_tokens=template trains the template's tokens."
            if config.lora is not None
            else "optim.frozen leaves it so; without the embedding table there (or the output head) it is trained."
        )
        yield (
            f"the embedding of {', '.join(found)} looks as if it had never been trained (next to 0, or equal to another "
            f"reserved token's), and {fix}"
        )


def _used_tokens(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    templates = {stream.template for stream in config.streams.values() if stream.templated}
    return {text: index for name in sorted(templates) for text, index in template_tokens(get_template(name), tokenizer).items()}


def _token_id(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    vocabulary = tokenizer.get_vocab()
    if text in vocabulary:
        return int(vocabulary[text])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ConfigError(
            f"lora.trainable_tokens: {text!r} is not one token of the tokenizer, which reads {len(ids)}."
            f"{did_you_mean(text, special_tokens(tokenizer))}"
        )
    return int(ids[0])
