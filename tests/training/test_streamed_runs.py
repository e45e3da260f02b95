"""Training on shards behind a URL: the same samples whatever is interrupted, fails, or shares the work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import BUCKET
from tests.forked import finish_two, flags, steps_done
from tests.training.test_trainer import AUGMENTED, assert_same_weights, config, interrupted, lines
from tests.web import FileServer, Request
from vitft import evaluate, train
from vitft.checkpoints.checkpoint import step_folders, step_of
from vitft.checkpoints.metadata import name_of
from vitft.data import packing, sampling
from vitft.data.augment import Preprocess
from vitft.data.augmentation.settings import Augmentation
from vitft.data.decoder import MAX_PIXELS
from vitft.data.loader import TrainLoader
from vitft.data.sources.source import class_indices, open_dataset
from vitft.data.stores.lazy_store import LazyStore
from vitft.data.streaming import blocks, remote
from vitft.data.streaming.parquet import ParquetShard
from vitft.errors import DataError, UsageError
from vitft.training.cost.dry_run import plan
from vitft.training.trainer import resume


def is_block(request: Request) -> bool:
    """Whether a request is for the images of a row group; footers are longer, labels shorter."""
    return request.first is not None and request.last is not None and 3000 < request.last - request.first < 20_000


LONGER = {"max_train_samples": None, "batch_size": 16, "max_steps": 60, "epochs": 1, "save_every": 10, "log_every": 1}


def story(run: Path) -> list[tuple[object, ...]]:
    return [(line["step"], line["split"], line["loss"], line["accuracy"]) for line in lines(run)]


@pytest.mark.parametrize(
    "other", [{}, AUGMENTED, {"augment": "crop", "epochs": 3}], ids=["plain", "augmented", "crops"]
)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    settings = config(dataset=f"{server.url}/digits", **LONGER | other)
    whole = train(settings, output=tmp_path / "whole")
    interrupted(settings, tmp_path / "cut", 37, monkeypatch)
    blocks.clear()
    resumed = resume(tmp_path / "cut")
    assert story(resumed.run) == story(whole.run)
    assert_same_weights(whole.run / "last", resumed.run / "last")


def test_two_processes_train_as_one_does(digit_shards: Path, tmp_path: Path) -> None:
    changes = LONGER | {"dataset": f"file://{digit_shards}", "max_steps": 40}
    one = train(config(**changes), output=tmp_path / "one")
    ended = finish_two("train", *flags(**changes), "--output", str(tmp_path / "two"), log=tmp_path / "log")
    assert [code for code, _ in ended] == [0, 0], ended
    for ours, theirs in zip(lines(one.run), lines(tmp_path / "two"), strict=True):
        assert (ours["step"], ours["split"]) == (theirs["step"], theirs["split"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.fixture(params=["https", "s3"])
def faulty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[FileServer, str]:
    """What serves the shards of digits and can fail, and their URL."""
    monkeypatch.setattr(remote, "_SILENCE_S", 1)
    if request.param == "s3":
        return request.getfixturevalue("bucket"), BUCKET
    server = request.getfixturevalue("server")
    return server, f"{server.url}/digits"


@pytest.mark.parametrize(("fault", "why"), [(503, "503|reduce your request rate"), ("stall", "the server is silent")])
def test_a_server_that_fails_stops_the_run_with_everything_saved(
    faulty: tuple[FileServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int | str, why: str
) -> None:
    server, url = faulty
    for name, number in (("_LANES", 1), ("_SPREAD", 1)):  # else all is fetched before the first step
        monkeypatch.setattr(sampling, name, number)
    settings = config(dataset=url, **LONGER | {"stream_gb": 0, "head_init": "random", "save_every": 100})
    whole = train(settings, output=tmp_path / "whole")

    def fails(request: Request, number: int) -> int | str | None:
        return fault if is_block(request) and steps_done(tmp_path / "cut") >= 12 else None

    server.fault = fails
    blocks.clear()
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_ATTEMPTS", 2)
        with pytest.raises(
            DataError, match=rf"train-0000.*cannot be fetched: .*({why}).*vitft train --resume"
        ) as caught:
            train(settings, output=tmp_path / "cut")
    assert "\n" not in str(caught.value)
    (saved,) = step_folders(tmp_path / "cut")
    assert f"To go on from step {step_of(saved)}: " in str(caught.value)
    assert step_of(saved) == steps_done(tmp_path / "cut") >= 12  # and not an earlier one
    server.fault = lambda request, number: None
    resumed = resume(tmp_path / "cut")
    assert story(resumed.run) == story(whole.run)
    assert_same_weights(whole.run / "last", resumed.run / "last")


def test_what_fails_now_and_then_changes_nothing(faulty: tuple[FileServer, str], tmp_path: Path) -> None:
    server, url = faulty
    settings = config(dataset=url, **LONGER | {"stream_gb": 0})
    whole = train(settings, output=tmp_path / "whole")
    faults: list[int | str] = [503, "cut", "damaged", 500, "stall"]
    met: list[int | str] = []

    def fails(request: Request, number: int) -> int | str | None:
        if not is_block(request) or number % 3:
            return None
        met.append(faults[len(met) % len(faults)])
        return met[-1]

    server.fault = fails
    blocks.clear()
    flaky = train(settings, output=tmp_path / "flaky")
    assert {*met} == {*faults}
    assert_same_weights(whole.run / "last", flaky.run / "last")


@pytest.mark.parametrize("gone", ["train-00001", "test-00000"])
def test_a_shard_that_is_gone_is_not_skipped(faulty: tuple[FileServer, str], tmp_path: Path, gone: str) -> None:
    """Hundreds of images are missing then, not a bad one."""
    server, url = faulty
    settings = config(dataset=url, on_bad_image="skip", stream_gb=0, **LONGER)
    server.fault = lambda request, number: 404 if is_block(request) and gone in request.name else None
    with pytest.raises(
        DataError, match=rf"^{gone}.*: cannot be fetched: there is no such file or folder; it may be intact: try"
    ):
        train(settings, output=tmp_path / "run")


def test_a_shard_that_stays_damaged_is_not_skipped(server: FileServer, tmp_path: Path) -> None:
    settings = config(dataset=f"{server.url}/digits", on_bad_image="skip", stream_gb=0, **LONGER)
    server.fault = lambda request, number: "damaged" if is_block(request) and "train-00001" in request.name else None
    with pytest.raises(DataError, match=r"^train-00001.*: its shard is corrupt, or has changed; it may be intact: try"):
        train(settings, output=tmp_path / "run")


def test_a_run_on_other_data_is_scored_on_shards(server: FileServer, digits_run: Any) -> None:
    """Settings for reading its own dataset do not apply, and its training images are not looked for among others."""
    found = evaluate(digits_run.run, dataset=f"{server.url}/digits")
    assert (found.split, found.count) == ("test", 359)
    assert not [one for one in server.requests if is_block(one) and "train" in one.name]


def test_shards_that_change_are_refused_on_resume(
    digit_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: Path
) -> None:
    (tmp_path / "set").mkdir()
    for file in digit_shards.glob("*.parquet"):
        (tmp_path / "set" / file.name).write_bytes(file.read_bytes())
    with FileServer(tmp_path) as server:
        settings = config(dataset=f"{server.url}/set", **LONGER)
        interrupted(settings, tmp_path / "run", 37, monkeypatch)
        changed = min((tmp_path / "set").glob("train*"))
        changed.write_bytes(changed.read_bytes().replace(b"\x89PNG", b"\x88PNG", 1))
        with pytest.raises(DataError, match=r"its shards have changed since the run began\.$"):
            resume(tmp_path / "run")


def test_a_checkpoint_has_the_name_of_a_dataset_not_its_url(server: FileServer, tmp_path: Path) -> None:
    """It can be shared; who may read the URL need not be everyone, and it may have a token."""
    url = f"{server.url}/digits?token=s3cret"
    run = train(config(dataset=f"{server.url}/digits", **LONGER | {"max_steps": 2}), output=tmp_path / "run").run
    for file in ("README.md", "vitft.json"):
        assert "127.0.0.1" not in (run / "best" / file).read_text()
    assert evaluate(run).count == 50  # the run knows the URL
    assert name_of(url) == name_of(f"{server.url}/digits/") == "digits"
    assert name_of("hf://datasets/owner/name@main/data") == "hf://datasets/owner/name@main/data"


def test_balanced_sampling_is_refused_with_a_remedy(digit_shards: Path, tmp_path: Path) -> None:
    settings = config(dataset=f"file://{digit_shards}", sampling="balanced", max_steps=1)
    with pytest.raises(
        UsageError, match=r"sampling balanced repeats images of the whole dataset.*--logit-adjustment 1"
    ):
        train(settings, output=tmp_path / "run")


def test_a_dry_run_fetches_next_to_nothing(server: FileServer) -> None:
    settings = config(dataset=f"{server.url}/digits", stream_gb=0)
    plan(settings)
    assert len({*filter(is_block, server.requests)}) <= 2


def loader(url: str, rank: int, world: int, batch_size: int = 16) -> TrainLoader:
    rows = open_dataset(url).splits["train"]
    how = Preprocess(height=8, width=8, mean=(0.5,) * 3, std=(0.5,) * 3, resample="bilinear", rescale=1 / 255)
    store = LazyStore(rows, class_indices(rows), how, crops=False, max_pixels=10**6, skip_bad=False)
    augmentation = Augmentation.of(config(augment="flip"))
    return TrainLoader(
        store, class_indices(rows), how, augmentation=augmentation, classes=10, batch_size=batch_size,
        device=store.device, rank=rank, world=world,
    )  # fmt: skip


def test_the_first_steps_fetch_what_they_need_and_what_comes_next(server: FileServer) -> None:
    one = loader(f"{server.url}/digits", 0, 1)
    one.end = 3
    for step in range(3):
        one.batch(step)
    shown = one.store.blocks[np.concatenate([one.samples(step) for step in range(3)])]  # type: ignore[union-attr]
    first = one.store.blocks[:1]  # type: ignore[union-attr,index]  # looked at for the format of images
    assert len({*filter(is_block, server.requests)}) == len(np.union1d(shown, first)) < 20


@pytest.mark.usefixtures("fetched")
def test_without_a_disk_an_epoch_fetches_every_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in use and what comes next are in memory together."""
    monkeypatch.setattr(packing, "_ROW_GROUP", 8)
    monkeypatch.setattr(packing, "_SMALL_GROUP", 0)
    packing.pack(open_dataset("digits"), tmp_path / "set", max_pixels=MAX_PIXELS)
    seen: list[tuple[object, int]] = []
    fetch = ParquetShard.fetch

    def spy(self: ParquetShard, block: int, column: str) -> object:
        seen.append((self, block))
        return fetch(self, block, column)

    monkeypatch.setattr(ParquetShard, "fetch", spy)
    one = loader(f"file://{tmp_path}/set", 0, 1, batch_size=32)
    one.end = one.steps_per_epoch
    for step in range(one.steps_per_epoch):
        one.batch(step)
    assert len({*seen}) == len(np.unique(one.store.blocks)) == 180  # type: ignore[union-attr]
    assert len(seen) <= 180 + 15  # where one of 16 lanes ends and the next one begins, they share a block


def test_processes_fetch_different_shards(digit_shards: Path) -> None:
    both = [loader(f"file://{digit_shards}", rank, 2) for rank in range(2)]
    wanted = [
        {*one.store.blocks[np.concatenate([one.shard(step) for step in range(one.steps_per_epoch)])].tolist()}  # type: ignore[union-attr]
        for one in both
    ]
    assert len(wanted[0] & wanted[1]) <= 4  # of 24
    assert len(wanted[0] | wanted[1]) == 24
