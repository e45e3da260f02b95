"""Run folders: atomic writes, checksums, locks."""

import dataclasses
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vitft import TrainConfig, evaluate, predict, train
from vitft.checkpoints import checkpoint as ckpt
from vitft.checkpoints.metadata import read_card, verify, write_card
from vitft.config.train import PATHS
from vitft.errors import DataError, ModelError, UsageError
from vitft.explain.trace import trace_image
from vitft.io.atomic import lock_folder, new_folder, write_json, write_text
from vitft.training.callbacks import recorded
from vitft.training.run_folder import locked
from vitft.training.setup import absolute
from vitft.training.trainer import resume


def test_a_folder_write_that_fails_leaves_the_previous_folder(tmp_path: Path) -> None:
    target = tmp_path / "best"
    with new_folder(target) as fresh:
        (fresh / "weights").write_text("old")

    def fail() -> None:
        with new_folder(target) as fresh:
            (fresh / "weights").write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_file_write_that_fails_leaves_the_previous_file(tmp_path: Path) -> None:
    file = tmp_path / "splits.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(file, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\ud800")
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["splits.json"]


def test_damage_to_a_step_checkpoint_is_found(tmp_path: Path, digits_run: object) -> None:
    run: Path = digits_run.run  # type: ignore[attr-defined]
    folder = ckpt.step_folders(run)[0]
    assert ckpt.find_damage(folder) is None
    copy = tmp_path / folder.name
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "config.json"):
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 4
        (copy / name).write_bytes(data)
        assert ckpt.find_damage(copy) == f"{name} does not match its checksum"
        (copy / name).write_bytes(data[:-1])
        assert f"{name} has" in str(ckpt.find_damage(copy))
        (copy / name).unlink()
        assert "FileNotFoundError" in str(ckpt.find_damage(copy))


def test_a_folder_that_is_not_a_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="exists and is not empty; choose another"):
        ckpt.create_run(tmp_path, overwrite=False)
    with pytest.raises(UsageError, match="replaces only run folders"):
        ckpt.create_run(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_run_killed_before_its_config_was_written_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    write_json(tmp_path / "environment.json", {})
    ckpt.create_run(tmp_path, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    (tmp_path / "checkpoints" / "step-000001").mkdir()
    with pytest.raises(UsageError, match="exists and is not empty; choose another"):
        ckpt.create_run(tmp_path, overwrite=False)


def test_an_existing_run_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ckpt.create_run(run, overwrite=False)
    write_text(run / "config.yaml", "dataset: digits\n")
    with pytest.raises(UsageError, match=r"--resume .* continues it, --overwrite replaces it"):
        ckpt.create_run(run, overwrite=False)
    ckpt.create_run(run, overwrite=True)
    assert not (run / "config.yaml").exists()


class PowerCut(Exception):  # noqa: N818
    pass


def lose_power_before_first_save(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a run by one that starts from its last weights, and lose power before the first checkpoint."""

    def cut(*given: Any) -> None:
        raise PowerCut

    settings = TrainConfig(
        dataset="digits", model=str(run / "last"), max_steps=2, save_every=1, batch_size=16, max_eval_samples=20,
        device="cpu", precision="fp32", seed=7,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "save_step", cut)
        with pytest.raises(PowerCut):
            train(settings, output=run, overwrite=True)


def test_a_run_that_replaces_its_starting_point_can_be_resumed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_power_before_first_save(copied, monkeypatch)
    assert ckpt.read_config(copied).seed == 7
    assert resume(copied).step == 2
    names = {file.name for file in copied.iterdir()}
    assert names == {
        "best", "last", "checkpoints", "config.yaml", "environment.json", "splits.json", "metrics.jsonl",
        "results.json", "predictions-validation.parquet", "predictions-test.parquet",
    }  # fmt: skip
    assert ckpt.read_config(copied).model == str(copied / "last")


def test_a_run_is_restored_if_its_replacement_saved_nothing(
    copied: Path, digits_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        lose_power_before_first_save(copied, monkeypatch)
    ckpt.restore_replaced(copied)
    names = {file.relative_to(digits_run.run) for file in digits_run.run.rglob("*")}
    assert {file.relative_to(copied) for file in copied.rglob("*")} == names
    assert evaluate(copied).accuracy == digits_run.scores["test"].accuracy


@pytest.mark.parametrize("moves", range(1, 17))
def test_a_kill_while_a_run_is_moved_aside_or_restored_loses_nothing(
    copied: Path, digits_run: Any, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """Seven files and folders are moved out and back; their parent folder is renamed each time."""
    real, renames = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        renames.append(self)
        if len(renames) == moves:
            raise PowerCut
        return real(self, target)

    def set_aside_and_restore() -> None:
        ckpt.create_run(copied, overwrite=True)
        ckpt.restore_replaced(copied)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(PowerCut):
            set_aside_and_restore()
    with locked(copied):
        pass
    names = {file.relative_to(digits_run.run) for file in digits_run.run.rglob("*")}
    assert {file.relative_to(copied) for file in copied.rglob("*")} == names


def test_the_model_folder_for_a_path(tmp_path: Path, digits_run: object) -> None:
    run: Path = digits_run.run  # type: ignore[attr-defined]
    assert ckpt.find_model(run) == run / "best"
    assert ckpt.find_model(run / "last") == run / "last"
    (tmp_path / "checkpoints").mkdir()
    write_text(tmp_path / "config.yaml", "")
    with pytest.raises(ModelError, match="no checkpoint yet"):
        ckpt.find_model(tmp_path)


def test_a_misspelled_exported_file_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no\.onnx: no such file; `vitft export RUN` makes one\.$"):
        ckpt.find_model(tmp_path / "no.onnx")
    (tmp_path / "model.onnx").write_text("")
    with pytest.raises(ModelError, match=rf"no\.onnx: no such file; did you mean {tmp_path}/model\.onnx\?$"):
        ckpt.find_model(tmp_path / "no.onnx")


@pytest.mark.parametrize("typed", ["step-2", "step-000002", "checkpoints/step-2", "checkpoints/step2", "2"])
def test_a_misspelled_step_folder_gets_a_suggestion(digits_run: object, typed: str) -> None:
    run: Path = digits_run.run  # type: ignore[attr-defined]
    folder = run / "checkpoints" / "step-000002"
    assert folder.is_dir()
    with pytest.raises(ModelError) as caught:
        ckpt.find_model(run / typed)
    assert str(caught.value) == (
        f"{run / typed}: no such checkpoint; this run has best, last, checkpoints/step-000003, "
        f"checkpoints/step-000002; did you mean {folder}?"
    )


def test_the_error_for_a_missing_checkpoint_lists_the_existing_ones(digits_run: object) -> None:
    run: Path = digits_run.run  # type: ignore[attr-defined]
    for typed in ("newest", "step-7", "checkpoints/step-000007"):
        with pytest.raises(ModelError, match=r"has best, last, checkpoints/step-000003, checkpoints/step-000002\.$"):
            ckpt.find_model(run / typed)


def test_invalid_metadata_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "vitft.json").write_text('{"vitft": "0", "config": {"lr": -1}}')
    with pytest.raises(ModelError, match=r"vitft\.json: cannot be read"):
        read_card(tmp_path)


def test_a_folder_is_restored_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    (tmp_path / ".best.vitft-old").mkdir()
    (tmp_path / ".best.vitft-old" / "weights").write_text("old")

    def fail() -> None:
        with new_folder(tmp_path / "best"):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (tmp_path / "best" / "weights").read_text() == "old"


def test_unrelated_files_in_a_run_folder_stay(copied: Path) -> None:
    others = [".notes.old", ".slurm.new", ".cache.gone", ".vimrc.new", "notes.vitft-old", ".vitft-old"]
    for name in others:
        (copied / name).write_text("mine")
    (copied / ".trash.old").mkdir()
    with locked(copied):
        pass
    assert [(copied / name).read_text() for name in others] == ["mine"] * len(others)
    assert (copied / ".trash.old").is_dir()
    (copied / ".best.vitft-new").mkdir()
    (copied / ".last.vitft-old").mkdir()
    with locked(copied):
        pass
    assert not (copied / ".best.vitft-new").exists()
    assert not (copied / ".last.vitft-old").exists()


def test_a_folder_with_a_non_ascii_number_is_not_a_step(copied: Path) -> None:
    (copied / "checkpoints" / "step-²").mkdir()
    (copied / "checkpoints" / "step-٣").mkdir()
    assert [folder.name for folder in ckpt.step_folders(copied)] == ["step-000003", "step-000002"]
    resume(copied)


@pytest.mark.parametrize(("mask", "files", "folders"), [(0o027, 0o640, 0o750), (0o002, 0o664, 0o775)])
def test_a_run_writes_files_with_the_default_permissions(tmp_path: Path, mask: int, files: int, folders: int) -> None:
    before = os.umask(mask)
    try:
        settings = TrainConfig(dataset="digits", model="vit-micro", max_train_samples=20, max_steps=1, device="cpu")
        run = train(settings, output=tmp_path / "run").run
    finally:
        os.umask(before)
    modes = {file: stat.S_IMODE(file.stat().st_mode) for file in (run, *run.rglob("*"))}
    assert {file: mode for file, mode in modes.items() if mode != (folders if file.is_dir() else files)} == {}


# -- checksums and locks --------------------------------------------------------------------------

FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.fixture
def copied(digits_run: Any, tmp_path: Path) -> Path:
    shutil.copytree(digits_run.run, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", FILES)
def test_every_reader_of_a_checkpoint_detects_a_flipped_bit(copied: Path, name: str, tmp_path: Path) -> None:
    file = copied / "best" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    readers: list[Callable[[], object]] = [
        lambda: evaluate(copied),
        lambda: predict("docs/digits", copied),
        lambda: trace_image(Path("docs/digits/nine.png"), copied),
        lambda: train(TrainConfig(dataset="digits", model=str(copied / "best"), max_steps=1), output=tmp_path / "new"),
    ]
    for read in readers:
        with pytest.raises(ModelError, match=rf"{name}: does not match its SHA-256 checksum; use another"):
            read()
    assert not (tmp_path / "new").exists()


def test_a_missing_file_is_named(copied: Path) -> None:
    (copied / "best" / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"preprocessor_config\.json: is missing"):
        evaluate(copied)


def test_every_file_of_a_checkpoint_except_the_readme_has_a_checksum(digits_run: Any) -> None:
    for folder in (digits_run.run / "best", digits_run.run / "last"):
        sums = json.loads((folder / "vitft.json").read_text())["sha256"]
        assert set(sums) | {"vitft.json", "README.md"} == {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_bit_of_the_metadata_is_verified(copied: Path, every: int) -> None:
    """By default every seventh bit: one in nearly every byte, at all positions within a byte."""
    file = copied / "last" / "vitft.json"
    whole = file.read_bytes()
    # Written in place, because truncating and rewriting the file would flush it to disk each time.
    with file.open("r+b", buffering=0) as stream:
        for bit in range(0, 8 * len(whole), every):
            at, mask = bit // 8, 1 << bit % 8
            os.pwrite(stream.fileno(), bytes([whole[at] ^ mask]), at)
            with pytest.raises(ModelError, match=r"vitft\.json|is missing|does not match its SHA-256"):
                verify(copied / "last")
            os.pwrite(stream.fileno(), whole[at : at + 1], at)
    assert verify(copied / "last")


def test_a_checkpoint_contains_no_local_paths_but_its_run_knows_them(tmp_path: Path, digits_run: Any) -> None:
    data = tmp_path / "secret" / "photos"
    for label in ("cat", "dog"):
        (data / label).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8), (i, 2 * i, 200)).save(data / label / f"{i}.png")
    out = tmp_path / "secret" / "out.txt"
    out.write_text("train\tcat/3.png\n")
    settings = TrainConfig(
        dataset=str(data), model=str(digits_run.run / "last"), exclude=str(out), max_steps=2, save_every=1,
        device="cpu", keep_finished=1, batch_size=8,
    )  # fmt: skip
    run = train(settings, output=tmp_path / "run").run
    folders = [run / "best", run / "last", *ckpt.step_folders(run)]
    for folder in folders:
        for file in folder.iterdir():
            assert str(tmp_path).encode() not in file.read_bytes(), file
            assert str(digits_run.run).encode() not in file.read_bytes(), file
        card = read_card(folder)
        assert card is not None
        assert (card.config.dataset, card.config.exclude) == (str(data), str(out))
        assert (evaluate(folder).count, evaluate(folder).split_hash) == (4, card.splits["validation"]["hash"])
    assert "Started from last; trained on photos for 2 steps" in (run / "best" / "README.md").read_text()
    shared = shutil.copytree(run / "best", tmp_path / "shared" / "photos")
    with pytest.raises(UsageError, match="it does not say what dataset it was trained on; add --dataset"):
        evaluate(shared)
    assert evaluate(shared, dataset=str(data), split="train").count == 40


@pytest.mark.parametrize("setting", PATHS)
def test_a_checkpoint_has_the_name_of_any_path_and_its_run_has_the_path(
    setting: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret" / "file").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "secret")
    config, card = ckpt.read_config(copied), read_card(copied / "best")
    assert card is not None
    config = absolute(config.model_copy(update={setting: "file"}))
    assert getattr(config, setting) == str(tmp_path / "secret" / "file"), "a run goes on from any folder"
    ckpt.write_config(copied, config)
    (copied / "best" / "vitft.json").unlink()
    write_card(copied / "best", dataclasses.replace(card, config=config))
    for name in ("vitft.json", "README.md"):
        assert "secret" not in (copied / "best" / name).read_text()
    inside, outside = read_card(copied / "best"), read_card(shutil.copytree(copied / "best", tmp_path / "b" / "best"))
    assert inside is not None
    assert outside is not None
    assert inside.config == config
    # A folder of that name may be here, and be another one.
    assert getattr(outside.config, setting) == (None if setting in ("dataset", "image_folder") else "file")


def test_the_readme_states_model_data_and_scores(digits_run: Any, tmp_path: Path) -> None:
    card = read_card(digits_run.checkpoint)
    assert card is not None
    page = (digits_run.checkpoint / "README.md").read_text()
    header = yaml.safe_load(page.split("---\n")[1])
    assert (header["library_name"], header["pipeline_tag"]) == ("transformers", "image-classification")
    lines = page.splitlines()
    assert "Classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in lines
    assert f"Started from vit-micro, new weights; trained on digits for {card.step} steps" in lines
    assert any(line.startswith(f"({card.epoch:.2f} epochs) with vitft ") for line in lines)
    assert set(card.scores) == {"validation", "test"}
    for split, score in card.scores.items():
        accuracy, count = f"{100 * score['accuracy']:.2f} %", score["count"]
        assert f"- {split}: accuracy {accuracy} on {count} images (split {score['split_hash']})" in lines
    labels = ("*a*", "<b>", "c\n# d", *(f"class {i}" for i in range(48)))
    write_card(tmp_path, dataclasses.replace(card, labels=labels, scores={}))
    lines = (tmp_path / "README.md").read_text().splitlines()
    wanted = [r"\*a\*", "&lt;b&gt;", r"c \# d", *labels[3:50], "..."]
    assert f"Classes: {', '.join(wanted)}" in lines
    assert "Not scored at this step." in lines


def test_a_folder_with_the_name_of_a_dataset_is_not_mistaken_for_it(copied: Path, tmp_path: Path) -> None:
    """Only the name of a path is stored; it must not be read as a hub id or a built-in dataset."""
    card = read_card(copied / "best")
    assert card is not None
    card = dataclasses.replace(card, config=card.config.model_copy(update={"dataset": "/data/digits"}))
    folder = shutil.copytree(copied / "best", tmp_path / "elsewhere" / "best")
    (folder / "vitft.json").unlink()
    write_card(folder, card)
    assert "/data" not in (folder / "vitft.json").read_text()
    stored = read_card(folder)
    assert stored is not None
    assert stored.config.dataset is None


def test_a_changed_config_is_refused_on_resume(copied: Path) -> None:
    file = copied / "config.yaml"
    whole = file.read_bytes()
    assert ckpt.read_config(copied).dataset == "digits"
    for bit in range(0, 8 * len(whole), 7):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"config\.yaml: was changed since the run wrote it"):
            ckpt.read_config(copied)
    file.write_bytes(whole.replace(b"lr: 0.001", b"lr: 0.1"))
    with pytest.raises(UsageError, match=r"undo the change, or start a new run with it: vitft train --recipe"):
        resume(copied)


def test_a_flipped_bit_in_the_metrics_loses_one_line_and_not_the_run(copied: Path) -> None:
    file = copied / "metrics.jsonl"
    content = bytearray(file.read_bytes())
    content[3] ^= 0x80
    file.write_bytes(content)
    assert len(recorded(copied)) == len(content.splitlines()) - 1
    resume(copied)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"splits": 3}', '{"splits": {"train": {}}}', None])
def test_a_run_with_unverifiable_splits_is_not_resumed(copied: Path, content: str | None) -> None:
    shutil.rmtree(copied / "checkpoints" / "step-000003")
    file = copied / "splits.json"
    file.unlink() if content is None else file.write_text(content)
    unreadable = r"splits\.json: not readable .*start (anew|a new run)"
    with pytest.raises(DataError, match=f"{unreadable}|the train split is not the one"):
        resume(copied)


@pytest.mark.parametrize("content", ["", "{}", '{"threads": "x"}', None])
def test_a_run_without_recorded_threads_is_not_resumed(copied: Path, content: str | None) -> None:
    """Runs of earlier versions do not have them in config.yaml."""
    ckpt.write_config(copied, ckpt.read_config(copied).model_copy(update={"threads": None}))
    file = copied / "environment.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ModelError, match=r"environment\.json: not readable"):
        resume(copied)


def test_an_unknown_state_format_names_the_file(copied: Path) -> None:
    folder = copied / "checkpoints" / "step-000003"
    (folder / "state.json").write_text('{"steps": 3}')
    with pytest.raises(ModelError, match=r"state\.json: cannot be read"):
        ckpt.read_state(folder)


def test_a_model_folder_without_checksums_is_accepted(saved: Callable[..., Path]) -> None:
    folder = saved()
    assert verify(folder) == folder


def test_two_processes_do_not_train_in_one_folder(copied: Path) -> None:
    with lock_folder(copied) as locked:  # as another process would
        assert locked
        with pytest.raises(UsageError, match="another process is training there"):
            resume(copied)
        with pytest.raises(UsageError, match="another process is training there"):
            ckpt.check_free(copied, overwrite=True)
    before = sorted(copied.rglob("*"))
    resume(copied)  # it was finished; the folder is free again
    assert sorted(copied.rglob("*")) == before


def test_a_run_locks_its_folder_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def look(self: Any, state: Any) -> Any:
        with lock_folder(self.run) as locked:
            seen.append(locked)
        return "trained"

    monkeypatch.setattr("vitft.training.loop.Run.train", look)
    settings = TrainConfig(dataset="digits", model="vit-micro", max_train_samples=20, max_steps=1, device="cpu")
    assert train(settings, output=tmp_path / "run") == "trained"  # type: ignore[comparison-overlap]
    assert seen == [False]
