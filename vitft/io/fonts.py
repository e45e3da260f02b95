"""A font for each name in a picture: DejaVu Sans, which comes with matplotlib, or one that is installed here."""

from functools import cache
from pathlib import Path

# Sans-serif fonts with Chinese, Japanese and Korean letters, as Linux, macOS and Windows have them.
_INSTALLED = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Source Han Sans", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Droid Sans Fallback", "Hiragino Sans", "PingFang SC", "Heiti TC", "Apple SD Gothic Neo",
    "Yu Gothic", "MS Gothic", "Microsoft YaHei", "SimHei", "Malgun Gothic", "Arial Unicode MS", "Unifont",
)  # fmt: skip


def drawable(name: str, otherwise: str) -> tuple[str, str]:
    """The name, or `otherwise` where no font here has all of its letters, and the file of a font that does.

    A whole name has one font, for Pillow knows no second one, and a box in place of a letter tells nothing.
    """
    letters = {ord(letter) for letter in name + "…"}  # it may be cut
    if letters <= _letters(_dejavu()):
        return name, _dejavu()
    fitting = (file for font in _INSTALLED if (file := _file(font)) is not None and letters <= _letters(file))
    file = next(fitting, None)
    return (otherwise, _dejavu()) if file is None else (name, file)


@cache
def _dejavu() -> str:
    from matplotlib import get_data_path

    return str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@cache
def _file(font: str) -> str | None:
    """The file of an installed font."""
    from matplotlib.font_manager import FontProperties, findfont

    try:
        return str(findfont(FontProperties(family=[font]), fallback_to_default=False))
    except ValueError:
        return None


@cache
def _letters(file: str) -> frozenset[int]:
    """The code points that a font draws."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(file).get_charmap())
