"""`vitft explain --html`: a self-contained page in a real browser, with mouse, touch and keyboard."""

import json
import re
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import vitft
from vitft.cli.app import app
from vitft.errors import UsageError
from vitft.explain.attention import attention_weights, rollout
from vitft.explain.lens import lens
from vitft.explain.page import write_page
from vitft.explain.trace import Trace, trace_image

MICRO = Path(vitft.__file__).parent / "assets" / "vit-micro"
HOSTILE = "</script><script>document.title='taken'</script><b>&amp;\u202e"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return trace_image(path, MICRO)


@pytest.fixture(scope="module")
def file(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "page.html"
    write_page(replace(trace, labels=tuple(f"{HOSTILE}{label}" for label in trace.labels)), path)
    return path


@pytest.fixture
def visit(browser: Any, file: Path) -> Iterator[Any]:
    """Opens the page at a size. Asserts at the end that there were no console messages and no network requests."""
    contexts, messages = [], []

    def open_page(width: int = 1200, height: int = 900, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or messages.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready=yes]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not messages


def patch(page: Any, row: int, column: int) -> dict[str, float]:
    """The center of a patch (row and column from 1) within the picture."""
    box = page.locator("#picture").bounding_box()
    return {"x": (column - 0.5) / 7 * box["width"], "y": (row - 0.5) / 7 * box["height"]}


def strongest(trace: Trace, layer: int, head: int, token: int) -> str:
    """The page's description of a head; head 0 is the mean of all."""
    heads = attention_weights(trace)[layer - 1]
    row = (heads[head - 1] if head else heads.mean(axis=0))[token]
    best = int(row[1:].argmax())
    percent = f"{100 * row[1 + best]:.{1 if row[1 + best] < 0.1 else 0}f}\u00a0%"
    return f"attends most to the patch in row {best // 7 + 1}, column {best % 7 + 1} ({percent})"


def test_click_a_patch_and_choose_a_head(visit: Any, trace: Trace) -> None:
    page = visit()
    assert page.inner_text("#description").startswith("In layer 4, all heads on average, the class token attends")
    assert strongest(trace, 4, 0, 0) in page.inner_text("#description")
    before = page.evaluate("document.getElementById('picture').toDataURL()")
    page.click("#picture", position=patch(page, 3, 5))
    page.mouse.move(2, 2)
    page.click("#heads button[data-head='2']")
    description = page.inner_text("#description")
    assert description.startswith("In layer 4, head 2, the patch in row 3, column 5 attends")
    assert strongest(trace, 4, 2, 1 + 2 * 7 + 4) in description
    assert page.evaluate("document.getElementById('picture').toDataURL()") != before
    page.select_option("#layer", "0")
    page.select_option("#head", "4")
    assert strongest(trace, 1, 4, 1 + 2 * 7 + 4) in page.inner_text("#description")
    page.click("#class")
    assert "In layer 1, head 4, the class token attends" in page.inner_text("#description")
    page.click("#rollout")
    row, column = np.unravel_index(rollout(trace).argmax(), (7, 7))
    assert f"the patch in row {row + 1}, column {column + 1} contributes most to the class token" in page.inner_text(
        "#description"
    )


def test_choose_a_class_to_see_what_speaks_for_it(visit: Any, trace: Trace) -> None:
    page = visit()
    label = trace.scores[2][0]
    page.select_option("#speaks", "2")
    share = trace.relevance[2] / trace.relevance[2].sum()
    row, column = np.unravel_index(share.argmax(), (7, 7))
    digits = 1 if share.max() < 0.1 else 0
    assert page.inner_text("#description").endswith(
        f"{label}, {100 * share.max():.{digits}f}\u00a0% is in the patch in row {row + 1}, column {column + 1}."
    )
    assert not page.is_visible("#heads")
    page.select_option("#speaks", "")
    assert page.is_visible("#heads")


def test_the_lens_shows_the_answer_after_each_block_and_that_of_the_patch(visit: Any, trace: Trace) -> None:
    page, found = visit(), lens(trace)
    rows = [row.inner_text() for row in page.locator("#depths tr").all()]
    assert len(rows) == 5
    for row, classes in zip(rows, found.pooled, strict=True):
        assert f"{HOSTILE}{trace.labels[classes.argmax()]} " in row
    page.hover("#picture", position=patch(page, 3, 5))
    token = 1 + 2 * 7 + 4
    assert page.inner_text("#lens-token") == "the patch in row 3, column 5"
    for depth in range(5):
        cell = page.locator("#depths tr").nth(depth).locator("td").nth(1).inner_text()
        assert cell.startswith(f"{HOSTILE}{trace.labels[found.best[depth, token]]} ")


def test_hover_over_a_patch(visit: Any) -> None:
    page = visit()
    page.hover("#picture", position=patch(page, 7, 1))
    assert page.inner_text("#description").count("the patch in row 7, column 1 attends") == 1
    page.mouse.move(2, 2)
    assert page.inner_text("#description").count("the class token attends") == 1


def test_keyboard_control(visit: Any) -> None:
    page = visit()
    page.focus("#picture")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowLeft", "[", ".", "."):
        page.keyboard.press(key)  # the first one moves from the class token to the first patch
    assert page.inner_text("#description").startswith("In layer 3, head 2, the patch in row 2, column 1 attends")
    page.keyboard.press("c")
    assert page.inner_text("#description").count("the class token attends") == 1
    page.focus("#next")
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#name") == "embed.projection"


def test_step_through_all_stages(visit: Any, trace: Trace) -> None:
    page, names = visit(), []
    while True:
        names.append(page.inner_text("#name"))
        if page.is_disabled("#next"):
            break
        page.click("#next")
    assert names == list(trace.by_numpy)
    page.click("#groups button:has-text('Block 2')")
    assert page.inner_text("#name") == "block.2.attention.norm"
    page.click("#steps button:has-text('softmax')")
    facts = page.inner_text("#facts")
    assert "1 × 4 × 50 × 50" in facts
    assert "vitft/scratch/tensors.py, softmax" in facts
    assert "exp(s_i)" in page.inner_text("#formula")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_on_a_phone(visit: Any, scheme: str) -> None:
    page = visit(360, 740, color_scheme=scheme, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.get_attribute("html", "data-theme") == scheme
    page.tap("#picture", position=patch(page, 4, 4))
    assert page.inner_text("#description").count("the patch in row 4, column 4 attends") == 1
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert abs(luminance(ink) - luminance(paper)) > 0.7
    sizes = "[...document.querySelectorAll('p, td, th, button, select')].map(e => getComputedStyle(e).fontSize)"
    assert min(float(size.removesuffix("px")) for size in page.evaluate(sizes)) >= 12
    shadow = "one => getComputedStyle(one).backgroundAttachment"
    for parts in page.locator(".flow").all():
        assert parts.evaluate("one => one.scrollWidth > one.clientWidth")
        assert parts.evaluate(shadow) == "local, local, scroll, scroll", "where more is to the left or right"
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") != scheme
    assert abs(luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) - luminance(paper)) > 0.7


def luminance(color: str) -> float:
    red, green, blue = (int(number) / 255 for number in re.findall(r"\d+", color)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_hostile_class_name_is_shown_as_text(visit: Any, trace: Trace) -> None:
    page = visit()
    assert page.title().startswith(HOSTILE)
    assert f"{HOSTILE}{trace.scores[0][0]}" in page.inner_text("#title")
    assert page.inner_text("#bars").count(HOSTILE) == 5
    assert page.locator("#bars b").count() == 0


def test_the_page_contains_the_numbers_of_the_trace(file: Path, trace: Trace) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=|url\(|@import|https?:", text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert [stage["name"] for stage in data["stages"]] == list(trace.by_numpy)
    pictures = {stage["name"]: stage["picture"] for stage in data["stages"]}

    def decoded(name: str) -> Any:
        picture = pictures[name]
        steps = np.frombuffer(b64decode(picture["steps"]), np.int8).reshape(picture["height"], picture["width"])
        return steps, steps * picture["largest"] / 127, picture["largest"] / 127

    _, numbers, step = decoded("norm")
    assert np.abs(numbers - trace.by_numpy["norm"][0]).max() <= 0.51 * step
    steps, numbers, step = decoded("block.3.attention.softmax")
    heads = trace.by_numpy["block.3.attention.softmax"][0]
    assert (steps[:, 50::51] == -128).all()  # the separators between four heads of 50 columns
    assert np.abs(numbers[:, 51:101] - heads[1]).max() <= 0.51 * step
    _, numbers, step = decoded("block.1.mlp.in")
    assert numbers.shape == (50, 256)
    assert np.abs(numbers - trace.by_numpy["block.1.mlp.in"][0]).max() <= 0.51 * step
    norm = next(stage for stage in data["stages"] if stage["name"] == "norm")
    assert norm["norm"] == pytest.approx(np.linalg.norm(trace.by_numpy["norm"].astype(np.float64)))


def test_the_command_writes_the_page_and_says_where(trace: Trace, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["explain", "--image", str(trace.path), "--html", str(tmp_path / "page.html")])
    assert result.exit_code == 0
    assert "open it in a browser" in result.stderr
    assert not result.stdout
    assert (tmp_path / "page.html").stat().st_size > 50_000
    with pytest.raises(UsageError, match="cannot be written"):
        write_page(trace, tmp_path / "no" / "page.html")
    assert "--html needs an image" in CliRunner().invoke(app, ["explain", "--html", "x.html"]).output
