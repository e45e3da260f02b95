"""vitft fine-tunes Vision Transformers for image classification, and shows how they work."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitft.config.train import TrainConfig
    from vitft.data.sources.source import Source, open_dataset
    from vitft.errors import DataError, ModelError, Stopped, TrainingError, UsageError, VitftError
    from vitft.evaluation.comparison import Compared, Comparison, compare
    from vitft.evaluation.evaluation import evaluate
    from vitft.evaluation.loading import load_model
    from vitft.evaluation.metrics import ClassScore, Metrics, Score
    from vitft.evaluation.soup import Soup, soup
    from vitft.exporting.export import Exported, export
    from vitft.models.load import Loaded
    from vitft.prediction.embedding import Embedded, embed
    from vitft.prediction.predictor import Prediction, Predictor, predict
    from vitft.probing.doubt import Doubt, DoubtResult, doubt
    from vitft.probing.probe import ProbeResult, probe
    from vitft.publishing.push import Pushed, push
    from vitft.reporting.report import write_report
    from vitft.sweeping.sweep import SweepResult, resume_sweep, sweep
    from vitft.training.callbacks import Callback
    from vitft.training.loop import Result
    from vitft.training.trainer import resume, train

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "ClassScore",
    "Compared",
    "Comparison",
    "DataError",
    "Doubt",
    "DoubtResult",
    "Embedded",
    "Exported",
    "Loaded",
    "Metrics",
    "ModelError",
    "Prediction",
    "Predictor",
    "ProbeResult",
    "Pushed",
    "Result",
    "Score",
    "Soup",
    "Source",
    "Stopped",
    "SweepResult",
    "TrainConfig",
    "TrainingError",
    "UsageError",
    "VitftError",
    "__version__",
    "compare",
    "doubt",
    "embed",
    "evaluate",
    "export",
    "load_model",
    "open_dataset",
    "predict",
    "probe",
    "push",
    "resume",
    "resume_sweep",
    "soup",
    "sweep",
    "train",
    "write_report",
]

_ROOMS = {
    "config.train": ("TrainConfig",),
    "data.sources.source": ("Source", "open_dataset"),
    "errors": ("DataError", "ModelError", "Stopped", "TrainingError", "UsageError", "VitftError"),
    "evaluation.comparison": ("Compared", "Comparison", "compare"),
    "prediction.embedding": ("Embedded", "embed"),
    "evaluation.evaluation": ("evaluate",),
    "evaluation.loading": ("load_model",),
    "evaluation.metrics": ("ClassScore", "Metrics", "Score"),
    "prediction.predictor": ("Prediction", "Predictor", "predict"),
    "evaluation.soup": ("Soup", "soup"),
    "exporting.export": ("Exported", "export"),
    "models.load": ("Loaded",),
    "probing.doubt": ("Doubt", "DoubtResult", "doubt"),
    "probing.probe": ("ProbeResult", "probe"),
    "publishing.push": ("Pushed", "push"),
    "reporting.report": ("write_report",),
    "sweeping.sweep": ("SweepResult", "resume_sweep", "sweep"),
    "training.callbacks": ("Callback",),
    "training.loop": ("Result",),
    "training.trainer": ("resume", "train"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import vitft` costs nothing."""
    if name in _ROOM_OF:
        from importlib import import_module

        return getattr(import_module(f"vitft.{_ROOM_OF[name]}"), name)
    raise AttributeError(f"module 'vitft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
