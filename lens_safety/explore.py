"""A panel for notebooks: type a prompt, see what the model sees, steer it, read both texts side by side."""

from html import escape
from typing import Any

from . import plots
from . import tokens as tok
from .decoding import generate
from .detect import Detector, require_same_reading, shipped_for
from .directions import ContentVectors, content_vectors
from .models import fingerprint
from .operators import OPERATORS
from .prompts import load_prompts
from .readings import DETECTOR, TokenScores, token_scores
from .residuals import residual_streams
from .steer import steering
from .types import LensSafetyError, OptionError, ResidualModel

_WORDS = {"safe": "#0072B2", "dangerous": "#B34700", "unsure": "#52606D"}


def explore(
    model: ResidualModel, detector: Detector | None = None, vectors: ContentVectors | None = None
) -> Any:
    """A widget with a prompt box, sliders for layer and multiplier, operators, and buttons to read and steer.

    Read gives the detector's verdict with its calibrated probability, the score at each layer and the view
    of the tokens; Steer writes the unsteered and the steered text side by side. It is returned, not shown:
    make it the last line of a cell.

    Args:
        detector: `load_detector()` by default; for another model than the built-in one, a two-vector
            detector fitted on the built-in set `content`.
        vectors: the content vectors of that set, read as the detector reads, by default.

    Raises:
        OptionError: ipywidgets is not installed (extra `notebook`).
        MismatchError: a detector or vectors of another model, or read in two ways.
    """
    widgets = _widgets()
    detector, vectors = _given_or_made(model, detector, vectors)
    return _Panel(widgets, model, detector, vectors).root


def _widgets() -> Any:
    try:
        import ipywidgets
    except ImportError as error:
        raise OptionError(
            "explore() needs ipywidgets, which is not installed: pip install 'lens-safety[notebook]'"
        ) from error
    return ipywidgets


def _given_or_made(
    model: ResidualModel, detector: Detector | None, vectors: ContentVectors | None
) -> tuple[Detector, ContentVectors]:
    known = fingerprint(model)
    if detector is None:
        detector = shipped_for(model)
    if detector is None or vectors is None:
        read = {} if detector is None else {"position": detector.position, "template": detector.template}
        cache = residual_streams(
            model,
            load_prompts("content"),
            position=tok.named_position(read.get("position", "content_mean")),
            template=tok.named_template(read.get("template", "auto")),
        )
        detector = detector or Detector.fit(cache)
        vectors = vectors or content_vectors(cache)
    for what, one in (("the detector", detector), ("the vectors", vectors)):
        one.model.require(known, what)
    require_same_reading("the vectors", vectors, "a detector", detector)
    return detector, vectors


class _Panel:
    """The widgets of one panel and what they do; `root` is what is shown."""

    def __init__(self, widgets: Any, model: ResidualModel, detector: Detector, vectors: ContentVectors):
        self.widgets, self.model, self.detector, self.vectors = widgets, model, detector, vectors
        self.scores: TokenScores | None = None
        wide = {"description_width": "90px"}
        self.prompt = widgets.Textarea(
            description="Prompt", placeholder="Type a prompt", rows=3, style=wide, layout={"width": "auto"}
        )
        self.layer = widgets.SelectionSlider(
            description="Layer", options=list(vectors.layers), value=self._first_layer(), style=wide
        )
        self.multiplier = widgets.FloatSlider(
            description="Multiplier", value=-2.0, min=-8.0, max=8.0, step=0.5, style=wide
        )
        self.operator = widgets.Dropdown(description="Operator", options=list(OPERATORS), style=wide)
        self.length = widgets.IntSlider(description="New tokens", value=40, min=1, max=200, style=wide)
        self.read = widgets.Button(description="Read", button_style="primary", icon="search")
        self.steer = widgets.Button(description="Steer", icon="random")
        self.said, self.verdict, self.texts = widgets.HTML(), widgets.HTML(), widgets.HTML()
        # Scripts run in an Output and not in an HTML widget; the libraries are there once for all views.
        self.sources, self.layers, self.tokens = widgets.Output(), widgets.Output(), widgets.Output()
        _put(self.sources, f"<script>{plots.plotly_js()}</script><script>{plots.circuits_js()}</script>")
        self.root = self._laid_out()
        self.read.on_click(lambda _: self._try(self._read))
        self.steer.on_click(lambda _: self._try(self._steer))
        self.layer.observe(lambda _: self._draw_layers(), names="value")

    def _first_layer(self) -> int:
        read = [layer for layer in self.detector.layers if layer in self.vectors.layers]
        return read[0] if read else self.vectors.layers[len(self.vectors.layers) // 2]

    def _laid_out(self) -> Any:
        rows = {"flex_flow": "row wrap"}
        steering_row = self.widgets.HBox(
            [self.layer, self.multiplier, self.operator, self.length], layout=rows
        )
        buttons = self.widgets.HBox([self.read, self.steer])
        shown = [self.said, self.verdict, self.texts, self.tokens, self.layers, self.sources]
        return self.widgets.VBox([self.prompt, steering_row, buttons, *shown])

    def _try(self, action: Any) -> None:
        """Run what a button does; what a user can mend is one sentence in the panel."""
        self.said.value = ""
        self.read.disabled = self.steer.disabled = True
        try:
            action()
        except LensSafetyError as error:
            self.said.value = f"<p role='alert' style='color: #B34700'>{escape(str(error))}</p>"
        finally:
            self.read.disabled = self.steer.disabled = False

    def _read(self) -> None:
        self.scores = None
        self.verdict.value = ""
        _put(self.tokens, "")
        _put(self.layers, "")
        self.scores = token_scores(
            self.model, [self.prompt.value], detector=self.detector, vectors=self.vectors
        )
        self.verdict.value = self._verdict(self.scores)
        view = plots.token_view(self.scores, reader=None)
        _put(self.tokens, view.html, view.text)
        self._draw_layers()

    def _verdict(self, scores: TokenScores) -> str:
        score = scores.of(0, DETECTOR)["running"].to_numpy()[-1:]
        word, probability = self.detector.verdicts(score)[0], float(self.detector.probability(score)[0])
        return (
            f"<p style='font-size: 16px'><b style='color: {_WORDS[word]}'>{word}</b>: calibrated probability "
            f"of danger {probability:.2f} <small>(score {score[0]:.3g}, threshold "
            f"{self.detector.threshold:.3g}; {escape(self.detector.name)}, calibrated on "
            f"{escape(self.detector.source)})</small></p>"
        )

    def _draw_layers(self) -> None:
        if self.scores is not None:
            figure = plots.prompt_layers(self.scores, mark=self.layer.value)
            _put(self.layers, plots.fragment(figure, f"explore-{id(self)}"), "score at each layer")

    def _steer(self) -> None:
        self.texts.value = ""
        prompts, n = [self.prompt.value], self.length.value
        layer, m, operator = self.layer.value, self.multiplier.value, self.operator.value
        (plain,) = generate(self.model, prompts, max_new_tokens=n)
        with steering(self.model, self.vectors, layers=[layer], multiplier=m, operator=operator) as plan:
            (steered,) = generate(self.model, prompts, max_new_tokens=n)
        dose = float(plan.writes[layer].dose[0])
        does = f"Steered at layer {layer}: {operator}, multiplier {m:g}, dose {dose:.2f}"
        self.texts.value = _side_by_side([("Unsteered", plain), (does, steered)])


def _side_by_side(texts: list[tuple[str, str]]) -> str:
    parts = [
        f"<div><b>{escape(name)}</b><p style='white-space: pre-wrap; overflow-wrap: anywhere; "
        f"line-height: 1.45'>{escape(text) or '(no text)'}</p></div>"
        for name, text in texts
    ]
    columns = "repeat(auto-fit, minmax(min(100%, 260px), 1fr))"
    return f"<div style='display: grid; gap: 16px; grid-template-columns: {columns}'>{''.join(parts)}</div>"


def _put(output: Any, html: str, text: str = "") -> None:
    """Show HTML in an Output widget in place of what is there."""
    data = {"text/html": html, "text/plain": text}
    shown = {"output_type": "display_data", "data": data, "metadata": {}}
    output.outputs = (shown,) if html else ()
