"""Where the program meets its surroundings: the terminal, files on disk, fonts, the hub's answers, signals.

`console` is the only module of the package that prints.
"""
