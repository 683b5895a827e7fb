"""The models that are compared, called arms: what a user writes for one, and the loaded thing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from unified_lm.core.errors import ConfigError, did_you_mean
from unified_lm.export.manifest import ATTENTIONS, FILE_NAME
from unified_lm.inference.loading import model_folder
from unified_lm.inference.unified import UnifiedLM
from unified_lm.mining.embedders import folder_hash
from unified_lm.models.embedded import EMBEDDED_MODELS, embedded_directory

EMBEDDED = "embedded"
"""Stands for the default embedded model; its own name, smollm2-135m, does too."""

_SPEC = re.compile(r"(?:(?P<label>[^=/]+)=)?(?P<location>.+?)(?:@(?P<attention>\w+))?$")


@dataclass(frozen=True, kw_only=True)
class ArmSettings:
    """How models are read, in place of what their exports say; see `UnifiedLM.from_pretrained`.

    Attributes:
        device: None takes the accelerator if there is one.
        dtype: type of the weights in memory.
        template: of models that are no export, and in place of the exports' own where it is given.
        pooling: None takes the export's, "mean" for others.
        attention: None takes the export's, "bidirectional" for others.
    """

    device: str | None = None
    dtype: str | None = "float32"
    template: str | None = None
    pooling: str | None = None
    attention: str | None = None


@dataclass(frozen=True)
class Arm:
    """One model of a comparison, not loaded yet.

    Attributes:
        label: its name in figures.
        folder: where its files lie.
        settings: how it is read.
    """

    label: str
    folder: Path
    settings: ArmSettings

    def load(self) -> UnifiedLM:
        """Load the model. A folder that is no export is embedded with template "plain" unless another one is given.

        Raises:
            CheckpointError, ConfigError, ModelError: see `UnifiedLM.from_pretrained`.
        """
        settings = self.settings
        exported = (self.folder / FILE_NAME).is_file()
        return UnifiedLM.from_pretrained(
            self.folder,
            device=settings.device,
            dtype=settings.dtype,
            template=settings.template or (None if exported else "plain"),
            pooling=settings.pooling,
            attention=settings.attention,
        )

    @property
    def run_dir(self) -> Path | None:
        """The run that exported it, whose report shows the tables that lie beside the export; None for other models."""
        folder = self.folder.resolve()
        return folder.parent if folder.name == "export" and (folder / FILE_NAME).is_file() else None

    def key(self) -> str:
        """Changes whenever a number measured on the arm may: the bytes of its files, and how it is read."""
        settings = replace(self.settings, device=None)
        return blake2b(f"{folder_hash(self.folder)}{settings}".encode(), digest_size=16).hexdigest()


def parse_arms(specs: Sequence[str], settings: ArmSettings) -> list[Arm]:
    """The arms that a user names.

    Args:
        specs: each `[LABEL=]MODEL[@causal|@bidirectional]`, where MODEL is an export, a run that has one, a folder or Hub name
            of a causal language model, or "embedded".
        settings: for all; an arm's own attention wins.

    Raises:
        ConfigError: unknown attention, or two arms of one label.
        CheckpointError: nothing there, or a run without an export.
    """
    arms = []
    for spec in specs:
        if Path(spec).expanduser().is_dir():
            label, location, attention = None, spec, None
        else:
            match = _SPEC.match(spec)
            if match is None:
                raise ConfigError(f"'{spec}' is no model; expected [LABEL=]MODEL[@causal|@bidirectional].")
            label, location, attention = match["label"], match["location"], match["attention"]
        if attention is not None and attention not in ATTENTIONS:
            raise ConfigError(f"'{spec}': unknown attention '{attention}'.{did_you_mean(attention, ATTENTIONS)}")
        folder = _folder(location)
        name = label or f"{_name(location, folder)}{'' if attention is None else f' {attention}'}"
        arms.append(Arm(name, folder, replace(settings, attention=attention or settings.attention)))
    twice = [label for label, count in Counter(arm.label for arm in arms).items() if count > 1]
    if twice:
        raise ConfigError(f"two models are called '{twice[0]}' in the figures; tell them apart: LABEL=MODEL.")
    return arms


def _folder(location: str) -> Path:
    if (location == EMBEDDED or location in EMBEDDED_MODELS) and not Path(location).is_dir():
        return embedded_directory("" if location == EMBEDDED else location)
    return model_folder(location, None)


def _name(location: str, folder: Path) -> str:
    """An export is called after its run."""
    if not Path(location).expanduser().is_dir():
        return location
    resolved = folder.resolve()
    return resolved.parent.name if resolved.name == "export" else resolved.name
