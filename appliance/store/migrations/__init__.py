"""The schema's history. `HEAD` is the revision that this version of the code works with.

A revision is never changed once released: a change to `tables.py` comes with a new one.
"""

HEAD = "0001"
