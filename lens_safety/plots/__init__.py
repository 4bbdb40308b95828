"""One result in, one plotly figure out, in one house style. Nothing is shown; the figure is returned."""

from .detection import (
    comparison,
    label_curve,
    score_distribution,
    shortcut_audit,
    tone_cells,
    transfer_matrix,
)
from .layers import layer_curve
from .profiles import layer_profile
from .steering import dose_response, operators, prompt_slopes, steering_map
from .style import fragment, plotly_js, save_html, save_image, themed
from .token_views import View, attention_view, circuits_js, save_views, token_view, token_views
from .vectors import tone_and_content, top_dimensions, vector

__all__ = [
    "View",
    "attention_view",
    "circuits_js",
    "comparison",
    "dose_response",
    "fragment",
    "label_curve",
    "layer_curve",
    "layer_profile",
    "operators",
    "plotly_js",
    "prompt_slopes",
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
