"""vitft fine-tunes Vision Transformers for image classification, and shows how they work."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitft.config.train import TrainConfig
    from vitft.evaluation.evaluation import evaluate
    from vitft.evaluation.prediction import Predictor, predict
    from vitft.training.trainer import resume, train

__version__ = "0.1.0"
__all__ = ["Predictor", "TrainConfig", "__version__", "evaluate", "predict", "resume", "train"]

_ROOMS = {
    "Predictor": "evaluation.prediction", "TrainConfig": "config.train", "evaluate": "evaluation.evaluation",
    "predict": "evaluation.prediction", "resume": "training.trainer", "train": "training.trainer",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import vitft` costs nothing."""
    if name in _ROOMS:
        from importlib import import_module

        return getattr(import_module(f"vitft.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'vitft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
