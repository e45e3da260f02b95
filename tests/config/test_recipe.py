"""Recipes: finding them by name or file, strict parsing, and merging as defaults < recipe < flags."""

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


def test_flags_override_the_recipe_and_the_recipe_overrides_the_defaults(mine: Path) -> None:
    config = load_config(str(mine), {"batch_size": 8})

    assert (config.epochs, config.lr, config.batch_size) == (TrainConfig().epochs, 2e-5, 8)


def test_without_a_recipe_flags_override_the_defaults() -> None:
    assert load_config(None, {"lr": 1e-3}) == TrainConfig(lr=1e-3)


def test_a_flag_can_turn_off_a_switch_of_the_recipe(mine: Path) -> None:
    mine.write_text("from_scratch: yes\n")
    assert load_config(str(mine), {}).from_scratch
    assert not load_config(str(mine), {"from_scratch": False}).from_scratch


def test_an_error_names_its_source(mine: Path) -> None:
    with pytest.raises(UsageError, match=r"^--lr should be"):
        load_config(str(mine), {"lr": -1.0})
    mine.write_text("lr: -1\n")
    with pytest.raises(UsageError, match=r"^recipe mine\.yaml: lr should be"):
        load_config(str(mine), {"batch_size": 3})


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["2e-5", "2.0e-5", "0.00002", "'2e-5'", "2E-5"])
def test_a_learning_rate_parses_in_every_notation(mine: Path, written: str) -> None:
    """In YAML 1.1, 2e-5 is a string."""
    mine.write_text(f"lr: {written}\n")
    assert load_config(str(mine), {}).lr == 2e-5


@pytest.mark.parametrize("word", ["none", "None"])
def test_an_empty_recipe_gives_the_defaults_and_none_is_a_string(mine: Path, word: str) -> None:
    mine.write_text("# nothing yet\n")
    assert load_config(str(mine), {}) == TrainConfig()
    mine.write_text(f"augment: {word.lower()}\n")
    assert load_config(str(mine), {}).augment == "none"


def test_a_byte_order_mark_and_crlf_are_accepted(mine: Path) -> None:
    mine.write_bytes("\ufefflr: 2e-5\r\nepochs: 1\r\n".encode())
    assert read_recipe(mine) == {"lr": "2e-5", "epochs": 1}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("learningrate: 1\n", "unknown setting 'learningrate'"),
        ("batchsize: 1\n", "did you mean batch_size?"),
        ("augment: flipp\n", "did you mean flip?"),
        ("lr: .nan\n", "finite"),
        ("epochs: .inf\n", "epochs should be"),
        ("optim:\n  lr: 3\n", "unknown setting 'optim'"),
        ("lr:\n  peak: 3\n", "lr should be a valid number or 'auto', got {'peak': 3}"),
        ("- lr\n- 3\n", "a recipe is `setting: value` lines, got list"),
        ("just words", "a recipe is `setting: value` lines, got str"),
        ("lr: 1\nepochs: 2\nlr: 3\n", "line 3: lr is already set"),
        ("batch_size: 1\nbatch-size: 2\n", "line 2: batch_size is already set"),
        ("lr: [1\n", "cannot be read"),
        ("lr: !!python/object/apply:os.system ['true']\n", "cannot be read"),
        (b"lr: \xff\xfe\n", "cannot be read"),
        (b"\x00\x01", "cannot be read"),
        ("1: 2\n", "unknown setting '1'"),
        ("? [a, b]\n: 3\n", "line 1: the name of a setting must be a word"),
        ("a: &a [*a]\n", "cannot be read"),
        ("a:\n" + "- 1\n" * 2000, "more than 500 settings, too many for a recipe"),
    ],
)
def test_an_invalid_recipe_gets_a_one_line_error(mine: Path, content: str | bytes, expected: str) -> None:
    assert expected in refused(mine, content)


def test_every_bundled_recipe_loads_and_has_a_summary() -> None:
    assert {recipe.textbook for recipe in recipes()} == {True, False}
    for recipe in recipes():
        config = textbook.load_config(recipe.name, {})[1] if recipe.textbook else load_config(recipe.name, {})
        assert config.dataset, recipe.name
        assert len(recipe.summary) > 20, recipe.name
        assert recipe.path.read_text().startswith("# "), recipe.name


# -- finding and copying --------------------------------------------------------------------------


def test_a_recipe_is_found_by_path_and_by_name(mine: Path) -> None:
    known = recipes()[0]
    assert find_recipe(str(mine)) == mine
    assert find_recipe(known.name) == known.path
    with pytest.raises(UsageError, match=f"did you mean {known.name}"):
        find_recipe(known.name[:-1])
    with pytest.raises(UsageError, match="`vitft recipes ls` lists them"):
        find_recipe("quite-another")


def test_a_textbook_recipe_is_found_without_its_folder_and_only_by_its_command() -> None:
    short = "mnist-patch7"
    assert find_recipe(short) == find_recipe(f"scratch/{short}") == find_recipe(short, textbook=True)
    for name in (short, f"scratch/{short}"):
        with pytest.raises(UsageError, match=f"{name} is a textbook recipe; run it with: vitft scratch train {short}"):
            load_config(name, {})
    with pytest.raises(UsageError, match="digits is a fine-tuning recipe; run it with: vitft train --recipe digits"):
        find_recipe("digits", textbook=True)


def test_a_recipe_is_copied_to_a_file_or_folder_and_never_overwrites(tmp_path: Path) -> None:
    known = recipes()[0]

    assert copy_recipe(known.name, tmp_path / "a.yaml") == tmp_path / "a.yaml"
    into = copy_recipe(known.name, tmp_path)
    assert into.read_bytes() == known.path.read_bytes() == (tmp_path / "a.yaml").read_bytes()
    into.write_text("mine now")
    with pytest.raises(UsageError, match="already exists; choose another name"):
        copy_recipe(known.name, tmp_path)
    with pytest.raises(UsageError, match="create it first"):
        copy_recipe(known.name, tmp_path / "no" / "a.yaml")
    assert into.read_text() == "mine now"
