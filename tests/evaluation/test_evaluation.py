"""A score is what scikit-learn makes of the model's answers, on the split that it names."""

import errno
import inspect
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn import metrics as sk
from typer.testing import CliRunner

from tests.forked import finish_two
from tests.training.test_trainer import draw
from vitft import Predictor, TrainConfig, load_model, train
from vitft.checkpoints.checkpoint import read_config, step_folders, write_config
from vitft.checkpoints.metadata import read_card, sha256, sha256_of, write_card
from vitft.cli.app import app
from vitft.cli.tables import training_report
from vitft.config.train import of_any_version
from vitft.data.augment import preprocess_images
from vitft.data.decoder import decode
from vitft.data.sources.identity import ids
from vitft.data.sources.source import open_dataset
from vitft.data.splits import make_splits
from vitft.errors import DataError, ModelError, UsageError
from vitft.evaluation import evaluation
from vitft.evaluation.evaluation import evaluate, matched
from vitft.evaluation.metrics import Metrics
from vitft.evaluation.split_predictions import most_probable, require
from vitft.io.atomic import json_text, write_json
from vitft.models.image_processor import read_processor
from vitft.prediction.predictor import Scores
from vitft.training.setup import prepare
from vitft.training.trainer import resume

KEYS = ["accuracy", "accuracy_interval", "top5", "loss", "macro_f1", "balanced_accuracy", "count", "split",
        "split_hash", "images_per_s", "per_class", "confusion", "calibration"]  # fmt: skip


def numbers(metrics: Metrics) -> dict[str, Any]:
    """All but the speed, which differs from call to call."""
    return {key: value for key, value in metrics.to_dict().items() if key != "images_per_s"}


def by_hand(folder: Path, role: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The split's true classes and the logits that plain Transformers gives, one image at a time."""
    card = read_card(folder)
    assert card is not None
    source = open_dataset(str(card.config.dataset))
    split = make_splits(source, val_fraction=card.config.val_fraction, max_train_samples=None,
                        max_eval_samples=card.config.max_eval_samples,
                        seed=card.config.split_seed)[role]  # fmt: skip
    how = read_processor(str(folder), transformers.AutoConfig.from_pretrained(folder))
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    cells = source.splits[split.source].select(split.rows)["image"]
    with torch.no_grad():
        pixels = (preprocess_images([torch.from_numpy(decode(cell["bytes"]))], how) for cell in cells)
        logits = torch.cat([model(pixel_values=one).logits for one in pixels])
    return split.labels, logits.double().numpy(), source.labels


@pytest.mark.parametrize("role", ["test", "validation"])
def test_scores_are_scikit_learns(digits_run: Any, role: str) -> None:
    """To 1e-5 for the loss, a mean of float32 values; the rest are counts."""
    truth, logits, labels = by_hand(digits_run.checkpoint, role)
    predicted, classes = logits.argmax(axis=1), list(range(len(labels)))

    got = evaluate(digits_run.run, split=role)

    assert (got.split, got.count) == (role, len(truth))
    assert got.accuracy == pytest.approx(sk.accuracy_score(truth, predicted), abs=1e-12)
    assert got.top5 == pytest.approx(sk.top_k_accuracy_score(truth, logits, k=5, labels=classes), abs=1e-12)
    shares = torch.from_numpy(logits).softmax(1).numpy()
    assert got.loss == pytest.approx(sk.log_loss(truth, shares, labels=classes), abs=1e-5)
    assert got.macro_f1 == pytest.approx(sk.f1_score(truth, predicted, average="macro"), abs=1e-12)
    assert got.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(truth, predicted), abs=1e-12)
    matrix = sk.confusion_matrix(truth, predicted, labels=classes)
    assert got.matrix.tolist() == matrix.tolist()
    cells = [[i, j, matrix[i, j]] for i, j in np.argwhere(matrix).tolist()]
    assert got.confusion == {"labels": list(labels), "cells": cells}
    table = sk.precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0)
    rows = [(row.precision, row.recall, row.f1, row.count) for row in got.per_class]
    np.testing.assert_allclose(rows, np.array(table).T, atol=1e-12)
    low, high = got.accuracy_interval
    assert low < got.accuracy < high


def test_the_recorded_scores_are_those_of_evaluate(digits_run: Any) -> None:
    card = read_card(digits_run.checkpoint)
    assert card is not None
    assert set(card.scores) == {"validation", "test"}

    for role, recorded in card.scores.items():
        got = evaluate(digits_run.checkpoint, split=role)
        now = got.to_dict()
        for key in recorded.keys() - {"images_per_s"}:
            assert recorded[key] == pytest.approx(now[key]), (role, key)
        assert got.split_hash == card.splits[role]["hash"]
    assert {role: score.summary() for role, score in digits_run.scores.items()} == card.scores


def test_two_evaluations_give_the_same_numbers(digits_run: Any) -> None:
    assert numbers(evaluate(digits_run.run)) == numbers(evaluate(digits_run.run))


def test_of_equal_classes_the_first_is_the_answer_everywhere(
    digits_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, the two best logits are often equal."""
    loaded = load_model(digits_run.run)

    class Coarse(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            logits = loaded.model(pixel_values=pixel_values).logits
            return SimpleNamespace(logits=(logits / 3).round() * 3)

    coarse = replace(loaded, model=Coarse())
    monkeypatch.setattr(evaluation, "load_model", lambda checkpoint: coarse)
    found = evaluate(digits_run.run)
    said = require(found.predictions)
    best = np.sort(said.probabilities, axis=1)[:, ::-1]
    assert (best[:, 0] == best[:, 1]).mean() > 0.1
    assert found.accuracy == (said.predicted == said.truth).mean()
    assert found.matrix.tolist() == sk.confusion_matrix(said.truth, said.predicted, labels=range(10)).tolist()
    before = (said.probabilities > best[:, [4]]).sum(axis=1)  # classes that are better than the fifth
    equal = said.probabilities == best[:, [4]]
    fifth = equal & (equal.cumsum(axis=1) <= 5 - before[:, None])
    five = (said.probabilities > best[:, [4]]) | fifth
    assert found.top5 == five[np.arange(len(said.truth)), said.truth].mean()
    predictor = Predictor(digits_run.run)
    for row in (np.full(10, 0.1, np.float32), np.array([0, 0.1, 0.4, 0, 0.1, 0.4, 0, 0, 0, 0], np.float32)):
        answer = predictor.prediction("", Scores(row[None], None), 0, top_k=3)
        order = np.argsort(-row, kind="stable")[:3].tolist()
        assert [label for label, _ in answer.top] == [predictor.labels[place] for place in order]


def test_the_batch_size_changes_nothing_but_the_last_digits(digits_run: Any) -> None:
    whole, single = (evaluate(digits_run.run, max_eval_samples=40, batch_size=size) for size in (64, 7))
    assert whole.confusion == single.confusion
    assert whole.loss == pytest.approx(single.loss, abs=1e-6)


def test_a_run_and_each_of_its_checkpoints_can_be_named(digits_run: Any) -> None:
    run = digits_run.run
    best, last = (numbers(evaluate(run / name)) for name in ("best", "last"))
    step = numbers(evaluate(step_folders(run)[0]))

    assert numbers(evaluate(run)) == best
    assert step == last
    assert best["split"] == last["split"] == "test"


def test_a_path_may_be_text(digits_run: Any) -> None:
    assert numbers(evaluate(str(digits_run.run))) == numbers(evaluate(digits_run.run))


def test_the_train_split_is_scored_if_asked_for(digits_run: Any) -> None:
    got = evaluate(digits_run.run, split="train", max_eval_samples=20)
    assert got.split == "train"
    assert got.count > 0


@pytest.mark.parametrize("count", [1, 33, 150])
def test_fewer_samples_are_stratified_and_named_by_their_hash(digits_run: Any, count: int) -> None:
    got = evaluate(digits_run.run, max_eval_samples=count)

    assert got.count == sum(row.count for row in got.per_class) == count
    counts = [row.count for row in got.per_class]
    assert max(counts) - min(counts) <= 2
    assert (got.split_hash == evaluate(digits_run.run).split_hash) == (count == 150)


def test_an_unknown_split_names_those_there_are(digits_run: Any) -> None:
    with pytest.raises(UsageError, match="split tset: digits has train, validation, test"):
        evaluate(digits_run.run, split="tset")


# -- folders of plain Transformers, and other data --------------------------------------------------


def make_data(root: Path, labels: tuple[str, ...] = ("ant", "bee", "cat"), count: int = 4) -> Path:
    """A folder of class folders, each class of its own brightness."""
    for i, label in enumerate(labels):
        (root / label).mkdir(parents=True)
        for number in range(count):
            drawn = np.random.default_rng([i, number]).integers(0, 60, (20, 24, 3)) + 60 * i
            Image.fromarray(drawn.astype(np.uint8)).save(root / label / f"{number}.png")
    return root


def test_a_plain_folder_is_scored_on_all_of_the_data_named(saved: Callable[..., Path], tmp_path: Path) -> None:
    data = str(make_data(tmp_path / "data"))
    with pytest.raises(
        UsageError, match=r"data has no test or validation split; to score its 12 images.*--split train"
    ):
        evaluate(saved("vit"), dataset=data)
    got = evaluate(saved("vit"), dataset=data, split="train")

    assert (got.split, got.count) == ("train", 12)  # nothing is set aside: this model was not trained on it
    assert [row.label for row in got.per_class] == ["ant", "bee", "cat"]


def test_a_plain_folder_needs_a_dataset(saved: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="add --dataset"):
        evaluate(saved("vit"))
    with pytest.raises(UsageError, match="vit-micro: it does not say what dataset it was trained on; add --dataset"):
        evaluate("vit-micro")
    with pytest.raises(ModelError, match="no such folder here; if it is a hub id, add --dataset"):
        evaluate("runs/typo")


def permuted(folder: Path, order: list[int]) -> None:
    """Renumber the classes of a saved ViT: the same model, in another order of labels."""
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    names = [model.config.id2label[i] for i in order]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order].clone())
        model.classifier.bias.copy_(model.classifier.bias[order].clone())
    model.save_pretrained(folder)


def test_labels_are_matched_by_name(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder, data = saved("vit"), str(make_data(tmp_path / "data"))
    before = evaluate(folder, dataset=data, split="train")

    permuted(folder, [2, 0, 1])
    after = evaluate(folder, dataset=data, split="train")

    assert after.confusion["labels"] == ["cat", "ant", "bee"]
    assert (after.accuracy, after.macro_f1) == pytest.approx((before.accuracy, before.macro_f1))
    assert after.loss == pytest.approx(before.loss, abs=1e-6)
    rows = {row.label: row for row in before.per_class}
    assert all(row == rows[row.label] for row in after.per_class)


def test_data_with_some_of_the_classes_is_enough(saved: Callable[..., Path], tmp_path: Path) -> None:
    got = evaluate(saved("vit"), dataset=str(make_data(tmp_path / "data", ("cat", "bee"))), split="train")
    assert [row.count for row in got.per_class] == [0, 4, 4]


def test_other_labels_are_an_error_that_lists_both_sides(saved: Callable[..., Path], tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", ("ant", "dog"))
    with pytest.raises(DataError) as caught:
        evaluate(saved("vit"), dataset=str(data), split="train")
    assert "the data has [ant, dog]" in str(caught.value)
    assert "knows [ant, bee, cat]" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_classes_of_the_same_name_are_distinguished_by_index() -> None:
    """As ImageNet's two cranes."""
    truth, names = np.array([0, 1, 2]), ("crane", "kite", "crane")
    assert matched(truth, names, names, name="model")[0].tolist() == [0, 1, 2]


def test_a_checkpoints_own_settings_do_not_rule_over_other_data(digits_run: Any, tmp_path: Path) -> None:
    """The run's limit of 150 images, and its share for validation, were for the digits."""
    data = make_data(tmp_path / "data", tuple("0123456789"), 20)
    got = evaluate(digits_run.run, dataset=str(data), split="train")
    assert (got.split, got.count) == ("train", 200)
    card = read_card(digits_run.checkpoint)
    assert card is not None
    own = {"dataset": "owner/name", "dataset_revision": "1234567", "exclude": "/not/here.txt", "max_train_samples": 9,
           "image_column": "picture", "label_column": "digit", "image_folder": "/not/here"}  # fmt: skip
    alone = shutil.copytree(digits_run.checkpoint, tmp_path / "alone")
    for name in ("vitft.json", "README.md"):
        (alone / name).unlink()
    write_card(alone, replace(card, config=card.config.model_copy(update=own)))
    assert numbers(evaluate(alone, dataset=str(data), split="train")) == numbers(got)


def test_what_is_asked_for_rules_over_the_checkpoints_own_settings(
    digits_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"dataset_revision": "1234567", "max_pixels": 99, "on_bad_image": "skip", "image_column": "picture",
             "label_column": "kind", "split_column": "part", "fold_column": "fold", "fold": 3, "image_folder": "/a",
             "encoding": "cp1252", "value_range": "0:99", "allow_outside": True}  # fmt: skip

    def read(config: TrainConfig, given: object) -> None:
        assert {name: getattr(config, name) for name in asked} == asked
        raise KeyError

    monkeypatch.setattr("vitft.evaluation.evaluation.source_of", read)
    for dataset in ("digits", "/other"):
        with pytest.raises(KeyError):
            evaluate(digits_run.run, dataset=dataset, **asked)


def checkpoint_of(run: Any, folder: Path, own: dict[str, Any] | None) -> Path:
    """A copy of a run's best checkpoint, with other settings of its own; None: without any."""
    shutil.copytree(run.checkpoint, folder)
    card = read_card(folder)
    assert card is not None
    for name in ("vitft.json", "README.md"):
        (folder / name).unlink()
    if own is not None:
        write_card(folder, replace(card, config=card.config.model_copy(update=own)))
    return folder


@pytest.mark.parametrize(
    ("own", "asked", "wanted"),
    [
        ({"precision": "bf16", "device": "cpu"}, None, "bf16"),
        ({"precision": "bf16", "device": "cpu"}, "fp32", "fp32"),
        ({"precision": "bf16", "device": "cuda"}, None, "fp32"),  # another machine's
        (None, None, "fp32"),
    ],
)
def test_a_checkpoint_is_scored_in_the_precision_that_its_run_had_on_this_device(
    digits_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: Any, asked: str | None, wanted: str
) -> None:
    folder = checkpoint_of(digits_run, tmp_path / "alone", own)
    seen: list[str] = []
    monkeypatch.setattr("vitft.evaluation.evaluation.find_precision", lambda name, device: seen.append(name) or "fp32")
    evaluate(folder, dataset="digits", split="train", max_eval_samples=8, device="cpu", precision=asked)
    assert seen == [wanted]


@pytest.mark.parametrize(("device", "wanted"), [("cpu", "eager"), ("cuda", "sdpa")])
def test_a_checkpoint_is_scored_with_the_attention_that_its_run_had_on_this_device(
    digits_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, wanted: str
) -> None:
    folder = checkpoint_of(digits_run, tmp_path / "alone", {"attention": "eager", "device": device})
    real, used = evaluation.measure, []
    monkeypatch.setattr(
        evaluation, "measure", lambda model, *given, **named: used.append(model) or real(model, *given, **named)
    )
    evaluate(folder, dataset="digits", split="train", max_eval_samples=8, device="cpu")
    assert [model.config._attn_implementation for model in used] == [wanted]


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_of_equal_probabilities_the_first_class_comes_first(classes: int) -> None:
    torch.manual_seed(0)
    found = torch.randn(64, classes).bfloat16().float().softmax(dim=1)
    found[:3] = torch.tensor([0.0, 1.0]).repeat(3, classes // 2)
    count = min(5, classes)
    expected = np.argsort(-found.numpy(), axis=1, kind="stable")[:, :count]
    assert most_probable(found, count).tolist() == expected.tolist()
    assert most_probable(found.double(), 1)[:, 0].tolist() == found.argmax(dim=1).tolist()


def test_an_image_of_more_pixels_than_asked_for_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    data = str(make_data(tmp_path / "data"))
    assert evaluate(saved("vit"), dataset=data, split="train", max_pixels=20 * 24).count == 12
    with pytest.raises(DataError, match=r"480 pixels.*479"):
        evaluate(saved("vit"), dataset=data, split="train", max_pixels=20 * 24 - 1)


def test_naming_the_checkpoints_own_dataset_changes_nothing(digits_run: Any) -> None:
    assert numbers(evaluate(digits_run.run, dataset="digits")) == numbers(evaluate(digits_run.run))


def test_a_bad_image_stops_it_or_is_left_out_and_reported(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder, data = saved("vit"), make_data(tmp_path / "data")
    whole = evaluate(folder, dataset=str(data), split="train")
    (data / "bee" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"bee/1\.png: is empty"):
        evaluate(folder, dataset=str(data), split="train")

    skipped: list[Any] = []
    got = evaluate(folder, dataset=str(data), split="train", on_bad_image="skip", report_skipped=skipped.extend)

    assert [one.name for one in skipped] == ["bee/1.png"]
    assert [row.count for row in got.per_class] == [4, 3, 4]
    assert got.split_hash != whole.split_hash


def decoding_is_told(folder: str) -> None:
    """Write down how many images this process decodes."""
    real, file = evaluation.decode_all, Path(folder, os.environ["RANK"])

    def decode_and_tell(rows: Any, *given: Any, **how: Any) -> Any:
        file.write_text(str(len(rows)))
        return real(rows, *given, **how)

    evaluation.decode_all = decode_and_tell  # type: ignore[assignment]


def test_each_of_two_processes_decodes_the_images_that_it_scores(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder, data = saved("vit"), make_data(tmp_path / "data")
    words = ["eval", str(folder), "--dataset", str(data), "--split", "train", "--device", "cpu", "--json"]
    for bad, skipping in ((), ()), (("bee/1.png",), ("--on-bad-image", "skip")):
        for name in bad:
            (data / name).write_bytes(b"")
        alone = CliRunner().invoke(app, [*words, *skipping])
        (first, said), (second, silent) = finish_two(
            *words, *skipping, log=tmp_path / "log", before=partial(decoding_is_told, str(tmp_path))
        )
        assert (first, second, silent) == (0, 0, ""), said
        together = json.loads(said[said.index("{") :])
        assert together["count"] == 12 - len(bad)
        for key in ("confusion", "split_hash", "accuracy", "per_class"):
            assert together[key] == json.loads(alone.stdout)[key]
        assert together["loss"] == pytest.approx(json.loads(alone.stdout)["loss"], rel=1e-5)
        assert said.count("bee/1.png: is empty") == len(bad)
        assert [(tmp_path / rank).read_text() for rank in "01"] == ["6", "6"]
    (first, said), (second, same) = finish_two(*words, log=tmp_path / "log")
    assert (first, second) == (3, 3)
    assert said.count("bee/1.png: is empty") == same.count("bee/1.png: is empty") == 1


# -- the command -----------------------------------------------------------------------------------


def test_json_is_one_document_with_the_keys_that_scripts_rely_on(digits_run: Any) -> None:
    done = CliRunner().invoke(app, ["eval", str(digits_run.run), "--json"])

    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert list(document) == KEYS
    assert list(document["per_class"][0]) == ["label", "precision", "recall", "f1", "count"]
    assert list(document["confusion"]) == ["labels", "cells"]
    assert 0 <= document["accuracy"] <= 1
    assert document["split"] == "test"


def test_the_report_names_split_count_and_interval(digits_run: Any) -> None:
    done = CliRunner().invoke(app, ["eval", str(digits_run.run / "best"), "--split", "validation"])

    got = evaluate(digits_run.run, split="validation")
    assert done.exit_code == 0, done.output
    head = done.stdout.splitlines()[0]
    low, high = got.accuracy_interval
    assert head.startswith(f"accuracy {100 * got.accuracy:.1f} % (95 % interval {100 * low:.1f}–{100 * high:.1f})")
    assert f"on {got.count} images of validation [{got.split_hash[:8]}]" in head


@pytest.mark.parametrize(("words", "code"), [(["./absent"], 4), (["DATA"], 4), (["RUN", "--split", "tset"], 2)])
def test_what_cannot_be_scored_is_one_line(digits_run: Any, tmp_path: Path, words: list[str], code: int) -> None:
    known = {"RUN": str(digits_run.run), "DATA": str(make_data(tmp_path / "data"))}
    command = ["eval", *(known.get(word, word) for word in words)]
    done = CliRunner().invoke(app, command + ([] if "RUN" in words else ["--dataset", "digits"]))
    assert (done.exit_code, len(done.stderr.splitlines())) == (code, 1), done.output


def test_each_flag_of_the_command_is_an_argument_and_may_undo_what_the_run_had(digits_run: Any, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["eval", str(digits_run.run), "--no-streaming", "--stream-gb", "1"])
    assert done.exit_code == 0, done.output
    fields = TrainConfig.model_fields
    reading = {name for name, field in fields.items() if field.json_schema_extra["panel"] == "Reading"}  # type: ignore[index, call-overload]
    assert reading <= inspect.signature(evaluate).parameters.keys()


def test_the_confusion_matrix_is_drawn(digits_run: Any, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["eval", str(digits_run.run), "--json", "--plot", str(tmp_path / "plot.png")])

    assert done.exit_code == 0, done.output
    json.loads(done.stdout)
    with Image.open(tmp_path / "plot.png") as plot:
        assert min(plot.size) > 200


@pytest.mark.parametrize(("flag", "name"), [("--plot", "a.png"), ("--predictions", "a.parquet")])
def test_a_file_that_cannot_be_written_loses_no_scores(
    digits_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, name: str
) -> None:
    def full(path: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    words = ["eval", str(digits_run.run), "--max-eval-samples", "40", flag]
    for room in ("plots", "split_predictions"):
        monkeypatch.setattr(f"vitft.evaluation.{room}.new_file", full)
    done = CliRunner().invoke(app, [*words, str(tmp_path / name)])
    assert (done.exit_code, done.stdout.startswith("accuracy ")) == (1, True), done.output
    assert done.stderr.endswith(f"error: {tmp_path / name}: No space left on device.\n")
    (tmp_path / name).mkdir()
    refused = CliRunner().invoke(app, [*words, str(tmp_path / name)])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"{tmp_path / name}: give a .{name[2:]} file in a folder that exists." in refused.stderr


def test_the_public_names_are_the_rooms_own() -> None:
    import vitft

    assert vitft.evaluate is evaluate
    assert vitft.TrainConfig is TrainConfig


def test_what_one_dataset_was_allowed_another_is_not(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "lists").mkdir()
    rows = ["path,label"]
    for number in range(8):
        Image.new("RGB", (28, 28), (number * 9, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
        rows.append(f"../photos/{number}.png,{'ab'[number % 2]}")
    for name in ("mine.csv", "other.csv"):
        (tmp_path / "lists" / name).write_text("\n".join(rows))
    mine, other = (str(tmp_path / "lists" / name) for name in ("mine.csv", "other.csv"))
    small = {"model": "vit-micro", "max_steps": 1, "val_fraction": 0, "device": "cpu", "precision": "fp32"}
    run = train(TrainConfig(dataset=mine, allow_outside=True, **small), output=tmp_path / "run").run  # type: ignore[arg-type]
    assert evaluate(run, split="train").count == 8
    with pytest.raises(DataError, match="is outside of"):
        evaluate(run, split="train", allow_outside=False)
    with pytest.raises(DataError, match="is outside of"):
        evaluate(run, dataset=other, split="train")
    assert evaluate(run, dataset=other, split="train", allow_outside=True).count == 8


# -- a test split that was held out ----------------------------------------------------------------


def noise(folder: Path, names: range, seed: int = 0) -> Path:
    """Images of noise in two classes, named by their numbers; image N is the same in every folder."""
    for number in names:
        label = folder / "ab"[number % 2]
        label.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([seed, number]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(label / f"{number:03}.png")
    return folder


TINY: dict[str, Any] = {
    "model": "vit-micro", "from_scratch": True, "image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "heads": 2,
    "mlp": 16, "max_steps": 1, "device": "cpu", "precision": "fp32", "val_fraction": 0.3,
}  # fmt: skip
ONWARD = {name: value for name, value in TINY.items() if name in ("max_steps", "device", "precision", "val_fraction")}


def trained(data: Path, run: Path, **settings: Any) -> Any:
    return train(TrainConfig(dataset=str(data), **TINY | settings), output=run)


def trained_on(data: Path, run: Path, **settings: Any) -> Path:
    return Path(trained(data, run, **settings).run)


def roles(run: Path) -> dict[str, set[str]]:
    splits = json.loads((run / "splits.json").read_text())["splits"]
    return {role: set(split["ids"]) for role, split in splits.items()}


def test_a_test_split_held_out_of_training_is_scored_and_stays_held_out(tmp_path: Path) -> None:
    data = noise(tmp_path / "data", range(60))
    result = trained(data, tmp_path / "run", test_fraction=0.3, split_seed=4)
    first = roles(result.run)
    assert {name: len(names) > 5 for name, names in first.items()} == dict.fromkeys(
        ("train", "validation", "test"), True
    )
    assert sum(map(len, first.values())) == len(set().union(*first.values())) == 60
    assert set(result.scores) == {"validation", "test"}
    got = evaluate(result.run)
    assert (got.split, got.count) == ("test", len(first["test"]))
    assert numbers(got) == numbers(evaluate(result.run / "last", split="test"))
    noise(data, range(60, 80))
    then = roles(train(TrainConfig(dataset=str(data), model=str(result.run), **ONWARD), output=tmp_path / "2").run)
    assert first["test"] == then["test"]  # though it was not asked for again
    assert first["train"] <= then["train"]
    assert first["validation"] <= then["validation"]


def test_the_report_says_whether_a_score_is_independent(tmp_path: Path) -> None:
    data = noise(tmp_path / "data", range(60))
    for name, changes, said in (
        ("alone", {}, True),
        ("tested", {"test_fraction": 0.3}, False),
        ("no score", {"val_fraction": 0.0}, False),
    ):
        result = trained(data, tmp_path / name, **changes)
        assert ("not an independent score: validation chose" in training_report(result)) == said
        assert ("no independent score" in (result.checkpoint / "README.md").read_text()) == said


def test_where_there_is_a_test_split_no_other_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise(tmp_path / "data" / "train", range(40))
    noise(tmp_path / "data" / "test", range(40, 50))
    splits = prepare(TrainConfig(dataset=str(tmp_path / "data"), test_fraction=0.5, **TINY)).splits
    assert len(splits["test"].rows) == 10
    assert "test_fraction 0.5 is not used: data has a test split, test" in capsys.readouterr().err


def test_where_all_was_trained_on_no_test_split_can_be_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = noise(tmp_path / "data", range(40))
    run = trained_on(data, tmp_path / "run")
    again = TrainConfig(dataset=str(data), model=str(run), test_fraction=0.3, **ONWARD)
    assert set(prepare(again).splits) == {"train", "validation"}
    assert "no test split: " in capsys.readouterr().err


def test_a_checkpoint_from_before_split_seed_is_scored_on_its_own_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There, `seed` decided the splits; the record of its run is gone."""
    data = noise(tmp_path / "data", range(60))
    result = trained(data, tmp_path / "run", seed=5, split_seed=5)
    alone = shutil.copytree(result.run / "best", tmp_path / "alone")
    card = json.loads((alone / "vitft.json").read_text())
    assert card["config"].pop("split_seed") == 5
    card["sha256"].pop("vitft.json")
    checksums = card.pop("sha256")
    write_json(alone / "vitft.json", card | {"sha256": checksums | {"vitft.json": sha256_of(json_text(card))}})
    capsys.readouterr()
    got = evaluate(alone, dataset=str(data), split="validation")
    assert got.split_hash == result.scores["validation"].split_hash
    assert "may have been trained on" not in capsys.readouterr().err
    assert of_any_version({"seed": 5}) == {"seed": 5, "split_seed": 5}
    assert of_any_version({"seed": 5, "split_seed": 2})["split_seed"] == 2


def test_seeds_share_their_validation_images(tmp_path: Path) -> None:
    data = noise(tmp_path / "data", range(60))
    drawn = [
        prepare(TrainConfig(dataset=str(data), seed=seed, split_seed=split_seed, **TINY)).splits["validation"].hash
        for seed, split_seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


# -- what was trained on is not scored --------------------------------------------------------------


@pytest.fixture
def noisy(tmp_path: Path) -> tuple[Path, Path]:
    """Sixty images, and a run on them."""
    data = noise(tmp_path / "data", range(60))
    return data, trained_on(data, tmp_path / "run")


def test_photos_that_were_added_change_nothing_of_what_is_scored(
    noisy: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = noisy
    before = evaluate(run, split="validation")
    noise(data, range(60, 100))
    after = evaluate(run)
    assert numbers(after) == numbers(before)
    assert f"40 images of train are new: in no split of {run}" in capsys.readouterr().err
    gone = min(roles(run)["validation"])
    (data / gone).unlink()
    left = evaluate(run, split="validation")
    assert left.count == before.count - 1
    assert left.split_hash != before.split_hash
    assert f"1 of {before.count} validation images of {run} are gone" in capsys.readouterr().err
    assert evaluate(run, split="train").count == 60 - before.count


def test_a_dataset_that_moved_is_split_as_it_was(noisy: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = noisy
    before = evaluate(run, split="validation")
    renamed = tmp_path / "elsewhere"
    for file in data.rglob("*.png"):  # other names, and one folder deeper
        copy = renamed / "train" / file.parent.name / "sub" / f"photo-{file.name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    noise(renamed / "train", range(100, 110))
    assert numbers(evaluate(run, dataset=str(renamed))) == numbers(before)
    assert evaluate(run, dataset=str(renamed), split="train").split_hash == evaluate(run, split="train").split_hash


def test_images_that_were_trained_on_are_not_scored_as_a_test(noisy: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = noisy
    other = noise(tmp_path / "other" / "test", range(200, 230)).parent
    noise(other / "train", range(230, 240))
    assert evaluate(run, dataset=str(other)).count == 30
    mine = sorted(roles(run)["train"])[:3]
    for name in mine:
        (other / "test" / "a" / f"again-{Path(name).name}").write_bytes((data / name).read_bytes())
    with pytest.raises(DataError, match=r"3 of the 33 test images were trained on by .*first is test/a/again-"):
        evaluate(run, dataset=str(other))
    done = CliRunner().invoke(app, ["eval", str(run), "--dataset", str(other)])
    assert (done.exit_code, len(done.stderr.splitlines())) == (3, 1)
    # The same numbers as names, but other pictures: another dataset, with nothing held out.
    third = noise(tmp_path / "third", range(60), seed=1)
    with pytest.raises(UsageError, match="third has no test or validation split"):
        evaluate(run, dataset=str(third))
    assert evaluate(run, dataset=str(third), split="train").count == 60


def test_an_image_moved_from_train_to_a_new_test_folder_is_found(tmp_path: Path) -> None:
    data = noise(tmp_path / "data" / "train", range(60)).parent
    run = trained_on(data, tmp_path / "run")
    noise(data / "test", range(300, 310))
    name = min(roles(run)["train"])
    (data / name).rename(data / "test" / "a" / "moved.png")
    with pytest.raises(DataError, match="1 of the 11 test images were trained on"):
        evaluate(run)
    assert evaluate(run, split="validation").count == len(roles(run)["validation"])


@pytest.mark.parametrize("seed", [0, 5])
def test_training_on_keeps_what_was_held_out_out(noisy: tuple[Path, Path], tmp_path: Path, seed: int) -> None:
    data, run = noisy
    noise(data, range(60, 100))
    second = train(
        TrainConfig(dataset=str(data), model=str(run / "last"), split_seed=seed, **ONWARD), output=tmp_path / "second"
    ).run
    first, then = roles(run), roles(second)
    assert first["validation"] <= then["validation"]
    assert first["train"] <= then["train"]
    assert len(then["validation"]) > len(first["validation"])  # of the new ones, a share
    moved = tmp_path / "moved"
    data.rename(moved)
    third = train(
        TrainConfig(dataset=str(moved), model=str(second / "last"), split_seed=9, **ONWARD), output=tmp_path / "3"
    )
    assert {role: {Path(n).name for n in names} for role, names in roles(third.run).items()} == {
        role: {Path(n).name for n in names} for role, names in then.items()
    }


def test_training_on_with_a_split_that_was_trained_on_is_refused(noisy: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = noisy
    other = noise(tmp_path / "other" / "train", range(400, 440)).parent
    (other / "val" / "a").mkdir(parents=True)
    (other / "val" / "b").mkdir(parents=True)
    for name in sorted(roles(run)["train"])[:4]:
        (other / "val" / name).write_bytes((data / name).read_bytes())
    settings = TrainConfig(dataset=str(other), model=str(run / "last"), **ONWARD)
    with pytest.raises(DataError, match=r"4 of the 4 validation images were trained on by .*--exclude"):
        train(settings, output=tmp_path / "second")


def test_what_was_held_out_alone_leaves_nothing_to_train_on(noisy: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = noisy
    for name in roles(run)["validation"]:
        (tmp_path / "others" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "others" / name).write_bytes((data / name).read_bytes())
    settings = TrainConfig(dataset=str(tmp_path / "others"), model=str(run / "last"), **ONWARD)
    with pytest.raises(DataError, match=r"others: no training images; its splits are train\."):
        train(settings, output=tmp_path / "second")


def test_where_all_was_trained_on_nothing_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = noise(tmp_path / "data", range(40))
    run = trained_on(data, tmp_path / "run", val_fraction=0.0)
    second = train(TrainConfig(dataset=str(data), model=str(run / "last"), **ONWARD), output=tmp_path / "second").run
    assert set(roles(second)) == {"train"}
    assert "no validation split: " in capsys.readouterr().err


def test_a_checkpoint_without_its_run_warns_of_what_is_unknown(
    noisy: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = noisy
    before = evaluate(run)
    alone = tmp_path / "alone"
    shutil.copytree(run / "best", alone)
    capsys.readouterr()
    assert numbers(evaluate(alone, dataset=str(data))) == numbers(before)
    assert capsys.readouterr().err == ""
    other = noise(tmp_path / "other" / "test", range(200, 230)).parent
    noise(other / "train", range(230, 240))
    evaluate(alone, dataset=str(other))
    assert "these images may have been trained on" in capsys.readouterr().err
    noise(data, range(60, 80))
    with pytest.raises(UsageError, match="data has no test or validation split"):
        evaluate(alone, dataset=str(data))
    (run / "splits.json").unlink()
    capsys.readouterr()
    kept = evaluate(run)
    assert "the data has changed or was split by an earlier" in capsys.readouterr().err
    assert kept.count >= before.count


def test_images_without_files_are_known_by_their_content(tmp_path: Path) -> None:
    """A parquet file whose rows were shuffled, and to which others were added."""

    def write(numbers_: list[int], folder: Path) -> Path:
        rows = [{"bytes": (noise(tmp_path / "png", range(n, n + 1)) / "ab"[n % 2] / f"{n:03}.png").read_bytes(),
                 "path": None} for n in numbers_]  # fmt: skip
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        made = datasets.Dataset.from_dict({"image": rows, "label": [n % 2 for n in numbers_]}, features=features)
        folder.mkdir(exist_ok=True)
        made.to_parquet(str(folder / "train.parquet"))
        return folder

    data = write(list(range(60)), tmp_path / "data")
    run = trained_on(data, tmp_path / "run")
    before = evaluate(run)
    write([*range(60, 70), *reversed(range(60))], data)
    assert numbers(evaluate(run)) == numbers(before)
    again = trained_on(data, tmp_path / "again")
    assert roles(run)["validation"] <= roles(again)["validation"]
    assert roles(run)["train"] <= roles(again)["train"]


def test_a_list_to_leave_out_moves_no_other_image(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("train\trow 0\ntrain\trow 1\ntrain\trow 700\n")
    settings = {"max_train_samples": None, "max_eval_samples": None}
    whole = trained_on(Path("digits"), tmp_path / "whole", **settings)
    left = trained_on(Path("digits"), tmp_path / "left", exclude=str(tmp_path / "out.txt"), **settings)
    for role, names in roles(left).items():
        assert names <= roles(whole)[role]
    assert sum(map(len, roles(whole).values())) - sum(map(len, roles(left).values())) == 3
    every, found = (require(evaluate(run, split="validation").predictions) for run in (whole, left))
    numbers_of = dict(zip(every.ids, every.rows.tolist(), strict=True))
    assert found.rows.tolist() == [numbers_of[image] for image in found.ids]
    assert min(found.rows) > 1


# -- runs of old: splits drawn by row numbers -------------------------------------------------------

OLD = Path(__file__).parents[1] / "corpus" / "old-runs"


@pytest.fixture(params=["digits", "photos"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run that was begun and broken off before splits were drawn by identity."""
    run = tmp_path / "run"
    shutil.copytree(OLD / request.param, run)
    if request.param == "photos":
        draw(tmp_path / "photos")
        moved = read_config(run).model_copy(update={"dataset": str(tmp_path / "photos")})
        write_config(run, moved)
        for folder in (run / "best", *step_folders(run)):
            card = read_card(folder)
            assert card is not None
            for name in ("vitft.json", "README.md", "manifest.json"):
                (folder / name).unlink(missing_ok=True)
            write_card(folder, replace(card, config=moved))
        for step in step_folders(run):
            manifest = {f.name: {"size": f.stat().st_size, "sha256": sha256(f)} for f in sorted(step.iterdir())
                        if f.name != "manifest.json"}  # fmt: skip
            write_json(step / "manifest.json", manifest)
    return run


def test_an_old_run_is_scored_resumed_and_trained_on_with_its_own_splits(old: Path, tmp_path: Path) -> None:
    recorded = json.loads((old / "splits.json").read_text())["splits"]
    for role in ("validation", "train"):
        got = evaluate(old, split=role)
        assert (got.count, got.split_hash) == (recorded[role]["count"], recorded[role]["hash"])
    config = read_config(old)
    second = train(
        TrainConfig(dataset=str(config.dataset), model=str(old / "best"), split_seed=3, **ONWARD), output=tmp_path / "2"
    ).run
    resume(old)  # proves by their sum that the pixels are those that it began with, in their order
    source = open_dataset(str(config.dataset))
    for role in ("train", "validation"):
        rows = recorded[role]["ids"]
        if isinstance(rows[0], int):
            rows = ids(source.splits["train"], np.array(rows))
        assert set(rows) <= roles(second)[role]
    assert json.loads((old / "splits.json").read_text())["splits"] == recorded
