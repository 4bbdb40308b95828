"""lens_safety: where danger is in the residual stream, how well it is detected there, and what steering does.

Everything public is here and is imported on first use, so that `import lens_safety` costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import plots
    from .detect import Detector
    from .directions import ContentVectors, content_vectors, random_vectors, tone_vectors
    from .doctor import Checkup, checkup
    from .evaluate import (
        DetectionReport,
        DetectorComparison,
        compare,
        evaluate,
        oracle_accuracy,
        report_scores,
        tfidf_report,
    )
    from .models import ModelFingerprint, fingerprint, load_model
    from .prompts import Prompt, PromptSet, load_prompts
    from .report import report
    from .residuals import ResidualCache, residual_streams
    from .separation import LayerTable, layer_table, top_dimensions
    from .steer import Steering, continuation_nll, generate, steering
    from .study import Study, study
    from .sweep import SteeringSweep, sweep
    from .types import (
        FileError,
        LensSafetyError,
        MismatchError,
        ModelError,
        OptionError,
        PromptError,
        ResidualModel,
    )

_ROOMS = {
    "detect": ("Detector",),
    "directions": ("ContentVectors", "content_vectors", "random_vectors", "tone_vectors"),
    "doctor": ("Checkup", "checkup"),
    "evaluate": (
        "DetectionReport",
        "DetectorComparison",
        "compare",
        "evaluate",
        "oracle_accuracy",
        "report_scores",
        "tfidf_report",
    ),
    "models": ("ModelFingerprint", "fingerprint", "load_model"),
    "prompts": ("Prompt", "PromptSet", "load_prompts"),
    "report": ("report",),
    "residuals": ("ResidualCache", "residual_streams"),
    "separation": ("LayerTable", "layer_table", "top_dimensions"),
    "steer": ("Steering", "continuation_nll", "generate", "steering"),
    "study": ("Study", "study"),
    "sweep": ("SteeringSweep", "sweep"),
    "types": (
        "FileError",
        "LensSafetyError",
        "MismatchError",
        "ModelError",
        "OptionError",
        "PromptError",
        "ResidualModel",
    ),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "Checkup",
    "ContentVectors",
    "DetectionReport",
    "Detector",
    "DetectorComparison",
    "FileError",
    "LayerTable",
    "LensSafetyError",
    "MismatchError",
    "ModelError",
    "ModelFingerprint",
    "OptionError",
    "Prompt",
    "PromptError",
    "PromptSet",
    "ResidualCache",
    "ResidualModel",
    "Steering",
    "SteeringSweep",
    "Study",
    "checkup",
    "compare",
    "content_vectors",
    "continuation_nll",
    "evaluate",
    "fingerprint",
    "generate",
    "layer_table",
    "load_model",
    "load_prompts",
    "oracle_accuracy",
    "plots",
    "random_vectors",
    "report",
    "report_scores",
    "residual_streams",
    "steering",
    "study",
    "sweep",
    "tfidf_report",
    "tone_vectors",
    "top_dimensions",
]


class _Door(ModuleType):
    """`evaluate`, `report`, `study` and `sweep` name a room and its function: the door shows the function."""

    def __getattr__(self, name: str) -> Any:
        if name == "plots":
            return import_module(".plots", __name__)
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule sets it on its package, where it would hide the function of its name.
        if not (isinstance(value, ModuleType) and name in _HOME):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return __all__


sys.modules[__name__].__class__ = _Door
