"""``python -m bicompile`` is the command line."""

import sys

from bicompile.cli import main

if __name__ == "__main__":
    sys.exit(main())
