"""The prompts that answers are generated after."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unified_lm.retrieval import answering


@contextmanager
def recorded_prompts() -> Iterator[list[answering.Prompt]]:
    """Record every prompt that is made inside."""
    real, prompts = answering.make_prompt, list[answering.Prompt]()

    def keep(*arguments: Any, **named: Any) -> answering.Prompt:
        prompts.append(real(*arguments, **named))
        return prompts[-1]

    answering.make_prompt = keep
    try:
        yield prompts
    finally:
        answering.make_prompt = real
