"""Arms of an ablation that fail: reported at once and again at the end, without ending the other arms."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from unified_lm.assembly.ablation.folder import mark_failed
from unified_lm.config.schema import ArmConfig
from unified_lm.core import distributed
from unified_lm.core.agreement import fail_alike, run_on_rank0
from unified_lm.core.errors import UserError


@dataclass(frozen=True)
class _Alike:
    """Arms that failed for one reason."""

    text: str
    arms: list[ArmConfig] = field(default_factory=list)


class Failures:
    """The arms that failed in one call.

    A user's error that is one of all arms (data that are not there, say) shows itself in the first two alike. Where nothing has
    ever finished, the ablation then ends with it, instead of loading a model for every arm only to fail in the same way. Should
    the other arms be free of it, the same command tries them first (`ablation.folder.Begun.order`).

    Args:
        num_runs: of the ablation.
        any_finished: whether a run of it has finished; kept up to date by the caller.
        console: where failures are reported.
    """

    def __init__(self, num_runs: int, *, any_finished: bool, console: Console) -> None:
        self.num_runs = num_runs
        self.any_finished = any_finished
        self.console = console
        self._alike: dict[str, _Alike] = {}
        """By reason, without the folder of the run."""

    def note(self, arm: ArmConfig, error: Exception) -> None:
        """Tell that an arm has failed, and write it into its folder. Call it from the handler of the error, on every rank.

        Raises:
            Exception: `error` itself, where the ranks cannot go on together.
            UserError: it is one of all arms.
        """
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        mark = partial(mark_failed, arm, text)
        if not fail_alike(error, arm.run.run_dir):
            mark()  # by whichever rank it is; the others end, too
            raise error
        run_on_rank0(mark)
        alike = self._alike.setdefault(text.replace(arm.run.run_dir, "RUN_DIR"), _Alike(text))
        if alike.arms:
            self._say(f"{_name(arm)} failed in the same way as {_name(alike.arms[0])}")
        else:
            self._say(f"{_name(arm)} failed: {text}")
        if not isinstance(error, UserError):
            self._say(traceback.format_exc())
        alike.arms.append(arm)
        self._end_if_common(error, alike)

    def _end_if_common(self, error: Exception, alike: _Alike) -> None:
        first = not self.any_finished and len(self._alike) == 1 and len(alike.arms) < self.num_runs
        if isinstance(error, UserError) and first and len({arm.name for arm in alike.arms}) > 1:
            raise UserError(
                f"{alike.text}\n{' and '.join(map(_name, alike.arms))} failed like this before any run had finished, so no "
                "other was tried. Mend it and give the same command again; it begins with those that were not tried."
            )

    def tell(self) -> None:
        """Print what failed, where the ablation ends for another reason."""
        if self._alike:
            self._say(self._summary())

    def tell_and_raise(self) -> None:
        """Raise what failed, if anything did.

        Raises:
            UserError: names the arms and the reasons.
        """
        if self._alike:
            raise UserError(self._summary())

    def _summary(self) -> str:
        lines = [f"  {', '.join(map(_name, alike.arms))}: {alike.text}" for alike in self._alike.values()]
        num_failed = sum(len(alike.arms) for alike in self._alike.values())
        again = "The same command again runs only what is not finished; ARM.key=value changes a setting of one arm."
        return "\n".join([f"{num_failed} of {self.num_runs} runs of the ablation failed:", *lines, again])

    def _say(self, text: str) -> None:
        if distributed.is_rank0():
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _name(arm: ArmConfig) -> str:
    return Path(arm.run.run_dir).name
