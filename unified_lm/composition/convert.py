"""Plain nested values <-> the frozen dataclasses, strictly, with every problem collected instead of only the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from unified_lm.composition.locate import read_yaml
from unified_lm.composition.validate import find_problems
from unified_lm.config.parts import PartConfig, find_description
from unified_lm.config.schema import ChainConfig, ObjectiveConfig, RunConfig, StreamConfig
from unified_lm.core.errors import ConfigError, UserError, did_you_mean
from unified_lm.core.typed import FAILED, hints_of, name_of, show, show_briefly, typed_value
from unified_lm.core.user_files import user_path
from unified_lm.data.formats import FORMATS
from unified_lm.objectives import OBJECTIVES

_TABLES: Mapping[type[PartConfig], Mapping[str, type[PartConfig]]] = {StreamConfig: FORMATS, ObjectiveConfig: OBJECTIVES}
"""Per role of a part the table that its names are looked up in."""


def convert(cls: type, value: Mapping[str, Any], *, resolved: bool = False) -> tuple[Any, list[str]]:
    """Build a configuration dataclass from nested plain values.

    Args:
        cls: the dataclass.
        value: nested dicts, lists and scalars.
        resolved: whether the values were saved with a run. Runs of earlier versions saved every setting of every kind of part:
            what belongs to another kind meant nothing then, and is left out.

    Returns:
        The instance and the problems found: unknown keys, wrong types, missing fields, each with its dotted key. A faulty
        value is replaced by its default, so that what depends on the others can still be checked; the instance is None
        where a field without a default is missing or faulty.
    """
    problems: list[str] = []
    made = _dataclass(cls, without_idle(value) if resolved else value, "", problems)
    return (None if made is FAILED else made), problems


def _dataclass(cls: type, value: Any, path: str, problems: list[str]) -> Any:
    if isinstance(value, str) and hasattr(cls, "from_text"):
        return cls.from_text(value)
    if not isinstance(value, Mapping):
        names = ", ".join(field.name for field in dataclasses.fields(cls))
        problems.append(f"{path}: got {show(value)}, expected keys and values ({names}).")
        return FAILED
    if issubclass(cls, PartConfig) and cls in _TABLES:
        described = _describe(cls, value, path, problems)
        if described is None:
            return FAILED
        cls = described
    fields = {field.name: field for field in dataclasses.fields(cls)}
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in fields and not _is_of_another_kind(cls, key, value[key], prefix, problems):
            problems.append(f"unknown key '{prefix}{key}'.{_suggest(str(key), prefix, list(fields))}")
    made: dict[str, Any] = {}
    complete = True
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in value:
            if not has_default:
                problems.append(f"missing key '{prefix}{name}' ({name_of(hints_of(cls)[name])}), which has no default.")
                complete = False
            continue
        item = typed_value(hints_of(cls)[name], value[name], prefix + name, problems, _dataclass, finite=True)
        if item is not FAILED:
            made[name] = item
        elif not has_default:
            complete = False
    return cls(**made) if complete else FAILED


def _describe(base: type[PartConfig], value: Mapping[str, Any], path: str, problems: list[str]) -> type | None:
    """The class of a part that the value of its selector names; None, and a problem, where there is none."""
    name = value.get(base.selector)
    if not isinstance(name, str):
        problems.append(
            f"missing key '{path}.{base.selector}' (text), which has no default."
            if name is None
            else f"{path}.{base.selector}: got {show(name)}, expected text."
        )
        return None
    try:
        return find_description(name, _TABLES[base], base)
    except ConfigError as error:
        problems.extend(f"{path}.{base.selector}: {problem}" for problem in error.problems)
        return None


def _owners(cls: type, key: str) -> list[str]:
    """The kinds of a part's role that have a setting, by name; none where the class is no part."""
    base = next((base for base in _TABLES if issubclass(cls, base)), None)
    table = _TABLES[base] if base is not None else {}
    return [name for name, kind in table.items() if any(field.name == key for field in dataclasses.fields(kind))]


def _is_of_another_kind(cls: type, key: str, value: Any, prefix: str, problems: list[str]) -> bool:
    """Whether a key is a setting of another kind of part, which is a problem of its own."""
    owners = _owners(cls, key)
    if owners:
        role, chosen = cls.role, getattr(cls, cls.selector, cls.__name__)  # type: ignore[attr-defined]
        problems.append(
            f"{prefix}{key}: does not apply to the {role} {chosen}, and is set to {show_briefly(value)}; it belongs to "
            f"{', '.join(owners)}."
        )
    return bool(owners)


def without_idle(values: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration (of a run or a chain) without what belongs to other kinds than its formats and objectives."""
    if isinstance(stages := values.get("stages"), Sequence):
        return {**values, "stages": [without_idle(stage) if isinstance(stage, Mapping) else stage for stage in stages]}
    streams = values.get("streams")
    if not isinstance(streams, Mapping):
        return dict(values)
    kept = {}
    for name, stream in streams.items():
        kept[name] = _of_own_kind(StreamConfig, stream)
        if isinstance(kept[name], dict) and "objective" in kept[name]:
            kept[name]["objective"] = _of_own_kind(ObjectiveConfig, kept[name]["objective"])
    return {**values, "streams": kept}


def _of_own_kind(base: type[PartConfig], values: Any) -> Any:
    cls = _describe(base, values, "", []) if isinstance(values, Mapping) else None
    if cls is None:
        return values  # reported by the conversion
    own = {field.name for field in dataclasses.fields(cls)}
    return {key: value for key, value in values.items() if key in own or not _owners(cls, key)}


def _suggest(key: str, prefix: str, known: list[str]) -> str:
    """ " Did you mean ...?": a key of the same group first, then the same key in another group, then the list of keys."""
    close = did_you_mean(key, known)
    if close.startswith(" Did you mean"):
        return close.replace(f"'{close.split(chr(39))[1]}'", f"'{prefix}{close.split(chr(39))[1]}'")
    elsewhere = [path for path in schema_keys() if path.rpartition(".")[2] == key]
    return f" Did you mean {' or '.join(repr(path) for path in elsewhere)}?" if elsewhere else close


@cache
def schema_keys() -> tuple[str, ...]:
    """Every dotted key of a run; `*` stands for a name of the user's (a stream) or a position in a list."""
    return tuple(_keys_of(RunConfig, ""))


def _keys_of(cls: type, prefix: str) -> Iterator[str]:
    kinds = (cls, *_TABLES[cls].values()) if cls in _TABLES else (cls,)
    for name, kind in {field.name: hints_of(part)[field.name] for part in kinds for field in dataclasses.fields(part)}.items():
        yield prefix + name
        inner, star = kind, ""
        while get_args(inner):
            star += ".*" if get_origin(inner) in (tuple, dict) else ""
            nested = [arg for arg in get_args(inner) if arg not in (type(None), Ellipsis, str)]
            inner = nested[0] if nested else str
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from _keys_of(inner, f"{prefix}{name}{star}.")


def to_plain(config: Any) -> Any:
    """Nested dicts, lists and scalars of a configuration."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    return config


def to_yaml(config: RunConfig | ChainConfig) -> str:
    """The resolved configuration as YAML: every key, in the order of the schema. `from_yaml` reads it back equal."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=120)


def from_yaml(path: str | Path) -> RunConfig | ChainConfig:
    """Read a resolved configuration, as saved with a run.

    Raises:
        ConfigError: not readable, or not (or no longer) a valid configuration; every problem is listed.
    """
    return build_config(read_yaml(Path(path)), resolved=True)


def saved_settings(path: Path) -> dict[str, Any]:
    """The nested settings of a saved run, for reading its results: as they were saved, and nothing is imported for it.

    A key that is younger than the run has its default. Of a part from outside the package nothing but what it saved is known.

    Args:
        path: the resolved configuration.

    Raises:
        ConfigError: not readable, or of a chain.
    """
    values = read_yaml(path)
    if "stages" in values:
        raise ConfigError(f"{path} belongs to a chain; give the folders of its stages.")
    found = _completed(RunConfig, values)
    assert isinstance(found, dict), "a mapping stays one"
    return found


def _completed(kind: Any, value: Any) -> Any:
    """A plain value of an annotated type with the defaults of keys that it lacks, and without those of other kinds of parts."""
    args = get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
        cls: Any = kind
        if issubclass(kind, PartConfig) and kind in _TABLES:
            cls = _TABLES[kind].get(str(value.get(kind.selector)), kind)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        found = {}
        for name, field in fields.items():
            if name in value:
                found[name] = _completed(hints_of(cls)[name], value[name])
            elif field.default is not dataclasses.MISSING:
                found[name] = to_plain(field.default)
            elif field.default_factory is not dataclasses.MISSING:
                found[name] = to_plain(field.default_factory())
        idle = set() if cls is kind else {name for name in value if _owners(cls, name)}
        return found | {name: item for name, item in value.items() if name not in fields and name not in idle}
    if isinstance(value, list) and get_origin(kind) is tuple:
        return [_completed(args[0], item) for item in value]
    if isinstance(value, Mapping) and get_origin(kind) is dict:
        return {key: _completed(args[1], item) for key, item in value.items()}
    of_union = [arg for arg in args if dataclasses.is_dataclass(arg)] if get_origin(kind) not in (dict, tuple) else []
    return _completed(of_union[0], value) if of_union else value


def build_config(
    values: Mapping[str, Any], problems: list[str] | None = None, *, resolved: bool = False
) -> RunConfig | ChainConfig:
    """Convert and cross-check nested values.

    Args:
        values: of a run or a chain.
        problems: earlier findings, to report together with ours.
        resolved: see `convert`.

    Raises:
        ConfigError: anything is wrong; every problem is listed.
    """
    cls = ChainConfig if "stages" in values else RunConfig
    config, found = convert(cls, values, resolved=resolved)
    found = [*(problems or []), *found]
    if isinstance(config, RunConfig):
        config = _at_home(config, found)
    if config is not None:
        found += find_problems(config)
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    assert isinstance(config, (RunConfig, ChainConfig))
    return config


def _at_home(config: RunConfig, problems: list[str]) -> RunConfig:
    """A run whose folders have `~` expanded."""
    copies = config.checkpoint.copy_to
    return dataclasses.replace(
        config,
        run_dir=expanded(config.run_dir, "run_dir", problems),
        resume=expanded(config.resume, "resume", problems),
        checkpoint=dataclasses.replace(
            config.checkpoint, copy_to=None if copies is None else expanded(copies, "checkpoint.copy_to", problems)
        ),
    )


def expanded(text: str, key: str, problems: list[str]) -> str:
    """The text of a path with `~` and `~user` expanded, and otherwise as it is.

    Args:
        text: the value of a key.
        key: its dotted name.
        problems: takes what is wrong.
    """
    try:
        return str(user_path(text)) if text.startswith("~") else text
    except UserError as error:
        problems.append(f"{key}: {error}")
        return text
