"""What other libraries call by name: an engine for data on many machines, and sentence-transformers where it must refuse.

With [Ray Data](https://docs.ray.io) a worker per GPU loads the model once, and Ray moves the batches, retries what a lost
worker had, and writes the result; `docs/embedding.md` has the call. Nothing here imports Ray or sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from unified_lm.core.errors import CheckpointError, DataError, did_you_mean
from unified_lm.inference.unified import UnifiedLM


class EmbedBatch:
    """A callable that adds a column of vectors to a batch.

    Args:
        model: a folder or Hub name, which every worker loads for itself.
        column: the one that holds texts.
        into: the one for vectors, float32 `[N, D]`.
        instruction: of all texts, "" for none.
        loading: further arguments of `UnifiedLM.from_pretrained`.

    Raises:
        CheckpointError, ConfigError, ModelError: see `UnifiedLM.from_pretrained`.
    """

    def __init__(
        self, model: str, *, column: str = "text", into: str = "embedding", instruction: str = "", **loading: Any
    ) -> None:
        self.model = UnifiedLM.from_pretrained(model, **loading)
        self.column = column
        self.into = into
        self.instruction = instruction

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same columns and the vectors.

        Args:
            batch: columns of N values each.

        Raises:
            DataError: no such column, one of the vectors' name, or a value that is no text or empty.
        """
        if self.column not in batch:
            raise DataError(
                f"no column '{self.column}' among [{', '.join(batch)}].{did_you_mean(self.column, batch)} "
                "Name the one that holds texts (column=)."
            )
        if self.into in batch:
            raise DataError(f"there is a column '{self.into}' already. Name another one for the vectors (into=).")
        vectors = self.model.encode(list(batch[self.column]), self.instruction)
        return {**batch, self.into: vectors}


class UseUnifiedLM:
    """What stands in modules.json where sentence-transformers would embed otherwise than the export.

    Without that file it would take the mean over all tokens, whatever they attend to, with a warning. So it refuses a module
    that is not its own, and, if it was told to trust the folder, gives the message of `load`.
    """

    @classmethod
    def load(cls, folder: str, *_: Any, **__: Any) -> UseUnifiedLM:
        """Refuse.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            f"{folder} embeds in a way that sentence-transformers does not know (its unified_lm.json says which attention and "
            "method). Use unified_lm.UnifiedLM.from_pretrained."
        )
