"""One result in, one plotly figure out, in one house style. Nothing is shown; the figure is returned."""

from .curves import precision_recall, reliability, risk_coverage, roc
from .damage import consistency, damage_frontier, operators
from .detection import (
    comparison,
    confusion,
    label_curve,
    models_side_by_side,
    score_distribution,
    shortcut_audit,
    tone_cells,
    transfer_matrix,
)
from .layers import layer_curve, layers_side_by_side
from .maps import cosine_map, depth_map, dimension_map
from .projections import projection
from .steering import dose_response, prompt_slopes, steering_map
from .style import fragment, plotly_js, save_html, save_image, themed
from .token_views import View, attention_view, circuits_js, prompt_layers, save_views, token_view, token_views
from .vectors import tone_and_content, top_dimensions, vector

__all__ = [
    "View",
    "attention_view",
    "circuits_js",
    "comparison",
    "confusion",
    "consistency",
    "cosine_map",
    "damage_frontier",
    "depth_map",
    "dimension_map",
    "dose_response",
    "fragment",
    "label_curve",
    "layer_curve",
    "layers_side_by_side",
    "models_side_by_side",
    "operators",
    "plotly_js",
    "precision_recall",
    "projection",
    "prompt_layers",
    "prompt_slopes",
    "reliability",
    "risk_coverage",
    "roc",
    "save_html",
    "save_image",
    "save_views",
    "score_distribution",
    "shortcut_audit",
    "steering_map",
    "themed",
    "token_view",
    "token_views",
    "tone_and_content",
    "tone_cells",
    "top_dimensions",
    "transfer_matrix",
    "vector",
]
