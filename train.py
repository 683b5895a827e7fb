"""Train a recipe: `torchrun train.py recipe=NAME key=value`, or `python train.py` for one process."""

import os
import sys

from unified_lm.cli.main import run_command


def main(argv: list[str]) -> None:
    """Compose the recipe, train it, export it; the folder of the run is the last line of output."""
    from unified_lm.cli.commands import train

    run_dir = train(argv)
    if os.environ.get("RANK", "0") == "0":
        print(run_dir)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
