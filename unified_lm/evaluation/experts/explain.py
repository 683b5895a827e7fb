"""Experts in the model's own words: a word that means what the expert's tokens mean, put into a question (MONET's paper, 5.3).

The word is no token but a vector: the mean of the input embeddings of the tokens that use the expert most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unified_lm.core.errors import DataError
from unified_lm.inference.unified import UnifiedLM
from unified_lm.models.headless import require_head

QUESTION = "Q: What is the meaning of the word X?\nA: Sure! The meaning of the word X is"
"""What is asked; each X is the vector."""


@torch.no_grad()
def explain_tokens(model: UnifiedLM, tokens: Sequence[int], *, question: str = QUESTION, max_new_tokens: int = 48) -> str:
    """What a model says that some tokens mean, greedily.

    Args:
        model: one that generates.
        tokens: ids of the tokens that use an expert most.
        question: with an X, or several, where the vector goes.
        max_new_tokens: of the answer.

    Raises:
        DataError: no token, or a question without an X.
        ModelError: the model has no language-model head.
    """
    parts = question.split("X")
    if not tokens or len(parts) < 2:
        raise DataError(f"got {len(tokens)} tokens and the question {question!r}: expected at least one, and an X in it.")
    encoder = model.prompt_encoder
    pieces = encoder.running_text(parts, continued=True)
    with model.borrow_backbone() as backbone, backbone.stock_attention() as causal_lm:
        require_head(causal_lm)
        table = causal_lm.get_input_embeddings()
        vector = table(torch.tensor(list(tokens), device=model.device)).mean(0, keepdim=True)
        leading = [torch.tensor(list(encoder.leading_ids), dtype=torch.long, device=model.device)]
        rows = [table(ids) for ids in leading if len(ids)]
        for number, ids in enumerate(pieces):
            rows += [vector] if number else []
            rows += [table(torch.from_numpy(ids).long().to(model.device))] if len(ids) else []
        states = torch.cat(rows)[None]
        answer = causal_lm.generate(  # type: ignore[operator]
            inputs_embeds=states,
            attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=encoder.tokenizer.pad_token_id,
        )
    return str(encoder.tokenizer.decode(answer[0].tolist(), skip_special_tokens=True)).strip()
