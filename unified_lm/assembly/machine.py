"""Settings that the machine decides: `model.dtype=auto` and `parallel.backend=auto`, filled in before anything is built."""

from __future__ import annotations

from dataclasses import replace

from unified_lm.composition.validate import find_problems
from unified_lm.config.schema import RunConfig
from unified_lm.core import distributed
from unified_lm.core.errors import ConfigError
from unified_lm.models.precision import AUTO, auto_dtype


def settle_dtype(config: RunConfig, earlier: RunConfig | None = None) -> tuple[RunConfig, list[str]]:
    """Fill in `model.dtype=auto`. Collective.

    Args:
        config: the run.
        earlier: the settings of the run that it goes on from, whose dtype it keeps on any machine.

    Returns:
        The run, and a notice of what was chosen and why.

    Raises:
        ConfigError: another setting cannot go with what this machine has.
    """
    if config.model.dtype != AUTO:
        return config, []
    if earlier is not None and earlier.model.dtype != AUTO:
        dtype, reason = earlier.model.dtype, "as this run began"
    else:
        # nodes may differ: bfloat16 where all of them have it
        found = distributed.all_gather_objects(auto_dtype(distributed.local_device()))
        dtype, reason = max(found)
    settled = replace(config, model=replace(config.model, dtype=dtype))
    notice = f"model.dtype=auto is {dtype}: {reason}."
    if problems := find_problems(settled):
        raise ConfigError([f"{problem} ({notice})" for problem in problems])
    return settled, [notice]
