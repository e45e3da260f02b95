"""The model card of a checkpoint, `README.md`: what it was trained on and its scores, for people and for the hub."""

import html
import re
from math import isfinite
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vitft import __version__
from vitft.checkpoints.metadata import Card, name_of
from vitft.config.train import TrainConfig
from vitft.data.sources.source import ALIASES
from vitft.io.console import counted, safe


def readme(card: Card, repo: str | None = None, license: str | None = None) -> str:
    """The text of the model card.

    Args:
        card: the metadata of the checkpoint.
        repo: the hub id that it gets, if it gets one.
        license: the license that the card states, as the hub spells it, such as apache-2.0.
    """
    scores = "\n".join(
        f"- {split}: accuracy {100 * score['accuracy']:.2f} % on {counted(score['count'], 'image')} "
        f"(split {score['split_hash']})"
        + (", which chose the checkpoint, so this is no independent score" if _chose(card) else "")
        for split, score in card.scores.items()
    )
    config = card.config
    start = f"{name_of(config.model)}, new weights" if config.from_scratch else name_of(config.model)
    data, length = _plain(name_of(str(config.dataset))), f"for {counted(card.step, 'step')}\n({card.epoch:.2f} epochs) "
    average = ""
    if card.parts:
        names = "\n".join(f"- {_plain(part['run'])}, step {part['step']}" for part in card.parts)
        length, average = "", f"\n\nThe average of the weights of {counted(len(card.parts), 'run')}:\n\n{names}"
    return f"""---
{_header(card, repo, license)}
---

# {"An image classifier" if repo is None else _plain(repo.split("/")[-1])}

Classes: {", ".join(map(_plain, card.labels[:50]))}{", ..." if len(card.labels) > 50 else ""}

Started from {_plain(start)}; trained on {data} {length}with vitft {__version__}.{average}

{scores or "Not scored at this step."}

```python
from transformers import pipeline

classify = pipeline("image-classification", model="{repo or "path/to/this/folder"}")
```
"""


def _header(card: Card, repo: str | None, license: str | None) -> str:
    """The metadata that the hub reads: https://huggingface.co/docs/hub/model-cards#model-card-metadata."""
    config = card.config
    dataset, model = _dataset_id(config), None if config.from_scratch else _hub_id(config.model)
    results = [result for split, score in card.scores.items() for result in _results(card, split, score)]
    name = repo.split("/")[-1] if repo else f"{name_of(config.model)}-{name_of(str(config.dataset))}".replace("/", "-")
    named: dict[str, Any] = {"model_name": name, "eval_results": results} if results else {}
    data = ModelCardData(
        library_name="transformers", pipeline_tag="image-classification", license=license, base_model=model,
        datasets=[dataset] if dataset else None, tags=["image-classification", "vision", "vitft"], **named,
    )  # fmt: skip
    return data.to_yaml()


def _results(card: Card, split: str, score: dict[str, Any]) -> list[EvalResult]:
    dataset = name_of(str(card.config.dataset))
    chose = ", which chose the checkpoint" if _chose(card) else ""
    on = f"on {counted(score['count'], f'{split} image')}{chose}"
    metrics = {"accuracy": ("accuracy", f"Accuracy {on}"), "macro_f1": ("f1", f"Macro F1 {on}")}
    return [
        EvalResult(
            task_type="image-classification", dataset_type=_dataset_id(card.config) or dataset, dataset_name=dataset,
            dataset_split=split, dataset_args={"images": score["count"], "hash": score["split_hash"]},
            metric_type=kind, metric_name=name, metric_value=round(score[field], 6),
        )
        for field, (kind, name) in metrics.items() if isfinite(score.get(field, float("nan")))
    ]  # fmt: skip


def _chose(card: Card) -> bool:
    """Whether the only score is that of the images that chose the checkpoint."""
    return set(card.scores) == {"validation"}


def _dataset_id(config: TrainConfig) -> str | None:
    alias = ALIASES.get(str(config.dataset))
    return alias.repo if alias else _hub_id(config.dataset)


def _hub_id(value: str | None) -> str | None:
    """A setting that is a hub id, owner/name; None for a path or a built-in name."""
    return value if value is not None and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", value) else None


def _plain(name: str) -> str:
    """Escape a name for Markdown, so that it cannot start a block or be HTML, a link or emphasis."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(safe(name).replace("\n", " "), quote=False))
