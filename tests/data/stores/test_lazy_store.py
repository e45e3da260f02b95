"""Large splits, whose images are decoded when they are first needed."""

import errno
import json
import os
import re
import signal
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.data.stores.test_store import photos
from tests.forked import finish_together, finish_two, steps_done
from tests.training.test_trainer import lines
from vitft.checkpoints import checkpoint as ckpt
from vitft.config.train import TrainConfig
from vitft.data.augment import Preprocess
from vitft.data.sources.identity import sample_id
from vitft.data.sources.source import open_dataset
from vitft.data.stores import cache, lazy_store, store
from vitft.data.stores.lazy_store import LazyStore, is_large
from vitft.data.stores.store import Store, UnreadableError, decode_all
from vitft.errors import DataError, Stopped
from vitft.evaluation.novelty import read_novelty
from vitft.evaluation.results import read_results
from vitft.hardware.pools import map_in_processes
from vitft.training import loop, novelty, setup
from vitft.training.setup import prepare
from vitft.training.trainer import resume, train

SIZES = [(100, 64), (64, 100), (70, 90), (80, 50), (20, 10), (300, 40), (90, 90), (65, 65)]
PREPROCESS = Preprocess(32, 32)
HOW: dict[str, Any] = {"crops": False, "max_pixels": 10**7, "skip_bad": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photos(tmp_path / "photos", SIZES)


def lazily(folder: Path, **options: Any) -> LazyStore:
    rows = open_dataset(str(folder)).splits["train"]
    labels = np.array(rows["label"], np.int64)
    return LazyStore(rows, labels, PREPROCESS, **HOW | options)


def at_once(folder: Path, **options: Any) -> Store:
    rows = open_dataset(str(folder)).splits["train"]
    return decode_all(rows, PREPROCESS, training=True, **HOW | options)[0]


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def name_of(position: int) -> str:
    """Folders are read in order of their names: cats have the odd numbers."""
    return f"train/cat/{2 * position + 1:03}.png" if position < 4 else f"train/dog/{2 * (position - 4):03}.png"


# -- the store ------------------------------------------------------------------------------------


@pytest.mark.parametrize("crops", [False, True])
def test_its_images_are_those_of_a_store_that_decodes_them_at_once(folder: Path, crops: bool) -> None:
    whole, lazy = at_once(folder, crops=crops), lazily(folder, crops=crops)
    for index in ([3, 0, 5], [5, 3, 7, 0], [4], [1, 1]):
        assert same(lazy.gather(np.array(index), stacked=False), whole.gather(np.array(index), stacked=False))
    alike = lazy.gather(np.array([0, 3]))
    assert isinstance(alike, Tensor) is (not crops)


def test_each_image_is_decoded_once_when_it_is_needed(folder: Path, decoded: list[Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(lazy_store, "_SAMPLE", 1)
    store = lazily(folder)
    assert len(decoded) == 1
    store.gather(np.array([2, 4]))
    store.gather(np.array([4, 2, 6]))
    assert [source.name for source in decoded[1:]] == ["005.png", "000.png", "004.png"]


def test_what_a_forked_process_decodes_is_kept_for_all(folder: Path, decoded: list[Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(lazy_store, "_SAMPLE", 1)
    store, whole = lazily(folder, cache_gb=1), at_once(folder)
    for _ in map_in_processes(lambda i: len(store.gather(np.array([i, i + 1]))), [0, 2, 4, 6], 2):
        pass
    decoded.clear()
    everything = np.arange(8)
    assert same(store.gather(everything, stacked=False), whole.gather(everything, stacked=False))
    assert decoded == []
    store.attend()
    store.close()
    at_once(folder, cache_gb=1)
    assert decoded == []  # it is cached


@pytest.mark.parametrize("crops", [False, True])
def test_once_all_are_decoded_they_are_cached(
    folder: Path, decoded: list[Any], crops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_store, "_SAMPLE", 1)
    store = lazily(folder, cache_gb=1, crops=crops)
    for index in (np.arange(7), np.arange(8)):
        assert cache.entries() == []
        store.gather(index)
        store.attend()
        store.close()
    assert len(cache.entries()) == 1
    plain = at_once(folder, crops=crops)
    decoded.clear()
    again, whole = lazily(folder, cache_gb=1, crops=crops), at_once(folder, cache_gb=1, crops=crops)
    assert (again.digest, whole.digest) == (store.digest, plain.digest)
    assert same(again.gather(np.arange(8), stacked=False), plain.gather(np.arange(8), stacked=False))
    assert decoded == []


def test_a_cached_image_that_is_corrupt_is_decoded_again(
    folder: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = lazily(folder, cache_gb=1)
    store.attend()
    store.close()
    (entry,) = cache.entries()
    pixels = entry.folder / "pixels"
    raw = bytearray(pixels.read_bytes())
    raw[-1] ^= 1
    pixels.write_bytes(raw)
    again = lazily(folder, cache_gb=1)
    assert same(again.gather(np.arange(8), stacked=False), store.gather(np.arange(8), stacked=False))
    again.attend()
    again.attend()
    assert "cached photos are corrupt and are decoded again; the entry was removed" in capsys.readouterr().err
    assert cache.entries() == []


def test_what_is_cached_are_not_the_pixels_of_a_file_that_changed_since(folder: Path) -> None:
    store = lazily(folder, cache_gb=1)
    file = folder / name_of(1)
    Image.open(file).transpose(Image.Transpose.ROTATE_180).save(file)
    store.attend()
    store.close()
    assert len(cache.entries()) == 1
    now = at_once(folder)
    for cached in (at_once(folder, cache_gb=1), lazily(folder, cache_gb=1)):
        assert same(cached.gather(np.array([1]), stacked=False), now.gather(np.array([1]), stacked=False))


@pytest.mark.parametrize("room", [4000, 10_000])
def test_what_exceeds_the_limit_is_decoded_each_time(
    folder: Path, decoded: list[Any], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Of 3,072 bytes each, but for one of 600; the memory takes one, and the file the others that fit."""
    monkeypatch.setattr(lazy_store, "IN_MEMORY", 4000)
    store, whole = lazily(folder, cache_gb=room / 1e9), at_once(folder)
    decoded.clear()
    index = np.arange(8)
    for _ in range(2):
        assert same(store.gather(index, stacked=False), whole.gather(index, stacked=False))
    kept = {4000: 2, 10_000: 3}[room]
    assert len(decoded) == 2 * (8 - kept)
    assert cache.entries() == []


def test_an_image_that_is_not_kept_must_not_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_store, "IN_MEMORY", 1)
    store = lazily(folder, skip_bad=True)
    file = folder / name_of(1)
    Image.open(file).transpose(Image.Transpose.ROTATE_180).save(file)
    said = rf"{name_of(1)}: decodes to different pixels; it has changed since the run began\."
    with pytest.raises(DataError, match=said):
        store.gather(np.array([1]))


@pytest.mark.parametrize("forks", [False, True])
def test_in_place_of_a_bad_image_the_next_of_its_class_is_shown(
    folder: Path, decoded: list[Any], forks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_store, "_SAMPLE", 1)
    for position in (2, 3, 5):
        (folder / name_of(position)).write_bytes(b"no image")
    store = lazily(folder, skip_bad=True)
    index = np.array([5, 2, 3, 1])

    def shown(_: int) -> list[Tensor]:
        return list(store.gather(index, stacked=False))

    images = next(map_in_processes(shown, [0], 1)) if forks else shown(0)
    wanted = at_once(folder, skip_bad=True)  # without the three
    assert same(images, wanted.gather(np.array([3, 0, 0, 1]), stacked=False))
    decoded.clear()
    store.gather(index)
    assert decoded == []
    store.attend()
    store.attend()
    assert [(one.position, one.name, one.reason) for one in store.skipped] == [
        (position, name_of(position), "is not an image in a supported format") for position in (2, 3, 5)
    ]
    for position in (0, 1):
        (folder / name_of(position)).write_bytes(b"no image")
    with pytest.raises(DataError, match=rf"{name_of(1)}: is not .*; nor can any other image of its class be read: fix"):
        lazily(folder, skip_bad=True).gather(np.array([1]))


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_a_failure_of_the_machine_is_not_a_bad_image(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would come back intact on resume."""
    monkeypatch.setattr(lazy_store, "_SAMPLE", 1)
    store = lazily(folder, skip_bad=True)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(UnreadableError, match=name_of(3)):
            store.gather(np.array([3]))
    assert same(store.gather(np.array([3]), stacked=False), at_once(folder).gather(np.array([3]), stacked=False))
    store.attend()
    assert store.skipped == []


def test_where_no_large_file_is_allowed_memory_is_used_alone(
    folder: Path, decoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_store, "IN_MEMORY", 10_000)
    real = os.truncate

    def limited(file: int, size: int) -> None:
        if size > 10_000:
            raise OSError(errno.EFBIG, "File too large")
        real(file, size)

    monkeypatch.setattr(os, "truncate", limited)
    store = lazily(folder, cache_gb=1)
    decoded.clear()
    assert same(store.gather(np.arange(8), stacked=False), at_once(folder).gather(np.arange(8), stacked=False))
    assert 8 < len(decoded) < 16  # some are kept


@pytest.mark.parametrize("forks", [False, True])
def test_a_bad_image_that_may_not_be_skipped_is_named(
    folder: Path, forks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_store, "_SAMPLE", 1)
    (folder / name_of(5)).write_bytes(b"")
    store, index = lazily(folder), np.array([4, 5])
    said = rf"^{name_of(5)}: is empty .*; fix it, or add --on-bad-image skip\.$"
    with pytest.raises(UnreadableError, match=said) as found:
        next(map_in_processes(lambda _: store.gather(index), [0], 1)) if forks else store.gather(index)
    assert found.value.names == [name_of(5)]


def test_a_split_is_large_by_its_images_and_the_model_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = open_dataset(str(folder)).splits["train"]
    assert not is_large(rows, PREPROCESS)
    monkeypatch.setattr(lazy_store, "PHOTOS", 7)
    assert is_large(rows, PREPROCESS)
    assert not is_large(rows, Preprocess(224, 224))
    monkeypatch.setattr(lazy_store, "SMALL", 7)
    assert is_large(rows, Preprocess(224, 224))


# -- training on one ------------------------------------------------------------------------------


def settings(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.parse(
        {"dataset": str(folder), "model": "vit-micro", "image_size": 28, "epochs": 3, "batch_size": 8, "lr": 3e-3,
         "val_fraction": 0.25, "device": "cpu", "precision": "fp32", "compile": "off", "threads": 1,
         "head_init": "random", "reference_images": 0, "cache_gb": 0.0}
        | changes
    )  # fmt: skip


def few_are_many() -> None:
    """In a process of its own."""
    lazy_store.PHOTOS, lazy_store._SAMPLE = 10, 2


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset that is large."""
    monkeypatch.setattr(lazy_store, "PHOTOS", 10)
    monkeypatch.setattr(lazy_store, "_SAMPLE", 2)
    return photos(tmp_path / "many", [(40 + i, 60) for i in range(48)])


def bits(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def trained_on(folder: Path) -> list[str]:
    """The names of the training images, in order."""
    split = prepare(settings(folder)).splits["train"]
    return [str(name) for name in split.ids]


def damage(file: Path) -> bytes:
    """Cut an image short, which its header does not tell; returns what it was."""
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    return raw


@pytest.mark.parametrize("changes", [{}, {"augment": "crop"}, {"head_init": "features", "cache_gb": 1.0}])
def test_a_run_has_the_bits_of_one_that_decoded_everything_first(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    first = train(settings(many, **changes), output=tmp_path / "lazy")
    second = train(settings(many, **changes), output=tmp_path / "cached")
    monkeypatch.setattr(lazy_store, "PHOTOS", 1000)
    whole = train(settings(many, **changes), output=tmp_path / "whole")
    assert bits(first.run / "last") == bits(whole.run / "last") == bits(second.run / "last")
    assert first.scores["validation"].accuracy == whole.scores["validation"].accuracy


def test_nothing_but_the_first_batch_is_decoded_before_the_first_step(
    many: Path, tmp_path: Path, decoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    step = loop.Learner.step

    def first(self: Any, number: int) -> Any:
        result = step(self, number)
        seen.append(len(decoded))
        return result

    monkeypatch.setattr(loop.Learner, "step", first)
    train(settings(many, epochs=1), output=tmp_path / "run")
    assert seen[0] <= 10
    assert len(decoded) == 48


def test_headers_are_read_before_anything_is_written(many: Path, tmp_path: Path) -> None:
    bad = many / trained_on(many)[3]
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match=rf"{bad.name}: is not an image"):
        train(settings(many), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    result = train(settings(many, on_bad_image="skip"), output=tmp_path / "run")
    assert result.run.name == "run"


def test_an_image_found_bad_while_training_stops_the_run_which_then_goes_on(many: Path, tmp_path: Path) -> None:
    undisturbed = train(settings(many), output=tmp_path / "whole")
    bad = many / trained_on(many)[3]
    raw = damage(bad)
    with pytest.raises(DataError) as stopped:
        train(settings(many, save_every=100), output=tmp_path / "run")
    said = re.fullmatch(
        rf".*{bad.name}: is truncated.*; fix it, or add --on-bad-image skip\. "
        rf"To go on from step (\d+): vitft train --resume {tmp_path / 'run'}",
        str(stopped.value),
    )
    assert said
    folders = ckpt.step_folders(tmp_path / "run")
    assert [folder.name for folder in folders] == ([f"step-{int(said[1]):06}"] if int(said[1]) else [])
    assert int(said[1]) == steps_done(tmp_path / "run")
    bad.write_bytes(raw)
    assert bits(resume(tmp_path / "run").run / "last") == bits(undisturbed.run / "last")
    Image.open(bad).transpose(Image.Transpose.ROTATE_180).save(bad)
    with pytest.raises(DataError, match="the same names, but other pixels"):  # by now the run has seen it
        resume(tmp_path / "run", {"epochs": 4})


def test_a_resumed_run_shows_the_same_in_place_of_a_bad_image(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = many / trained_on(many)[3]
    damage(bad)
    undisturbed = train(settings(many, on_bad_image="skip"), output=tmp_path / "whole")
    with pytest.raises(DataError):
        train(settings(many), output=tmp_path / "run")
    capsys.readouterr()
    result = resume(tmp_path / "run", {"on_bad_image": "skip"})
    assert bits(result.run / "last") == bits(undisturbed.run / "last")
    assert capsys.readouterr().err.count(f"{bad.name} (train): is truncated") == 1
    for run in ("whole", "run"):
        assert f'"{trained_on(many)[3]}"' in (tmp_path / run / "splits.json").read_text().split('"skipped"')[1]


def test_a_split_that_skipped_images_make_small_is_resumed_as_it_began(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = trained_on(many)
    monkeypatch.setattr(lazy_store, "PHOTOS", len(names) - 1)
    (many / names[3]).write_bytes(b"no image")
    run = train(settings(many, on_bad_image="skip"), output=tmp_path / "run").run
    resume(run, {"epochs": 4})
    assert ckpt.read_state(run / "last").step == 4 * -(-(len(names) - 1) // 8)


def test_a_validation_image_found_bad_is_left_out_of_the_score(many: Path, tmp_path: Path) -> None:
    split = prepare(settings(many)).splits["validation"]
    bad = many / str(split.ids[0])
    raw = damage(bad)
    with pytest.raises(
        DataError, match=rf"{bad.name}: is truncated[^;]*; fix it, or add --on-bad-image skip\. To go on"
    ):
        train(settings(many), output=tmp_path / "run")
    result = resume(tmp_path / "run", {"on_bad_image": "skip"})
    assert result.scores["validation"].count == len(split.ids) - 1
    bad.write_bytes(raw)
    whole = train(settings(many), output=tmp_path / "whole")
    assert whole.scores["validation"].count == len(split.ids)
    assert bits(result.run / "last") == bits(whole.run / "last")


def test_content_hashes_are_recorded_with_the_first_checkpoint(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recorded() -> list[bool]:
        document = json.loads((tmp_path / "run/splits.json").read_text())
        return ["contents" in entry for entry in document["splits"].values()]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Learner, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings(many), output=tmp_path / "run")
    assert recorded() == [False, False]
    resume(tmp_path / "run")
    assert recorded() == [True, True]
    document = json.loads((tmp_path / "run/splits.json").read_text())
    monkeypatch.setattr(lazy_store, "PHOTOS", 1000)
    whole = train(settings(many), output=tmp_path / "whole")
    at_once = json.loads((whole.run / "splits.json").read_text())
    for role, entry in document["splits"].items():
        assert entry["contents"] == at_once["splits"][role]["contents"]


def test_the_name_of_a_repaired_image_may_be_spelled_otherwise(many: Path, tmp_path: Path) -> None:
    """Decomposed, as macOS stores names."""
    plain = many / trained_on(many)[3]
    bad = plain.rename(plain.with_name("e\u0301" + plain.name))
    raw = damage(bad)
    with pytest.raises(DataError):
        train(settings(many), output=tmp_path / "run")
    bad.write_bytes(raw)
    assert resume(tmp_path / "run").step


def test_a_run_that_is_stopped_does_not_wait_for_hashes(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on, step = threading.Event(), loop.Learner.step

    def slow(*_: object) -> dict[str, list[str]]:
        going_on.wait()
        return {}

    def interrupted(self: Any, number: int) -> Any:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr("vitft.training.run_folder.contents_of", slow)
        patch.setattr(loop.Learner, "step", interrupted)
        with pytest.raises(Stopped):
            train(settings(many, save_every=100), output=tmp_path / "run")
    going_on.set()
    assert [folder.name for folder in ckpt.step_folders(tmp_path / "run")] in (["step-000002"], ["step-000003"])
    resume(tmp_path / "run")
    splits = json.loads((tmp_path / "run/splits.json").read_text())["splits"]
    assert all(len(entry["contents"]) == entry["count"] for entry in splits.values())


def test_all_images_that_were_left_out_are_listed(many: Path, tmp_path: Path) -> None:
    """By their headers, while training, in a linear probe too, and of the test split, which is scored last."""
    for kind in ("cat", "dog"):
        (many / "test" / kind).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40, 40), (90 * number, 9, 9)).save(many / f"test/{kind}/{number}.png")
    names = trained_on(many)
    damage(many / names[3])
    damage(many / "test/cat/1.png")
    (many / names[8]).write_bytes(b"no image")
    probe = {"freeze": "backbone", "augment": "flip", "epochs": 6}
    for name, changes in (("full", {}), ("probe", probe)):
        result = train(settings(many, on_bad_image="skip", **changes), output=tmp_path / name)
        splits = json.loads((result.run / "splits.json").read_text())["splits"]
        assert {bad for bad, _ in splits["train"]["skipped"]} == {names[3], names[8]}
        assert [bad for bad, _ in splits["test"]["skipped"]] == ["test/cat/1.png"]
        assert result.scores["test"].count == 5


def words_of(config: TrainConfig) -> list[str]:
    given = config.model_dump(exclude_defaults=True)
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_two_processes_show_the_same_in_place_of_a_bad_image_as_one(many: Path, tmp_path: Path) -> None:
    for place in (3, 11):
        damage(many / trained_on(many)[place])
    skipping = settings(many, on_bad_image="skip", log_every=1)
    one = train(skipping, output=tmp_path / "one").run
    two = tmp_path / "two"
    words = [*words_of(skipping), "--output", str(two)]
    both = finish_two("train", *words, log=tmp_path / "log", before=few_are_many)
    assert [code for code, _ in both] == [0, 0], both
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    listed = [json.loads((run / "splits.json").read_text())["splits"]["train"]["skipped"] for run in (one, two)]
    assert len(listed[0]) == 2
    assert sorted(listed[0]) == sorted(listed[1])


@pytest.mark.parametrize("epochs", [1, 4])
def test_what_another_machine_skips_is_told(many: Path, tmp_path: Path, epochs: int) -> None:
    """By the one process that speaks, and once, though after four epochs both machines have met most images."""
    bad = trained_on(many)[::4]
    for name in bad:
        damage(many / name)
    words = [*words_of(settings(many, on_bad_image="skip", epochs=epochs)), "--output", str(tmp_path / "two")]
    both = finish_together(2, "train", *words, log=tmp_path / "log", before=few_are_many, machines=2)
    assert [code for code, _ in both] == [0, 0], both
    assert sorted(re.findall("warning: skipped (\\S+) ", both[0][1])) == sorted(bad)
    assert both[1][1] == ""


def counting(record: str, place: str) -> None:
    """Of each image that this process decodes, write the name down; what is cached is in `place`."""
    few_are_many()
    os.environ["VITFT_CACHE"] = place
    real = store.decode

    def decode(source: Any, *more: Any) -> Any:
        with Path(record).open("a") as file:
            file.write(f"{Path(source).name}\n")
        return real(source, *more)

    store.decode = decode


def test_two_processes_decode_each_training_image_once(many: Path, tmp_path: Path) -> None:
    """In three epochs, each would decode nearly all images. Both decode what they need at the same moment."""
    words = [*words_of(settings(many, cache_gb=1.0, log_every=1)), "--output", str(tmp_path / "two")]
    record = tmp_path / "decoded"
    both = finish_two(
        "train", *words, log=tmp_path / "log", before=partial(counting, str(record), os.environ["VITFT_CACHE"])
    )
    assert [code for code, _ in both] == [0, 0], both
    names = [name.rpartition("/")[2] for name in trained_on(many)]
    times = Counter(record.read_text().split())
    # Those by which the decoder is identified, the first and the last one here, are needed by both at once, and first.
    assert {name: times[name] for name in names[1:-1]} == dict.fromkeys(names[1:-1], 1)
    assert {times[names[0]], times[names[-1]]} <= {1, 2}
    assert len(names) in [entry.images for entry in cache.entries()]  # for the next run
    one = train(settings(many, log_every=1), output=tmp_path / "one").run
    for ours, theirs in zip(lines(one), lines(tmp_path / "two"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_two_processes_that_cannot_decode_a_validation_image_save_together(many: Path, tmp_path: Path) -> None:
    held_out = prepare(settings(many)).splits["validation"].ids
    bad = many / str(held_out[0])
    raw = damage(bad)
    run = tmp_path / "run"
    (first, said), (second, _) = finish_two(
        "train", *words_of(settings(many)), "--output", str(run), log=tmp_path / "log", before=few_are_many
    )
    assert (first, second) == (3, 3)
    assert f"{bad.name}: is truncated" in said
    folders = ckpt.step_folders(run)
    assert len(folders) == 1
    assert f"To go on from step {int(folders[0].name.removeprefix('step-'))}:" in " ".join(said.split())
    bad.write_bytes(raw)
    assert resume(run).scores["validation"].count == len(held_out)


def few_are_many_and_decoding_is_told(folder: str) -> None:
    """Write down the names of the images that this process decodes at once."""
    few_are_many()
    novelty.FEWEST, real, file = 5, setup.decode_all, Path(folder, os.environ["RANK"])

    def decode_and_tell(rows: Any, *given: Any, **how: Any) -> Any:
        file.write_text("\n".join(sample_id(rows, row) for row in range(len(rows))))
        return real(rows, *given, **how)

    setup.decode_all = decode_and_tell


def test_each_of_two_processes_decodes_the_validation_images_that_it_scores(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of which cannot be read."""
    held_out = [str(name) for name in prepare(settings(many)).splits["validation"].ids]
    damage(many / held_out[-2])
    skipping = settings(many, on_bad_image="skip", reference_images=20)
    monkeypatch.setattr(novelty, "FEWEST", 5)
    one, two = train(skipping, output=tmp_path / "one").run, tmp_path / "two"
    words, told = [*words_of(skipping), "--output", str(two)], partial(few_are_many_and_decoding_is_told, str(tmp_path))
    both = finish_two("train", *words, log=tmp_path / "log", before=told)
    assert [code for code, _ in both] == [0, 0], both
    parts = [(tmp_path / str(rank)).read_text().splitlines() for rank in range(2)]
    assert parts[0] + parts[1] == held_out
    assert len(parts[0]) in (len(parts[1]), len(parts[1]) + 1)
    alone, shared = (read_results(run).predictions("validation") for run in (one, two))
    assert alone.ids == shared.ids
    assert len(alone.ids) == len(held_out) - 1
    np.testing.assert_allclose(alone.probabilities, shared.probabilities, atol=1e-4)
    np.testing.assert_allclose(*(read_novelty(run).known for run in (one, two)), atol=1e-2)
    skipped = [json.loads((run / "splits.json").read_text())["splits"]["validation"]["skipped"] for run in (one, two)]
    assert skipped[0] == skipped[1] != []


@pytest.mark.parametrize("role", ["train", "validation"])
def test_a_run_does_not_go_on_with_other_images(many: Path, tmp_path: Path, role: str) -> None:
    train(settings(many, epochs=1), output=tmp_path / "run")
    file = many / str(prepare(settings(many)).splits[role].ids[-1])
    Image.open(file).transpose(Image.Transpose.ROTATE_180).save(file)
    with pytest.raises(DataError, match=f"the {role} split differs .*: the same names, but other pixels"):
        resume(tmp_path / "run", {"epochs": 2})
