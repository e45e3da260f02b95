"""Load or create a model: new head, other input size, frozen backbone, compiled blocks.

Weights are always loaded as float32; the setting `precision` applies only to matrix products.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
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
from vitft.errors import ModelError, UsageError, VitftError, first_line, nearest
from vitft.hardware.shards import write
from vitft.io import console
from vitft.io.hub_errors import answers, reason
from vitft.io.library_logs import quiet_transformers
from vitft.io.paths import composed, expanded
from vitft.models.blocks import batch_norms, block_stacks, freeze_first, frozen_parts
from vitft.models.classifiers import TIMM, check_family, classifier_class, classifier_config
from vitft.models.custom_sizes import with_sizes
from vitft.models.drop_path import drop_paths, set_drop_path_rate
from vitft.models.heads import head_modules, in_head, label_tensors
from vitft.models.image_processor import find_processor_file, read_processor
from vitft.models.lora import add_adapter, has_adapter, read_adapter
from vitft.models.memory_guard import check_lengths, check_memory, check_pickled
from vitft.models.resize import check_size, has_fixed_size, input_size, resize_model, with_image_size
from vitft.randomness import derive_seed
from vitft.spec import PRESETS, ViTSpec, spec_from_config

BUNDLED = "vit-micro"
EXPORTED = (".onnx", ".xml", ".pt2")
"""How the names of exported files end: see `checkpoints.exported`."""
_COMMIT = re.compile("[0-9a-f]{40}")
_OFFLINE_HINT = f"without network, use --model {BUNDLED} (bundled), a local folder or --from-scratch"

Scoring = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True)
class Loaded:
    """A model with its preprocessing, labels and hub commit."""

    model: Any  # a transformers PreTrainedModel for image classification
    preprocess: Preprocess
    labels: tuple[str, ...]
    revision: str | None  # the resolved hub commit; None for a folder
    new_head: bool
    scoring: Scoring = "softmax"  # turns logits into scores


@quiet_transformers()
def load_for_training(config: TrainConfig, labels: Sequence[str], untrained: Sequence[str] = ()) -> Loaded:
    """Load or create the model of a run, with a head for `labels`, at the run's input size.

    A checkpoint with the same label names keeps its head and its label order; the head may also have labels from
    `untrained`, the classes of the dataset without training images. Otherwise the head is new, initialized from the
    seed. Raises ModelError.
    """
    torch.manual_seed(derive_seed(config.seed, "weights"))
    if config.from_scratch:
        loaded = _from_scratch(config, labels)
        return replace(loaded, preprocess=loaded.preprocess.with_value_range(config.value_range))
    origin = _origin(locate(config.model), config.model_revision)
    hf_config = _read_hf_config(origin)
    known, wanted = _labels_of(hf_config), {*map(composed, labels)}
    same = known == tuple(labels) or (
        len(set(known)) == len(known) and wanted <= {*map(composed, known)} <= wanted | {*map(composed, untrained)}
    )
    keeps_head = same and _has_head(hf_config) and (scoring := _scoring(hf_config)) == "softmax"
    if same and _has_head(hf_config) and not keeps_head:
        console.warn(
            f"{config.model} scores each label independently ({scoring}): its head is replaced by a new softmax head, "
            "for exactly one label per image"
        )
    names = known if keeps_head else tuple(labels)
    _set_labels(hf_config, names)
    set_drop_path_rate(hf_config, config.drop_path)
    model = _load_weights(origin, hf_config, new_head=not keeps_head)
    preprocess = _read_preprocess(origin, hf_config)
    if config.image_size is not None and (preprocess.height, preprocess.width) != (config.image_size,) * 2:
        model = resize_model(model, config.image_size)
        preprocess = preprocess.with_size(config.image_size)
    drop_paths(model, config.drop_path)
    if config.freeze == "backbone":
        model.requires_grad_(False)
        for head in head_modules(model):
            head.requires_grad_(True)
    elif config.freeze != "none":
        freeze_first(model, config.freeze)
    if config.lora_rank is not None:
        add_adapter(model, config)
    _freeze_unused(model, preprocess)
    return Loaded(model, preprocess.with_value_range(config.value_range), names, origin.commit, not keeps_head)


def _freeze_unused(model: Any, how: Preprocess) -> None:
    """Freeze what the logits do not depend on: mask tokens, the last norm of a CLIP, the pooling of a SigLIP.

    It gets no gradient, and DDP would wait for one.
    """
    training = model.training
    model.eval()
    for device in ("meta", "cpu"):  # shapes tell, but where a model reads a number (Perceiver)
        try:
            unused = _without_gradient(model, how, device)
        except Exception:  # a model that reads no such image fails where training tries one
            continue
        for name in unused:
            model.get_parameter(name).requires_grad_(False)
        break
    model.train(training)


def _without_gradient(model: Any, how: Preprocess, device: str) -> list[str]:
    """The names of trainable parameters that a backward pass does not reach, on the CPU or with shapes alone."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    if device == "meta":
        tensors = {
            name: torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
            for name, tensor in tensors.items()
        }
    trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    pixels = torch.zeros((1, how.channels, how.height, how.width), device=device)
    logits = torch.func.functional_call(model, tensors, kwargs={"pixel_values": pixels}).logits
    gradients = torch.autograd.grad(logits.sum(), list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]


@quiet_transformers()
def load_trained(name_or_path: str | Path, revision: str | None = None, *, headless: bool = False) -> Loaded:
    """Load a trained image classifier from a folder or hub id, in evaluation mode. Raises ModelError.

    With `headless`, a backbone without a head is loaded too, with an untrained head for two classes.
    """
    origin = _origin(locate(str(name_or_path)), revision)
    hf_config = _read_hf_config(origin)
    new_head = not _has_head(hf_config)
    if new_head and not headless:
        raise _headless(origin)
    if new_head:
        _set_labels(hf_config, ("untrained 1", "untrained 2"))
    model = _load_weights(origin, hf_config, new_head=new_head)
    preprocess = _read_preprocess(origin, hf_config)
    return Loaded(model.eval(), preprocess, _labels_of(hf_config), origin.commit, new_head, _scoring(hf_config))


@contextmanager
def saved(model: Any, processor: Any = None) -> Iterator[str]:
    """Save a Transformers model, with its image processor if any, to a temporary folder. Raises UsageError."""
    if not isinstance(model, transformers.PreTrainedModel):
        raise UsageError(f"model: got {type(model).__name__}; pass a name, a path or a Transformers model.")
    with TemporaryDirectory(prefix="vitft-") as temporary:
        folder = Path(temporary) / (Path(model.name_or_path).name or type(model).__name__)
        with quiet_transformers():
            model.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
        if (
            processor is None
            and (origin := model.name_or_path)
            and (file := find_processor_file(origin, local_files_only=True))
        ):
            copyfile(file, folder / file.name)
        yield str(folder)


def _scoring(hf_config: Any) -> Scoring:
    """How to turn logits into scores, by the rules of Transformers' pipeline."""
    if hf_config.problem_type == "regression":
        return "none"
    return (
        "sigmoid" if hf_config.problem_type == "multi_label_classification" or hf_config.num_labels == 1 else "softmax"
    )


@quiet_transformers()
def read_config(name_or_path: str | Path, *, offline: bool | None = None) -> Any:
    """The Transformers configuration of a folder or hub id. Raises ModelError.

    `offline`: read it from the cache alone; by default if the hub does not answer.
    """
    return _read_hf_config(_origin(locate(str(name_or_path)), None, offline))


def locate(model: str) -> str:
    """Resolve a model name to a folder or hub id; `vit-micro` is the bundled checkpoint. Raises ModelError."""
    path = expanded(model)
    if path.is_dir():
        return str(path)
    if path.is_file() and path.suffix in EXPORTED:
        raise _exported(model)
    if path.is_file():
        raise ModelError(f"model {model}: is a file; use the folder that contains its config.json and weights.")
    if model == BUNDLED:
        return str(files("vitft") / "assets" / BUNDLED)
    if model in PRESETS:
        raise ModelError(f"{model} is a preset without weights; add --from-scratch, or use a checkpoint.")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise ModelError(f"model {model}: no such folder; {_OFFLINE_HINT}.")
    if "/" not in model and (hint := nearest(model, PRESETS)):
        raise ModelError(f"model {model}: neither a local folder nor a preset{hint}")
    return model


def shape_of(model: Any) -> ViTSpec | None:
    """The sizes of a loaded model; None if a ViTSpec cannot describe the architecture."""
    try:
        return spec_from_config(model.config.to_dict() | {"num_labels": model.config.num_labels})
    except VitftError:
        return None


def vit_config(spec: ViTSpec) -> Any:
    """The Transformers configuration for a ViTSpec."""
    return transformers.ViTConfig(
        image_size=spec.image_height,
        patch_size=spec.patch_height,
        num_channels=spec.channels,
        hidden_size=spec.width,
        num_attention_heads=spec.heads,
        num_hidden_layers=spec.layers,
        intermediate_size=spec.mlp,
    )


@quiet_transformers()
def spec_of(config: TrainConfig) -> ViTSpec:
    """The sizes of a new model: a preset, modified by the sizes in the settings. Raises UsageError."""
    sizes = {name: getattr(config, name) for name in ("image_size", *SIZES)}
    if config.width and not config.mlp:
        sizes["mlp"] = 4 * config.width
    return with_sizes(PRESETS[config.model], sizes)


def _from_scratch(config: TrainConfig, labels: Sequence[str]) -> Loaded:
    commit = None
    if config.model in PRESETS:
        hf_config = vit_config(spec_of(config))
        preprocess = Preprocess(hf_config.image_size, hf_config.image_size)
    else:  # the configuration of a checkpoint, without its weights
        if any(getattr(config, name) for name in SIZES):
            raise ModelError(f"sizes apply only to presets ({', '.join(PRESETS)}); {config.model} has its own.")
        origin = _origin(locate(config.model), config.model_revision)
        hf_config, commit = _read_hf_config(origin), origin.commit
        preprocess = _read_preprocess(origin, hf_config)
        if config.image_size is not None:
            hf_config = with_image_size(hf_config, config.image_size)
            preprocess = preprocess.with_size(config.image_size)
    _set_labels(hf_config, labels)
    set_drop_path_rate(hf_config, config.drop_path)
    check_memory(classifier_class(hf_config), hf_config, config.model)
    check_size(hf_config, preprocess.height, preprocess.width)
    model = classifier_class(hf_config)(hf_config)
    drop_paths(model, config.drop_path)
    _freeze_unused(model, preprocess)
    return Loaded(model, preprocess, tuple(labels), commit, True)


@dataclass(frozen=True)
class _Origin:
    """Where a model is read from: a folder or a hub id. `cache_only`: the hub cannot be reached."""

    name_or_path: str
    revision: str | None
    cache_only: bool
    commit: str | None = None  # the resolved hub commit

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of every Transformers loader."""
        return {"revision": self.commit or self.revision, "local_files_only": self.cache_only}


def _origin(name_or_path: str, revision: str | None, offline: bool | None = None) -> _Origin:
    folder = Path(name_or_path)
    if not folder.is_dir():
        offline = not answers(name_or_path, revision) if offline is None else offline
        origin = _Origin(name_or_path, revision, offline)
        try:
            file = transformers.utils.cached_file(name_or_path, "config.json", **origin.arguments())
        except (OSError, ValueError) as error:
            raise _unreadable(origin, error) from error
        # The snapshot folder in the cache is named after the commit; all other files are then read at that commit.
        name = Path(str(file)).parent.name
        return replace(origin, commit=name if _COMMIT.fullmatch(name) else None)
    if not (folder / "config.json").is_file():
        names = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
        if any((folder / f"model{suffix}").is_file() for suffix in EXPORTED):
            raise _exported(name_or_path)
        raise ModelError(f"{name_or_path}: no config.json (it contains {names}); use a Transformers model folder.")
    return _Origin(name_or_path, revision, True)


def _read_hf_config(origin: _Origin) -> Any:
    """Read and check the Transformers configuration. Raises ModelError unless it can classify images."""
    try:
        file = transformers.utils.cached_file(origin.name_or_path, "config.json", **origin.arguments())
        document = json.loads(Path(str(file)).read_text(encoding="utf-8"))
        check_lengths(document, origin.name_or_path)
        family = TIMM if "pretrained_cfg" in document else document.get("model_type")
        check_family(family, origin.name_or_path)
        hf_config = transformers.AutoConfig.from_pretrained(
            origin.name_or_path, trust_remote_code=False, **origin.arguments()
        )
    except VitftError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(origin, error) from error
    except Exception as error:  # Transformers has its own validation errors
        raise ModelError(f"{origin.name_or_path}: config.json is invalid: {first_line(error)}.") from error
    classifier_class(hf_config := classifier_config(hf_config))
    for part in (hf_config, getattr(hf_config, "vision_config", None) or hf_config):  # only logits, by name
        part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False
    return hf_config


def _pickled(origin: _Origin) -> list[Path]:
    """The pickle files that Transformers would load: none if there are safetensors."""
    folder = Path(origin.name_or_path)
    if folder.is_dir():
        return [] if any(folder.glob("model*.safetensors")) else sorted(folder.glob("pytorch_model*.bin"))
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        try:
            file = transformers.utils.cached_file(
                origin.name_or_path, name, _raise_exceptions_for_missing_entries=False, **origin.arguments()
            )
        except (OSError, ValueError):  # loading the weights reports the error
            return []
        if file:
            return [Path(file)] if name.endswith(".bin") else []
    return []


def _load_weights(origin: _Origin, hf_config: Any, *, new_head: bool) -> Any:
    """Load the model. With `new_head`, the head is initialized; the result depends only on the torch seed.

    Vectors outside of the blocks, such as a pooler's norm that pretraining did not use, may be missing: they keep
    their initial values, with a warning. Raises ModelError for other missing tensors, for tensors of another shape
    and for non-finite values.
    """
    classifier = classifier_class(hf_config)
    rng_state = torch.get_rng_state()
    check_memory(classifier, hf_config, origin.name_or_path)
    for file in _pickled(origin):
        check_pickled(file)
    model, info = _read_weights(classifier, origin, hf_config)
    if not label_tensors(model):
        raise ModelError(f"{origin.name_or_path}: a {hf_config.model_type} has no layer that depends on the labels.")
    missing = {name for name in info["missing_keys"] if not name.endswith(("mask_token", "num_batches_tracked"))}
    reshaped = {name for name, *_ in info["mismatched_keys"]}
    head = {name for name in missing | reshaped if in_head(model, name)}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    initial = {name for name in missing - head if _beside_blocks(name, tensors[name])} if new_head else set()
    if wrong := sorted((missing | reshaped) - head - initial):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelError(
            f"{origin.name_or_path}: {wrong[0]}{more} of a {hf_config.model_type}'s {len(tensors)} tensors "
            f"{'are' if more else 'is'} missing or of another shape; is this the right folder?"
        )
    if head and not new_head:
        raise _headless(origin)
    if initial:
        console.warn(f"{origin.name_or_path} has no {', '.join(sorted(initial))}: they keep their initial values")
    if new_head:
        torch.set_rng_state(rng_state)  # loading drew random numbers
        for name in sorted(label_tensors(model) | head & dict(model.named_parameters()).keys()):
            if tensors[name].ndim > 1:
                nn.init.trunc_normal_(tensors[name], std=getattr(hf_config, "initializer_range", 0.02))
            elif name in label_tensors(model):
                nn.init.zeros_(tensors[name])
    for name, tensor in model.float().state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{origin.name_or_path}: {name} has non-finite values; use another checkpoint.")
    return model


def _read_weights(classifier: Any, origin: _Origin, hf_config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """`from_pretrained` of the model; returns the model and Transformers' loading info."""
    try:
        model, info = classifier.from_pretrained(
            origin.name_or_path, config=hf_config, dtype=torch.float32, ignore_mismatched_sizes=True,
            output_loading_info=True, weights_only=True, **origin.arguments(), **options,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _unreadable(origin, error) from error
    except Exception as error:  # safetensors and pickle have their own errors for corrupt files
        raise ModelError(f"{origin.name_or_path}: its weights cannot be read: {first_line(error)}.") from error
    if not options and info["unexpected_keys"] and all(key.startswith("module.") for key in info["unexpected_keys"]):
        # Saved from torch's DataParallel.
        return _read_weights(classifier, origin, hf_config, key_mapping={r"^module\.": ""})
    return model, info


def _beside_blocks(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is a vector (or scalar) outside of the repeated blocks."""
    return tensor.ndim <= 1 and not any(part.isdecimal() for part in name.split("."))


def restore_weights(model: Any, folder: Path) -> None:
    """Give a model that is being trained the weights of one of its checkpoints. Raises ModelError."""
    if has_adapter(model):
        read_adapter(model, folder)
    else:
        weights = load_trained(folder).model.state_dict()
        for name, tensor in model.state_dict().items():
            write(tensor, weights[name])


def set_training(model: Any, freeze: int | str) -> None:
    """Set training mode, but for what the setting `freeze` freezes, which has no dropout and fixed running means."""
    model.train(freeze != "backbone")
    if freeze == "backbone":
        for head in head_modules(model):
            head.train()
    elif freeze != "none":
        for part in frozen_parts(model):
            part.eval()
    for norm in batch_norms(model):  # those beside an adapter
        if isinstance(norm.weight, nn.Parameter):
            norm.train(norm.training and norm.weight.requires_grad)


def set_attention(model: Any, wanted: str) -> None:
    """Set the implementation of attention, `eager` or `sdpa`, if the model has it."""
    with suppress(ValueError):  # some architectures refuse what they lack, others ignore it
        model.set_attn_implementation(wanted)


def checkpoint_activations(model: Any) -> None:
    """Turn on gradient checkpointing: save only each block's input, recompute the rest (Chen et al. 2016)."""
    # Renamed within Transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compiled(module: nn.Module) -> Callable[..., Any]:
    """A forward function with the blocks under torch.compile, for one batch shape. The module does not change.

    All blocks of a model share their code, so torch.compile compiles it once: for ViT-B/16 this took 8 s on an H200,
    and a step took a fifth less time (docs/benchmarks.md). A module without repeated blocks is compiled as a whole.
    """
    innermost = block_stacks(module)
    if not innermost:
        return torch.compile(module, dynamic=False)
    original = [list(blocks) for blocks in innermost]
    fast = [[torch.compile(block, dynamic=False) for block in blocks] for blocks in original]

    def install(blocks_of: Sequence[Sequence[Any]]) -> None:
        for stack, blocks in zip(innermost, blocks_of, strict=True):
            for index, block in enumerate(blocks):
                stack[index] = block

    def forward(**inputs: Any) -> Any:
        try:
            install(fast)
            return module(**inputs)
        finally:
            install(original)

    return forward


def _set_labels(hf_config: Any, names: Sequence[str]) -> None:
    hf_config.num_labels = len(names)
    hf_config.id2label = dict(enumerate(names))
    hf_config.label2id = {name: i for i, name in enumerate(names)}
    hf_config.problem_type = None
    if hf_config.model_type == TIMM:
        hf_config.label_names, hf_config.label_descriptions = list(names), None


def _labels_of(hf_config: Any) -> tuple[str, ...]:
    """The class names; a class without one is called `LABEL_3`, like in Transformers."""
    id2label = hf_config.id2label or {}
    names = id2label if isinstance(id2label, dict) else dict(enumerate(id2label))
    return tuple(str(names.get(i, f"LABEL_{i}")) for i in range(hf_config.num_labels))


def _has_head(hf_config: Any) -> bool:
    if hf_config.model_type == TIMM and not hf_config.architectures:  # timm's own checkpoints name no class
        return bool(hf_config.num_labels)
    return any("ForImageClassification" in name for name in hf_config.architectures or ())


def _read_preprocess(origin: _Origin, hf_config: Any) -> Preprocess:
    """The checkpoint's preprocessing, at an input size that the model accepts."""
    preprocess = read_processor(origin.name_or_path, hf_config, **origin.arguments())
    size, prepared = input_size(hf_config), (preprocess.height, preprocess.width)
    if size is None or size == prepared or not has_fixed_size(hf_config, prepared):
        return preprocess
    return preprocess.with_size(*size)


def _headless(origin: _Origin) -> ModelError:
    return ModelError(f"{origin.name_or_path}: a backbone with no classification head; fine-tune it first: vitft train")


def _exported(model: str) -> ModelError:
    return ModelError(f"{model}: is exported, so its weights cannot be trained or averaged; use the run it came from.")


def _unreadable(origin: _Origin, error: Exception) -> ModelError:
    if Path(origin.name_or_path).is_dir():
        return ModelError(f"{origin.name_or_path}: not a readable Transformers model: {first_line(error)}.")
    at = f" at revision {origin.revision}" if origin.revision else ""
    return ModelError(f"model {origin.name_or_path}{at}: no such local folder, and {reason(error)}; {_OFFLINE_HINT}.")
