"""lens_safety: where danger is in the residual stream, how well it is detected there, and what steering does.

Everything public is here and is imported on first use, so that `import lens_safety` costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import operators, plots
    from .audit import (
        LabelCurve,
        ShortcutAudit,
        ToneContent,
        TransferMatrix,
        category_matrix,
        joined,
        label_curve,
        shortcut_audit,
        tone_content,
        transfer_matrix,
    )
    from .baselines import TextBaseline, control_reports
    from .decoding import continuation_nll, generate, next_token_logits, stream
    from .detect import Detector, load_detector
    from .directions import (
        ContentVectors,
        content_vectors,
        orthogonal_vectors,
        random_vectors,
        stand_in,
        tone_vectors,
    )
    from .doctor import Checkup, checkup
    from .evaluate import (
        DetectionReport,
        DetectorComparison,
        PairedTests,
        choose_detector,
        compare,
        evaluate,
        oracle_accuracy,
        paired_tests,
        report_scores,
    )
    from .exchange import from_dict, read_gguf, to_dict, write_gguf
    from .explore import explore
    from .models import ModelFingerprint, fingerprint, load_model
    from .moments import Moments, moments
    from .plans import Dose, ExponentialDecay, LinearDecay, SteeringPlan
    from .prompts import Prompt, PromptSet, load_prompts
    from .public_sets import public_sets
    from .readings import (
        AttentionPatterns,
        TokenScores,
        attention_patterns,
        class_bands,
        layer_scores,
        nearest_prompts,
        token_scores,
    )
    from .report import report, sweep_report
    from .residuals import ResidualCache, residual_streams
    from .responses import Consistency, SteeringSweep, consistency
    from .separation import LayerTable, layer_table, top_dimensions
    from .steer import TargetKL, next_token_kl, steering, steering_plan
    from .store import ResidualStore
    from .study import Study, study
    from .sweep import sweep
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
    "audit": (
        "LabelCurve",
        "ShortcutAudit",
        "ToneContent",
        "TransferMatrix",
        "category_matrix",
        "joined",
        "label_curve",
        "shortcut_audit",
        "tone_content",
        "transfer_matrix",
    ),
    "baselines": ("TextBaseline", "control_reports"),
    "decoding": ("continuation_nll", "generate", "next_token_logits", "stream"),
    "detect": ("Detector", "load_detector"),
    "directions": (
        "ContentVectors",
        "content_vectors",
        "orthogonal_vectors",
        "random_vectors",
        "stand_in",
        "tone_vectors",
    ),
    "doctor": ("Checkup", "checkup"),
    "evaluate": (
        "DetectionReport",
        "DetectorComparison",
        "PairedTests",
        "choose_detector",
        "compare",
        "evaluate",
        "oracle_accuracy",
        "paired_tests",
        "report_scores",
    ),
    "exchange": ("from_dict", "read_gguf", "to_dict", "write_gguf"),
    "explore": ("explore",),
    "models": ("ModelFingerprint", "fingerprint", "load_model"),
    "moments": ("Moments", "moments"),
    "prompts": ("Prompt", "PromptSet", "load_prompts"),
    "public_sets": ("public_sets",),
    "readings": (
        "AttentionPatterns",
        "TokenScores",
        "attention_patterns",
        "class_bands",
        "layer_scores",
        "nearest_prompts",
        "token_scores",
    ),
    "report": ("report", "sweep_report"),
    "residuals": ("ResidualCache", "residual_streams"),
    "separation": ("LayerTable", "layer_table", "top_dimensions"),
    "plans": ("Dose", "ExponentialDecay", "LinearDecay", "SteeringPlan"),
    "steer": ("TargetKL", "next_token_kl", "steering", "steering_plan"),
    "store": ("ResidualStore",),
    "study": ("Study", "study"),
    "responses": ("Consistency", "SteeringSweep", "consistency"),
    "sweep": ("sweep",),
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
    "AttentionPatterns",
    "Checkup",
    "Consistency",
    "ContentVectors",
    "DetectionReport",
    "Detector",
    "DetectorComparison",
    "Dose",
    "ExponentialDecay",
    "FileError",
    "LabelCurve",
    "LayerTable",
    "LensSafetyError",
    "LinearDecay",
    "MismatchError",
    "ModelError",
    "ModelFingerprint",
    "Moments",
    "OptionError",
    "PairedTests",
    "Prompt",
    "PromptError",
    "PromptSet",
    "ResidualCache",
    "ResidualModel",
    "ResidualStore",
    "ShortcutAudit",
    "SteeringPlan",
    "SteeringSweep",
    "Study",
    "TargetKL",
    "TextBaseline",
    "TokenScores",
    "ToneContent",
    "TransferMatrix",
    "attention_patterns",
    "category_matrix",
    "checkup",
    "choose_detector",
    "class_bands",
    "compare",
    "consistency",
    "content_vectors",
    "continuation_nll",
    "control_reports",
    "evaluate",
    "explore",
    "fingerprint",
    "from_dict",
    "generate",
    "joined",
    "label_curve",
    "layer_scores",
    "layer_table",
    "load_detector",
    "load_model",
    "load_prompts",
    "moments",
    "nearest_prompts",
    "next_token_kl",
    "next_token_logits",
    "operators",
    "oracle_accuracy",
    "orthogonal_vectors",
    "paired_tests",
    "plots",
    "public_sets",
    "random_vectors",
    "read_gguf",
    "report",
    "report_scores",
    "residual_streams",
    "shortcut_audit",
    "stand_in",
    "steering",
    "steering_plan",
    "stream",
    "study",
    "sweep",
    "sweep_report",
    "to_dict",
    "token_scores",
    "tone_content",
    "tone_vectors",
    "top_dimensions",
    "transfer_matrix",
    "write_gguf",
]


class _Door(ModuleType):
    """`evaluate`, `moments`, `report`, `study` and others name a room and a function: the door shows this."""

    def __getattr__(self, name: str) -> Any:
        if name in ("operators", "plots"):
            return import_module(f".{name}", __name__)
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
