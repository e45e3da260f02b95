"""The report of a run: that its numbers are the run's, and that it works in a browser."""

import csv
import json
import re
import shutil
from base64 import b64decode
from collections.abc import Callable, Iterator
from html import unescape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vitft import ModelError, Predictor, TrainConfig, UsageError, resume, train, write_report
from vitft.cli.app import app
from vitft.evaluation.label_noise import noise_of
from vitft.evaluation.loading import load_model
from vitft.evaluation.metrics import score
from vitft.evaluation.results import FILE as RESULTS
from vitft.evaluation.results import predictions_file, read_results, write_results
from vitft.evaluation.split_predictions import Predictions
from vitft.io.console import percent
from vitft.reporting import looks, pictures
from vitft.reporting.report import CROSSED, _confusion
from vitft.training.loop import Result

HOSTILE = ["<img src=x onerror=alert(1)>", "</script><b>", "a\"b'c", "ünï çödé 猫", "x" * 60]


def photos(root: Path, labels: list[str], count: int = 12, splits: tuple[str, ...] = ("train", "test")) -> Path:
    """Noise in folders named by number, and the names of classes in a table, where any text can be a name."""
    rng = np.random.default_rng(0)
    lines = ["file,label,split"]
    for split in splits:
        for number in range(count * len(labels)):
            file = root / f"{split}-{number}.png"
            root.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(file)
            label = labels[number % len(labels)].replace('"', '""')
            lines.append(f'{file.name},"{label}",{split}')
    (root / "data.csv").write_text("\n".join(lines), encoding="utf-8")
    return root / "data.csv"


def trained(data: Path, run: Path, **changes: object) -> Result:
    settings: dict[str, Any] = {
        "dataset": str(data), "model": "vit-micro", "from_scratch": True, "width": 16, "layers": 1, "heads": 2,
        "mlp": 32, "epochs": 2, "val_fraction": 0.2, "device": "cpu", "precision": "fp32", "log_every": 1,
    }  # fmt: skip
    return train(TrainConfig.parse(settings | changes), output=run)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose classes have names that would break a careless page."""
    folder = tmp_path_factory.mktemp("hostile")
    run = trained(photos(folder / "photos", HOSTILE), folder / "run").run
    write_report(run)
    return run


def document(page: str) -> dict[str, Any]:
    """The data that the page's script reads."""
    found: dict[str, Any] = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    return found


def scored(page: str) -> list[dict[str, Any]]:
    """The images of the scored split that a page has."""
    return [image for image in document(page)["images"] if "said" in image]


def test_the_page_has_the_numbers_of_the_results(hostile: Path) -> None:
    page = (hostile / "report.html").read_text()
    results = read_results(hostile)
    test = results.splits["test"]
    assert f"<strong>{100 * test['accuracy']:.2f} %</strong>" in page
    assert f"of {test['count']} test images are right" in page
    assert test["split_hash"] in page
    data = document(page)
    assert data["classes"] == [row["label"] for row in test["per_class"]]
    said = results.predictions("test")
    counts = {(truth, predicted): count for truth, predicted, count in test["confusion"]["cells"]}
    for cell, numbers in data["cells"].items():
        truth, predicted = map(int, cell.split(","))
        assert len(numbers) == min(counts[truth, predicted], pictures.OF_A_CELL)
        for number in numbers:
            image = data["images"][number]
            place = said.ids.index(image["name"])
            assert (image["truth"], image["said"]) == (truth, predicted)
            assert (said.truth[place], said.predicted[place]) == (truth, predicted)
            assert image["sure"] == pytest.approx(said.confidence[place], abs=1e-4)
    assert any(cell.split(",")[0] == cell.split(",")[1] for cell in data["cells"]), "right answers, too"


def table(page: str, section: str) -> list[list[str]]:
    """The texts of the rows of a section's first table, its head among them."""
    rows = page.partition(f'id="{section}"')[2].partition("</table>")[0].split("<tr>")[1:]
    return [[unescape(re.sub("<[^>]*>", "", cell)).strip() for cell in re.split("</t[dh]>", row)[:-1]] for row in rows]


def test_each_class_has_its_images_in_every_split(hostile: Path, tmp_path: Path) -> None:
    head, *rows = table((hostile / "report.html").read_text(), "classes")
    assert head[:4] == ["class", "train", "validation", "test"]
    splits = json.loads((hostile / "splits.json").read_text())
    truth = read_results(hostile).predictions("test").truth
    for number, row in enumerate(rows):
        assert row[0] == sorted(HOSTILE)[number]
        place = splits["labels"].index(row[0])
        kept = [splits["splits"][role]["classes"][place] for role in ("train", "validation")]
        assert list(map(int, row[1:4])) == [*kept, int((truth == number).sum())]
        assert sum(kept) == 12
    assert all(sum(one["classes"]) == one["count"] for one in splits["splits"].values())
    run = tmp_path / "run"  # a model that had its classes before keeps their order, which is not the dataset's
    shutil.copytree(hostile, run)
    for of_class in (splits["labels"], *(one["classes"] for one in splits["splits"].values())):
        of_class.reverse()
    (run / "splits.json").write_text(json.dumps(splits))
    assert table(write_report(run).read_text(), "classes") == [head, *rows]


def test_training_images_of_each_class_are_shown(hostile: Path) -> None:
    data = document((hostile / "report.html").read_text())
    shown = [image for image in data["images"] if "said" not in image]
    lines = (hostile.parent / "photos" / "data.csv").read_text(encoding="utf-8").splitlines()
    classes = {name: label for name, label, _ in csv.reader(lines[1:])}
    assert [image["truth"] for image in shown] == sorted([*range(5)] * 2)
    for image in shown:
        assert image["name"].startswith("train-")
        assert classes[image["name"]] == data["classes"][image["truth"]]


def test_where_the_time_went(hostile: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(hostile, run)
    results = json.loads((run / RESULTS).read_text())
    seconds = {"opening": 30.0, "steps": 150.0, "data_wait": 20.0, "tuning": 0.0, "phase of a later version": 0.2}
    (run / RESULTS).write_text(json.dumps(results | {"seconds": seconds}))
    page = write_report(run).read_text()
    assert "Where 3 min 20 s went" in page
    times = page.partition('class="times"')[2].partition("</table>")[0]
    rows = [[re.sub("<[^>]*>", "", cell) for cell in row.split("</td>")[:3]] for row in times.split("<tr>")[1:]]
    assert re.findall(r"width:([\d.]+)%", times) == ["15.0", "74.9", "10.0", "0.1"]
    assert rows == [
        ["opening and decoding", "30 s", "15.0 %"], ["steps", "2 min 30 s", "74.9 %"],
        ["waiting for data", "20 s", "10.0 %"], ["phase of a later version", "0 s", "0.1 %"],
    ]  # fmt: skip
    del results["seconds"]  # as an earlier version left it
    (run / RESULTS).write_text(json.dumps(results))
    assert 'class="times"' not in write_report(run).read_text()


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", ["a", "b"])
    (tmp_path / "photos" / "train-3.png").unlink()
    (tmp_path / "exclude.txt").write_text("train\ttrain-5.png\n")
    limits = {"max_train_samples": 10, "on_bad_image": "skip", "exclude": str(tmp_path / "exclude.txt")}
    run = trained(data, tmp_path / "run", epochs=1, **limits).run
    page = write_report(run).read_text()
    section = page.partition('id="data-read"')[2].partition("</section>")[0]
    splits = json.loads((run / "splits.json").read_text())
    used = splits["splits"]["train"]["count"] + splits["splits"]["validation"]["count"]
    assert f"{23 - used} of the 23 images of train are in no split" in section, "24 but for the one that is listed"
    assert "1 of 48 images do not exist" in section
    assert "1 image left out: listed in exclude.txt" in section
    assert "images: column &#39;file&#39;" in section
    splits["decisions"] = [f"images: {Path.home()}/photos", "shards: https://me:secret@host/a"]
    (run / "splits.json").write_text(json.dumps(splits))
    told = write_report(run).read_text()
    assert '<li class="soft">images: ~/photos</li>' in told
    assert "shards: " in told
    assert "secret" not in told
    for name in ("decisions", "warnings", "images"):  # as earlier versions left it
        del splits[name]
    for one in splits["splits"].values():
        del one["classes"]
    (run / "splits.json").write_text(json.dumps(splits))
    old = write_report(run).read_text()
    assert table(old, "data-read")[0][:2] == ["train", "10"]
    assert table(old, "classes")[0][:2] == ["class", "test"]


def shown_in(page: str, section: str) -> list[int]:
    """The numbers of the images of a section."""
    numbers: list[int] = json.loads(
        page.partition(f'id="{section}"')[2].partition('data-images="')[2].partition('"')[0]
    )
    return numbers


def test_images_that_could_not_be_read_are_listed(tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", ["a", "b"])
    (tmp_path / "photos" / "train-3.png").write_bytes(b"no image")
    (tmp_path / "photos" / "test-0.png").write_bytes(b"")
    run = trained(data, tmp_path / "run", on_bad_image="skip", epochs=1).run
    page = write_report(run).read_text()
    assert "1 test image could not be read" in page
    assert re.search(r"1 (train|validation) image could not be read", page)
    assert re.search(r"<td>[^<]*train-3\.png</td><td class=\"soft\">[^<]*not an image", page)
    resume(run, {"epochs": 2})
    assert "1 test image could not be read" in write_report(run).read_text()


def test_nothing_is_loaded_from_elsewhere(hostile: Path) -> None:
    page = (hostile / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page) == []
    assert "http" not in re.sub(r"data:image[^\"]*", "", page)


def test_pictures_stay_within_their_size(hostile: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pictures, "BYTES", 20_000)
    page = write_report(hostile, tmp_path / "small.html").read_text()
    urls = [image["src"] for image in document(page)["images"]]
    assert 0 < sum(map(len, urls)) <= 20_000
    assert len(urls) < len(document((hostile / "report.html").read_text())["images"])


def test_images_are_found_again_after_others_were_added(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def noise(name: str) -> Path:
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
        return file

    for number in range(40):
        noise(f"{('train', 'test')[number % 2]}/{'ab'[number // 2 % 2]}/{number:02}.png")
    run = trained(tmp_path / "data", tmp_path / "run", image_size=16, patch_size=8).run
    before = scored(write_report(run).read_text())
    for name in ("a/000.png", "a/new.png", "b/000.png"):
        noise(f"test/{name}")
    assert scored(write_report(run).read_text()) == before
    gone = tmp_path / "data" / before[0]["name"]
    gone.unlink()
    after = scored(write_report(run).read_text())
    assert [image["name"] for image in after] == [
        image["name"] for image in before if image["name"] != before[0]["name"]
    ]


def test_the_surest_mistakes_and_the_least_certain_images_show_where_the_model_looked(hostile: Path) -> None:
    page = (hostile / "report.html").read_text()
    data, said = document(page), read_results(hostile).predictions("test")
    sure = [said.ids[place] for place in said.mistakes()[: pictures.SURE]]
    unsure = [data["images"][number]["name"] for number in shown_in(page, "unsure")]
    with_look = [image for image in data["images"] if "look" in image]
    names = {image["name"] for image in with_look}
    assert len(names) == len(with_look) == looks.LOOKS
    of_each = [sum(name in names for name in some) for some in (sure, unsure)]
    assert min(of_each) >= min(looks.LOOKS // 2, len(unsure)), "in turn"
    assert set(sure[:12]) | set(unsure[:12]) <= names <= set(sure) | set(unsure), "the first ones"
    assert f"({looks.LOOKS} images" in page
    # Bright where the model's own map is high: computed here once more for one image.
    image = with_look[0]
    predictor = Predictor(hostile)
    pixels = predictor.read(hostile.parent / "photos" / image["name"])
    (weights,) = predictor.maps(pixels[None], [image["said"]])
    picture = Image.open(BytesIO(b64decode(image["look"].partition(",")[2]))).convert("L")
    shown = np.asarray(picture.resize((weights.shape[1], weights.shape[0]), Image.Resampling.BOX), float)
    assert np.corrcoef(shown.ravel(), weights.ravel())[0, 1] > 0.9


def test_large_models_show_fewer_of_them(hostile: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(looks, "_COST", looks._COST / 1e9)
    page = write_report(hostile, tmp_path / "page.html").read_text()
    assert not any("look" in image for image in document(page)["images"])
    assert 'id="look"' not in page
    assert "Where the model looked is not shown: the model is so large" in page


def test_some_architectures_show_none_and_say_so(saved: Callable[..., Path], tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", ["ant", "bee", "cat"])
    settings: dict[str, Any] = dict.fromkeys(("width", "layers", "heads", "mlp"))
    run = trained(data, tmp_path / "run", epochs=1, model=str(saved("swin")), from_scratch=False, **settings).run
    page = write_report(run).read_text()
    assert not any("look" in image for image in document(page)["images"])
    assert "Where the model looked is not shown: in this architecture" in page


def test_where_the_model_looked_is_shown_for_as_many_as_there_is_time_for(
    hostile: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = load_model(hostile).model
    patches = (model.config.image_size / model.config.patch_size) ** 2
    monkeypatch.setattr(looks, "_COST", 5.5 * sum(weight.numel() for weight in model.parameters()) * patches)
    page = write_report(hostile, tmp_path / "page.html").read_text()
    assert sum("look" in image for image in document(page)["images"]) == 5


def test_without_the_dataset_the_rest_is_there(hostile: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(hostile, moved)
    data = hostile.parent / "photos"
    data.rename(tmp_path / "elsewhere")
    try:
        page = write_report(moved).read_text()
        assert "No images are shown:" in page
        assert 'class="matrix"' in page
        again = write_report(moved, dataset=str(tmp_path / "elsewhere" / "data.csv")).read_text()
        assert document(again)["images"]
    finally:
        (tmp_path / "elsewhere").rename(data)


def test_a_run_without_results_is_refused_with_the_way_out(hostile: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no run folder"):
        write_report(tmp_path)
    shutil.copytree(hostile, tmp_path / "run")
    (tmp_path / "run" / RESULTS).unlink()
    with pytest.raises(ModelError, match=r"has no results yet; .* vitft train --resume"):
        write_report(tmp_path / "run")
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(hostile, tmp_path / "nowhere" / "report.html")


def test_training_writes_it_and_the_command_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--dataset", "digits", "--model", "vit-micro", "--max-train-samples", "60", "--max-steps", "2"]
    run = CliRunner().invoke
    done = run(app, [*words, "--output", "runs/a"])
    assert done.exit_code == 0, done.output
    assert "report: runs/a/report.html" in done.stderr
    without = run(app, [*words, "--output", "runs/b", "--report", "off"])
    assert without.exit_code == 0
    assert not Path("runs/b/report.html").exists()
    assert run(app, ["report", "runs/b", "--output", "page.html"]).stdout == "page.html\n"
    assert Path("page.html").is_file()
    assert "give a .html file" in run(app, ["report", "runs/b", "--output", "page.txt"]).stderr


def test_a_report_that_fails_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **named: Any) -> Path:
        raise UsageError("the disk is full")

    monkeypatch.setattr("vitft.reporting.report.write_report", fails)
    words = ["train", "--dataset", "digits", "--model", "vit-micro", "--max-train-samples", "60", "--max-steps", "1"]
    done = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "run")])
    assert done.exit_code == 0
    assert "no report: the disk is full" in done.stderr
    assert "test accuracy" in done.stdout


def test_labels_that_are_probably_wrong_are_listed_with_what_they_look_like(
    hostile: Path, opened: Callable[..., Any], tmp_path: Path
) -> None:
    """Labels are drawn as the model says, and every twentieth is replaced by another."""
    rng, count = np.random.default_rng(0), 60
    said = rng.dirichlet(np.full(5, 0.02), count).astype(np.float32)
    said = (said + 1e-4) / (said + 1e-4).sum(axis=1, keepdims=True)
    truth = (said.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
    planted = np.arange(0, count, 20)
    labels = truth.copy()
    labels[planted] = (truth[planted] + rng.integers(1, 5, len(planted))) % 5
    run = with_results(hostile, tmp_path / "run", labels, said)
    file = write_report(run)
    names = read_results(run).predictions("test").ids
    doubted = {image["name"]: image for image in document(file.read_text())["images"] if "wrong" in image}
    assert set(doubted) == {names[place] for place in planted}
    for place in planted:
        image = doubted[names[place]]
        assert (image["truth"], image["likely"]) == (labels[place], truth[place])
        assert image["wrong"] > 0.9
    page = opened(file, 360)
    assert page.locator("#labels li").count() == len(planted)
    first = page.locator("#labels li").first.text_content()
    worst = max(doubted.values(), key=lambda image: image["wrong"])
    assert f"class {worst['truth']}" in first
    assert f"looks like class {worst['likely']}" in first
    rate = noise_of(read_results(run).predictions("test")).rate
    assert f"{percent(rate)} of their labels are wrong" in page.locator("#labels p").first.text_content()
    page.get_by_text("By name").press("Enter")
    rows = page.eval_on_selector_all(
        "#labels details tbody tr", "rows => rows.map(row => [...row.cells].slice(0, 3).map(cell => cell.textContent))"
    )
    by_doubt = sorted(doubted.values(), key=lambda image: -image["wrong"])
    assert rows == [[one["name"], f"class {one['truth']}", f"class {one['likely']}"] for one in by_doubt]


def with_results(hostile: Path, run: Path, truth: np.ndarray, said: np.ndarray) -> Path:
    """A copy of the run with these results, (n,) and (n, classes): what a page says depends on them alone."""
    shutil.copytree(hostile, run)
    count, classes = said.shape
    labels = tuple(f"class {number}" for number in range(classes))
    top = np.argsort(-said, axis=1)[:, : min(5, classes)]
    losses = -np.log(said[np.arange(count), truth] + 1e-9)
    measured = score(truth, top, losses, labels, split="test", split_hash="0123456789abcdef", elapsed_s=1.0)
    write_results(run, "best", 1, {"test": measured}, None, {})
    known = read_results(hostile).predictions("test").ids
    ids = tuple(known[number % len(known)] for number in range(count))
    Predictions("test", "0123456789abcdef", "test", labels, (), ids, np.arange(count), truth, said).write(
        predictions_file(run, "test")
    )
    return run


# -- in a browser -----------------------------------------------------------------------------------


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a file in a window of a width; at the end, the page must have had no error."""
    contexts, errors = [], []

    def open_page(file: Path, width: int = 1440, scheme: str = "light") -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: errors.append("a script of a name ran"))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (360, "dark")])
def test_it_fits_the_window_and_shows_names_as_they_are(
    hostile: Path, opened: Callable[..., Any], width: int, scheme: str
) -> None:
    page = opened(hostile / "report.html", width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    names = page.eval_on_selector_all("#classes tbody td:first-child", "cells => cells.map(cell => cell.textContent)")
    assert names == sorted(HOSTILE)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (light == "rgb(251, 250, 247)") == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_wider_than_a_phone_shows_it_and_scrolls_by_keyboard(
    hostile: Path, opened: Callable[..., Any], tmp_path: Path, scheme: str
) -> None:
    said = np.random.default_rng(0).dirichlet(np.full(15, 0.2), 600).astype(np.float32)
    page = opened(write_report(with_results(hostile, tmp_path / "run", np.arange(600) % 15, said)), 360, scheme)
    for section, label in (("classes", "Scores by class"), ("confusion", "Confusion matrix")):
        region = page.locator(f"#{section}").get_by_role("region", name=label)
        assert region.evaluate("one => one.scrollWidth > one.clientWidth + 50")
        covers = region.evaluate("one => getComputedStyle(one).backgroundAttachment.split(', ')")
        assert covers == ["local", "local", "scroll", "scroll"], "covers move with the table, shadows stay"
        colors = region.evaluate("one => getComputedStyle(one).backgroundImage.match(/rgba?[(][^)]*[)]/g)")
        card, shadow = colors[2], colors[-2]
        assert card == page.locator(f"#{section}").evaluate("one => getComputedStyle(one).backgroundColor")
        assert shadow == ("rgba(0, 0, 0, 0.267)" if scheme == "light" else "rgba(255, 255, 255, 0.333)")
        names = region.locator("tr > :first-child")
        before = names.evaluate_all("cells => cells.map(cell => cell.getBoundingClientRect().x)")
        assert region.get_attribute("tabindex") == "0"  # not every browser has a scroller in the tab order
        region.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("document.activeElement.scrollLeft > 0")
        region.evaluate("one => one.scrollTo(9999, 0)")
        assert names.evaluate_all("cells => cells.map(cell => cell.getBoundingClientRect().x)") == before
        assert names.first.evaluate("""cell => { cell.scrollIntoView({ block: "center" });
            const box = cell.getBoundingClientRect(), places = [...Array(Math.floor(box.width)).keys()];
            return places.every((x) => document.elementFromPoint(box.x + x, box.bottom - 12).closest("th") === cell);
        }"""), "on top"
    row = page.locator(".matrix tr").nth(3).locator("button")
    row.last.focus()
    for _ in range(row.count() - 1):
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("""() => { const one = document.activeElement, box = one.getBoundingClientRect();
            return document.elementFromPoint(box.x + 2, box.y + box.height / 2) === one; }"""), "not under the names"
    assert row.first.evaluate("one => one === document.activeElement")


def test_a_switch_shows_where_the_model_looked(hostile: Path, opened: Callable[..., Any]) -> None:
    page = opened(hostile / "report.html")
    image = scored((hostile / "report.html").read_text())[0]
    first = page.locator("#mistakes img").first
    assert first.get_attribute("src") == image["src"]
    page.get_by_label("Show where the model looked").check()
    assert first.get_attribute("src") == image["look"]
    page.get_by_label("Show where the model looked").press("Space")
    assert first.get_attribute("src") == image["src"]


@pytest.mark.parametrize("width", [360, 1440])
def test_the_matrix_is_walked_and_opened_by_keyboard(hostile: Path, opened: Callable[..., Any], width: int) -> None:
    page = opened(hostile / "report.html", width)
    focused = "document.activeElement.dataset.cell"
    page.locator("#classes th button").last.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.ariaLabel") == "Confusion matrix", "which arrow keys scroll"
    page.keyboard.press("Tab")
    first = page.evaluate(focused)
    assert first == page.locator("[data-cell]").first.get_attribute("data-cell")
    row, column = map(int, first.split(","))
    page.keyboard.press("ArrowDown")
    below = page.evaluate(focused)
    assert below == f"{row + 1},{column}", "every class was taken for one"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == first, "nothing is left of it"
    page.keyboard.press("ArrowDown")
    for key in ("Enter", "Space"):
        page.keyboard.press(key)
        assert page.evaluate("document.querySelector('dialog').open")
        shown = page.locator("dialog li").count()
        count = int(page.locator(f'[data-cell="{below}"]').get_attribute("data-count"))
        assert shown == min(count, pictures.OF_A_CELL)
        assert page.evaluate("document.querySelector('dialog img').naturalWidth") > 0
        page.keyboard.press("Escape")
        assert not page.evaluate("document.querySelector('dialog').open")
        assert page.evaluate(focused) == below, "where it was"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) is None, "one stop for all numbers"


def test_arrow_keys_pass_over_what_never_happened(hostile: Path, opened: Callable[..., Any], tmp_path: Path) -> None:
    """And Tab comes back to the number that it left."""
    truth, predicted = np.array([(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)] * 2).T
    said = np.full((len(truth), 3), 0.1, np.float32)
    said[np.arange(len(truth)), predicted] = 0.8
    page = opened(write_report(with_results(hostile, tmp_path / "run", truth, said)))
    focused = "document.activeElement.dataset.cell"
    assert page.locator(".matrix [tabindex='0']").count() == 1
    page.locator('[data-cell="0,0"]').focus()
    walk = [
        "Right 0,2",
        "Right 0,2",
        "Down 2,2",
        "Down 2,2",
        "Left 2,0",
        "Left 2,0",
        "Up 0,0",
        "Down 2,0",
        "Right 2,2",
        "Up 0,2",
    ]
    for key, cell in map(str.split, walk):
        page.keyboard.press(f"Arrow{key}")
        assert page.evaluate(focused) == cell, key
    page.keyboard.press("Tab")
    assert page.evaluate(focused) is None
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(focused) == "0,2"


def test_the_diagonal_opens_right_answers(hostile: Path, opened: Callable[..., Any]) -> None:
    page = opened(hostile / "report.html")
    cells = page.eval_on_selector_all("[data-cell]", "cells => cells.map(cell => cell.dataset.cell)")
    cell = next(cell for cell in cells if cell.split(",")[0] == cell.split(",")[1])
    page.locator(f'[data-cell="{cell}"]').click()
    label = sorted(HOSTILE)[int(cell.split(",")[0])]
    assert page.locator("dialog h2").text_content() == f"{label}, found"
    for text in page.locator("dialog li").all_text_contents():
        assert text.startswith(label)
        assert f"is {label}" not in text


@pytest.mark.parametrize("width", [360, 1440])
def test_the_table_sorts_by_each_column_both_ways_by_keyboard(
    hostile: Path, opened: Callable[..., Any], width: int
) -> None:
    page = opened(hostile / "report.html", width)
    heads = page.locator("#classes th button")
    names = heads.all_text_contents()
    assert names == ["class", "train", "validation", "test", "precision", "recall", "F1"]
    for column, name in enumerate(names):
        if column == 0:
            heads.first.focus()
        else:
            page.keyboard.press("Tab")
        for order, key in (("ascending", "Enter"), ("descending", "Space")):
            page.keyboard.press(key)
            values = page.eval_on_selector_all(
                "#classes tbody tr",
                "(rows, at) => rows.map(row => at ? Number(row.cells[at].dataset.value) : row.cells[at].textContent)",
                column,
            )  # fmt: skip
            compare = "a.localeCompare(b)" if column == 0 else "a - b"
            wanted = page.evaluate(f"values => values.toSorted((a, b) => {compare})", values)
            assert values == (wanted if order == "ascending" else wanted[::-1]), name
            assert page.locator("#classes th").nth(column).get_attribute("aria-sort") == order
            assert page.evaluate("document.activeElement.textContent") == name


@pytest.mark.parametrize("classes", [2, 1000])
def test_two_classes_and_a_thousand(hostile: Path, opened: Callable[..., Any], tmp_path: Path, classes: int) -> None:
    rng = np.random.default_rng(0)
    said = rng.dirichlet(np.full(classes, 0.2), 3000).astype(np.float32)
    truth = np.where(rng.random(3000) < 0.7, said.argmax(1), rng.integers(0, classes, 3000))
    file = write_report(with_results(hostile, tmp_path / "run", truth, said))
    assert file.stat().st_size < 5_000_000
    page = opened(file, 360)
    assert page.locator("#classes tbody tr").count() == classes
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator("[data-cell]").first.click()
    assert page.locator("dialog li").count() > 0


def test_a_confusion_matrix_of_an_early_version_is_shown_as_its_cells_are() -> None:
    few, many = ["cat", "dog"], [f"class {number}" for number in range(CROSSED + 1)]
    for classes in (few, many):
        matrix = [[0] * len(classes) for _ in classes]
        matrix[0][0], matrix[0][1], matrix[1][0] = 3, 1, 2
        dense, sparse = {"matrix": matrix}, {"cells": [[0, 0, 3], [0, 1, 1], [1, 0, 2]]}
        shown = _confusion({"confusion": sparse}, classes)
        assert _confusion({"confusion": dense}, classes) == shown
    assert shown == {"worst": [(1, 0, 2), (0, 1, 1)], "kinds": 2}
    assert _confusion({"confusion": sparse}, few)["fractions"] == [[0.75, 0.25], [1.0, 0.0]]
    assert _confusion({}, few) == {"worst": [], "kinds": 0}
