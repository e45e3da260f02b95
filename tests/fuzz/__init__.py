"""Hostile input by the thousand: valid files, mutated, each to load or to end in one line.

    python -m tests.fuzz images --count 10000 --seed 1

`seeds/` has the valid files; `mutations` changes them, `targets` reads them, `__main__` counts what comes of it.
"""
