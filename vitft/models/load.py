"""A model from a name or a folder: load or create, new head, other input size, freeze.

Weights are float32 whatever was stored: precision is the matrix products', not the weights'.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import transformers
from torch import nn

from vitft.config.train import SIZES, TrainConfig
from vitft.data.augment import Preprocess
from vitft.errors import ModelError, UsageError, VitftError, nearest
from vitft.io import console
from vitft.io.hub_errors import answers, reason
from vitft.io.paths import composed, expanded
from vitft.models.custom_sizes import with_sizes
from vitft.models.heads import head_modules, in_head, label_tensors
from vitft.models.image_processor import read_processor, stored_processor
from vitft.models.memory_guard import check_demand, check_lengths, check_pickled
from vitft.models.resize import at_image_size, check_size, is_fixed, size_of, with_image_size
from vitft.randomness import seed_of
from vitft.spec import PRESETS, ViTSpec, spec_from_config

BUNDLED = "vit-micro"
_COMMIT = re.compile("[0-9a-f]{40}")
_ELSEWHERE = f"--model {BUNDLED} is bundled, a local folder needs no network, --from-scratch no weights"


Scoring = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True)
class Loaded:
    """A model, what turns an image into its input, and where both came from."""

    model: Any  # a transformers PreTrainedModel for image classification
    preprocess: Preprocess
    labels: tuple[str, ...]
    revision: str | None  # the hub commit that was used
    new_head: bool
    scoring: Scoring = "softmax"  # what makes scores of its logits


def load_for_training(config: TrainConfig, labels: Sequence[str], untrained: Sequence[str] = ()) -> Loaded:
    """The model of a run: pretrained or new, with a head for `labels`, at the run's input size.

    A checkpoint whose labels are these by name keeps its head and its order of labels, also if the head has some of
    the `untrained` classes of the data set; any other head is new, seeded. Raises ModelError.
    """
    _quiet()
    torch.manual_seed(seed_of(config.seed, "weights"))
    if config.from_scratch:
        loaded = _from_scratch(config, labels)
        return replace(loaded, preprocess=loaded.preprocess.with_value_range(config.value_range))
    origin = _origin(locate(config.model), config.model_revision)
    stored = _stored(origin)
    known, wanted = _labels_of(stored), {*map(composed, labels)}
    same = known == tuple(labels) or (
        len(set(known)) == len(known) and wanted <= {*map(composed, known)} <= wanted | {*map(composed, untrained)}
    )
    keeps_head = same and _has_head(stored) and (scoring := _scoring(stored)) == "softmax"
    if same and _has_head(stored) and not keeps_head:
        console.warn(
            f"{config.model} scores each label by itself ({scoring}): its head is left out for a new one, "
            "which tells which one of the labels an image has"
        )
    names = known if keeps_head else tuple(labels)
    _label(stored, names)
    model = _weights(origin, stored, fresh_head=not keeps_head)
    how = _preprocess(origin, stored)
    if config.image_size is not None and (how.height, how.width) != (config.image_size,) * 2:
        model = at_image_size(model, config.image_size)
        how = how.with_size(config.image_size)
    if config.freeze == "backbone":
        model.requires_grad_(False)
        for head in head_modules(model):
            head.requires_grad_(True)
    _without_mask_token(model)
    return Loaded(model, how.with_value_range(config.value_range), names, origin.commit, not keeps_head)


def _without_mask_token(model: Any) -> None:
    """It is for pretraining: no image gives it a gradient, and several processes would wait for one."""
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token"):
            parameter.requires_grad_(False)


def load_trained(where: str | Path, revision: str | None = None, *, headless: bool = False) -> Loaded:
    """A finished image classifier, as it is: a folder or a hub id. Raises ModelError.

    `headless`: a backbone without a head is loaded too, with an untrained one for two classes.
    """
    origin = _origin(locate(str(where)), revision)
    stored = _stored(origin)
    lacks = not _has_head(stored)
    if lacks and not headless:
        raise _headless(origin)
    if lacks:
        _label(stored, ("untrained 1", "untrained 2"))
    model = _weights(origin, stored, fresh_head=lacks)
    how = _preprocess(origin, stored)
    return Loaded(model.eval(), how, _labels_of(stored), origin.commit, lacks, _scoring(stored))


@contextmanager
def saved(model: Any, processor: Any = None) -> Iterator[str]:
    """A Transformers model as a folder, while entered, with its processor if it has one. Raises UsageError."""
    if not isinstance(model, transformers.PreTrainedModel):
        raise UsageError(f"model: got {type(model).__name__}; give a name, a path or a model of Transformers.")
    with TemporaryDirectory(prefix="vitft-") as temporary:
        folder = Path(temporary) / (Path(model.name_or_path).name or type(model).__name__)
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        elif model.name_or_path and (file := stored_processor(model.name_or_path, local_files_only=True)):
            copyfile(file, folder / file.name)
        yield str(folder)


def _scoring(stored: Any) -> Scoring:
    """As Transformers' pipeline decides it."""
    if stored.problem_type == "regression":
        return "none"
    return "sigmoid" if stored.problem_type == "multi_label_classification" or stored.num_labels == 1 else "softmax"


def read_config(where: str | Path) -> Any:
    """The Transformers configuration of a folder or hub id. Raises ModelError."""
    return _stored(_origin(locate(str(where)), None))


def locate(model: str) -> str:
    """The folder or hub id behind a name; the bundled checkpoint has a name of its own."""
    path = expanded(model)
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise ModelError(f"model {model}: a file; give the folder that holds its config.json and weights.")
    if model == BUNDLED:
        return str(files("vitft") / "assets" / BUNDLED)
    if model in PRESETS:
        raise ModelError(f"{model} is a shape without weights; add --from-scratch, or use a checkpoint of it.")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise ModelError(f"model {model}: no such folder; {_ELSEWHERE}.")
    if "/" not in model and (hint := nearest(model, PRESETS)):
        raise ModelError(f"model {model}: neither a folder here nor a known shape{hint}")
    return model


def shape_of(model: Any) -> ViTSpec | None:
    """The sizes of a loaded model; None where its architecture has no stage table."""
    try:
        return spec_from_config(model.config.to_dict() | {"num_labels": model.config.num_labels})
    except VitftError:
        return None


def vit_config(spec: ViTSpec) -> Any:
    """The Transformers configuration of a specification."""
    return transformers.ViTConfig(
        image_size=spec.image_height,
        patch_size=spec.patch_height,
        num_channels=spec.channels,
        hidden_size=spec.width,
        num_attention_heads=spec.heads,
        num_hidden_layers=spec.layers,
        intermediate_size=spec.mlp,
    )


def spec_of(config: TrainConfig) -> ViTSpec:
    """The shape of a new model: a preset, with the sizes that were given in place of its own."""
    given = {name: getattr(config, name) for name in ("image_size", *SIZES)}
    if config.width and not config.mlp:
        given["mlp"] = 4 * config.width
    return with_sizes(PRESETS[config.model], given)


def _from_scratch(config: TrainConfig, labels: Sequence[str]) -> Loaded:
    commit = None
    sizes = (config.patch_size, config.width, config.layers, config.heads, config.mlp)
    if config.model in PRESETS:
        stored = vit_config(spec_of(config))
        how = Preprocess(stored.image_size, stored.image_size)
    else:  # the shape of a checkpoint, without its weights
        if any(sizes):
            raise ModelError(f"sizes are for presets ({', '.join(PRESETS)}); {config.model} has its own.")
        origin = _origin(locate(config.model), config.model_revision)
        stored, commit = _stored(origin), origin.commit
        how = _preprocess(origin, stored)
        if config.image_size is not None:
            stored, how = with_image_size(stored, config.image_size), how.with_size(config.image_size)
    _label(stored, labels)
    check_demand(_classifier_class(stored), stored, config.model)
    check_size(stored, how.height, how.width)
    model = _classifier_class(stored)(stored)
    _without_mask_token(model)
    return Loaded(model, how, tuple(labels), commit, True)


@dataclass(frozen=True)
class _Origin:
    """Where a model is read from: a folder or a hub id, and from the cache alone where no hub answers."""

    where: str
    revision: str | None
    cache_only: bool
    commit: str | None = None  # what the revision came to, on the hub

    def arguments(self) -> dict[str, Any]:
        """What every reader of Transformers takes."""
        return {"revision": self.commit or self.revision, "local_files_only": self.cache_only}


def _origin(where: str, revision: str | None) -> _Origin:
    _quiet()
    folder = Path(where)
    if not folder.is_dir():
        asked = _Origin(where, revision, not answers(where, revision))
        try:
            found = transformers.utils.cached_file(where, "config.json", **asked.arguments())
        except (OSError, ValueError) as error:
            raise _unreadable(asked, error) from error
        # The cache's folder of a snapshot has the commit's name; all other files are read from it too.
        name = Path(str(found)).parent.name
        return replace(asked, commit=name if _COMMIT.fullmatch(name) else None)
    if not (folder / "config.json").is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise ModelError(f"{where}: no config.json here (it holds {held}); point to a Transformers model folder.")
    return _Origin(where, revision, True)


def _stored(origin: _Origin) -> Any:
    """The model's Transformers configuration, of an architecture that classifies images."""
    try:
        file = transformers.utils.cached_file(origin.where, "config.json", **origin.arguments())
        check_lengths(json.loads(Path(str(file)).read_text(encoding="utf-8")), origin.where)
        stored = transformers.AutoConfig.from_pretrained(origin.where, trust_remote_code=False, **origin.arguments())
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(origin, error) from error
    except Exception as error:  # Transformers checks the values with an error of its own
        raise ModelError(f"{origin.where}: config.json is not usable: {_first_line(error)}.") from error
    _classifier_class(stored)
    for part in (stored, getattr(stored, "vision_config", None) or stored):  # logits by their name, and they alone
        part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False
    return stored


def _pickled(origin: _Origin) -> list[Path]:
    """The pickles that Transformers would read the weights from: it takes safetensors where there are any."""
    folder = Path(origin.where)
    if folder.is_dir():
        return [] if any(folder.glob("model*.safetensors")) else sorted(folder.glob("pytorch_model*.bin"))
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        try:
            found = transformers.utils.cached_file(
                origin.where, name, _raise_exceptions_for_missing_entries=False, **origin.arguments()
            )
        except (OSError, ValueError):  # what the hub said is told where the weights are read
            return []
        if found:
            return [Path(found)] if name.endswith(".bin") else []
    return []


def _weights(origin: _Origin, stored: Any, *, fresh_head: bool) -> Any:
    """The model with every tensor that the checkpoint has; only a `fresh_head` is new, and depends on the seed alone.

    Raises ModelError naming what else is missing or of another shape, and what is no number. Vectors beside the
    blocks, such as the norm of a pooler that pretraining does without, begin at their initial values, with a warning.
    """
    classifier = _classifier_class(stored)
    torch_state = torch.get_rng_state()
    check_demand(classifier, stored, origin.where)
    for file in _pickled(origin):
        check_pickled(file)
    model, info = _read_weights(classifier, origin, stored)
    if not label_tensors(model):
        raise ModelError(f"{origin.where}: a {stored.model_type} has no classifier that could get other labels.")
    missing = {name for name in info["missing_keys"] if not name.endswith(("mask_token", "num_batches_tracked"))}
    reshaped = {name for name, *_ in info["mismatched_keys"]}
    headless = {name for name in missing | reshaped if in_head(model, name)}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    initial = {name for name in missing - headless if _beside_blocks(name, tensors[name])} if fresh_head else set()
    if wrong := sorted((missing | reshaped) - headless - initial):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelError(
            f"{origin.where}: {wrong[0]}{more} of a {stored.model_type}'s {len(tensors)} tensors "
            f"{'are' if more else 'is'} missing or of another shape; is this the right folder?"
        )
    if headless and not fresh_head:
        raise _headless(origin)
    if initial:
        console.warn(f"{origin.where} has no {', '.join(sorted(initial))}: they begin at their initial values")
    if fresh_head:
        torch.set_rng_state(torch_state)  # not on what loading drew
        for name in sorted(label_tensors(model) | headless & dict(model.named_parameters()).keys()):
            if tensors[name].ndim > 1:
                nn.init.trunc_normal_(tensors[name], std=getattr(stored, "initializer_range", 0.02))
            elif name in label_tensors(model):
                nn.init.zeros_(tensors[name])
    for name, tensor in model.float().state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{origin.where}: {name} holds values that are no number; use another checkpoint.")
    return model


def _read_weights(classifier: Any, origin: _Origin, stored: Any, **how: Any) -> tuple[Any, dict[str, Any]]:
    """The model as Transformers reads it, and what it says was missing, of other shapes and left over."""
    try:
        model, info = classifier.from_pretrained(
            origin.where, config=stored, dtype=torch.float32, ignore_mismatched_sizes=True,
            output_loading_info=True, weights_only=True, **origin.arguments(), **how,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unreadable(origin, error) from error
    except Exception as error:  # safetensors and pickle raise types of their own for a torn file
        raise ModelError(f"{origin.where}: its weights cannot be read: {_first_line(error)}.") from error
    if not how and info["unexpected_keys"] and all(key.startswith("module.") for key in info["unexpected_keys"]):
        # Saved from torch's DataParallel.
        return _read_weights(classifier, origin, stored, key_mapping={r"^module\.": ""})
    return model, info


def _beside_blocks(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is a vector, and not of one of the repeated blocks."""
    return tensor.ndim <= 1 and not any(part.isdecimal() for part in name.split("."))


def set_training(model: Any, *, frozen_backbone: bool) -> None:
    """Training mode; a frozen backbone stays in evaluation mode, without dropout."""
    model.train(not frozen_backbone)
    for head in head_modules(model) if frozen_backbone else ():
        head.train()


def checkpoint_activations(model: Any) -> None:
    """Keep only what each block reads, and compute the rest again in the backward pass (Chen et al. 2016)."""
    # Transformers renamed it within version 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compiled(module: nn.Module) -> Callable[..., Any]:
    """The module with its blocks by torch.compile, for batches of one shape; the module itself stays as it is.

    A model repeats one block, so that one is compiled for all: on an H200 that took 8 s for ViT-B/16, and its step was
    a fifth shorter (docs/benchmarks.md). What has no repeated blocks is compiled whole.
    """
    found = [one for one in module.modules() if isinstance(one, nn.ModuleList) and len({*map(type, one)}) == 1]
    lists = [one for one in found if not any(other in found for other in one.modules() if other is not one)]
    if not lists:
        return torch.compile(module, dynamic=False)
    own = [list(blocks) for blocks in lists]
    fast = [[torch.compile(block, dynamic=False) for block in blocks] for blocks in own]

    def forward(**inputs: Any) -> Any:
        try:
            _put(fast, lists)
            return module(**inputs)
        finally:
            _put(own, lists)

    return forward


def _put(blocks: Sequence[Sequence[Any]], lists: Sequence[nn.ModuleList]) -> None:
    for new, old in zip(blocks, lists, strict=True):
        for place, block in enumerate(new):
            old[place] = block


def _label(stored: Any, names: Sequence[str]) -> None:
    stored.num_labels = len(names)
    stored.id2label = dict(enumerate(names))
    stored.label2id = {name: i for i, name in enumerate(names)}
    stored.problem_type = None


def _labels_of(stored: Any) -> tuple[str, ...]:
    """Of each class its name; `LABEL_3`, as Transformers has it, of one that has none."""
    given = stored.id2label or {}
    names = given if isinstance(given, dict) else dict(enumerate(given))
    return tuple(str(names.get(i, f"LABEL_{i}")) for i in range(stored.num_labels))


def _has_head(stored: Any) -> bool:
    return any("ForImageClassification" in name for name in stored.architectures or ())


def _classifier_class(stored: Any) -> Any:
    mapping = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if type(stored) not in mapping:
        raise ModelError(f"a {stored.model_type} model cannot classify images; use a ViT, DeiT, BEiT, DINOv2 or Swin.")
    found = mapping[type(stored)]
    known = found if isinstance(found, tuple | list) else [found]
    # As AutoModelForImageClassification does: a distilled DeiT keeps its two heads.
    return next((one for one in known if one.__name__ in (stored.architectures or ())), known[0])


def _preprocess(origin: _Origin, stored: Any) -> Preprocess:
    """How the checkpoint prepares images, at a size that the model can read."""
    how = read_processor(origin.where, stored, **origin.arguments())
    own = size_of(stored)
    if own is None or own == (how.height, how.width) or not is_fixed(stored, (how.height, how.width)):
        return how
    return how.with_size(*own)


def _headless(origin: _Origin) -> ModelError:
    return ModelError(f"{origin.where}: a backbone with no classification head; fine-tune it first: vitft train.")


def _unreadable(origin: _Origin, error: Exception) -> ModelError:
    if Path(origin.where).is_dir():
        return ModelError(f"{origin.where}: not a readable Transformers model: {_first_line(error)}.")
    at = f" at revision {origin.revision}" if origin.revision else ""
    return ModelError(f"model {origin.where}{at}: no folder of that name here, and {reason(error)}; {_ELSEWHERE}.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


@cache
def _quiet() -> None:
    """Transformers' own messages name things a person here cannot act on; ours say what matters."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
