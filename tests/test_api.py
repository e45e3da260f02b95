"""vitft as a library: what is public, objects in place of names, who follows a run, and errors in Python's words."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import vitft
from tests.conftest import tiny_model
from tests.training.test_trainer import TINY, assert_same_weights, lines
from vitft import (
    Callback,
    DataError,
    Metrics,
    ModelError,
    Score,
    TrainConfig,
    UsageError,
    evaluate,
    load_model,
    open_dataset,
    resume,
    train,
)
from vitft.errors import typed_flags
from vitft.io import console


def given(count: int = 24, seed: int = 0, **more: Any) -> datasets.Dataset:
    """Images of three classes, one color each with noise, as a `datasets.Dataset` that was made in Python."""
    generator = np.random.default_rng(seed)
    labels = [row % 3 for row in range(count)]
    colors = np.eye(3)[labels] * 160
    images = [Image.fromarray((color + generator.integers(0, 90, (16, 16, 3))).astype(np.uint8)) for color in colors]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "green", "blue"])}
    return datasets.Dataset.from_dict({"image": images, "label": labels, **more}, datasets.Features(kinds))


SETTINGS: dict[str, Any] = {**TINY, "dataset": None, "batch_size": 8, "max_steps": 4, "eval_every": 2, "save_every": 2}


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig.parse({name: value for name, value in (SETTINGS | changes).items() if value is not None})


def test_every_public_name_can_be_imported_and_says_what_it_is() -> None:
    for name in set(vitft.__all__) - {"__version__"}:
        assert getattr(vitft, name).__doc__.strip(), name
    assert set(vitft.__all__) <= set(dir(vitft))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        vitft.trian  # noqa: B018


def test_the_package_is_imported_without_any_other() -> None:
    code = "import sys, vitft; print(sorted({n.split('.')[0] for n in sys.modules} & {'torch', 'numpy', 'pydantic'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_dataset_made_in_python_is_trained_resumed_and_scored(tmp_path: Path) -> None:
    made = given(48)
    whole = train(settings(), dataset=made, output=tmp_path / "whole")
    assert whole.scores.keys() == {"validation"}
    assert made.features["image"] == datasets.Image()  # the user's own is untouched

    class Stop(KeyboardInterrupt):
        pass

    class Stopper(Callback):
        def on_save(self, step: int, checkpoint: Path) -> None:
            assert checkpoint.name == f"step-{step:06d}"
            raise Stop

    with pytest.raises(Stop):
        train(settings(), dataset=made, output=tmp_path / "run", callbacks=[Stopper()])
    with pytest.raises(UsageError, match=r"loaded in Python; pass it again: resume\(run, dataset=\.\.\.\)"):
        resume(tmp_path / "run")
    with pytest.raises(DataError, match=r"data: none of the images that .*run was trained on is in it"):
        resume(tmp_path / "run", dataset=given(48, seed=1))
    resumed = resume(tmp_path / "run", dataset=made.select(range(48)))
    assert_same_weights(resumed.run / "last", whole.run / "last")
    assert resumed.scores["validation"].accuracy == whole.scores["validation"].accuracy

    again = evaluate(whole.run, dataset=made, split="validation")
    assert isinstance(again, Metrics)
    assert isinstance(again, Score)
    assert again.summary() == whole.scores["validation"].summary() | {"images_per_s": again.images_per_s}
    shuffled = evaluate(whole.run, dataset=made.shuffle(seed=3), split="validation")
    assert shuffled.accuracy == again.accuracy  # images are known by their content
    with pytest.raises(UsageError, match="does not say what dataset it was trained on; add dataset"), plainly():
        evaluate(whole.run)


class plainly:  # noqa: N801 (read as a word)
    """As outside of a command."""

    def __enter__(self) -> None:
        from vitft import errors

        self.before, errors._flag_style = errors._flag_style, False

    def __exit__(self, *error: object) -> None:
        from vitft import errors

        errors._flag_style = self.before


def test_splits_of_a_dataset_dict_keep_their_roles(tmp_path: Path) -> None:
    made = datasets.DatasetDict({"train": given(24), "test": given(12, seed=1)})
    source = open_dataset(made)
    assert (source.labels, {name: len(split) for name, split in source.splits.items()}) == (
        ("red", "green", "blue"), {"train": 24, "test": 12},
    )  # fmt: skip
    result = train(settings(max_steps=2), dataset=source, output=tmp_path / "run")
    assert result.scores["test"].count == 12


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([1, 2], "dataset: got list; give a name, a path"),
        ({"train": [1]}, "dataset: got list"),
        (datasets.Dataset.from_dict({"a": [1.5]}), "no image column"),
    ],
)
def test_what_is_not_a_dataset_is_refused_in_one_line(wrong: Any, said: str) -> None:
    with pytest.raises((UsageError, DataError), match=said):
        open_dataset(wrong)


def test_a_model_object_is_copied_and_trained(tmp_path: Path) -> None:
    model = tiny_model("vit", image_size=16, num_channels=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = settings(
        from_scratch=False, max_steps=2, **dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp"))
    )
    result = train(plain, model=model, dataset=given(), output=tmp_path / "run")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    trained = load_model(result.checkpoint)
    assert trained.labels == ("red", "green", "blue")
    changed = [name for name, tensor in trained.model.state_dict().items() if name in before
               and tensor.shape == before[name].shape and not torch.equal(tensor, before[name])]  # fmt: skip
    assert any("attention" in name for name in changed)
    model.save_pretrained(tmp_path / "folder")
    same = train(plain, model=tmp_path / "folder", dataset=given(), output=tmp_path / "other")
    assert_same_weights(result.run / "last", same.run / "last")
    recorded = (result.run / "config.yaml").read_text()
    assert "model: given-in-python/ViTForImageClassification" in recorded
    assert "/tmp" not in (result.checkpoint / "README.md").read_text()


def test_a_model_object_keeps_its_processor(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.1] * 3, image_std=[0.2] * 3)
    tiny_model("vit", image_size=16).save_pretrained(tmp_path / "folder")
    plain = settings(
        from_scratch=False, max_steps=1, **dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp"))
    )
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "folder")
    first = train(plain, model=model, processor=processor, dataset=given(), output=tmp_path / "a")
    assert load_model(first.checkpoint).preprocess.mean == (0.1, 0.1, 0.1)
    processor.save_pretrained(tmp_path / "folder")  # beside the weights, where it is found by itself
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "folder")
    second = train(plain, model=model, dataset=given(), output=tmp_path / "b")
    assert load_model(second.checkpoint).preprocess == load_model(first.checkpoint).preprocess
    with pytest.raises(UsageError, match="model: got Linear; pass a name, a path or a Transformers model"):
        train(plain, model=torch.nn.Linear(2, 2), dataset=given())


def test_a_run_of_a_model_object_that_saved_nothing_cannot_be_resumed(tmp_path: Path) -> None:
    class Stopper(Callback):
        def on_step(self, step: int) -> None:
            raise KeyError

    plain = settings(from_scratch=False, **dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp")))
    with pytest.raises(KeyError):
        train(plain, model=tiny_model("vit", 16), dataset=given(), output=tmp_path / "run", callbacks=[Stopper()])
    with pytest.raises(ModelError, match="began from a model loaded in Python, and had saved nothing; start it"):
        resume(tmp_path / "run", dataset=given())


def test_callbacks_are_called_for_everything_in_order(tmp_path: Path) -> None:
    heard: list[Any] = []

    class Ear(Callback):
        def on_start(self, run: Path, config: TrainConfig, total_steps: int) -> None:
            heard.append(("start", run.name, config.device, total_steps))

        def on_step(self, step: int) -> None:
            heard.append(("step", step))

        def on_log(self, step: int, epoch: float, values: Any) -> None:
            heard.append(("log", step, round(epoch, 2), {*values}))

        def on_evaluation(self, step: int, epoch: float, metrics: Metrics) -> None:
            heard.append(("evaluation", step, metrics.split, len(metrics.per_class)))

        def on_save(self, step: int, checkpoint: Path) -> None:
            heard.append(("save", step, (checkpoint / "manifest.json").is_file()))

        def on_end(self) -> None:
            heard.append(("end",))

    values = {"loss", "accuracy", "grad_norm", "images_per_s", "data_wait", "lr"}
    both = datasets.DatasetDict({"train": given(20), "validation": given(9, 1), "test": given(12, 2)})
    run = train(settings(log_every=10, save_every=4), dataset=both, output=tmp_path / "run", callbacks=[Ear()]).run
    assert heard == [
        ("start", "run", "cpu", 4), ("step", 1),
        ("step", 2), ("log", 2, 0.67, values), ("evaluation", 2, "validation", 3),
        ("step", 3),
        ("step", 4), ("log", 4, 1.33, values), ("evaluation", 4, "validation", 3), ("save", 4, True),
        ("evaluation", heard[-2][1], "test", 3), ("end",),
    ]  # fmt: skip
    assert [(line["step"], line["split"]) for line in lines(run)][:2] == [(2, "train"), (2, "validation")]


def test_the_time_of_evaluations_and_saves_is_not_that_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.001
        return now[0]

    class Slow(Callback):
        def on_evaluation(self, step: int, epoch: float, metrics: Metrics) -> None:
            now[0] += 1000

        def on_save(self, step: int, checkpoint: Path) -> None:
            now[0] += 1000

    monkeypatch.setattr("vitft.training.cost.throughput.time.perf_counter", clock)
    every = settings(log_every=1, save_every=3, eval_every=2, max_steps=6)
    run = train(every, dataset=given(), output=tmp_path / "run", callbacks=[Slow()]).run
    rates = [line["images_per_s"] for line in lines(run) if line["split"] == "train"]
    assert len(rates) == 6
    assert all(float(str(rate)) > 1 for rate in rates)


def test_a_callback_may_end_a_run_early(tmp_path: Path) -> None:
    class Enough(Callback):
        def on_evaluation(self, step: int, epoch: float, metrics: Metrics) -> bool:
            return step == 2

    run = train(settings(max_steps=8), dataset=given(), output=tmp_path / "run", callbacks=[Enough()]).run
    assert max(line["step"] for line in lines(run)) == 2
    assert json.loads((run / "last" / "state.json").read_text())["stopped_early"]


def test_notes_are_records_that_can_be_switched_off(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("vitft")
    try:
        console.note("a note")
        logger.setLevel(logging.WARNING)
        console.note("another note")
        console.warn("a warning [/]")
        with console.working("something"):
            pass
        assert capsys.readouterr().err == "a note\nwarning: a warning [/]\n"
        logger.addHandler(caplog.handler)
        caplog.clear()
        console.warn("to be kept")
        assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
            ("vitft", "WARNING", "to be kept")
        ]
    finally:
        logger.setLevel(logging.INFO)
        logger.removeHandler(caplog.handler)


def test_errors_of_a_library_call_speak_of_arguments() -> None:
    with plainly(), pytest.raises(UsageError, match="no dataset; add dataset with a hub id"):
        train(TrainConfig())
    with typed_flags(), pytest.raises(UsageError, match="no dataset; add --dataset with a hub id"):
        train(TrainConfig())
    with plainly():
        for wrong, said in (
            ({"device": "gpu"}, "TrainConfig: device should be 'auto', 'cpu', 'cuda' or 'mps', got 'gpu'"),
            ({"learning_rate": 1}, "TrainConfig: unknown setting 'learning_rate'; did you mean lr?"),
            ({"lr": -1}, "TrainConfig: lr should be greater than 0 or 'auto', got -1"),
            ({"patch_size": 4}, "TrainConfig: patch_size applies only to a new model; add from_scratch"),
        ):
            with pytest.raises(UsageError, match=re.escape(said)):
                TrainConfig(**wrong)  # type: ignore[arg-type]
    assert TrainConfig(device="cuda:0").device == "cuda"  # type: ignore[arg-type]
    assert TrainConfig().model_copy(update={"lr": 1e-3}) == TrainConfig(lr=1e-3)
