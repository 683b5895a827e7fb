"""From `recipe=NAME key=value group=option` to a configuration. The only file that imports Hydra.

Hydra parses the arguments and composes the recipe with its groups. The `key=value` arguments are merged here instead of
by Hydra, so that every unknown key, wrong type and contradiction can be reported at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unified_lm.composition.ablation_plan import KEY as ABLATION
from unified_lm.composition.ablation_plan import read_plan
from unified_lm.composition.convert import build_config, expanded, from_yaml, to_yaml, without_idle
from unified_lm.composition.locate import (
    FileState,
    configs_dir,
    find_recipe,
    group_options,
    read_yaml,
    recipes_dir,
    shipped_state,
)
from unified_lm.composition.overrides import absent_data, apply_override, drop_absent_validation, overlay, spell_out_sources
from unified_lm.composition.rehearsal import rehearse
from unified_lm.composition.validate import find_notices, find_problems
from unified_lm.config.schema import ArmConfig, ChainConfig, RunConfig, SweepConfig
from unified_lm.core.errors import ConfigError, did_you_mean
from unified_lm.core.typed import show_briefly

__all__ = ["compose", "compose_run", "from_yaml", "to_yaml"]

_ALIASES = {"push_to_hub": "export.push_to_hub"}
_TINY_RANDOM = "tiny_random"
_OF_ONE = " What one stage alone has is set as STAGE.KEY=VALUE."


@dataclass(frozen=True)
class _Arguments:
    """Parsed arguments: the group choices, the value overrides in order, and whether a tiny random model was asked for."""

    choices: dict[str, str]
    overrides: tuple[tuple[str, Any, bool], ...]
    """(dotted key, value, whether the key is deleted)."""
    tiny_random: bool

    @property
    def keys(self) -> frozenset[str]:
        """Dotted keys of the value overrides."""
        return frozenset(key for key, _, _ in self.overrides)

    @property
    def chooses_data(self) -> bool:
        """Whether data was named, as a group or by a key of one."""
        return "data" in self.choices or any(key.startswith("data.") for key in self.keys)


def compose(argv: Sequence[str]) -> RunConfig | ChainConfig | SweepConfig:
    """Compose a recipe with arguments.

    Args:
        argv: `recipe=NAME` (or the path of a recipe, of a resolved configuration, or of a run's folder), `key=value` with
            dotted keys in Hydra's grammar (lists as `[a,b]`, `~key` removes), and `group=option`.

    Raises:
        ConfigError: anything is wrong; every problem is listed, names with the closest known one.
    """
    problems: list[str] = []
    recipe, rest = _split_recipe(argv, problems)
    raw = read_yaml(path := find_recipe(recipe))
    if "chain" in raw:
        return _compose_chain(path.stem, raw, rest, problems)
    if ABLATION in raw:
        return _compose_sweep(path.stem, raw, rest, problems)
    arguments = _parse(rest, problems)
    values, notices = _compose_values(path, raw, arguments, problems)
    config = build_config(values, problems)
    assert isinstance(config, RunConfig)
    return replace(config, notices=tuple(dict.fromkeys((*config.notices, *notices, *find_notices(config, arguments.keys)))))


def compose_run(argv: Sequence[str]) -> RunConfig:
    """`compose` for callers that want one run.

    Raises:
        ConfigError: as `compose`, or the recipe is a chain or an ablation.
    """
    path = find_recipe(_split_recipe(argv, [])[0])
    raw = read_yaml(path)  # judged before anything is composed: a chain or an ablation may name itself
    if "chain" in raw:
        names = ", ".join(map(str, raw["chain"])) if isinstance(raw["chain"], list) else raw["chain"]
        raise ConfigError(f"recipe '{path.stem}' is a chain; choose one of its stages: {names}.")
    if ABLATION in raw:
        bases = raw[ABLATION].get("base") if isinstance(raw[ABLATION], dict) else None
        base = next(iter(bases)) if isinstance(bases, dict) and bases else bases
        raise ConfigError(f"recipe '{path.stem}' is an ablation of several runs; choose its base: {base}.")
    config = compose(argv)
    assert isinstance(config, RunConfig), "neither a chain nor an ablation"
    return config


def _split_recipe(argv: Sequence[str], problems: list[str]) -> tuple[str, list[str]]:
    names = [argument.partition("=")[2] for argument in argv if argument.startswith("recipe=")]
    if not names or not names[-1]:
        raise ConfigError("no recipe given: add recipe=NAME (`unified-lm recipes` lists them).")
    if len(names) > 1:
        problems.append(f"recipe: given {len(names)} times ({', '.join(names)}); give it once.")
    return names[-1], [argument for argument in argv if not argument.startswith("recipe=")]


# --- arguments ---------------------------------------------------------------------------------------------------------


def _parse(argv: Sequence[str], problems: list[str]) -> _Arguments:
    parser, options = OverridesParser.create(), group_options()
    choices: dict[str, str] = {}
    overrides: list[tuple[str, Any, bool]] = []
    tiny_random = False
    for argument in argv:
        parsed = _parse_one(parser, argument, problems)
        if parsed is None:
            continue
        key, value = _ALIASES.get(parsed.key_or_group, parsed.key_or_group), _plain(parsed.value())
        if key == "model" and value == _TINY_RANDOM:
            tiny_random = True
        elif key in options and not parsed.is_delete() and not isinstance(value, dict):
            choice = _choose(key, value, options[key], problems)
            if choice is not None:
                choices[key] = choice
        else:
            overrides.append((key, value, parsed.is_delete()))
            tiny_random = tiny_random or (key == "model.tiny_random" and value is True)
    return _Arguments(choices, tuple(overrides), tiny_random)


def _parse_one(parser: OverridesParser, argument: str, problems: list[str]) -> Override | None:
    try:
        parsed = parser.parse_override(argument)
    except HydraException as error:
        hint = "quote values with special characters ('key=\"a, b\"'), write lists as [a,b]"
        problems.append(f"cannot read the argument '{argument}': {str(error).splitlines()[0]} Expected key=value; {hint}.")
        return None
    if parsed.is_sweep_override():
        problems.append(f"argument '{argument}': a run takes one value; write a list as [a,b].")
        return None
    if parsed.key_or_group.split(".")[0] in {"hydra", "recipe"} or parsed.package is not None:
        problems.append(f"argument '{argument}': '{parsed.key_or_group}' cannot be set here.")
        return None
    return parsed


def _plain(value: Any) -> Any:
    """Hydra's parsed value without its quoted strings."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    return value


def _choose(group: str, value: Any, options: Sequence[str], problems: list[str]) -> str | None:
    """The group choice as Hydra wants it, or a problem: "x" for one option, "[x,y]" for several."""
    names = ["none" if name is None else str(name) for name in (value if isinstance(value, list) else [value])]
    known = [*options, *([_TINY_RANDOM] if group == "model" else [])]
    unknown = [name for name in names if name not in options]
    problems.extend(f"unknown {group} '{name}'.{did_you_mean(name, known)}" for name in unknown)
    if unknown or not names:
        return None
    return f"[{','.join(names)}]" if isinstance(value, list) else names[0]


# --- values ------------------------------------------------------------------------------------------------------------


def _compose_values(
    path: Path, raw: dict[str, Any], arguments: _Arguments, problems: list[str]
) -> tuple[dict[str, Any], list[str]]:
    """Compose the recipe, merge the overrides, resolve interpolations. Returns the values of a RunConfig, and notices."""
    notices: list[str] = []
    resolved = "defaults" not in raw
    if resolved:
        problems.extend(
            f"{group}={option}: {path} is a resolved configuration without groups; set its keys instead ({group}.KEY=VALUE)."
            for group, option in arguments.choices.items()
        )
        tree = without_idle(raw)
    else:
        tree = _hydra(path, arguments.choices)
        tree, preferred = _prefer_data(path, raw, tree, arguments)
        notices += preferred
    tree.setdefault("recipe", path.stem)
    if not resolved:
        tree["data"] = overlay(absent_data(), tree.get("data") or {})
    late = [item for item in arguments.overrides if not apply_override(tree, *item, problems)]
    tree = _resolve(tree, path, problems)
    spell_out_sources(tree)
    for item in late:
        apply_override(tree, *item, problems)
    if not resolved:
        tree.pop("data", None)
    drop_absent_validation(tree)
    if arguments.tiny_random and isinstance(tree.get("model"), dict):
        notices += rehearse(tree, arguments.keys, keep_data=arguments.chooses_data)
    if "model.name" in arguments.keys and "model.architecture" not in arguments.keys and isinstance(tree.get("model"), dict):
        tree["model"]["architecture"] = {}
    return tree, notices


def _hydra(path: Path, choices: dict[str, str]) -> dict[str, Any]:
    """Compose a recipe with its groups; interpolations stay as written.

    Arms of an ablation mostly differ in values, which are merged later: one of our recipes is composed with the same groups
    once, as long as no file of the package changes. A user's own recipe may name any file beside it.
    """
    chosen = tuple(choices.items())
    if path.parent != recipes_dir():
        return _hydra_anew(path, chosen)
    return deepcopy(_hydra_shipped(path, chosen, shipped_state()))


@lru_cache(maxsize=64)
def _hydra_shipped(path: Path, choices: tuple[tuple[str, str], ...], _: tuple[FileState, ...]) -> dict[str, Any]:
    return _hydra_anew(path, choices)


def _hydra_anew(path: Path, choices: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    search = ",".join("'" + folder.as_uri().replace("'", "\\'") + "'" for folder in (configs_dir(), recipes_dir()))
    overrides = [f"hydra.searchpath=[{search}]", *(f"{group}={option}" for group, option in choices)]
    try:
        with initialize_config_dir(str(path.parent), version_base="1.3"):
            config = hydra_compose(path.stem, overrides=overrides)
        values = OmegaConf.to_container(config, resolve=False)
    except Exception as error:  # Hydra's own, but for a defaults list of other types whatever its code runs into
        said = "its defaults lead back to themselves; remove one." if isinstance(error, RecursionError) else str(error).strip()
        raise ConfigError(f"recipe {path}: {said or 'its defaults list cannot be read'}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _prefer_data(
    path: Path, raw: dict[str, Any], tree: dict[str, Any], arguments: _Arguments
) -> tuple[dict[str, Any], list[str]]:
    """Compose again with the data that the model's group prefers, unless data were chosen or are the recipe's already."""
    preferred = tree.pop("preferred_data", None)
    own = next((entry["data"] for entry in raw["defaults"] if isinstance(entry, dict) and "data" in entry), None)
    if preferred is None or own is None or arguments.chooses_data or preferred == own:
        return tree, []
    tree = _hydra(path, {**arguments.choices, "data": preferred})
    tree.pop("preferred_data", None)
    own_names = " and ".join(own) if isinstance(own, list) else own
    return tree, [
        f"data={preferred}, which this model prefers, instead of the recipe's {own_names}; choose data=... for others."
    ]


def _resolve(tree: dict[str, Any], path: Path, problems: list[str]) -> dict[str, Any]:
    """The values of a recipe with their interpolations; an error names the file and the key that holds one."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = f", key '{error.full_key}'" if getattr(error, "full_key", None) else ""
        text = str(error).strip().splitlines()[0]
        raise ConfigError([*problems, f"{path}{key}: {text}."]) from error
    except RecursionError as error:
        raise ConfigError([*problems, f"{path}: an interpolation leads back to itself; write its value out."]) from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


# --- chains ------------------------------------------------------------------------------------------------------------


def _compose_chain(name: str, raw: dict[str, Any], argv: Sequence[str], problems: list[str]) -> ChainConfig:
    """Compose every stage: `STAGE.key=value` goes to one stage, `push_to_hub` to the last, anything else to all.

    With a `run_dir` every stage has its folder `run_dir/N-STAGE`.
    """
    names = tuple(raw["chain"]) if _is_names(raw["chain"]) else ()
    if not names:
        problems.append(f"chain {name}: got {show_briefly(raw['chain'])}, expected a list of recipes.")
    problems.extend(f"unknown key '{key}' in the chain {name}." for key in raw if key not in ("chain", "description"))
    run_dir = _run_dir(argv, problems)
    shared = [a for a in argv if not a.startswith("run_dir=") and not any(_is_for(a, stage) for stage in names)]
    uploads = [a for a in shared if a.partition("=")[0] in ("push_to_hub", "export.push_to_hub")]
    stages = []
    for index, stage in enumerate(names):
        own = [argument.replace(f"{stage}.", "", 1) for argument in argv if _is_for(argument, stage)]
        folder = [f'run_dir="{run_dir}/{index + 1}-{stage}"'] if run_dir else []
        rest = shared if index == len(names) - 1 else [a for a in shared if a not in uploads]
        try:
            stages.append(compose_run([f"recipe={stage}", *folder, *rest, *own]))
        except ConfigError as error:
            problems.extend(f"stage {stage}: {text}{_OF_ONE * text.startswith('unknown key')}" for text in error.problems)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    description = str(raw.get("description", "")).strip()
    chain = ChainConfig(recipe=name, description=description, run_dir=run_dir, stages=tuple(stages))
    if found := find_problems(chain):
        raise ConfigError(found)
    return chain


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _run_dir(argv: Sequence[str], problems: list[str]) -> str:
    given = [argument for argument in argv if argument.startswith("run_dir=")]
    parsed = _parse_one(OverridesParser.create(), given[-1], problems) if given else None
    return "" if parsed is None else expanded(str(parsed.value()), "run_dir", problems)


def _is_for(argument: str, stage: str) -> bool:
    return argument.lstrip("~+").startswith(f"{stage}.")


# --- ablations ---------------------------------------------------------------------------------------------------------

_SWEEP_KEYS = ("arms", "seeds", "base", "keep_checkpoints", "run_dir", "seed", "resume")


def _compose_sweep(name: str, raw: dict[str, Any], argv: Sequence[str], problems: list[str]) -> SweepConfig:
    """Compose every arm: `arms`, `seeds`, `base` and `keep_checkpoints` choose, `ARM.key=value` is one arm's, the rest all's.

    Hydra's own multirun is not used: its sweepers belong to `@hydra.main`, not to the compose API, and vary single keys, while
    an arm may need several that belong together.
    """
    plan = read_plan(name, raw, problems)
    own = _sweep_values(argv, problems)
    chosen = plan.choose_arms(own.get("arms"), problems)
    base = plan.choose_base(own.get("base"), problems)
    seeds = plan.choose_seeds(own.get("seeds", own.get("seed")), problems)
    run_dir = expanded(str(own.get("run_dir") or f"runs/{name}"), "run_dir", problems)
    shared = [a for a in argv if _key(a) not in _SWEEP_KEYS and not any(_is_for(a, arm) for arm in plan.arms)]
    arms: list[ArmConfig] = []
    refused: dict[str, list[str]] = {}
    for arm in chosen:
        for_this = [argument.replace(f"{arm}.", "", 1) for argument in argv if _is_for(argument, arm)]
        arguments = [*plan.bases.get(base, ()), *plan.overrides, *plan.arms[arm], *shared, *for_this]
        try:
            run = compose_run([f"recipe={base}", *arguments])
        except ConfigError as error:
            for problem in error.problems:
                refused.setdefault(problem, []).append(arm)
            continue
        if run.export.push_to_hub is not None:
            refused.setdefault("the runs of an ablation are not uploaded; remove push_to_hub.", []).append(arm)
        folders = {seed: f"{run_dir}/{arm}-seed{seed}" for seed in seeds}
        arms += [
            ArmConfig(
                name=arm, changes=(*plan.arms[arm], *for_this), run=replace(run, seed=seed, run_dir=folder, resume="auto")
            )
            for seed, folder in folders.items()
        ]
    problems.extend(f"{_arms_in_words(names, chosen)}: {problem}" for problem, names in refused.items())
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return SweepConfig(
        recipe=name,
        description=str(raw.get("description", "")).strip(),
        base=base,
        run_dir=run_dir,
        keep_checkpoints=own.get("keep_checkpoints") is True,
        arm_names=tuple(plan.arms),
        arms=tuple(arms),
    )


def _arms_in_words(names: Sequence[str], chosen: Sequence[str]) -> str:
    if len(names) == 1:
        return f"arm {names[0]}"
    return "every arm" if len(names) == len(chosen) else f"arms {', '.join(names)}"


def _sweep_values(argv: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """The values of the arguments that are the ablation's own."""
    parser = OverridesParser.create()
    parsed = [_parse_one(parser, argument, problems) for argument in argv if _key(argument) in _SWEEP_KEYS]
    values = {override.key_or_group: _plain(override.value()) for override in parsed if override is not None}
    if values.get("resume", "auto") != "auto":
        problems.append(f"resume: got {show_briefly(values['resume'])}; an ablation always continues its own runs, remove it.")
    if not isinstance(values.get("keep_checkpoints", False), bool):
        problems.append(f"keep_checkpoints: got {show_briefly(values['keep_checkpoints'])}, expected true or false.")
    return values


def _key(argument: str) -> str:
    return argument.lstrip("~+").partition("=")[0]
