"""`python -m kvutils VERB`, the same as `kvutils VERB`: see `kvutils.run.cli`."""

import sys

from kvutils.run.cli import main

if __name__ == "__main__":
    sys.exit(main())
