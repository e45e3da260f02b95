"""A ViT as a table: shapes, parameters, FLOPs and saved activations of each stage."""

import json
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from vitft.errors import ModelError, UsageError, as_flag
from vitft.io.console import size, without_secrets
from vitft.io.paths import expanded, shown
from vitft.models.custom_sizes import with_sizes
from vitft.spec import PRESETS, Stage, ViTSpec, preset, spec_from_config, stages, total, training_flops

DEFAULT_MODEL = "vit-base-patch16-224"


def resolve_spec(model: str | None = None, **sizes: int | None) -> ViTSpec:
    """The ViT to explain: a preset, or the config.json of a local folder or hub model, with some sizes replaced.

    The default model is DEFAULT_MODEL. `sizes` are image_size, patch_size, width, layers, heads, mlp, classes and
    pre_logits. Image and patch sizes are in pixels; a new patch size also sets the stride. Only a hub id (`owner/name`)
    uses the cache or the network. Presets and sizes do not import torch.

    Raises UsageError, in terms of the command's flags, for an unknown preset or inconsistent sizes; ModelError if the
    config.json is missing, unreadable or that of another architecture.
    """
    return with_sizes(_model_spec(model or DEFAULT_MODEL), sizes, as_flag)


def _model_spec(model: str) -> ViTSpec:
    """The spec of a preset, a local folder or a hub id, tried in that order."""
    folder = expanded(model)
    if model in PRESETS:
        return PRESETS[model]
    if folder.is_dir():
        return _read_config(folder / "config.json", model)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _read_config(_hub_config(model), model)
    if "/" in model:
        raise ModelError(f"no folder {model}; give a local model folder, a hub id (owner/name) or a preset.")
    try:
        return preset(model)  # raises for a mistyped name, without asking the hub
    except UsageError as error:
        raise UsageError(f"{error} You can also give a local folder or a hub id (owner/name).") from None


def _hub_config(model: str) -> Path:
    """The cached or downloaded config.json of a hub model. Raises ModelError if there is neither."""
    import huggingface_hub as hub

    from vitft.io.hub_errors import ask

    try:
        cached = hub.try_to_load_from_cache(model, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        ask(model, "config.json")
        return Path(hub.hf_hub_download(model, "config.json"))
    except Exception as error:  # a bad id, no such model, no network: these have no common base class
        cache = shown(Path(hub.constants.HF_HUB_CACHE))
        endpoint = without_secrets(hub.constants.ENDPOINT)
        raise ModelError(
            f"config.json of {model} is not in {cache} and cannot be downloaded from {endpoint} "
            f"({type(error).__name__}); offline, give a local folder or a preset such as {DEFAULT_MODEL}."
        ) from None


def _read_config(path: Path, model: str) -> ViTSpec:
    """The spec of a config.json."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        nested = sorted(path.parent.glob("*/config.json"))
        remedy = f"try {nested[0].parent}" if nested else "give a Transformers model folder"
        raise ModelError(f"no config.json in {model}; {remedy}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"config.json of {model} is unreadable ({error}); save the model again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"config.json of {model} is not a JSON object; save the model again.")
    return spec_from_config(config)


def document(spec: ViTSpec, batch_size: int = 1) -> dict[str, Any]:
    """All stages, JSON-ready: {"spec": fields of ViTSpec, "stages": [fields of Stage], "total": sums}.

    Shapes are lists; FLOPs and activation bytes are those of one forward pass of the batch (see `spec.stages`).
    Raises UsageError for a batch_size below 1.
    """
    parts = [asdict(stage) | {"input": list(stage.input), "output": list(stage.output)}
             for stage in stages(spec, batch_size)]  # fmt: skip
    sums = total(spec, batch_size)
    return {"spec": asdict(spec), "stages": parts, "total": {name: getattr(sums, name) for name in _COSTS}}


_COSTS = ("parameters", "flops", "activation_bytes")

# The columns of the table, and the order in which a narrow terminal drops them, least informative first.
_COLUMNS = ("stage", "shape in", "shape out", "params", "FLOPs", "saved")
_OPTIONAL = ("shape in", "saved", "FLOPs", "params")
Row = tuple[str | Text, ...] | None
"""A cell for each column, or None for a gap between rows."""


@dataclass(frozen=True)
class StageTable:
    """A table that drops columns to fit the width of the terminal."""

    summary: Text
    rows: list[Row]
    total: tuple[str, ...]
    legend: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The summary, as many columns as fit, and the legend."""
        unbounded = options.update(width=10_000)
        for count in range(len(_OPTIONAL) + 1):
            dropped = _OPTIONAL[:count]
            table = self._table([name for name in _COLUMNS if name not in dropped])
            if console.measure(table, options=unbounded).maximum <= options.max_width:
                break
        sums = dict(zip(_COLUMNS, self.total, strict=True))
        described = (name if name == "shape in" else f"{name} (total {sums[name]})" for name in dropped)
        missing = f" Not shown for lack of width: {', '.join(described)}." if dropped else ""
        yield self.summary
        yield table
        yield Text(self.legend + missing, style="dim")

    def _table(self, columns: list[str]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_footer=True, pad_edge=False, padding=(0, 1, 0, 0))
        indices = [_COLUMNS.index(name) for name in columns]
        for name, index in zip(columns, indices, strict=True):
            if name.startswith("shape"):
                style = "dim" if name == "shape in" else ""
                table.add_column(name, self.total[index], style=style, overflow="fold")
            else:
                table.add_column(name, self.total[index], justify="left" if name == "stage" else "right", no_wrap=True)
        for row in self.rows:
            table.add_section() if row is None else table.add_row(*(row[index] for index in indices))
        return table


def stage_table(spec: ViTSpec, batch_size: int = 1, all_blocks: bool = False) -> StageTable:
    """A summary of the ViT, the table of its stages, and a legend; all columns fit in a width of 80.

    Blocks after the first are combined in one row, unless `all_blocks`. Names are those of `spec.stages`; shapes start
    with the batch. Raises UsageError for a batch_size below 1.
    """
    rows: list[Row] = []
    repeated: list[Stage] = []
    for block, steps in groupby(stages(spec, batch_size), key=_block):
        if block > 1 and not all_blocks:
            repeated += steps
            if block == spec.layers:
                name = "block 2" if block == 2 else f"blocks 2-{block}"
                rows.append((Text(name, "bold cyan"), "", "as block 1", *_costs(repeated)))
        else:
            if block:
                rows.append((Text(f"block {block}", "bold cyan"), *[""] * 5))
            for step in steps:
                name = step.name.replace(f"block.{block}.", "  ")
                rows.append((name, _shape(step.input), _shape(step.output), *_costs([step])))
        rows.append(None)
    sums = total(spec, batch_size)
    total_row = ("total", _shape(sums.input), _shape(sums.output), *_costs([sums]))
    text = Text(" → ", "bold cyan").join(Text(step) for step in summary(spec)).append("\n")
    return StageTable(text, rows, total_row, _legend(spec, batch_size))


def _block(stage: Stage) -> int:
    """The number of the encoder block a stage is in, or 0 outside the blocks."""
    return int(stage.name.split(".")[1]) if stage.name.startswith("block.") else 0


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _costs(parts: list[Stage]) -> list[str]:
    """Total parameters, FLOPs and activation bytes of some stages, with a dot for 0."""
    parameters, flops, saved = (sum(getattr(stage, cost) for stage in parts) for cost in _COSTS)
    return [_count(parameters) or "·", _count(flops) or "·", size(saved) if saved else "·"]


def _count(number: float) -> str:
    """A count with up to four digits and a unit: 769, 590.6 k, 35.1 G; an empty string for 0."""
    if number < 1000:
        return f"{number:.0f}" if number else ""
    for unit in ("k", "M", "G", "T"):
        number /= 1000
        if round(number, 1) < 1000:
            return f"{number:.1f} {unit}"
    return f"{number / 1000:.1f} P"


def summary(spec: ViTSpec) -> tuple[str, ...]:
    """What happens to an image in the model, step by step, each in a few words."""
    blocks = "1 block" if spec.layers == 1 else f"{spec.layers} blocks"
    prefix = {0: "", 1: " with the class token"}.get(spec.prefix_tokens, f" with {spec.prefix_tokens} prefix tokens")
    return (
        f"{spec.image_height}×{spec.image_width} pixels",
        f"{spec.patches} patch{'es' if spec.patches > 1 else ''} of {spec.patch_height}×{spec.patch_width}",
        f"{spec.tokens} tokens of {spec.width} numbers{prefix}",
        f"{blocks} of attention (tokens look at each other) and MLP (each token on its own)",
        "the class token" if spec.pooling == "cls" else "the mean of the patch tokens",
        f"{spec.classes} logits, one per class",
    )


def _legend(spec: ViTSpec, batch_size: int) -> str:
    images = "1 image" if batch_size == 1 else f"{batch_size} images"
    training = _count(training_flops(spec, batch_size))
    return (
        f"\nShapes and costs are for {images}. FLOPs are those of matrix products, 2 per multiply-add; a training "
        f"step takes {training}. saved: float32 activations kept in memory for the backward pass."
    )
