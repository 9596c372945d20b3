"""Imported first by the programs in train/: one line where a package of their extra is missing."""

import sys

from rope_mm.checks.extras import TRAIN, MissingPackage, require

try:
    require("train", *TRAIN)
except MissingPackage:
    sys.excepthook = lambda kind, error, trace: print(f"error: {error}", file=sys.stderr)
    raise
