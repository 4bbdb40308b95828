import builtins
import importlib
import json
import re
from dataclasses import replace
from html import escape
from typing import Any

import pytest
from conftest import TEXTS, labelled

import lens_safety as ls
from lens_safety.operators import OPERATORS

widgets = pytest.importorskip("ipywidgets", reason="needs the extra notebook")

ROOM = importlib.import_module("lens_safety.explore")
"""The room, which the door hides behind its function."""

TRAIN = labelled([f"{text} {i}" for i in range(4) for text in TEXTS])
MARKUP = "</script><img src=x onerror=alert(1)> a cake"


@pytest.fixture(scope="module")
def made(tiny_folders) -> tuple[Any, ls.Detector, ls.ContentVectors]:
    model = ls.load_model(tiny_folders["llama"])
    cache = ls.residual_streams(model, TRAIN, progress=False)
    return model, ls.Detector.fit(cache, layers=[1]), ls.content_vectors(cache)


def below(root: Any) -> list[Any]:
    return [root, *(one for child in getattr(root, "children", ()) for one in below(child))]


class Hands:
    """A panel as a user meets it: controls by their names, and what is to be seen."""

    def __init__(self, panel: Any):
        self.all = below(panel)
        named = {one.description: one for one in self.all if getattr(one, "description", "")}
        self.prompt, self.layer, self.operator = named["Prompt"], named["Layer"], named["Operator"]
        self.multiplier, self.length = named["Multiplier"], named["New tokens"]
        self.read, self.steer = named["Read"].click, named["Steer"].click
        self.buttons = [named["Read"], named["Steer"]]

    @property
    def words(self) -> str:
        return "".join(one.value for one in self.all if isinstance(one, widgets.HTML))

    @property
    def drawn(self) -> str:
        """What the outputs show, without the libraries that they need."""
        shown = [one.outputs for one in self.all if isinstance(one, widgets.Output)]
        htmls = [output["data"]["text/html"] for outputs in shown for output in outputs]
        return "".join(html for html in htmls if len(html) < 500_000)


@pytest.fixture
def hands(made) -> Hands:
    return Hands(ls.explore(*made))


def test_a_prompt_is_read_with_verdict_probability_layers_and_tokens(hands, made):
    model, detector, _ = made
    hands.prompt.value = "how do I make a cake"
    assert hands.drawn == ""
    hands.read()
    score = detector.score(["how do I make a cake"], model=model)
    assert detector.verdicts(score)[0] in hands.words
    assert f"probability of danger {detector.probability(score)[0]:.2f}" in hands.words
    assert f"score {score[0]:.3g}, threshold {detector.threshold:.3g}" in hands.words
    assert "The prompt at each layer" in hands.drawn
    assert '"detector"' in hands.drawn
    assert "layer 2" in hands.drawn
    before = hands.words
    hands.prompt.value = "I do a kite for the garden"
    hands.read()
    assert hands.words != before


def test_moving_the_layer_moves_the_mark_and_reads_nothing_again(hands, monkeypatch):
    assert hands.layer.value == 1
    hands.prompt.value = "a kite"
    hands.read()
    monkeypatch.setattr(ROOM, "token_scores", lambda *a, **k: pytest.fail("read again"))
    drawn = []
    for layer in (1, 2, 0):
        hands.layer.value = layer
        drawn.append(hands.drawn)
    assert [outlines(one) for one in drawn] == [[0, 2, 0], [0, 0, 2], [2, 0, 0]]


def outlines(drawn: str) -> list[int]:
    found = re.search(r'"line":\{"color":"#1F2933","width":(\[.*?\])', drawn)
    assert found is not None
    return json.loads(found.group(1))


def test_steering_shows_what_generate_gives_with_and_without(hands, made):
    model, _, vectors = made
    hands.prompt.value, hands.length.value = "make the garden", 6
    hands.layer.value, hands.multiplier.value, hands.operator.value = 2, 6.0, "clamp"
    hands.steer()
    (plain,) = ls.generate(model, ["make the garden"], max_new_tokens=6)
    with ls.steering(model, vectors, layers=[2], multiplier=6.0, operator="clamp"):
        (steered,) = ls.generate(model, ["make the garden"], max_new_tokens=6)
    assert plain != steered
    for text in ("Unsteered", escape(plain), escape(steered)):
        assert text in hands.words
    assert "Steered at layer 2: clamp, multiplier 6, dose" in hands.words
    assert tuple(hands.operator.options) == tuple(OPERATORS)
    hands.multiplier.value, hands.operator.value = 0.0, "add"
    hands.steer()
    assert hands.words.count(escape(plain)) == 2


@pytest.mark.parametrize("button", ["read", "steer"])
def test_what_a_user_can_mend_is_one_sentence_in_the_panel(hands, button):
    for text, said in ((" ", "empty"), ("a cake " * 200, "longer|too long|context|room")):
        hands.prompt.value = text
        getattr(hands, button)()
        assert "role='alert'" in hands.words
        assert re.search(said, hands.words), hands.words
        assert not any(one.disabled for one in hands.buttons)
    hands.prompt.value = "a cake"
    getattr(hands, button)()
    assert "role='alert'" not in hands.words


def test_an_old_reading_does_not_stay_beside_an_error(hands):
    hands.prompt.value = "a cake"
    hands.read()
    hands.prompt.value = ""
    hands.read()
    assert hands.drawn == ""
    assert "probability" not in hands.words


def test_markup_in_a_prompt_is_text(hands, monkeypatch):
    hands.prompt.value = MARKUP
    hands.read()
    monkeypatch.setattr(ROOM, "generate", lambda *a, **k: [MARKUP])
    hands.steer()
    assert "&lt;img src=x" in hands.words
    for shown in (hands.words, hands.drawn):
        assert "<img" not in shown
    assert hands.drawn.count("</script>") == hands.drawn.count("<script")


def test_defaults_are_the_shipped_detector_or_one_of_the_content_set(made, monkeypatch):
    model, detector, vectors = made
    asked = []
    monkeypatch.setattr(ROOM, "load_prompts", lambda name: asked.append(name) or TRAIN)
    found = ROOM._given_or_made(model, None, None)
    assert asked == ["content"]
    assert found[0].source == found[1].source == TRAIN.name
    assert found[0].model.difference(detector.model) == ""
    monkeypatch.setattr(ROOM, "shipped_for", lambda model: detector)
    assert ROOM._given_or_made(model, None, vectors) == (detector, vectors)
    assert asked == ["content"]


def test_parts_that_do_not_belong_together_are_refused(made):
    model, detector, vectors = made
    with pytest.raises(ls.MismatchError, match="same position"):
        ls.explore(model, detector, replace(vectors, position="last"))
    with pytest.raises(ls.MismatchError, match="17"):
        ls.explore(model, replace(detector, model=replace(detector.model, d_model=17)), vectors)


def test_without_ipywidgets_the_extra_is_named(made, monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "ipywidgets":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ls.OptionError, match=r"lens-safety\[notebook\]"):
        ls.explore(*made)
