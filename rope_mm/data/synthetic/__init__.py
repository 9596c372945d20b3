"""Data sets made here or carried in the package."""
