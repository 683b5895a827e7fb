"""The models under comparison, called arms: how a user specifies one, and how it is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from unified_lm.core.errors import ConfigError, did_you_mean
from unified_lm.core.user_files import user_path
from unified_lm.export.manifest import ATTENTIONS, FILE_NAME
from unified_lm.inference.loading import model_folder
from unified_lm.inference.unified import UnifiedLM
from unified_lm.mining.embedders import folder_hash
from unified_lm.models.embedded import EMBEDDED_MODELS, embedded_directory

EMBEDDED = "embedded"
"""Names the default embedded model, as its own name, smollm2-135m, does."""

_SPEC = re.compile(r"(?:(?P<label>[^=/]+)=)?(?P<location>.+?)(?:@(?P<attention>\w+))?$")


@dataclass(frozen=True, kw_only=True)
class ArmSettings:
    """Overrides of what the exports themselves say about loading; see `UnifiedLM.from_pretrained`.

    Attributes:
        device: None selects the accelerator if there is one.
        dtype: type of the weights in memory.
        template: prompt template. None selects the export's own, "plain" for other models.
        pooling: None selects the export's, "mean" for other models.
        attention: None selects the export's, "bidirectional" for other models.
        max_tokens: limit of a text with its prompt. None selects the export's, 512 for other models.
    """

    device: str | None = None
    dtype: str | None = "float32"
    template: str | None = None
    pooling: str | None = None
    attention: str | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Arm:
    """One model of a comparison, not yet loaded.

    Attributes:
        label: its name in figures.
        folder: folder of its files.
        settings: how it is loaded.
    """

    label: str
    folder: Path
    settings: ArmSettings

    def load(self) -> UnifiedLM:
        """Load the model. A folder that is not an export uses the template "plain" unless another one is given.

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
            max_tokens=settings.max_tokens,
            check_weights=True,
        )

    @property
    def run_dir(self) -> Path | None:
        """The run that exported the model, whose report shows tables saved beside the export; None for other models."""
        folder = self.folder.resolve()
        return folder.parent if folder.name == "export" and (folder / FILE_NAME).is_file() else None

    def key(self) -> str:
        """Hash of everything that affects numbers measured on the arm: the bytes of its files, and how it is loaded."""
        settings = replace(self.settings, device=None)  # the device changes numbers by rounding only
        return blake2b(f"{folder_hash(self.folder)}{settings}".encode(), digest_size=16).hexdigest()


def parse_arms(specs: Sequence[str], settings: ArmSettings) -> list[Arm]:
    """Parse the arms that a user names.

    Args:
        specs: each `[LABEL=]MODEL[@ATTENTION]`, where MODEL is an export, a run with an export, a folder or Hub
            name of a causal language model, or "embedded".
        settings: for all arms; an attention in a spec takes precedence.

    Raises:
        ConfigError: unknown attention, or two arms with the same label.
        CheckpointError: no such model, or a run without an export.
    """
    arms = []
    for spec in specs:
        if user_path(spec).is_dir():
            label, location, attention = None, spec, None
        else:
            match = _SPEC.match(spec)
            if match is None:
                raise ConfigError(f"'{spec}' does not name a model; expected [LABEL=]MODEL[@ATTENTION].")
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
    """The default label: the name of the run for an export, of the folder otherwise."""
    if not user_path(location).is_dir():
        return location
    resolved = folder.resolve()
    return resolved.parent.name if resolved.name == "export" else resolved.name
