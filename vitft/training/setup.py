"""The setup of a run: resolve settings, open the dataset, make splits, load the model. Nothing is written."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vitft.checkpoints.checkpoint import base_of, find_model, is_run
from vitft.checkpoints.metadata import read_card, verify
from vitft.config.train import PATHS, SIZES, TrainConfig, range_of, usual_lr
from vitft.data.decoder import unused_range
from vitft.data.sources.identity import is_streamed
from vitft.data.sources.source import ALIASES, DIGITS, Source, source_of
from vitft.data.split_record import Record, describe_changes, read_record, restore_splits
from vitft.data.splits import Split, find_split_name, make_splits
from vitft.data.stores.lazy_store import LazyStore, is_large
from vitft.data.stores.store import Skipped, Store, check_headers, decode_all, decode_part
from vitft.data.validation.check import check, check_labels, imbalance, samples
from vitft.errors import DataError, UsageError
from vitft.evaluation.evaluation import listed, matched, without
from vitft.evaluation.held_out import earlier_sides, refuse_trained
from vitft.hardware.device import find_attention
from vitft.hardware.processes import ALONE, Processes
from vitft.io import console, paths
from vitft.io.paths import composed, expanded
from vitft.models.load import Loaded, load_for_training, set_attention, shape_of
from vitft.models.lora import has_adapter, read_adapter, require_peft
from vitft.spec import PRESETS
from vitft.training.loss import counts_alike, pinned_weights
from vitft.training.optim import unusual_lr

Labeled = tuple[Any, NDArray[np.int64]]
"""A `Store`, or a `Part` of it, or of the training images a `LazyStore`; and its labels, numbered as in the model."""


class Stores(Mapping[str, Labeled]):
    """By split, the images and their labels; what was not made at once is decoded when it is first asked for."""

    def __init__(self, made: dict[str, Labeled], later: dict[str, Callable[[], Labeled]]) -> None:
        self.made, self._later = made, later

    def __getitem__(self, role: str) -> Labeled:
        if role not in self.made:
            self.made[role] = self._later[role]()
        return self.made[role]

    def __contains__(self, role: object) -> bool:
        return role in self.made or role in self._later

    def __iter__(self) -> Iterator[str]:
        return iter({**self.made, **self._later})

    def __len__(self) -> int:
        return len({*self.made, *self._later})


@dataclass(frozen=True)
class Prepared:
    """What a run has before it decodes an image: resolved settings, the dataset, its splits and the model."""

    config: TrainConfig  # resolved: device, precision, revisions, absolute paths
    source: Source
    splits: dict[str, Split]
    loaded: Loaded
    began_lazily: bool | None = field(default=None, kw_only=True)  # as recorded; None for a new run

    @property
    def weights(self) -> int:
        """How many the model has."""
        return _count(self.loaded.model)

    @property
    def used(self) -> tuple[str, ...]:
        """The roles whose images are read: all, or with `skip_test` all but test, which stays held out."""
        return tuple(role for role in self.splits if role != "test" or not self.config.skip_test)

    @property
    def decodes_later(self) -> bool:
        """Whether training images are decoded when they are first needed, and not before the first step.

        A resumed run does as it began: the images that were left out then may have made the split small.
        """
        if self.began_lazily is not None:
            return self.began_lazily
        return is_large(self._rows("train"), self.loaded.preprocess, self.config.max_pixels)

    def with_settings(self, **changes: Any) -> Self:
        """A copy with other settings."""
        return replace(self, config=self.config.model_copy(update=changes))

    def decode(self, processes: Processes = ALONE) -> "Decoded":
        """Decode the splits, without unreadable images. Raises DataError for one that may not be skipped.

        Of several processes that share the work, which have to call this together, each decodes its part.
        """
        self._tell_unused_range()
        decoded = Decoded(self.config, self.source, dict(self.splits), self.loaded, Stores({}, {}), {})
        for role in self.used:
            decoded.stores.made[role], decoded.splits[role] = self._decode(role, decoded.skipped, processes)
        return decoded

    def open_images(self, processes: Processes = ALONE, *, resumes: bool = False) -> "Decoded":
        """Like `decode`, for training: of a large dataset, images are decoded when they are first needed.

        Of those, only the headers are read now, unless the run `resumes`. All `processes` have to call this: those of a
        machine share what they decode for training. Of what is only scored, each will decode its part, when all ask
        for it.
        """
        if not self.decodes_later:
            return self.decode()
        skipped = {role: list[Skipped]() for role in self.used}
        if self.config.check == "fast" and not resumes:
            return self.check_headers(skipped)._open_lazily(skipped, processes)
        return self._open_lazily(skipped, processes)

    def _open_lazily(self, skipped: dict[str, list[Skipped]], processes: Processes) -> "Decoded":
        """`skipped` has the images that are already left out."""
        self._tell_unused_range()
        config, split = self.config, self.splits["train"]
        labels = self._match(split, "train")[0]
        how = self._how("train") | {"processes": processes}
        train = LazyStore(self._rows("train"), labels, self.loaded.preprocess, **how)
        train.skipped.extend(skipped["train"])
        readable, skipped["train"] = dict(self.splits), train.skipped

        def later(role: str) -> Callable[[], Labeled]:
            def decode() -> Labeled:
                found: dict[str, list[Skipped]] = {}
                labeled, readable[role] = self._decode(role, found, processes, remedy="fix it")
                skipped[role].extend(found[role])
                return labeled

            return decode

        stores = Stores({"train": (train, labels)}, {role: later(role) for role in self.used if role != "train"})
        return Decoded(config, self.source, self.splits, self.loaded, stores, skipped, readable)

    def check_headers(self, skipped: dict[str, list[Skipped]] | None = None) -> Self:
        """Read the header of every image, decoding no pixels; otherwise like `decode`. Adds to `skipped`, by role.

        Of streamed splits nothing is read: all of it would have to be fetched.
        """
        splits = dict(self.splits)
        for role in self.used:
            split = self.splits[role]
            if is_streamed(self.source.splits[split.source]):
                continue
            with console.working(f"opening the {role} images") as progress:
                bad = check_headers(
                    self.source.splits[split.source].select(split.rows), max_pixels=self.config.max_pixels,
                    skip_bad=self.config.on_bad_image == "skip", progress=progress,
                )  # fmt: skip
            splits[role] = self._without(role, bad)
            if skipped is not None:
                skipped[role].extend(bad)
        return replace(self, splits=splits)

    def _without(self, role: str, skipped: list[Skipped]) -> Split:
        for image in skipped:
            console.warn(f"skipped {image.name} ({role}): {image.reason}")
        return without(self.splits[role], skipped, self.source)

    def _tell_unused_range(self) -> None:
        unset = "train" in self.used and self.loaded.preprocess.value_range is None
        if unset and (said := unused_range(samples(self._rows("train")))):
            console.warn(said)

    def _rows(self, role: str) -> Any:
        return self.source.splits[self.splits[role].source].select(self.splits[role].rows)

    def _decode(
        self,
        role: str,
        skipped: dict[str, list[Skipped]],
        processes: Processes = ALONE,
        remedy: str = "fix or remove it",
    ) -> tuple[Labeled, Split]:
        """A split's images and labels, and the split without those that are added to `skipped`.

        Several processes have to call this together: each decodes what it will score, and `decode_part` says what they
        raise.
        """

        def decode_rows(rows: Any) -> tuple[Store, list[Skipped]]:
            with console.working(f"decoding {role}") as progress:
                return decode_all(
                    rows, self.loaded.preprocess, training=role == "train", remedy=remedy, progress=progress,
                    **self._how(role),
                )  # fmt: skip

        store, skipped[role] = decode_part(self._rows(role), decode_rows, processes)
        split = self._without(role, skipped[role])
        return (store, self._match(split, role)[0]), split

    def _how(self, role: str) -> dict[str, Any]:
        """What decoding depends on."""
        config = self.config
        return {
            "crops": role == "train" and config.augment == "crop",
            "max_pixels": config.max_pixels,
            "skip_bad": config.on_bad_image == "skip",
            "cache_gb": config.cache_gb,
            "whole": config.check == "full",
            "name": f"{self.source.name}, {role}",
        }

    def _match(self, split: Split, role: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        return matched(
            split.labels, self.source.labels, self.loaded.labels, name=self.config.model, own=role != "train"
        )  # fmt: skip


@dataclass(frozen=True)
class Decoded(Prepared):
    """What a run has before its first step: its splits and their images.

    `skipped` has the images that could not be read, by role, as far as they have been met; on resume, only those that
    have become unreadable since. `splits` lacks those that were known before the first step, and `readable` all.
    """

    stores: Stores
    skipped: dict[str, list[Skipped]]
    readable: dict[str, Split] = field(default_factory=dict)

    def scored(self, role: str) -> Split:
        """The images of a split that were decoded."""
        return self.readable.get(role, self.splits[role])

    def lacking(self, role: str) -> tuple[str, ...]:
        """Classes of a split that the model does not have: see `evaluation.matched`."""
        return self._match(self.scored(role), role)[1]


def prepare(
    config: TrainConfig, checkpoint: Path | None = None, run: Path | None = None, dataset: Any = None
) -> Prepared:  # fmt: skip
    """Open the dataset, split it and load the model, by settings without `auto`. Raises VitftError.

    `dataset` is a dataset object that replaces the one named in the settings. On resume, the model is a `checkpoint` of
    the run, and the splits are those that the `run` recorded.
    """
    require_peft(config)
    with console.working("reading the dataset"):
        source = source_of(config, dataset)
    name = config.dataset or source.name
    _tell_faults(source, config)
    record = None if run is None else read_record(run)
    splits = _split(source, config) if record is None else _recalled(source, record)
    if record is not None and record.splits["train"].ids and ("train" not in splits or not len(splits["train"].rows)):
        raise DataError(
            f"{name}: none of the images that {run} was trained on is in it; give the dataset it began with."
        )
    if "train" not in splits or len(splits["train"].rows) == 0:
        raise DataError(f"{name}: no training images; its splits are {', '.join(source.splits)}.")
    if len(source.labels) < 2:
        raise DataError(f"{name}: there is only one class ({source.labels[0]}); add another.")
    if config.sampling == "balanced" and is_streamed(source.splits[splits["train"].source]):
        raise UsageError(
            "sampling balanced repeats images of the whole dataset, which a streamed one cannot give; use "
            "--class-weights balanced or --logit-adjustment 1."
        )
    if config.early_stopping and "validation" not in splits:
        raise UsageError("early_stopping needs a validation split, and there is none; set --val-fraction above 0.")
    trained = _trained(source, splits["train"])
    labels = _read_labels(config.labels, trained, source) if config.labels and checkpoint is None else trained
    with console.working("loading the model"):
        if checkpoint is None:
            config = config.model_copy(update={"model": _weights_of(config.model)})
            loaded = load_for_training(config, labels, () if config.labels else source.labels)
        else:  # a resumed run does not need the model it began from
            loaded = _load_again(config, name, trained, checkpoint)
    if len(loaded.labels) < 2:
        raise DataError(
            f"{name}: the training images are all of one class ({loaded.labels[0]}), which is nothing "
            "to classify; add images of another."
        )
    if config.grad_checkpointing and not loaded.model.supports_gradient_checkpointing:
        kind = loaded.model.config.model_type
        raise UsageError(f"grad_checkpointing: a {kind} has none; leave it out, or set a smaller --micro-batch-size.")
    _tell_untrained(source, splits, loaded.labels)
    attention, how = _attend(loaded, config), loaded.preprocess
    lr = config.lr if "lr" in config.model_fields_set else usual_lr(config, _count(loaded.model))
    pinned: dict[str, Any] = {"model_revision": loaded.revision or config.model_revision,
              "dataset_revision": source.revision or config.dataset_revision,
              "class_weights": pinned_weights(config, loaded.labels),
              "image_size": how.height if how.height == how.width else None, "attention": attention,
              "lr": lr}  # fmt: skip
    lazily = None if record is None else record.splits["train"].lazy
    return Prepared(absolute(config.model_copy(update=pinned)), source, splits, loaded, began_lazily=lazily)


def _count(model: Any) -> int:
    return sum(weights.numel() for weights in model.parameters())


def advise(prepared: Prepared) -> None:
    """Warn about what will probably make a new run worse: classes of unequal size, an unusual learning rate."""
    config, source = prepared.config, prepared.source
    counts = np.bincount(prepared.splits["train"].labels, minlength=len(source.labels))
    if not counts_alike(config) and (unequal := imbalance(counts, source.labels)) is not None:
        by = "" if config.best_by in ("balanced-accuracy", "macro-f1") else ", with --best-by balanced-accuracy"
        console.warn(
            f"train: {unequal}; the model will prefer the frequent classes. "
            f"To count all classes alike: --logit-adjustment 1{by}"
        )
    if (unusual := unusual_lr(config, prepared.weights)) is not None:
        console.warn(unusual)


def _weights_of(model: str) -> str:
    """For a run, its best checkpoint, as in eval and predict; anything else unchanged, with verified checksums."""
    folder = expanded(model)
    if is_run(folder):
        return str(find_model(folder))
    verify(folder)
    return model


def _split(source: Source, config: TrainConfig) -> dict[str, Split]:
    """The splits of a new run. Images keep the roles they had when the model was trained, if it comes from a run."""
    began = expanded(config.model)
    sides = None if config.from_scratch else earlier_sides(began, source, absolute(config))
    splits = make_splits(
        source, val_fraction=config.val_fraction, max_train_samples=config.max_train_samples,
        max_eval_samples=config.max_eval_samples, seed=config.split_seed, test_fraction=config.test_fraction,
        sides=sides,
    )  # fmt: skip
    if config.test_fraction and (own := find_split_name(source, "test")):
        console.note(f"test_fraction {config.test_fraction:g} is not used: {source.name} has a test split, {own}")
    if sides is not None:
        refuse_trained(began, source, splits)
        for role, fraction in (("test", config.test_fraction), ("validation", config.val_fraction)):
            if fraction and role not in splits:
                console.warn(f"no {role} split: {config.model} was trained on every image that could be set aside")
    return splits


def _recalled(source: Source, record: Record) -> dict[str, Split]:
    splits = restore_splits(record, source, moved=False)
    for sentence in describe_changes(record, source, splits):
        console.note(sentence)
    return splits


def _tell_faults(source: Source, config: TrainConfig) -> None:
    """Warn about odd labels, or with `check: full` about every image; missing classes are reported later."""
    for warning in source.warnings:
        console.warn(warning)
    if config.check == "full":
        with console.working("checking the data") as progress:
            counts = Counter(
                one.kind
                for one in check(
                    source, max_pixels=config.max_pixels, value_range=range_of(config.value_range), progress=progress
                )
            )
        if counts:
            listed = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
            console.warn(f"{listed}; `vitft data check` with the same dataset lists them")
    elif config.check == "fast":
        for one in check_labels(source):
            if one.kind == "similar-labels":  # `advise` tells an imbalance
                console.warn(f"{one.path}: {one.detail}")


def _attend(loaded: Loaded, config: TrainConfig) -> str:
    """Set the model's attention implementation, and return it. Raises UsageError if the model does not have it."""
    spec, model = shape_of(loaded.model), loaded.model
    wanted = find_attention(config.attention, config.device, spec.tokens if spec else None)
    if wanted is not None:
        set_attention(model, wanted)
        if config.attention != "auto" and model.config._attn_implementation != wanted:
            raise UsageError(f"attention {wanted}: a {model.config.model_type} model has none; use auto.")
    return str(model.config._attn_implementation)


def _trained(source: Source, train: Split) -> tuple[str, ...]:
    """The classes that have a training image."""
    if len(set(source.labels)) < len(source.labels):  # two with one name: which is left out is unclear
        return tuple(source.labels)
    seen = np.bincount(train.labels, minlength=len(source.labels)) > 0
    return tuple(label for label, has in zip(source.labels, seen.tolist(), strict=True) if has)


def _read_labels(file: str, trained: Sequence[str], source: Source) -> tuple[str, ...]:
    """Read class names, one per line. Raises DataError for duplicates, and if a class with images is missing."""
    try:
        lines = expanded(file).read_text(encoding="utf-8-sig").split("\n")  # splitlines() would split at U+2028 too
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"labels {file}: {reason}; give a text file with one class name per line.") from error
    spelled = {composed(label): label for label in source.labels}
    names = [spelled.get(composed(line)) or spelled.get(composed(line.strip()), line.strip()) for line in lines]
    names = [name for name in names if name]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise DataError(f"labels {file}: {twice} is listed twice; remove one of the lines.")
    left = set(names)
    if missing := [label for label in trained if label not in left]:
        more = f" and {len(missing) - 1:,} more, which have" if len(missing) > 1 else ", which has"
        raise DataError(
            f"labels {file}: lacks {missing[0]}{more} training images; add every class that has, one per line."
        )
    known = set(source.labels)
    if others := [name for name in names if name not in known]:
        console.warn(f"labels {file}: not among the classes of {source.name}: {listed(others, 5)}")
    return tuple(names)


def _tell_untrained(source: Source, splits: Mapping[str, Split], head: Sequence[str]) -> None:
    """Warn about classes without a training image, and count the images that can therefore never be right.

    Raises DataError if a split has no other images.
    """
    known, names = {*map(composed, head)}, np.array(source.labels, object)
    lacks = np.array([composed(label) not in known for label in source.labels])
    trained = np.bincount(splits["train"].labels, minlength=len(names)) > 0
    if len(kept := names[~trained & ~lacks]):
        console.warn(f"no training image of {len(kept):,} of {len(names):,} classes in the head: {listed(kept, 5)}")
    if not lacks.any():
        return
    never = {role: int(lacks[split.labels].sum()) for role, split in splits.items()}
    for role, count in never.items():
        if count == len(splits[role].rows):
            raise DataError(
                f"{source.name}: no {role} image has a class of the head, so there is nothing to score; "
                "add training images of those classes, or name the classes with --labels FILE."
            )
    counts = " and ".join(f"{count:,} {role}" for role, count in never.items() if count)
    images = "image" if sum(never.values()) == 1 else "images"
    console.warn(
        f"no training image of {lacks.sum():,} of {len(names):,} classes, left out of the head (--labels FILE adds "
        f"them): {listed(names[lacks], 5)}{f'; {counts} {images} can therefore never be right' if counts else ''}"
    )


def _load_again(config: TrainConfig, dataset: str, trained: Sequence[str], checkpoint: Path) -> Loaded:
    # The checkpoint determines the size, which need not be square, and the classes.
    sizes = dict.fromkeys((*SIZES, "image_size", "model_revision"))
    card = read_card(checkpoint)
    model = checkpoint if config.lora_rank is None else base_of(checkpoint)
    loaded = load_for_training(
        config.model_copy(update={"model": str(model), "from_scratch": False} | sizes),
        trained, () if card is None else card.labels,
    )  # fmt: skip
    if has_adapter(loaded.model):
        read_adapter(loaded.model, checkpoint)
    if loaded.new_head:
        raise DataError(f"the classes of {dataset} are not those that the run began with; start a new run.")
    return loaded


def absolute(config: TrainConfig) -> TrainConfig:
    """The settings with absolute local paths, which are valid from any folder."""
    given = {name: value for name in PATHS if (value := getattr(config, name))}
    known = {"dataset": (*ALIASES, DIGITS), "model": PRESETS, "class_weights": ("balanced",)}
    return config.model_copy(
        update={name: paths.absolute(value, known.get(name, ())) for name, value in given.items()}
    )  # fmt: skip
