"""Find a font that can draw a name: DejaVu Sans, which comes with matplotlib, or an installed font."""

from functools import cache
from pathlib import Path

# Sans-serif fonts with Chinese, Japanese and Korean glyphs on Linux, macOS and Windows.
_INSTALLED = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Source Han Sans", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Droid Sans Fallback", "Hiragino Sans", "PingFang SC", "Heiti TC", "Apple SD Gothic Neo",
    "Yu Gothic", "MS Gothic", "Microsoft YaHei", "SimHei", "Malgun Gothic", "Arial Unicode MS", "Unifont",
)  # fmt: skip


def drawable(name: str, fallback: str) -> tuple[str, str]:
    """The name and the file of a font that has all of its characters; without one, `fallback` and DejaVu Sans.

    One font must have the entire name, because Pillow has no font fallback.
    """
    characters = {ord(character) for character in name + "…"}  # the name may be truncated
    if characters <= _characters(_dejavu()):
        return name, _dejavu()
    fonts = (file for font in _INSTALLED if (file := _file(font)) is not None and characters <= _characters(file))
    file = next(fonts, None)
    return (fallback, _dejavu()) if file is None else (name, file)


@cache
def _dejavu() -> str:
    from matplotlib import get_data_path

    return str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@cache
def _file(font: str) -> str | None:
    """The file of an installed font; None if it is not installed."""
    from matplotlib.font_manager import FontProperties, findfont

    try:
        return str(findfont(FontProperties(family=[font]), fallback_to_default=False))
    except ValueError:
        return None


@cache
def _characters(file: str) -> frozenset[int]:
    """The code points that a font has glyphs for."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(file).get_charmap())
