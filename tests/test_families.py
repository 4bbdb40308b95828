"""The study's three models, as tiny random ones of the same architectures, and Gemma 3, end to end."""

import numpy as np
import pytest
from conftest import ARCHITECTURES, TEXTS, labelled

import lens_safety as ls


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_is_loaded_read_detected_with_and_steered(architecture, engine, tiny_folders):
    model = ls.load_model(tiny_folders[architecture], engine=engine)
    train = labelled([f"{text} {i}" for i in range(3) for text in TEXTS])
    cache = ls.residual_streams(model, train, progress=False)
    detector = ls.Detector.fit(cache, folds=2)
    np.testing.assert_allclose(detector.score(train, model=model), detector.score(cache), atol=1e-5)
    vectors = ls.content_vectors(cache)
    plain = ls.residual_streams(model, TEXTS, progress=False)
    with ls.steering(model, vectors, layers=[1], multiplier=3.0) as record:
        steered = ls.residual_streams(model, TEXTS, progress=False)
        text = ls.generate(model, TEXTS[:2], max_new_tokens=3)
    assert len(text) == 2
    assert record.fired[1] > 1
    moved = (steered.layer(1) - plain.layer(1)).numpy()
    expected = np.broadcast_to(3.0 * vectors.layer(1).numpy(), moved.shape)
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-3 * float(plain.layer(1).abs().max()))
    assert np.abs(moved).max() > 0.01
    # Under a hook prompts are run whole, without one behind their common beginning.
    np.testing.assert_allclose(steered.layer(0).numpy(), plain.layer(0).numpy(), rtol=1e-4, atol=1e-5)
