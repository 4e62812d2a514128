"""The schema's history. `HEAD` is the revision that this version of the code works with.

A revision is never changed once released: a change to `tables.py` comes with a new one.
"""

HEAD = "0005_harness_lines"

UNRELEASED = frozenset({"0001"})
"""Revisions that only versions in development wrote, with ciphertexts that do not open any more."""
