"""Errors a user can act on.

Every mistake that a user can make raises a `UserError` whose text says what is wrong, what was found, what was expected and
how to fix it. Commands print that text without a traceback and exit with code 2. `assert` is for our own invariants.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake outside our code: bad input, an impossible request, a missing file. Exit code 2, no traceback."""


class ConfigError(UserError):
    """A recipe, a key or a combination of settings is wrong. Carries every problem found, not only the first."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            text = f"{len(self.problems)} problems in the configuration:\n" + "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(text)


class DataError(UserError):
    """A source cannot be read, or a row violates its format. The text names file, line and field."""


class ModelError(UserError):
    """A model cannot be loaded, or cannot do what was requested (attention family, kernel, LoRA target)."""


class CheckpointError(UserError):
    """A checkpoint or an export is missing, incomplete, of another model, or could not be written."""


class OutputError(UserError):
    """An output would take the place of something that this package did not write, or its place cannot be written to."""


@contextmanager
def about(what: str | Path) -> Iterator[None]:
    """Let a user error inside begin with what it is about ("streams.embedding", one of several runs) if its text does not say.

    Raises:
        UserError: as inside.
    """
    try:
        yield
    except UserError as error:
        begin_with(error, what)
        raise


def begin_with(error: UserError, what: str | Path) -> None:
    """Let the text of an error begin with what it is about, if it does not say."""
    if str(what) not in str(error):
        error.args = (f"{what}: {error}",)


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or the list of known names when none is close.

    Args:
        name: what the user typed.
        known: the valid names. They may be the user's own, and then anything that YAML has as a key or in a list.
    """
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(names)}." if names else ""
