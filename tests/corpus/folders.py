"""Real-world image folders, with the expected results."""

from pathlib import Path

from tests.corpus import Case, photo, photos

NFC, NFD = "caf\u00e9", "cafe\u0301"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
CAT, DOG = {"cat": 1, "dog": 1}, ("cat", "dog")


def of(*folders: str, classes: tuple[str, ...] = DOG) -> dict[str, bytes]:
    """An image of each class in each folder."""
    return photos(*(f"{folder}/{name}/{number}.png" for number, folder in enumerate(folders) for name in classes))


def _linked(folder: Path) -> None:
    for name in DOG:
        (folder / name).mkdir()
    (folder / "pool").mkdir()
    (folder / "pool" / "a.png").write_bytes(photo())
    (folder / "cat" / "a.png").symlink_to(folder / "pool" / "a.png")
    (folder / "dog" / "b.png").symlink_to(folder / "pool" / "a.png")


def _looped(folder: Path) -> None:
    for name in DOG:
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(photo())
    (folder / "cat" / "again").symlink_to(folder / "cat")
    (folder / "dog" / "up").symlink_to(folder)


def _two_forms(folder: Path) -> None:
    for split, name in (("train", NFC), ("train", "tea"), ("test", NFD), ("test", "tea")):
        (folder / split / name).mkdir(parents=True)
        (folder / split / name / "0.png").write_bytes(photo())


def _an_empty_one(folder: Path) -> None:
    _looped(folder)
    (folder / "cat" / "again").unlink()
    (folder / "dog" / "up").unlink()
    (folder / "emu").mkdir()


CASES = [
    Case(
        "class-folders",
        photos("cat/0.png", "cat/1.png", "dog/0.png"),
        ".",
        {"train": {"cat": "cat/0.png cat/1.png", "dog": "dog/0.png"}},
        decided="all images are for training",
    ),
    Case("train-val-test", of("train", "val", "test"), ".", {"train": CAT, "val": CAT, "test": CAT}),
    Case("training-testing", of("Training", "Testing"), ".", {"Training": CAT, "Testing": CAT}),
    Case("evaluation-alone", of("test", "val"), ".", {"test": CAT, "val": CAT}),
    Case(
        "kaggle-doubled",
        of("seg_train/seg_train", "seg_test/seg_test") | photos("seg_pred/seg_pred/0.png", "seg_pred/seg_pred/1.png"),
        ".",
        {"train": {"cat": "seg_train/seg_train/cat/0.png", "dog": 1}, "test": CAT},
        decided="seg_train is read from seg_train/seg_train",
        warned="2 images in seg_pred left out",
    ),
    Case("kaggle-set", of("training_set/training_set", "test_set/test_set"), ".", {"train": CAT, "test": CAT}),
    Case(
        "kaggle-unlabeled-test",
        of("train") | photos("test/test/0.png", "test/test/1.png"),
        ".",
        {"train": CAT},
        warned="test is left out, with 2 images: its only folder, test, is not a class",
    ),
    Case(
        "unknown-test",
        of("train") | photos("test/unknown/0.png"),
        ".",
        {"train": CAT},
        warned="its only folder, unknown, is not a class of the training split",
    ),
    Case(
        "tiny-imagenet",
        photos("train/n01/images/0.JPEG", "train/n02/images/0.JPEG", "val/images/v0.JPEG", "val/images/v1.JPEG")
        | photos("test/images/t0.JPEG")
        | {
            "train/n01/n01_boxes.txt": "0.JPEG\t0\t0\t3\t2\n",
            "val/val_annotations.txt": "v0.JPEG\tn02\t0\t0\t3\t2\nv1.JPEG\tn01\t0\t0\t3\t2\n",
        },
        ".",
        {"train": {"n01": 1, "n02": 1}, "val": {"n01": "val/images/v1.JPEG", "n02": "val/images/v0.JPEG"}},
        decided="the classes of val are read from its annotations",
        warned="test is left out, with 1 image",
    ),
    *(
        Case(
            f"annotations-of-other-{name}",
            photos("train/n01/0.png", "train/n02/0.png", "val/images/0.png", "val/images/1.png")
            | {"val/val.txt": "".join(f"{line}\n" for line in lines)},
            ".",
            {"train": {"n01": 1, "n02": 1}},
            warned="val is left out, with 2 images: its only folder, images, is not a class of the training split",
        )
        for name, lines in {
            "classes": ("0.png n01", "1.png n03"),
            "images": ("0.png n01", "1.png n02", "2.png n02"),
            "number": ("0.png n01",),
        }.items()
    ),
    Case(
        "imagefolder-metadata",
        photos("train/0.png", "train/1.png", "test/0.png", "test/1.png")
        | {
            "train/metadata.csv": "file_name,label\n0.png,dog\n1.png,cat\n",
            "test/metadata.jsonl": '{"file_name": "0.png", "label": "cat"}\n{"file_name": "1.png", "label": "dog"}\n',
        },
        ".",
        {"train": {"cat": "train/1.png", "dog": "train/0.png"}, "test": {"cat": "test/0.png", "dog": "test/1.png"}},
        decided="the labels are those of test/metadata.jsonl, train/metadata.csv",
    ),
    Case(
        "metadata-with-tabs",
        photos("0.png", "1.png") | {"metadata.tsv": "file_name\tlabel\n0.png\tdog\n1.png\tcat\n"},
        ".",
        {"train": {"cat": "1.png", "dog": "0.png"}},
        decided="the labels are those of metadata.tsv",
    ),
    Case(
        "metadata-at-the-root",
        photos("train/0.png", "train/1.png", "test/0.png", "test/9.png")
        | {"metadata.csv": "file_name,label\ntrain/0.png,dog\ntrain/1.png,cat\ntest/0.png,dog\n"},
        ".",
        {"train": {"cat": "train/1.png", "dog": "train/0.png"}, "test": {"dog": "test/0.png"}},
        warned="1 of 4 images are left out: not listed in any metadata file",
    ),
    Case(
        "metadata-of-captions",
        of("train") | {"train/metadata.jsonl": '{"file_name": "cat/0.png", "width": 3, "height": 2}\n'},
        ".",
        {"train": CAT},
        decided="has no labels, so the class folders are used",
    ),
    Case("nested-once", of("archive/pets/train", "archive/pets/test"), ".", {"train": CAT, "test": CAT}),
    Case(
        "nested-classes",
        of("archive/pets"),
        ".",
        {"train": {"cat": "archive/pets/cat/0.png", "dog": 1}},
        decided="the dataset is read from archive/pets, the only folder with images",
    ),
    Case(
        "deep-classes",
        photos("cat/a.png", "cat/old/b.png", "dog/x/y/c.png"),
        ".",
        {"train": {"cat": "cat/a.png cat/old/b.png", "dog": "dog/x/y/c.png"}},
    ),
    Case(
        "splits-within-classes",
        photos("cat/train/0.png", "cat/test/1.png", "dog/train/2.png", "dog/test/3.png"),
        ".",
        {"train": {"cat": "cat/train/0.png", "dog": 1}, "test": {"cat": "cat/test/1.png", "dog": 1}},
        decided="in each class folder",
    ),
    Case(
        "splits-within-some-classes",
        photos("cat/train/0.png", "cat/test/1.png", "dog/2.png"),
        ".",
        error="the folders in cat are named like splits, those in dog are not",
    ),
    Case("two-data-sets", of("small/train", "small/test", "large/train"), ".", error="give one dataset: "),
    Case("two-validations", of("train", "val", "valid"), ".", error="val, valid are all validation splits"),
    Case("two-families", of("trainA", "testA", "trainB", "testB"), ".", error="2 sets of splits"),
    Case("two-cases", of("train", "Train"), ".", error="are all train splits"),
    Case(
        "train-beside-rubbish",
        of("train", "test") | photos("docs/logo.png"),
        ".",
        {"train": CAT, "test": CAT},
        warned="1 image in docs left out: not named like a split",
    ),
    Case("flat-splits", photos("train/0.png", "test/0.png"), ".", error="test, train hold images but no class folders"),
    Case("a-flat-split", photos("train/0.png", "train/1.png"), ".", error="train holds images but no class folders"),
    Case(
        "flat-splits-with-a-table",
        photos("train/0.png", "test/0.png") | {"train.csv": "path,label\n0.png,x\n"},
        ".",
        error="did you mean the file",
    ),
    Case(
        "detection",
        photos("images/train/0.png") | {"labels/train/0.txt": "0 .5 .5 1 1\n"},
        ".",
        error="object detection",
    ),
    Case(
        "a-class-called-test",
        photos("pass/0.png", "fail/0.png", "test/0.png"),
        ".",
        {"train": {"fail": 1, "pass": 1, "test": 1}},
        warned="the folder test is read as a class, like fail, pass",
    ),
    Case(
        "train-station",
        photos("train_station/0.png", "test_tube/0.png"),
        ".",
        {"train": {"test_tube": 1, "train_station": 1}},
    ),
    Case(
        "test-beside-the-classes",
        photos("cat/0.png", "dog/0.png", "test/cat/1.png", "test/dog/1.png"),
        ".",
        {"train": {"cat": "cat/0.png", "dog": 1}, "test": {"cat": "test/cat/1.png", "dog": 1}},
        decided="folders beside test are the training split: cat, dog",
    ),
    Case(
        "other-classes-in-test",
        of("train") | of("test", classes=("Katze", "Hund")),
        ".",
        {"train": CAT, "test": {"Hund": 1, "Katze": 1}},
        warned="none of the 2 classes of test is in the training split",
    ),
    Case(
        "many-other-classes-in-test",
        of("train") | of("test", classes=tuple("abcdef")),
        ".",
        {"train": CAT, "test": dict.fromkeys("abcdef", 1)},
        warned="none of the 6 classes of test is in the training split: a, b, c, d, e, ... (6 in all)",
    ),
    Case(
        "unicode-forms-of-a-class",
        _two_forms,
        ".",
        {"train": {NFC: (f"train/{NFC}/0.png",), "tea": 1}, "test": {NFC: (f"test/{NFD}/0.png",), "tea": 1}},
    ),
    Case(
        "unicode-forms-in-one-split",
        photos(f"{NFC}/0.png", f"{NFD}/1.png", "tea/0.png"),
        ".",
        {"train": {NFC: 2, "tea": 1}},
        decided="differ only in Unicode form and are one class",
    ),
    Case(
        "hidden-and-left-behind",
        of(".")
        | photos(
            "cat/.hidden.png", "cat/@eaDir/0.png", "__MACOSX/cat/0.png", ".ipynb_checkpoints/0.png", "cat/._0.png"
        ),
        ".",
        {"train": CAT},
    ),
    Case("an-empty-class", _an_empty_one, ".", {"train": CAT}, decided="the folder emu is not a class: it is empty"),
    Case(
        "a-class-of-notes",
        of(".") | {"emu/a.npy": b"x", "emu/b.npy": b"x"},
        ".",
        {"train": CAT},
        warned="the folder emu is not a class: it has 2 files and no image",
    ),
    Case(
        "no-suffix",
        of(".") | {"cow/0": photo(".jpg"), "cow/1.dat": photo(), "cow/IMG.PNG": photo(), "cow/a.jfif": photo(".jpg")},
        ".",
        {"train": CAT | {"cow": "cow/0 cow/1.dat cow/IMG.PNG cow/a.jfif"}},
        decided="2 files are images by content, not by name (first: cow/0)",
    ),
    Case(
        "not-all-of-a-name",
        of(".") | {"cat/x.heif-but-png": photo(), "cat/README": "cats\n", "cat/Makefile": b"P6 is no picture here"},
        ".",
        {"train": {"cat": 2, "dog": 1}},
        decided=("1 file is an image by content", "2 files are not images: 2 no suffix"),
    ),
    Case(
        "camera-raw",
        of(".") | {"cat/a.NEF": photo(".tif")},
        ".",
        {"train": CAT},
        warned="1 file is camera raw, which cannot be read (first: cat/a.NEF)",
    ),
    Case("linked-images", _linked, ".", {"train": {"cat": 1, "dog": 1, "pool": 1}}, warned="cat/a.png"),
    Case(
        "looped-links",
        _looped,
        ".",
        {"train": {"cat": 1, "dog": 1}},
        decided=("the link cat/again is not followed", "the link dog/up is not followed"),
    ),
    Case(
        "csvs-in-folders",
        {"a/labels.csv": "path,label\n0.png,x\n", "b/labels.csv": "path,label\n0.png,x\n"},
        ".",
        error="did you mean the file",
    ),
    Case("images-alone", photos("0.png", "1.png"), ".", error="holds images but no class folders"),
    *(
        Case(
            f"{name}-of-folders",
            of("."),
            ".",
            error=(f"--{name.replace('_', '-')} 1: ", "is a folder of images, not a table; leave it out"),
            options={name: value},
        )
        for name, value in {
            "image_column": "1",
            "label_column": "1",
            "split_column": "1",
            "fold": 1,
            "encoding": "1",
            "image_folder": "1",
        }.items()
    ),
    Case("nothing", {"notes.md": "x"}, ".", error="expected root/class/image.jpg"),
]
