"""Train a recipe: `torchrun train.py recipe=NAME key=value`, or `python train.py` for one process.

Training is four public calls, compose, build, fit and export (docs/python-api.md). `unified-lm train` runs the same `main`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from unified_lm.cli.main import run_command
from unified_lm.core.failures import is_main_process


def main(argv: Sequence[str]) -> Path:
    """Run what the arguments ask for; returns the folder of the run (of a chain's last stage, or of a whole ablation)."""
    from unified_lm import build_run, compose, export_run, fit_run, training_session  # here: torch takes seconds to import

    config = compose(argv)  # recipe and arguments: one run, a chain of stages, or an ablation
    with training_session(config) as session:  # the process group, and a watchdog over it
        for job in session.jobs():  # the run; each stage of a chain; each arm of an ablation; nothing in a dry run
            with job:  # an ablation notes an arm's failure and goes on; any other error ends the session
                job.run = build_run(job.config)  # model, data, objectives, backend: whatever can be refused is refused here
                if fit_run(job.run):  # False when a signal stopped it; a checkpoint is then what it leaves
                    export_run(job.run)  # merged, verified with stock tools, written
    return session.run_dir


def program(argv: Sequence[str]) -> None:
    """`main`, with the command's help; the folder of the run is the last line of output, once for all ranks."""
    from unified_lm.cli.commands import show_help_of_train

    show_help_of_train(argv)
    run_dir = main(argv)
    if is_main_process():
        print(run_dir)


if __name__ == "__main__":
    sys.exit(run_command(lambda: program(sys.argv[1:])))
