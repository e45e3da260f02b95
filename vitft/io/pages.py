"""What the HTML pages have in common: colors, light and dark, and type. Each has a copy in it, and so needs no file."""

from importlib.resources import files


def shared_style() -> str:
    """The stylesheet that a page puts before its own.

    Its custom properties are `--paper` and `--card` (backgrounds), `--ink` and `--soft` (text), `--line`, `--accent`,
    `--good` and `--bad`. `color-scheme` chooses between light and dark: by default, the reader's system.
    """
    return files("vitft.io").joinpath("pages.css").read_text(encoding="utf-8")
