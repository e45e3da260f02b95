"""`vitft explain --html`: a page that needs no network, in a real browser, with mouse, finger and keys."""

import json
import re
import shutil
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
from vitft.explain.attention import rollout, weights
from vitft.explain.page import write_page
from vitft.explain.trace import Trace, trace

MICRO = Path(vitft.__file__).parent / "assets" / "vit-micro"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
HOSTILE = "</script><script>document.title='taken'</script><b>&amp;\u202e"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return trace(path, MICRO)


@pytest.fixture(scope="module")
def file(found: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "page.html"
    write_page(replace(found, labels=tuple(f"{HOSTILE}{label}" for label in found.labels)), path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, file: Path) -> Iterator[Any]:
    """Opens the page at a size; at the end nothing may have been said on the console or asked of a network."""
    contexts, heard = [], []

    def open_page(width: int = 1200, height: int = 900, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or heard.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready=yes]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not heard


def patch(page: Any, row: int, column: int) -> dict[str, float]:
    """Where the middle of a patch (from 1) is, within the picture."""
    box = page.locator("#picture").bounding_box()
    return {"x": (column - 0.5) / 7 * box["width"], "y": (row - 0.5) / 7 * box["height"]}


def brightest(found: Trace, layer: int, head: int, token: int) -> str:
    """What the page says of a head; of head 0, the mean of all."""
    heads = weights(found)[layer - 1]
    shares = (heads[head - 1] if head else heads.mean(axis=0))[token]
    best = int(shares[1:].argmax())
    digits = 1 if shares[1 + best] < 0.1 else 0
    return f"most at the patch in row {best // 7 + 1}, column {best % 7 + 1} ({100 * shares[1 + best]:.{digits}f} %)"


def test_a_patch_is_clicked_and_a_head_chosen(visit: Any, found: Trace) -> None:
    page = visit()
    assert page.inner_text("#told").startswith("The class token looks, in layer 4 and all heads on average")
    assert brightest(found, 4, 0, 0) in page.inner_text("#told")
    before = page.evaluate("document.getElementById('picture').toDataURL()")
    page.click("#picture", position=patch(page, 3, 5))
    page.mouse.move(2, 2)
    page.click("#heads button[data-head='2']")
    told = page.inner_text("#told")
    assert told.startswith("The patch in row 3, column 5 looks, in layer 4 and head 2")
    assert brightest(found, 4, 2, 1 + 2 * 7 + 4) in told
    assert page.evaluate("document.getElementById('picture').toDataURL()") != before
    page.select_option("#layer", "0")
    page.select_option("#head", "4")
    assert brightest(found, 1, 4, 1 + 2 * 7 + 4) in page.inner_text("#told")
    page.click("#class")
    assert "The class token looks, in layer 1 and head 4" in page.inner_text("#told")
    page.click("#rollout")
    row, column = np.unravel_index(rollout(found).argmax(), (7, 7))
    assert f"from the patch in row {row + 1}, column {column + 1}" in page.inner_text("#told")


def test_a_patch_is_pointed_at_and_left(visit: Any) -> None:
    page = visit()
    page.hover("#picture", position=patch(page, 7, 1))
    assert page.inner_text("#told").startswith("The patch in row 7, column 1 looks")
    page.mouse.move(2, 2)
    assert page.inner_text("#told").startswith("The class token looks")


def test_keys_do_what_the_mouse_does(visit: Any) -> None:
    page = visit()
    page.focus("#picture")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowLeft", "[", ".", "."):
        page.keyboard.press(key)  # the first leads from the class token to the first patch
    assert page.inner_text("#told").startswith("The patch in row 2, column 1 looks, in layer 3 and head 2")
    page.keyboard.press("c")
    assert page.inner_text("#told").startswith("The class token looks")
    page.focus("#next")
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#name") == "embed.projection"


def test_the_stages_are_stepped_through_from_first_to_last(visit: Any, found: Trace) -> None:
    page, seen = visit(), []
    while True:
        seen.append(page.inner_text("#name"))
        if page.is_disabled("#next"):
            break
        page.click("#next")
    assert seen == list(found.by_numpy)
    page.click("#groups button:has-text('Block 2')")
    assert page.inner_text("#name") == "block.2.attention.norm"
    page.click("#steps button:has-text('softmax')")
    facts = page.inner_text("#facts")
    assert "1 × 4 × 50 × 50" in facts
    assert "vitft/scratch/tensors.py, softmax" in facts
    assert "exp(s_i)" in page.inner_text("#formula")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone(visit: Any, scheme: str) -> None:
    page = visit(360, 740, color_scheme=scheme, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.get_attribute("html", "data-theme") == scheme
    page.tap("#picture", position=patch(page, 4, 4))
    assert page.inner_text("#told").startswith("The patch in row 4, column 4 looks")
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert abs(luminance(ink) - luminance(paper)) > 0.7
    sizes = "[...document.querySelectorAll('p, td, th, button, select')].map(e => getComputedStyle(e).fontSize)"
    assert min(float(size.removesuffix("px")) for size in page.evaluate(sizes)) >= 12
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") != scheme


def luminance(colour: str) -> float:
    red, green, blue = (int(number) / 255 for number in re.findall(r"\d+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_class_name_is_shown_and_not_obeyed(visit: Any, found: Trace) -> None:
    page = visit()
    assert page.title().startswith(HOSTILE)
    assert f"{HOSTILE}{found.scores[0][0]}" in page.inner_text("#title")
    assert page.inner_text("#bars").count(HOSTILE) == 5
    assert page.locator("#bars b").count() == 0


def test_the_page_has_the_numbers_of_the_trace(file: Path, found: Trace) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=|url\(|@import|https?:", text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert [stage["name"] for stage in data["stages"]] == list(found.by_numpy)
    pictures = {stage["name"]: stage["picture"] for stage in data["stages"]}

    def painted(name: str) -> Any:
        picture = pictures[name]
        steps = np.frombuffer(b64decode(picture["steps"]), np.int8).reshape(picture["height"], picture["width"])
        return steps, steps * picture["largest"] / 127, picture["largest"] / 127

    _, numbers, step = painted("norm")
    assert np.abs(numbers - found.by_numpy["norm"][0]).max() <= 0.51 * step
    steps, numbers, step = painted("block.3.attention.softmax")
    heads = found.by_numpy["block.3.attention.softmax"][0]
    assert (steps[:, 50::51] == -128).all()  # the gaps between four heads of 50 columns
    assert np.abs(numbers[:, 51:101] - heads[1]).max() <= 0.51 * step
    _, numbers, step = painted("block.1.mlp.in")
    assert numbers.shape == (50, 256)
    assert np.abs(numbers - found.by_numpy["block.1.mlp.in"][0]).max() <= 0.51 * step
    norm = next(stage for stage in data["stages"] if stage["name"] == "norm")
    assert norm["norm"] == pytest.approx(np.linalg.norm(found.by_numpy["norm"].astype(np.float64)))


def test_the_command_writes_it_and_says_where(found: Trace, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["explain", "--image", str(found.path), "--html", str(tmp_path / "page.html")])
    assert result.exit_code == 0
    assert "open it in a browser" in result.stderr
    assert not result.stdout
    assert (tmp_path / "page.html").stat().st_size > 50_000
    with pytest.raises(UsageError, match="cannot be written"):
        write_page(found, tmp_path / "no" / "page.html")
    assert "--html shows real numbers" in CliRunner().invoke(app, ["explain", "--html", "x.html"]).output
