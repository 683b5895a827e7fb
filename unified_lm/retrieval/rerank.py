"""Passages in a better order, by the same weights read as a cross-encoder.

- **pointwise**: one causal forward per passage, packed, asks whether it answers the question; the score is the log-odds of
  "yes" against "no" as the next token (monoT5's way, arXiv:2003.06713, with a decoder).
- **listwise**: the model writes the numbers of all passages, best first (RankGPT, arXiv:2304.09542; GRIT, arXiv:2402.09906,
  section 4.3 reranks its own hits so). What it leaves out keeps its order behind what it names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

from unified_lm.batch import Sample
from unified_lm.core.errors import ConfigError, did_you_mean
from unified_lm.data.prompts.encoding import Encoded
from unified_lm.inference import UnifiedLM
from unified_lm.models.embedding import sample_states
from unified_lm.models.headless import require_head
from unified_lm.retrieval.documents import Document, Passage

METHODS = ("pointwise", "listwise")
_YES, _NO = "yes", "no"
_POINTWISE = "{document}\n\nDoes this text answer the question? Say yes or no.\nQuestion: {question}"
_LISTWISE = "{documents}\n\nQuestion: {question}\nList the numbers of the texts above, the most relevant first, as [2] > [1]."


class Reranker:
    """Reranks what a search found; called with a question and passages.

    Args:
        model: reads and scores.
        method: one of `METHODS`.
        max_tokens: most tokens of a passage that are read.
        token_budget: the most tokens of one forward (pointwise).

    Raises:
        ConfigError: unknown method, or (pointwise) the tokenizer has no single token for "yes" and "no".
    """

    def __init__(self, model: UnifiedLM, method: str = "pointwise", max_tokens: int = 384, token_budget: int = 4096) -> None:
        if method not in METHODS:
            raise ConfigError(f"unknown way to rerank '{method}'.{did_you_mean(method, METHODS)}")
        self.model = model
        self.method = method
        self.max_tokens = max_tokens
        self.token_budget = token_budget
        if method == "pointwise":
            self._words = [self._first_token(word) for word in (_YES, _NO)]
            if self._words[0] == self._words[1]:
                raise ConfigError("the tokenizer writes 'yes' and 'no' with the same first token; rerank listwise.")

    def __call__(self, question: str, passages: Sequence[Passage]) -> list[Passage]:
        """Passages in their new order; pointwise scores are log-odds, listwise ones 1 / rank."""
        if len(passages) < 2:
            return list(passages)
        if self.method == "pointwise":
            scores = self.scores(question, [passage.document.text for passage in passages])
            order = sorted(range(len(passages)), key=lambda index: (-scores[index], index))
            return [Passage(passages[index].document, float(scores[index])) for index in order]
        order = self._listwise(question, [passage.document for passage in passages])
        return [Passage(passages[index].document, 1.0 / rank) for rank, index in enumerate(order, start=1)]

    def scores(self, question: str, documents: Sequence[str]) -> np.ndarray:
        """Log-odds of "yes" against "no" that a document answers a question, float32 `[N]`."""
        encoder = self.model.prompt_encoder
        samples = []
        for document in documents:
            said = _POINTWISE.format_map({"document": self._cut(document), "question": question.strip()})
            samples.append(Sample(input_ids=encoder.generation_prompt([("user", said)]).astype(np.int64), stream="rerank"))
        scores = np.empty(len(samples), dtype=np.float32)
        with self.model.borrow_backbone() as backbone:
            require_head(backbone.causal_lm)
            head = backbone.output_head()
            rows = head.weight[self._words].float()
            bias = 0.0 if head.bias is None else head.bias[self._words].float()
            for index, states in sample_states(backbone, samples, token_budget=self.token_budget, device=self.model.device):
                with torch.no_grad():
                    logits = (rows @ states[-1].float() + bias) * head.scale
                    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
                scores[index] = float(logits[0] - logits[1])
        return scores

    def _listwise(self, question: str, documents: Sequence[Document]) -> list[int]:
        listed = "\n\n".join(f"[{number}] {self._cut(document.text)}" for number, document in enumerate(documents, start=1))
        said = _LISTWISE.format_map({"documents": listed, "question": question.strip()})
        return read_order(self.model.generate(said, max_new_tokens=6 * len(documents)), len(documents))

    def _cut(self, text: str) -> str:
        tokenizer = self.model.prompt_encoder.tokenizer
        offsets = tokenizer(text.strip(), add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        return text.strip() if len(offsets) <= self.max_tokens else text.strip()[: offsets[self.max_tokens - 1][1]]

    def _first_token(self, word: str) -> int:
        """The token that an answer begins with: the same text after the prompt, minus the prompt."""
        encoder = self.model.prompt_encoder
        (answered,) = encoder.chat([(("user", "?"), ("assistant", word))], 1000)
        assert isinstance(answered, Encoded), "a short conversation can be encoded"
        return int(answered.ids[answered.spans[0][0]])


def read_order(answer: str, count: int) -> list[int]:
    """The order that a listwise answer gives, as indices from 0: named ones first, then the others as they were."""
    named = [int(number) - 1 for number in re.findall(r"\[(\d+)\]", answer)]
    valid = list(dict.fromkeys(index for index in named if 0 <= index < count))
    return valid + [index for index in range(count) if index not in valid]
