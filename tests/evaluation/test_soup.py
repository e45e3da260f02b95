"""Model soups: the mean of the weights of runs that may be averaged, chosen on images that none was trained on."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vitft import TrainConfig, evaluate, load_model, soup, train
from vitft.checkpoints.checkpoint import save_model, write_config
from vitft.checkpoints.metadata import read_card
from vitft.cli.app import app
from vitft.errors import DataError, UsageError
from vitft.evaluation.calibration import fit_temperature
from vitft.evaluation.held_out import lineage

SETTINGS: dict[str, Any] = {
    "dataset": "digits", "model": "vit-micro", "image_size": 28, "max_train_samples": 100, "max_eval_samples": 80,
    "max_steps": 4, "batch_size": 25, "device": "cpu", "precision": "fp32", "threads": 1, "compile": "off",
}  # fmt: skip
Variant = Callable[..., Path]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(TrainConfig(**SETTINGS), output=tmp_path_factory.mktemp("runs") / "first").run


@pytest.fixture
def variant(first: Path, tmp_path: Path) -> Variant:
    """Makes a run like the first one, with noise on its weights, other settings, or another card."""

    def make(name: str, noise: float = 0.0, card: dict[str, Any] | None = None, **settings: Any) -> Path:
        shutil.copytree(first, tmp_path / name)
        best = tmp_path / name / "best"
        loaded, old = load_model(best), read_card(best)
        assert old is not None
        drawn = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=drawn)
        new = replace(old, config=old.config.model_copy(update=settings), **(card or {}))
        save_model(best, loaded.model, loaded.preprocess, new)
        write_config(tmp_path / name, new.config)
        return tmp_path / name

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_uniform_soup_is_the_mean_of_all(first: Path, variant: Variant, tmp_path: Path) -> None:
    runs = [first, variant("one", 0.05), variant("other", 0.1)]
    made = soup(runs, tmp_path / "soup")
    parts, average = [weights(run / "best") for run in runs], weights(made.folder)
    assert average.keys() == parts[0].keys()
    for name, tensor in average.items():
        assert tensor.dtype == torch.float32
        mean = np.mean([part[name].double().numpy() for part in parts], axis=0)
        assert np.array_equal(tensor.numpy(), mean.astype(np.float32)) or np.allclose(tensor, mean, rtol=1e-7, atol=0)
    assert all(part.chosen for part in made.parts)
    accuracies = [part.metrics.accuracy for part in made.parts]
    assert accuracies == sorted(accuracies, reverse=True)
    assert {part.run for part in made.parts} == {str(run) for run in runs}
    last = made.parts[-1]
    assert last.metrics.accuracy == evaluate(last.run, split="validation").accuracy


def test_a_soup_is_a_checkpoint_that_names_its_parts(first: Path, variant: Variant, tmp_path: Path) -> None:
    made = soup([first, variant("one", 0.05)], tmp_path / "soup")
    scores = evaluate(made.folder, split="validation")
    assert (scores.accuracy, scores.split_hash) == (made.metrics.accuracy, made.metrics.split_hash)
    assert evaluate(made.folder).split == "test"
    card = read_card(made.folder)
    assert card is not None
    assert {part["run"] for part in card.parts} == {"first/best", "one/best"}
    assert card.scores["validation"]["accuracy"] == made.metrics.accuracy
    readme = (made.folder / "README.md").read_text(encoding="utf-8")
    assert "The average of the weights of 2 runs" in readme
    assert "first/best" in readme
    ancestor = lineage(made.folder)[0]  # so the images that its parts were trained on stay known
    assert ancestor.record is not None
    assert ancestor.record.matches(card.splits)


def test_what_a_soup_says_of_itself_is_of_the_soup(first: Path, variant: Variant, tmp_path: Path) -> None:
    """Neither the temperature nor the step of a part."""
    from vitft.serving.model import open_model

    made = soup([variant(name, 0.3, {"temperature": 9.0}) for name in ("one", "other")], tmp_path / "soup")
    card = read_card(made.folder)
    assert card is not None
    assert made.metrics.predictions is not None
    assert card.temperature == fit_temperature(made.metrics.predictions) != 9.0
    assert "step" in open_model(first).about
    assert "step" not in open_model(made.folder).about


def test_greedy_leaves_out_what_makes_it_worse(first: Path, variant: Variant, tmp_path: Path) -> None:
    near, spoiled = variant("near", 0.02), variant("spoiled", 3.0)
    made = soup([spoiled, near, first], tmp_path / "soup", greedy=True)
    chosen = {part.run: part.chosen for part in made.parts}
    assert not chosen[str(spoiled)]
    best = made.parts[0]
    assert best.chosen
    assert made.metrics.accuracy >= best.metrics.accuracy
    taken = [weights(Path(part.run) / "best") for part in made.parts if part.chosen]
    for name, tensor in weights(made.folder).items():
        assert torch.allclose(tensor, torch.stack([one[name] for one in taken]).mean(dim=0), atol=1e-6)
    assert evaluate(made.folder, split="validation").accuracy == made.metrics.accuracy


HASHES = {"validation": {"source": "train", "count": 9, "hash": "0" * 16}}


@pytest.mark.parametrize(
    ("changes", "card", "says"),
    [
        ({"model": "other/model"}, {}, "have other starting points (vit-micro and other/model)"),
        ({"image_size": 56}, {}, "have other input sizes (28 and 56)"),
        ({"dataset": "cifar10"}, {}, "have other datasets (digits and cifar10)"),
        ({"from_scratch": True}, {}, "started from new weights"),
        ({"head_init": "random", "seed": 5}, {}, "random heads to start from: seeds (0 and 5)"),
        ({}, {"labels": tuple("abcdefghij")}, "have other classes"),
        ({}, {"splits": {}}, "has no validation images"),
    ],
)
def test_runs_that_cannot_be_averaged_are_refused(
    first: Path, variant: Variant, tmp_path: Path, changes: dict[str, Any], card: dict[str, Any], says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("vitft.evaluation.soup.load_trained", lambda *given: pytest.fail("it was loaded"))
    if "splits" in card:  # as its record says, too
        monkeypatch.setattr("vitft.data.split_record.Record.matches", lambda *given: True)
    with pytest.raises(UsageError) as refused:
        soup([first, variant("other", card=card, **changes)], tmp_path / "soup")
    assert says in str(refused.value)
    assert not (tmp_path / "soup").exists()


def test_other_images_are_refused(first: Path, variant: Variant, tmp_path: Path) -> None:
    for role in ("validation", "train"):
        run = variant(role)
        card, record = read_card(run / "best"), json.loads((run / "splits.json").read_text(encoding="utf-8"))
        assert card is not None
        splits = {**card.splits, role: {**card.splits[role], "hash": "0" * 16}}
        record["splits"][role]["hash"] = "0" * 16
        (run / "splits.json").write_text(json.dumps(record), encoding="utf-8")
        loaded = load_model(run / "best")
        save_model(run / "best", loaded.model, loaded.preprocess, replace(card, splits=splits))
        with pytest.raises(UsageError, match=f"have other {'training' if role == 'train' else role} images"):
            soup([first, run], tmp_path / "soup")


def test_a_run_that_comes_from_one_trained_on_validation_images_is_refused(variant: Variant, tmp_path: Path) -> None:
    early = variant("early")
    card, record = read_card(early / "best"), json.loads((early / "splits.json").read_text(encoding="utf-8"))
    assert card is not None
    for document in (card.splits, record["splits"]):
        document["train"], document["validation"] = document["validation"], document["train"]
    (early / "splits.json").write_text(json.dumps(record), encoding="utf-8")
    loaded = load_model(early / "best")
    save_model(early / "best", loaded.model, loaded.preprocess, card)
    with pytest.raises(DataError, match=r"80 of the 80 validation images were trained on by .*early"):
        soup([variant("one", model=str(early)), variant("two", 0.1, model=str(early))], tmp_path / "soup")


def test_what_is_no_run_and_what_is_there_already(first: Path, tmp_path: Path, digits_run: Any) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine", encoding="utf-8")
    shutil.copytree(first / "best", tmp_path / "alone")
    for runs, output, says in (
        ([first, first], "soup", "is given twice"),
        ([first], "soup", "at least two runs"),
        ([first, tmp_path / "alone"], "soup", "is not a run of vitft train"),
        ([digits_run.run, digits_run.run / "last"], "soup", "started from new weights"),
        ([first, first / "last"], "there", "is there already"),
    ):
        with pytest.raises(UsageError, match=says):
            soup(runs, tmp_path / output)
    assert [*(tmp_path / "there").iterdir()] == [tmp_path / "there" / "mine.txt"]


def test_the_command_compares_the_soup_with_its_parts(first: Path, variant: Variant, tmp_path: Path) -> None:
    runner = CliRunner(env={"COLUMNS": "80"})
    words = ["soup", str(first), str(variant("spoiled", 3.0)), "--output", str(tmp_path / "soup")]
    done = runner.invoke(app, words)
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[-1] for row in rows if row[-1:] in (["yes"], ["no"])] == ["yes", "yes"]
    assert any(row[:1] == ["soup"] for row in rows)
    assert "is below its best part" in " ".join(done.stderr.split())
    assert f"next: vitft eval {tmp_path / 'soup'} --dataset digits" in done.stdout
    done = runner.invoke(app, [*words[:-1], str(tmp_path / "greedy"), "--greedy", "--json"])
    document = json.loads(done.stdout)
    assert [part["chosen"] for part in document["parts"]] == [True, False]
    assert document["validation"]["accuracy"] == document["parts"][0]["validation"]["accuracy"]
    assert "the soup is its best part alone" in " ".join(done.stderr.split())
