"""Weights & Biases: the same numbers as metrics.jsonl, in a run that survives restarts. The only file that imports wandb."""

from __future__ import annotations

import netrc
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from unified_lm.config.schema import LoggingConfig
from unified_lm.core.errors import ConfigError, DataError
from unified_lm.core.files import write_json
from unified_lm.core.user_files import read_json, user_path
from unified_lm.core.version import code_version

RUN_FILE = "wandb.json"
"""In the run's folder: the id that a restart continues."""

_SHORTEST_KEY = 40
_HIDDEN = "[hidden]"
_SECRET_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|(?:ghp|gho|ghs|github_pat)_[A-Za-z0-9_]{20,}"  # GitHub
    r"|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b"  # AWS
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password@ of an address
)


def check_wandb(config: LoggingConfig) -> None:
    """Refuse what would fail at the first step, before any weights are loaded.

    Raises:
        ConfigError: wandb is asked for but not installed, or asked to be online without a key.
    """
    if config.wandb == "disabled":
        return
    wandb = _import(config)
    if config.wandb != "online":
        return
    key = _api_key(wandb.setup().settings)
    advice = (
        "Run `wandb login`, or set WANDB_API_KEY; or use logging.wandb=offline (upload later with `wandb sync`) or "
        "logging.wandb=disabled. metrics.jsonl is always written."
    )
    if key is None:
        raise ConfigError(f"logging.wandb=online needs an API key, and there is none. {advice}")
    if len(key) < _SHORTEST_KEY:
        raise ConfigError(f"the wandb API key has {len(key)} characters; keys have {_SHORTEST_KEY} or more. {advice}")


class WandbRun:
    """One run at Weights & Biases, started at once; a run folder that had one continues it.

    The x axis is our own `step`, not wandb's counter: steps that are taken again after a restart would otherwise be dropped.

    Args:
        config: mode, project and names; the mode is not "disabled".
        run_dir: folder of the run; wandb's files and the id go there.
        settings: the resolved configuration; what looks like a secret is hidden.
        facts: further entries of wandb's config: peak of the device, number of ranks...

    Raises:
        ConfigError: wandb could not start (no network, a wrong key, no permission).
    """

    def __init__(
        self, config: LoggingConfig, run_dir: Path, settings: Mapping[str, Any], facts: Mapping[str, Any] | None = None
    ) -> None:
        wandb = _import(config)
        try:
            self._run = wandb.init(
                id=_run_id(run_dir),
                resume="allow",
                project=config.wandb_project,
                entity=config.wandb_entity,
                group=config.wandb_group,
                name=config.wandb_name or run_dir.name,
                tags=list(config.wandb_tags),
                dir=str(run_dir),
                mode=config.wandb,
                config={**hide_secrets(dict(settings)), "code_version": code_version(), **(facts or {})},
                # Neither the console (a progress bar, a thousand times) nor the user's code or git difference is uploaded.
                settings=wandb.Settings(console="off", disable_git=True, disable_code=True, save_code=False),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"wandb could not start: {error}. Check the key, logging.wandb_entity and the network, or use "
                "logging.wandb=offline (upload later with `wandb sync`)."
            ) from error
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add numbers to the history, at optimizer step `step`."""
        self._run.log({"step": step, **values})

    def finish(self, *, failed: bool) -> None:
        """Close the run, marked as failed or finished."""
        self._run.finish(exit_code=1 if failed else 0)


def hide_secrets(value: Any) -> Any:
    """The same value with everything that looks like a password or an access token replaced, in every string of it."""
    if isinstance(value, str):
        for name in _SECRET_VARIABLES:
            secret = os.environ.get(name)
            value = value.replace(secret, _HIDDEN) if secret else value
        return _SECRET.sub(_HIDDEN, value)
    if isinstance(value, Mapping):
        return {key: hide_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_secrets(item) for item in value]
    return value


def _import(config: LoggingConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"logging.wandb={config.wandb} needs wandb. Install it with `pip install 'unified_lm[wandb]'`, "
            "or use logging.wandb=disabled (metrics.jsonl is always written)."
        ) from error
    return wandb


def _api_key(settings: Any) -> str | None:
    """The key that `wandb.init` would find without asking: environment, settings, netrc. An identity token counts too."""
    token = os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    if token and Path(token).is_file():
        return Path(token).read_text(encoding="utf-8")
    key = os.environ.get("WANDB_API_KEY") or settings.api_key
    if key:
        return str(key)
    path = user_path(os.environ.get("NETRC") or "~/.netrc")
    try:
        known = netrc.netrc(str(path))
    except (OSError, netrc.NetrcParseError):
        return None
    entry = known.authenticators(urlsplit(settings.base_url).netloc) or known.authenticators("api.wandb.ai")
    return entry[2] if entry else None


_NEW_ID = "Remove it: the run then gets a new one at wandb."


def _run_id(run_dir: Path) -> str:
    """The id of the run's folder: that of an earlier start, or a new one."""
    path = run_dir / RUN_FILE
    if path.is_file():
        content = read_json(path, fix=_NEW_ID)
        if not isinstance(content, dict) or not isinstance(content.get("id"), str):
            raise DataError(f"{path} holds no id of a run. {_NEW_ID}")
        return str(content["id"])
    identifier = secrets.token_hex(8)
    write_json(path, {"id": identifier})
    return identifier
