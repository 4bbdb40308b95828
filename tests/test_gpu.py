"""A GPU gives what the CPU gives: a pretended one always, a real one where there is one."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FRAMED, TEXTS, labelled
from pretended_gpu import moved, pretended_gpu

import lens_safety as ls
from lens_safety.models import Engine
from lens_safety.passes import Passes

TWICE = [TEXTS[0], TEXTS[0], TEXTS[1]]
"""Two rows of one prompt, which are run once and told apart inside."""


@pytest.fixture(scope="module")
def far_models() -> dict:
    return {}


@pytest.fixture(params=["pretended", *(["cuda"] if torch.cuda.is_available() else [])])
def there(
    request: pytest.FixtureRequest,
    engine: Engine,
    tiny,
    tiny_folders: dict[str, Path],
    far_models: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[SimpleNamespace]:
    """The tiny model on the CPU and on a GPU, and what is learned from it."""
    is_real, key = request.param == "cuda", (request.param, engine)
    if key not in far_models:
        model = ls.load_model(tiny_folders["llama"], engine=engine, device="cuda" if is_real else "cpu")
        far_models[key] = model if is_real else moved(model)
    cache = ls.residual_streams(tiny, labelled(), progress=False)
    known = SimpleNamespace(
        near=tiny,
        far=far_models[key],
        cache=cache,
        vectors=ls.content_vectors(cache),
        low=ls.Detector.fit(cache, layers=[0], folds=2),
        high=ls.Detector.fit(cache, layers=[2], folds=2),
        is_real=is_real,
    )
    with nullcontext([]) if is_real else pretended_gpu(monkeypatch) as known.seen:
        yield known


def steered(model, known: SimpleNamespace, **options: Any) -> list[str]:
    with ls.steering(model, known.vectors, layers=[1], multiplier=[3.0, -3.0, 0.0], **options):
        return ls.generate(model, TWICE, max_new_tokens=4)


def swept(model, known: SimpleNamespace) -> list[Any]:
    frame = ls.sweep(
        model,
        known.vectors,
        list(TEXTS[:2]),
        layers=[1],
        multipliers=[2.0],
        train=known.cache,
        n_random=1,
        detector=known.high,
        behaviour=("cake", "kite"),
        neutral=[],
        max_new_tokens=3,
        progress=False,
    ).frame
    numbers = ["logit_difference", "score", "inside_score", "nll"]
    return [frame["text"].tolist(), frame[numbers].to_numpy()]


def plans(model, known: SimpleNamespace) -> list[ls.SteeringPlan]:
    return [ls.steering_plan(model, known.vectors, layers=[1], multiplier=m) for m in (2.0, 0.0)]


JOBS: dict[str, Callable[[Any, SimpleNamespace], Any]] = {
    "residual_streams": lambda m, k: ls.residual_streams(m, FRAMED, progress=False).resid,
    "a maximum": lambda m, k: ls.residual_streams(m, FRAMED, position="max", progress=False).resid,
    "a last token": lambda m, k: ls.residual_streams(m, FRAMED, position="last", progress=False).resid,
    "moments": lambda m, k: ls.moments(m, labelled(), progress=False).dangerous.mean,
    "score": lambda m, k: k.low.score(FRAMED, model=m),
    "generate": lambda m, k: ls.generate(m, list(TEXTS), max_new_tokens=4),
    "stream": lambda m, k: list(ls.stream(m, FRAMED, max_new_tokens=3, temperature=1.0, top_k=9, top_p=0.9)),
    "next_token_logits": lambda m, k: ls.next_token_logits(m, FRAMED).cpu(),
    "continuation_nll": lambda m, k: ls.continuation_nll(m, FRAMED, ["a kite", "a cake for", "how"]),
    "next_token_kl": lambda m, k: ls.next_token_kl(m, plans(m, k), list(TEXTS[:2])),
    "sweep": swept,
    "token_scores": lambda m, k: (
        ls.token_scores(m, FRAMED, detector=k.low, vectors=k.vectors).frame[["score", "running"]].to_numpy()
    ),
    "attention_patterns": lambda m, k: ls.attention_patterns(m, FRAMED[0], layers=[0, 1]).pattern,
    "checkup": lambda m, k: ls.checkup(m).frame["passed"].tolist(),
    "a gate on the prompt": lambda m, k: steered(m, k, when=k.low),
    "a gate on each token": lambda m, k: steered(m, k, when=k.low, per="token"),
    "a schedule": lambda m, k: steered(m, k, schedule=ls.LinearDecay(3)),
    **{
        f"positions {name}": lambda m, k, name=name: steered(m, k, positions=name)
        for name in ("all", "prompt", "generated", "content", "last:2", "generated:1:2")
    },
    **{
        f"operator {name}": lambda m, k, name=name: steered(m, k, operator=name)
        for name in ("add-norm", "ablate", "clamp", "toward", "rotate")
    },
    **{
        f"site {name}": lambda m, k, name=name: steered(m, k, sites=(name,))
        for name in ("resid_pre", "attn_out", "mlp_out")
    },
}


@pytest.mark.parametrize("name", JOBS)
def test_a_gpu_gives_what_the_cpu_gives(there: SimpleNamespace, name: str):
    same(JOBS[name](there.far, there), JOBS[name](there.near, there))


def same(got: Any, want: Any) -> None:
    if isinstance(want, torch.Tensor | np.ndarray):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    elif isinstance(want, list) and any(isinstance(one, np.ndarray) for one in want):
        for one, other in zip(got, want, strict=True):
            same(one, other)
    else:
        assert got == want


def test_a_gpu_has_its_next_pass_before_the_vectors_of_one_are_waited_for(
    there: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    if there.is_real:
        pytest.skip("what is waited for is noted on the pretended GPU alone")
    real = Passes._one_pass

    def noted(self: Passes, batch: Any) -> torch.Tensor:
        there.seen.append("pass")
        return real(self, batch)

    monkeypatch.setattr(Passes, "_one_pass", noted)
    options = {"batch_tokens": 1, "share_prefix": False, "progress": False}
    got = ls.residual_streams(there.far, list(TEXTS[:3]), **options)
    assert [one for one in there.seen if one != "pinned"] == [
        "pass", "pass", "waited", "pass", "waited", "waited",
    ]  # fmt: skip
    assert there.seen.count("pinned") >= 3 * 3 + 3  # each batch's tokens, content and lengths; its weights
    same(got.resid, ls.residual_streams(there.near, list(TEXTS[:3]), **options).resid)


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch):
    with pretended_gpu(monkeypatch):
        there = torch.arange(6, device="cuda").float().view(2, 3)
        near = torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            there.add(near)
        with pytest.raises(RuntimeError, match="indices on the GPU"):
            near[there[0].long()]
        with pytest.raises(RuntimeError, match=r"numpy\(\) is not supported"):
            there.numpy()
        there[:, 1:] = 9
        assert (there + near.to(there.device)).cpu().tolist() == [[1, 10, 10], [4, 10, 10]]
    with pytest.raises(Exception, match=r"CUDA|cuda"):
        torch.zeros(1, device="cuda:99")
