import pandas as pd
import pytest
from conftest import require_engine

import lens_safety as ls
from lens_safety import doctor
from lens_safety.doctor import Checkup


def test_every_check_passes_on_the_built_in_model(smol):
    result = ls.checkup(smol)
    assert result.passed, result.frame.to_string()
    assert len(result.frame) == 7


def test_a_check_that_exceeds_its_limit_fails(tiny, monkeypatch):
    monkeypatch.setattr(doctor, "_batch_invariance", lambda model: 0.5)
    result = ls.checkup(tiny)
    assert not result.passed
    assert list(result.frame.loc[~result.frame["passed"], "check"]) == ["batch invariance"]


def test_a_final_norm_that_reads_something_else_is_found(tiny):
    """As with Hugging Face's last hidden state, which is read after the norm."""
    assert doctor._last_layer(tiny) == 0
    handle = doctor.last_norm(tiny).register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    try:
        assert doctor._last_layer(tiny) > 0.5
    finally:
        handle.remove()


def drifts(result: Checkup) -> tuple[float, float]:
    """Of residual streams, of content vectors."""
    measured = dict(zip(result.frame["check"], result.frame["measured"].tolist(), strict=True))
    return measured["drift of residual streams"], measured["drift of content vectors"]


def test_the_drift_of_lower_precision_is_measured_against_float32(tiny, engine, tiny_folders):
    half = ls.load_model(tiny_folders["llama"], engine=engine, dtype="bfloat16")
    streams, vectors = drifts(ls.checkup(half, reference=tiny))
    low, full = doctor._streams(half).resid, doctor._streams(tiny).resid
    largest = max(
        float((a - b).norm() / b.norm()) for a, b in zip(low.flatten(0, 1), full.flatten(0, 1), strict=True)
    )
    assert streams == pytest.approx(largest, rel=1e-4)
    assert 1e-4 < streams < 5e-2
    assert 1e-7 < vectors < 1e-2
    streams, vectors = drifts(ls.checkup(tiny, reference=tiny))
    assert streams == 0
    assert vectors < 1e-6


def test_a_reference_of_another_model_is_refused(tiny, engine, tiny_folders):
    other = ls.load_model(tiny_folders["gpt2"], engine=engine)
    with pytest.raises(ls.MismatchError, match=r"a reference of .*gpt2-tiny given for .*llama-tiny"):
        ls.checkup(tiny, reference=other)


@pytest.mark.parametrize("engine_name", ["hooked", "bridge"])
def test_an_unembedding_that_runs_is_counted(engine_name, tiny_folders):
    require_engine(engine_name)
    model = ls.load_model(tiny_folders["gpt2"], engine=engine_name)
    tokens = doctor._tokens(model)
    assert doctor._counted(doctor.unembedding(model), lambda: doctor.full_logits(model, tokens)) == 1
    assert doctor._unembeddings(model) == 0


def test_a_saved_check_up_comes_back(tiny, tmp_path):
    result = ls.checkup(tiny)
    pd.testing.assert_frame_equal(Checkup.load(result.save(tmp_path / "c.json")).frame, result.frame)
