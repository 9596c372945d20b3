"""`python -m rope_mm` is the command rope-mm."""

import sys

from rope_mm.cli import main

if __name__ == "__main__":
    sys.exit(main())
