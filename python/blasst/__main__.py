"""`python -m blasst`."""

import sys

from blasst.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
