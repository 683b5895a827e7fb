"""Where the files of a model come from: the Hub, a directory, the embedded wheel, an earlier run, or an adapter's base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unified_lm.config.schema import ModelConfig
from unified_lm.core.errors import ModelError, did_you_mean
from unified_lm.core.user_files import read_json, user_path
from unified_lm.models.adapters import CONFIG_FILE, Adapter, find_adapter
from unified_lm.models.embedded import embedded_directory

MANIFEST = "unified_lm.json"
"""The file of an export that records what stock formats have no field for."""


@dataclass(frozen=True)
class Origin:
    """Where files come from, and what the provenance says about it.

    Attributes:
        source: kind of origin, as in the provenance.
        location: directory or Hub name to load from.
        name: as the user wrote it, for messages.
        revision: Hub revision.
        extra: further entries of the provenance.
    """

    source: str
    location: str
    name: str
    revision: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_hub(self) -> bool:
        """Whether the files come from the Hub."""
        return not Path(self.location).is_dir()


def locate(config: ModelConfig) -> Origin:
    """Where the files of the model that a recipe names come from; not for models whose weights are drawn.

    Raises:
        ModelError: no such source, directory or run.
    """
    if config.init_from is not None:
        return locate_export(config.init_from)
    if config.source == "embedded":
        return Origin("embedded", str(embedded_directory(config.name)), config.name or "smollm2-135m")
    if config.source != "hub":
        raise ModelError(f"unknown model.source '{config.source}'.{did_you_mean(config.source, ('hub', 'embedded'))}")
    if not config.name:
        raise ModelError(
            "model.name is empty: give a Hub name (org/model) or a local directory, or set model.tiny_random=true."
        )
    local = user_path(config.name)
    if local.is_dir():
        return Origin("directory", str(local), config.name)
    if config.name.startswith("runs/"):  # it looks like a Hub name, which would be asked for
        raise ModelError(
            f"there is no directory '{config.name}'; commands of this project write below runs/. Run the one that makes it "
            "first: a training, or `unified-lm upcycle` for a mixture of experts (the recipe and its model file say how)."
        )
    # Hub names are "model" or "org/model"; anything else is a path with a typo.
    if local.exists() or config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise ModelError(f"model.name is '{config.name}', and there is no such directory.")
    return Origin("hub", config.name, config.name, config.revision)


@contextmanager
def of_adapter(origin: Origin, adapter: Adapter | None) -> Iterator[None]:
    """Context whose errors are about the base of an adapter, if there is one, and say so."""
    try:
        yield
    except ModelError as error:
        if adapter is None:
            raise
        where = f"{CONFIG_FILE}: base_model_name_or_path"
        raise ModelError(f"the base of the adapter '{origin.name}' ({where}): {error}") from error


def base_of(adapter: Adapter, origin: Origin, config: ModelConfig) -> Origin:
    """Where the base of an adapter comes from.

    Raises:
        ModelError: there is no such base, or it is an adapter itself.
    """
    folder = user_path(adapter.base)
    with of_adapter(origin, adapter):
        if (folder / MANIFEST).is_file():
            base = locate_export(adapter.base)
        else:
            base = locate(
                replace(
                    config, source="hub", name=adapter.base, revision=adapter.base_revision, init_from=None, tiny_random=False
                )
            )
        nested = find_adapter(base.location, base.revision) is not None
    if nested:
        raise ModelError(
            f"the base of the adapter '{origin.name}' is an adapter itself ({adapter.base}). Merge that one first: start a run "
            "from it, or AutoPeftModelForCausalLM.from_pretrained(BASE).merge_and_unload().save_pretrained(FOLDER)."
        )
    return base


def weights_origin(config: ModelConfig) -> Origin:
    """Where the configuration and most weights of a model come from: of an adapter, its base.

    Raises:
        ModelError: no such source, directory or run, or no base.
    """
    origin = locate(config)
    adapter = find_adapter(origin.location, origin.revision)
    return origin if adapter is None else base_of(adapter, origin, config)


def merged_origin(adapter: Adapter, origin: Origin, base: Origin) -> Origin:
    """What the provenance says of a base with an adapter merged into it: the adapter is one more stage of its history."""
    own = Path(adapter.location) / MANIFEST
    if own.is_file():
        return replace(origin, extra={**locate_export(adapter.location).extra, "location": None})
    earlier: dict[str, Any] = base.extra.get("manifest") or {}
    record = {"r": adapter.r, "alpha": adapter.alpha, "dropout": adapter.dropout, "target_modules": adapter.target_modules}
    manifest = {
        **earlier,
        "base_model": earlier.get("base_model") or adapter.base,
        "base_revision": earlier.get("base_revision") or adapter.base_revision or "",
        "stages": [*earlier.get("stages", ()), {"recipe": f"adapter {origin.name}", "steps": 0, "adapter": record}],
    }
    return replace(origin, extra={"init_from": base.location, "manifest": {**manifest, "weights_hash": ""}, "location": None})


def locate_export(init_from: str) -> Origin:
    """A run's `export` folder, or the export itself, with its manifest."""
    root = user_path(init_from)
    folder = _export_folder(root)
    if not has_export(init_from):
        found = "no such directory" if not root.is_dir() else "neither an export nor a run with an export inside"
        raise ModelError(
            f"model.init_from={init_from}: {found}. Expected the run_dir of a finished run (with export.enabled=true), or its "
            "export folder."
        )
    return Origin("init_from", str(folder), init_from, extra={"init_from": str(folder), "manifest": read_manifest(folder)})


def has_export(init_from: str) -> bool:
    """Whether there is an export, or an adapter, where `model.init_from` points."""
    folder = _export_folder(user_path(init_from))
    return (folder / "config.json").is_file() or (folder / CONFIG_FILE).is_file()


def _export_folder(root: Path) -> Path:
    return root / "export" if (root / "export").is_dir() else root


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an export; None of a folder without one.

    Raises:
        ModelError: it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path, ModelError, fix="Export the run again.")
    if not isinstance(manifest, dict):
        raise ModelError(f"{path} holds {type(manifest).__name__}, expected an object. Export the run again.")
    return manifest
