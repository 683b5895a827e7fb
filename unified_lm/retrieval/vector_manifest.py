"""What a folder of vectors says about itself (`embeddings.json`): its settings, and its texts by their hashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unified_lm.core.errors import CheckpointError
from unified_lm.core.typed import require_typed
from unified_lm.core.user_files import read_json

MANIFEST = "embeddings.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the vectors of a folder depend on.

    Attributes:
        model_key: hash of all that a vector depends on beside text, instruction and limit (`UnifiedLM.embedding_key`).
        dtype: of the model's weights in memory.
        dim: dimensions of a vector.
        instruction: of all texts, "" for none.
        max_tokens: limit of a text with its prompt.
        form: dtype of the file, "float32" or "float16".
        shard_rows: texts of a shard.
        token_budget: most tokens of a forward.
    """

    model_key: str
    dtype: str
    dim: int
    instruction: str
    max_tokens: int
    form: str
    shard_rows: int
    token_budget: int


@dataclass(frozen=True, kw_only=True)
class VectorManifest(Settings):
    """The content of the file.

    Attributes:
        rows: texts of the whole folder.
        digests: a hash of each shard's texts.
        truncated: texts that were cut to the limit, and
        tokens: tokens of all texts; both once all vectors are there.
    """

    rows: int
    digests: tuple[str, ...]
    truncated: int = 0
    tokens: int = 0

    @classmethod
    def load(cls, folder: Path) -> VectorManifest:
        """Read the file of a folder.

        Raises:
            CheckpointError: it is damaged, or of another version.
        """
        path, fix = folder / MANIFEST, f"Remove {folder} and embed again."
        said = read_json(path, CheckpointError, fix=fix)
        if isinstance(said, Mapping) and said.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {said.get('format')!r:.60}, and this version reads {FORMAT}. {fix}")
        found = require_typed(cls, said, path, CheckpointError, fix=fix, open_ended=True)
        if found.rows < 1 or found.shard_rows < 1 or -(-found.rows // found.shard_rows) != len(found.digests):
            told = f"{len(found.digests)} hashes for {found.rows} texts in shards of {found.shard_rows}"
            raise CheckpointError(f"{path} is damaged ({told}). {fix}")
        return found
