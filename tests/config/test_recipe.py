"""Recipes: found by name or file, read strictly, merged as defaults < recipe < flags."""

from pathlib import Path

import pytest

from vitft.config.recipe import copy_recipe, find_recipe, load_config, read_recipe, recipes
from vitft.config.train import TrainConfig
from vitft.errors import UsageError
from vitft.scratch_runner import config as textbook


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text("# Mine.\ndataset: digits\nlr: 2e-5\nbatch-size: 16\n")
    return file


def refused(file: Path, content: str | bytes) -> str:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        load_config(str(file), {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- precedence -----------------------------------------------------------------------------------


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(mine: Path) -> None:
    config = load_config(str(mine), {"batch_size": 8})

    assert (config.epochs, config.lr, config.batch_size) == (TrainConfig().epochs, 2e-5, 8)


def test_without_a_recipe_flags_win_over_the_defaults() -> None:
    assert load_config(None, {"lr": 1e-3}) == TrainConfig(lr=1e-3)


def test_a_flag_may_undo_a_switch_of_the_recipe(mine: Path) -> None:
    mine.write_text("from_scratch: yes\n")
    assert load_config(str(mine), {}).from_scratch
    assert not load_config(str(mine), {"from_scratch": False}).from_scratch


def test_each_mistake_is_named_where_it_was_made(mine: Path) -> None:
    with pytest.raises(UsageError, match=r"^--lr should be"):
        load_config(str(mine), {"lr": -1.0})
    mine.write_text("lr: -1\n")
    with pytest.raises(UsageError, match=r"^recipe mine\.yaml: lr should be"):
        load_config(str(mine), {"batch_size": 3})


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["2e-5", "2.0e-5", "0.00002", "'2e-5'", "2E-5"])
def test_a_rate_reads_as_a_number_however_it_is_written(mine: Path, written: str) -> None:
    """YAML 1.1 takes 2e-5 for a string."""
    mine.write_text(f"lr: {written}\n")
    assert load_config(str(mine), {}).lr == 2e-5


@pytest.mark.parametrize("word", ["none", "None"])
def test_an_empty_recipe_is_the_defaults_and_none_is_a_word(mine: Path, word: str) -> None:
    mine.write_text("# nothing yet\n")
    assert load_config(str(mine), {}) == TrainConfig()
    mine.write_text(f"augment: {word.lower()}\n")
    assert load_config(str(mine), {}).augment == "none"


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(mine: Path) -> None:
    mine.write_bytes("\ufefflr: 2e-5\r\nepochs: 1\r\n".encode())
    assert read_recipe(mine) == {"lr": "2e-5", "epochs": 1}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("learningrate: 1\n", "unknown setting 'learningrate'"),
        ("batchsize: 1\n", "did you mean batch_size?"),
        ("augment: flipp\n", "did you mean flip?"),
        ("lr: .nan\n", "finite"),
        ("epochs: .inf\n", "epochs should be"),
        ("optim:\n  lr: 3\n", "unknown setting 'optim'"),
        ("lr:\n  peak: 3\n", "lr should be a valid number, got {'peak': 3}"),
        ("- lr\n- 3\n", "a recipe is `setting: value` lines, got list"),
        ("just words", "a recipe is `setting: value` lines, got str"),
        ("lr: 1\nepochs: 2\nlr: 3\n", "lr is given twice, the second time in line 3"),
        ("batch_size: 1\nbatch-size: 2\n", "batch_size is given twice, the second time in line 2"),
        ("lr: [1\n", "cannot be read"),
        ("lr: !!python/object/apply:os.system ['true']\n", "cannot be read"),
        (b"lr: \xff\xfe\n", "cannot be read"),
        (b"\x00\x01", "cannot be read"),
        ("1: 2\n", "unknown setting '1'"),
        ("? [a, b]\n: 3\n", "a setting's name is a word"),
        ("a: &a [*a]\n", "cannot be read"),
    ],
)
def test_what_is_no_recipe_gets_one_line(mine: Path, content: str | bytes, says: str) -> None:
    assert says in refused(mine, content)


def test_every_bundled_recipe_loads_and_says_what_it_does() -> None:
    assert {recipe.textbook for recipe in recipes()} == {True, False}
    for recipe in recipes():
        config = textbook.load_config(recipe.name, {})[1] if recipe.textbook else load_config(recipe.name, {})
        assert config.dataset, recipe.name
        assert len(recipe.summary) > 20, recipe.name
        assert recipe.path.read_text().startswith("# "), recipe.name


# -- finding and copying --------------------------------------------------------------------------


def test_a_recipe_is_found_by_file_and_by_name(mine: Path) -> None:
    known = recipes()[0]
    assert find_recipe(str(mine)) == mine
    assert find_recipe(known.name) == known.path
    with pytest.raises(UsageError, match=f"did you mean {known.name}"):
        find_recipe(known.name[:-1])
    with pytest.raises(UsageError, match="`vitft recipes ls` lists them"):
        find_recipe("quite-another")


def test_a_textbook_recipe_is_found_without_its_folder_and_each_kind_by_its_own_command() -> None:
    short = "mnist-patch7"
    assert find_recipe(short) == find_recipe(f"scratch/{short}") == find_recipe(short, textbook=True)
    for name in (short, f"scratch/{short}"):
        with pytest.raises(UsageError, match=f"{name} is the textbook's; run it with: vitft scratch train {short}"):
            load_config(name, {})
    with pytest.raises(UsageError, match="digits fine-tunes; run it with: vitft train --recipe digits"):
        find_recipe("digits", textbook=True)


def test_a_copy_goes_to_a_file_or_into_a_folder_and_never_over_anything(tmp_path: Path) -> None:
    known = recipes()[0]

    assert copy_recipe(known.name, tmp_path / "a.yaml") == tmp_path / "a.yaml"
    into = copy_recipe(known.name, tmp_path)
    assert into.read_bytes() == known.path.read_bytes() == (tmp_path / "a.yaml").read_bytes()
    into.write_text("mine now")
    with pytest.raises(UsageError, match="exists; name another file"):
        copy_recipe(known.name, tmp_path)
    with pytest.raises(UsageError, match="make it first"):
        copy_recipe(known.name, tmp_path / "no" / "a.yaml")
    assert into.read_text() == "mine now"
