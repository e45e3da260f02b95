"""The curves of several runs on one plot."""

import json
from pathlib import Path

from PIL import Image

from vitft.reporting.curves import draw_curves, plot_curves


def run(folder: Path, name: str, *lines: dict[str, object]) -> Path:
    (folder / name).mkdir()
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / name


def test_each_run_is_a_line_of_what_it_recorded(tmp_path: Path) -> None:
    def step(epoch: float, loss: float) -> dict[str, object]:
        return {"step": int(10 * epoch), "epoch": epoch, "split": "train", "loss": loss, "lr": epoch / 100}

    def scored(epoch: float, accuracy: float) -> dict[str, object]:
        return {"step": int(10 * epoch), "epoch": epoch, "split": "validation", "loss": 0.5, "accuracy": accuracy}

    hostile = "猫 $x_1$ <b>"
    runs = [
        run(tmp_path, "a", step(0.5, 2.0), scored(0.5, 0.3), step(1.0, 1.0), scored(1.0, 0.7)),
        run(tmp_path, hostile, step(0.5, 3.0), step(1.0, 1.5)),
    ]
    figure = draw_curves(runs)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == ["training loss", "validation loss", "validation accuracy", "learning rate"]
    (epochs, losses), other = (line.get_data() for line in panels["training loss"].lines[:2])
    assert (list(epochs), list(losses)) == ([0.5, 1.0], [2.0, 1.0])
    assert list(other[1]) == [3.0, 1.5]
    assert list(panels["validation accuracy"].lines[0].get_data()[1]) == [0.3, 0.7]
    assert list(panels["learning rate"].lines[1].get_data()[1]) == [0.005, 0.01]
    assert figure.legends[0].get_texts()[0].get_text() == "a"
    plot_curves(runs, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 2 * picture.height


def test_runs_that_recorded_nothing_still_give_a_picture(tmp_path: Path) -> None:
    plot_curves([run(tmp_path, "a"), run(tmp_path, "b")], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()
