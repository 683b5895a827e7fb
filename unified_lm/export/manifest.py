"""`unified_lm.json`: what an export is, how it was made, and how to read it.

The stock files beside it (config.json, sentence_bert_config.json, ...) say how to *run* the model. The manifest records what
they have no field for: the history of adapters, the template, the data, the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from unified_lm.config.objectives import EMBEDDING_METHODS
from unified_lm.config.streams import MODES
from unified_lm.core.errors import CheckpointError, did_you_mean
from unified_lm.core.files import write_json
from unified_lm.core.outputs import FolderKind
from unified_lm.core.typed import require_typed, show
from unified_lm.core.user_files import read_json

FILE_NAME = "unified_lm.json"
"""Name of the manifest inside an export."""

MERGED = FolderKind("export", FILE_NAME)
ADAPTER = FolderKind("adapter", FILE_NAME)
FOR_ENGINE = FolderKind("copy of an export for an engine", FILE_NAME)
STANDARDIZED = FolderKind("standardized export", FILE_NAME)
"""The kinds of folders that have a manifest. None replaces another: a copy is soon made again, what was trained is not."""

FORMAT_VERSION = 1
"""Incremented when an older reader would misread a newer manifest."""

ATTENTIONS = ("bidirectional", "bidirectional_keep_first", "causal")
"""Attention with which an export embeds texts."""

_YOUNGER: dict[str, Any] = {"method": "hs", "alpha": 1.0}
"""Fields that earlier versions do not know; at these values they are not written, so that those still read the file."""

_VERSIONED = ("unified_lm", "torch", "transformers", "peft", "sentence-transformers")


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """The low-rank adapter of one stage, since merged into the weights.

    Attributes:
        r: rank.
        alpha: scaling numerator; the update was multiplied by alpha / r.
        target_modules: suffixes of the adapted modules.
        dropout: probability of dropping an element of the adapter's input while training.
        tokens: those whose embedding rows were trained too.
    """

    r: int
    alpha: float
    target_modules: tuple[str, ...]
    dropout: float = 0.0
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One finished stage of training (MNTP, SimCSE, supervised, GRIT...).

    Attributes:
        recipe: name of the recipe.
        steps: optimizer steps taken.
        run_id: name of the run, for finding its logs; "" if unknown.
        adapter: its adapter, or None if every weight was trained.
        settings: the main settings (learning rate, batch sizes, objectives), plain JSON values.
    """

    recipe: str
    steps: int
    run_id: str = ""
    adapter: AdapterRecord | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """One source of training data.

    Attributes:
        stream: name of the stream that read it.
        name: path, Hub name or built-in name.
        fingerprint: hash of its content (of rows that were read along: of names and sizes of files); "" if unknown.
        num_rows: rows in use, or None if unknown.
        license: license of the data; "" if unknown.
    """

    stream: str
    name: str
    fingerprint: str = ""
    num_rows: int | None = None
    license: str = ""


@dataclass(frozen=True, kw_only=True)
class StandardizerRecord:
    """The reference corpus whose statistics standardize an export's vectors.

    Attributes:
        corpus: name of the corpus.
        corpus_hash: hash of its texts, in any order.
        num_texts: number of texts that the statistics were fitted on.
        num_floored: number of dimensions whose standard deviation was raised to the minimum.
        relative_eps: minimum standard deviation, relative to the median one.
        instruction: instruction that the texts were embedded with, "" for none (as documents).
    """

    corpus: str
    corpus_hash: str
    num_texts: int
    num_floored: int
    relative_eps: float
    instruction: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about an export that stock files have no place for.

    Attributes:
        recipe: the recipe of the last stage (or the chain).
        base_model: Hub name or description of the model that training started from.
        family: `model_type` of the model.
        template: name of the prompt template.
        template_fields: the template's own strings, sufficient to rebuild it.
        attention: how texts are embedded, one of `ATTENTIONS`.
        modes: "embed", "generate" or both.
        pooling: "mean", "weighted_mean", "last_token" or "cls".
        normalize: whether vectors are L2-normalized by default.
        embedding_dim: size of an embedding; 0 before the export is written.
        projection_dim: output size of the linear head on the pooled vector, or None.
        standardizer: the reference corpus whose statistics standardize the vectors, or None if they are not standardized.
        method: what a vector is made of, one of `EMBEDDING_METHODS`; "hs" is left out of the file, as earlier versions had it.
        alpha: weight of the routing in method "moee_sum".
        instructions: prompt name -> instruction; "query" is the default for queries, "document" (absent: no instruction) for
            documents.
        max_tokens: limit of an embedded text with its prompt, in tokens.
        dtype: storage type of the weights.
        base_revision: Hub revision of the base model; "" if unknown.
        base_license: license of the base model; "" if unknown.
        stages: training stages, oldest first, those of earlier runs included.
        data: sources of training data.
        metrics: name -> {"before": value, "after": value, ...}.
        versions: library -> its version when the export was written.
        weights_hash: hash of the weight files (`hash_weights`); "" before the export is written.
        format_version: version of this file's format.
    """

    recipe: str
    base_model: str
    family: str
    template: str
    template_fields: Mapping[str, Any]
    attention: str = "bidirectional"
    modes: tuple[str, ...] = MODES
    pooling: str = "mean"
    normalize: bool = True
    embedding_dim: int = 0
    projection_dim: int | None = None
    standardizer: StandardizerRecord | None = None
    method: str = _YOUNGER["method"]
    alpha: float = _YOUNGER["alpha"]
    instructions: Mapping[str, str] = field(default_factory=dict)
    max_tokens: int = 512
    dtype: str = "bfloat16"
    base_revision: str = ""
    base_license: str = ""
    stages: tuple[StageRecord, ...] = ()
    data: tuple[DataRecord, ...] = ()
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    weights_hash: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise CheckpointError(f"unknown embedding attention '{self.attention}'.{did_you_mean(self.attention, ATTENTIONS)}")
        if self.method not in EMBEDDING_METHODS:
            raise CheckpointError(f"unknown embedding method '{self.method}'.{did_you_mean(self.method, EMBEDDING_METHODS)}")
        for mode in self.modes:
            if mode not in MODES:
                raise CheckpointError(f"unknown mode '{mode}'.{did_you_mean(mode, MODES)}")
        if not self.modes:
            raise CheckpointError(f"an export needs at least one mode of {', '.join(MODES)}.")

    @property
    def stock_tools_embed(self) -> bool:
        """Whether stock tools could compute its vectors: they know neither routing nor a first token that sees itself alone."""
        return self.method == "hs" and self.attention != "bidirectional_keep_first"

    @property
    def can_embed(self) -> bool:
        """Whether the export is meant to embed."""
        return "embed" in self.modes

    @property
    def can_generate(self) -> bool:
        """Whether the export is meant to generate."""
        return "generate" in self.modes

    def save(self, directory: Path) -> None:
        """Write `directory/unified_lm.json`."""
        write_json(
            directory / FILE_NAME, {key: value for key, value in asdict(self).items() if _YOUNGER.get(key, self) != value}
        )

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read `directory/unified_lm.json`.

        Raises:
            CheckpointError: missing, not JSON, of a newer format, or with missing or unknown fields.
        """
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{directory} has no {FILE_NAME}: it is not an export of unified_lm. Give the 'export' folder of a run."
            )
        value = read_json(path, CheckpointError, fix="The export is damaged: export the run again.")
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object. Export the run again.")
        found = value.get("format_version")
        if not isinstance(found, int) or isinstance(found, bool):
            raise CheckpointError(f"{path}: format_version is {show(found)}, expected an integer. Export the run again.")
        if found > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {found}, this unified_lm reads up to {FORMAT_VERSION}. Upgrade: pip install -U unified_lm"
            )
        fix = "The file is damaged or of another version: export the run again."
        return require_typed(cls, value, path, CheckpointError, fix=fix)


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that affect an export; those not installed are absent."""
    versions = {}
    for name in _VERSIONED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
