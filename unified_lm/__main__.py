"""`python -m unified_lm`: the same as the `unified-lm` command."""

import sys

from unified_lm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
