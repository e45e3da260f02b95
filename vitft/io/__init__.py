"""Input and output: the terminal, atomic files, paths, fonts, hub errors and signals.

Only `console` prints.
"""
