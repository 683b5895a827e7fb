"""Where recipes and configuration groups live, and what there is to choose from."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unified_lm.core.errors import ConfigError, did_you_mean
from unified_lm.core.user_files import user_path

_PACKAGE = Path(__file__).resolve().parents[1]
RESOLVED_NAME = "config.yaml"
"""File name of the resolved configuration in a run's folder."""


def _folder(name: str) -> Path:
    """The folder `_NAME` inside an installed wheel, or `NAME` beside the package in a checkout."""
    installed = _PACKAGE / f"_{name}"
    return installed if installed.is_dir() else _PACKAGE.parent / name


def recipes_dir() -> Path:
    """The folder of the recipes that come with the package."""
    return _folder("recipes")


def configs_dir() -> Path:
    """The folder of the configuration groups that come with the package."""
    return _folder("configs")


FileState = tuple[str, int, int]
"""Path, time of the last change in ns, and bytes of a file: what is read from it is remembered until one of them differs."""


def shipped_state() -> tuple[FileState, ...]:
    """The state of every recipe and group option that comes with the package."""
    return tuple(_state(path) for folder in (configs_dir(), recipes_dir()) for path in sorted(folder.rglob("*.yaml")))


def _state(path: Path) -> FileState:
    found = path.stat()
    return str(path), found.st_mtime_ns, found.st_size


def group_options() -> dict[str, tuple[str, ...]]:
    """The options of every group: {"model": ("llama2_7b", ...), ...}. `specialize` is Hydra's own business, not a choice."""
    groups = sorted(path for path in configs_dir().iterdir() if path.is_dir() and path.name != "specialize")
    return {group.name: tuple(sorted(option.stem for option in group.glob("*.yaml"))) for group in groups}


def list_recipes() -> dict[str, str]:
    """Name and description of every recipe that comes with the package."""
    return {path.stem: str(read_yaml(path).get("description", "")).strip() for path in sorted(recipes_dir().glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: a recipe's name, the path of a YAML file, or the folder of a run (its resolved configuration is taken).

    Raises:
        ConfigError: there is no such recipe or file.
    """
    try:
        return _find(name)
    except OSError as error:  # a name that is too long, or a folder that may not be read
        raise ConfigError(f"recipe '{name[:60]}{'...' if name[60:] else ''}': {error.strerror}.") from error


def _find(name: str) -> Path:
    built_in = recipes_dir() / f"{name}.yaml"
    if "/" not in name and built_in.is_file():
        return built_in
    path = user_path(name)
    if path.is_dir() and (path / RESOLVED_NAME).is_file():
        return (path / RESOLVED_NAME).resolve()
    if path.is_file() and path.suffix in {".yaml", ".yml"}:
        return path.resolve()
    if path.suffix in {".yaml", ".yml"} or "/" in name:
        raise ConfigError(f"recipe '{name}': there is no such file, nor a run folder with a {RESOLVED_NAME} in it.")
    raise ConfigError(f"unknown recipe '{name}'.{did_you_mean(name, list_recipes())}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping; interpolations stay as written.

    Raises:
        ConfigError: not readable, not YAML, or not a mapping; the text names the file and, where known, the line.
    """
    if path.parent == recipes_dir():
        return copy.deepcopy(_read_shipped(_state(path)))
    return _read_yaml(path)


@lru_cache(maxsize=128)
def _read_shipped(state: FileState) -> dict[str, Any]:
    """Listing the recipes reads all of them, and an ablation reads its base for every arm."""
    return _read_yaml(Path(state[0]))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except AssertionError as error:  # what OmegaConf says of a truth value at the top level
        raise ConfigError(f"{path}: expected the keys and values of a recipe or a run at the top level.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{path}: got {value!r} at the top level, expected the keys and values of a recipe or a run.")
    return {str(key): item for key, item in value.items()}
