"""The store of residual streams: nothing is run twice, whoever kills, damages or shares it."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D_MODEL, FINGERPRINT, N_LAYERS, TEXTS, ended, forked, labelled
from safetensors import SafetensorError
from test_residuals import drift, everything, rows_of_passes, streams

import lens_safety as ls
from lens_safety import files, passes, store
from lens_safety.models import Engine, hooked_available, resid_hook
from lens_safety.store import StoredRows
from lens_safety.types import FileError, OptionError

MANY = tuple(f"{text} {i}" for i in range(10) for text in TEXTS)
ONE_BY_ONE = {"batch_tokens": 1, "share_prefix": False}
"""A batch is one prompt, so that values are the same bit for bit whatever else is missing."""

LAYERS = [-1, *range(N_LAYERS)]


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def held_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in shards_of(folder))


def held(folder: Path, text: str) -> bool:
    return bool(list(rows_in(folder).find([text])))


def rows_in(kept: ls.ResidualStore | Path, **changed) -> StoredRows:
    """One call's rows, of a planted model."""
    named = {"position": "last", "template": "chat", "layers": LAYERS, "cut_at": None}
    model = replace(FINGERPRINT, **{key: changed.pop(key) for key in ("name",) if key in changed})
    return StoredRows(kept, model, **(named | changed))


def some(n: int, layers: int = len(LAYERS)) -> torch.Tensor:
    return torch.arange(layers * n * D_MODEL, dtype=torch.float32).reshape(layers, n, D_MODEL)


def keep_aged(kept: ls.ResidualStore, text: str, seconds: float) -> Path:
    """A shard of one prompt that was last used so many seconds ago."""
    before = set(shards_of(kept.folder))
    rows_in(kept).keep([text], some(1))
    (path,) = set(shards_of(kept.folder)) - before
    used = time.time() - seconds
    os.utime(path, (used, used))
    return path


def test_a_second_run_with_a_store_makes_no_forward_pass(tiny, tmp_path: Path):
    first = streams(tiny, store=tmp_path, batch_tokens=60)
    with rows_of_passes(tiny) as rows:
        second = streams(tiny, store=ls.ResidualStore(tmp_path))
    assert rows == []
    assert torch.equal(everything(second), everything(first))
    assert torch.equal(everything(first), everything(streams(tiny, batch_tokens=60)))


def test_a_detector_scores_and_predicts_from_a_store(tiny, tmp_path: Path):
    detector = ls.Detector.fit(streams(tiny, labelled()), layers=[1], folds=2)
    scores = detector.score(TEXTS, model=tiny, store=tmp_path)
    with rows_of_passes(tiny) as rows:
        assert detector.score(TEXTS, model=tiny, store=tmp_path).tolist() == scores.tolist()
        predicted = detector.predict(TEXTS, model=tiny, store=tmp_path)
    assert rows == []
    assert predicted.tolist() == (scores > detector.threshold).tolist()


def test_ten_more_prompts_are_ten_forward_passes_and_equal_ones_none(tiny, tmp_path: Path):
    streams(tiny, MANY[:40], store=tmp_path)
    more = [*MANY[40:50], *MANY[:40][::-1], MANY[45], MANY[3]]
    with rows_of_passes(tiny) as rows:
        got = streams(tiny, more, store=tmp_path, **ONE_BY_ONE)
    assert rows == [1] * 10
    assert drift(got, streams(tiny, more)) < 1e-4


def test_equal_prompts_are_stored_once(tiny, tmp_path: Path):
    streams(tiny, [*TEXTS, *TEXTS], store=tmp_path)
    assert ls.ResidualStore(tmp_path).to_frame()["prompts"].tolist() == [5]
    (path,) = shards_of(tmp_path)
    tensors, _ = files.load_tensors(path, store._KIND)
    assert tuple(tensors["rows"].shape) == (5, 1 + N_LAYERS, D_MODEL)


def test_what_shapes_a_row_has_rows_of_its_own(tiny, tmp_path: Path):
    streams(tiny, store=tmp_path)
    for chosen in ({"position": "last"}, {"template": "raw"}, {"position": "last", "template": "raw"}):
        options = {**chosen, "share_prefix": False}
        with rows_of_passes(tiny) as rows:
            got = streams(tiny, store=tmp_path, **options)
        assert sum(rows) == 5
        assert torch.equal(everything(got), everything(streams(tiny, **options)))


def test_all_layers_serve_any_of_them_in_any_order_and_fewer_do_not_serve_more(tiny, tmp_path: Path):
    streams(tiny, store=tmp_path, layers=[2, 0], **ONE_BY_ONE)
    with rows_of_passes(tiny) as rows:
        whole = streams(tiny, store=tmp_path, **ONE_BY_ONE)
    assert rows == [1] * 5
    with rows_of_passes(tiny) as rows:
        some = streams(tiny, [*TEXTS[::-1], TEXTS[0]], store=tmp_path, layers=[2, 0])
    assert rows == []
    assert some.layers == (2, 0)
    order = [4, 3, 2, 1, 0, 0]
    assert torch.equal(some.resid, whole.resid[[2, 0]][:, order])
    assert torch.equal(some.embed, whole.embed[order])


def test_a_store_is_not_shared_by_two_models(engine: Engine, tiny, tiny_folders, tmp_path: Path):
    streams(tiny, store=tmp_path)
    half = ls.load_model(tiny_folders["llama"], engine=engine, dtype="bfloat16")
    with rows_of_passes(half) as rows:
        streams(half, store=tmp_path, share_prefix=False)
    assert sum(rows) == 5


def test_a_prompt_cut_for_a_shorter_context_is_not_taken_for_the_longer_one(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {"prompts": ("a cake or a kite " * 40,), "truncate": True}
    monkeypatch.setattr(tiny.cfg, "n_ctx", 40)
    short = streams(tiny, **options, store=tmp_path)
    monkeypatch.setattr(tiny.cfg, "n_ctx", 80)
    long = streams(tiny, **options, store=tmp_path)
    assert drift(long, streams(tiny, **options)) < 1e-4
    assert drift(long, short) > 1e-2


def test_an_interrupted_run_keeps_its_finished_batches(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = {"batch_tokens": 1, "share_prefix": False}
    want, real, done = streams(tiny, **options), passes.Passes._one_pass, []

    def interrupted(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(passes.Passes, "_one_pass", interrupted)
        with pytest.raises(KeyboardInterrupt):
            streams(tiny, store=tmp_path, **options)
    with rows_of_passes(tiny) as rows:
        got = streams(tiny, store=tmp_path, **options)
    assert rows == [1, 1, 1]
    assert torch.equal(everything(got), everything(want))


@pytest.mark.parametrize(
    "options", [{"position": lambda ids, mask: 1}, {"template": lambda text: f"I {text}"}]
)
def test_a_store_for_a_callable_is_refused(tiny, tmp_path: Path, options: dict):
    with pytest.raises(FileError, match="store= needs a named position and template"):
        streams(tiny, store=tmp_path, **options)


def test_a_hooked_model_is_refused_because_the_store_belongs_to_the_plain_one(tiny, tmp_path: Path):
    with (
        tiny.hooks(fwd_hooks=[(resid_hook(1), lambda resid, hook: resid + 1)]),
        pytest.raises(OptionError, match="store= given while hooks"),
    ):
        streams(tiny, store=tmp_path)
    assert shards_of(tmp_path) == []


@pytest.fixture
def ready(tiny_folders, tiny_models):
    """The tiny Llama on one engine."""
    name: Engine = "hooked" if hooked_available() else "bridge"
    if name not in tiny_models:
        tiny_models[name] = ls.load_model(tiny_folders["llama"], engine=name)
    return tiny_models[name]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_at_ten_random_moments_loses_at_most_the_batch_in_flight(
    ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    want = streams(ready, MANY, **ONE_BY_ONE)
    folder, done, real = tmp_path / "store", tmp_path / "done", passes.Passes._one_pass

    def noted(*args):
        found = real(*args)
        with done.open("ab") as file:
            file.write(b".")
        return found

    rng = np.random.default_rng(0)
    with monkeypatch.context() as patch:
        patch.setattr(passes.Passes, "_one_pass", noted)
        for _ in range(10):
            done.write_bytes(b"")
            before, enough = len(shards_of(folder)), int(rng.integers(0, 5))
            child = forked(lambda: streams(ready, MANY, store=folder, **ONE_BY_ONE))
            deadline = time.monotonic() + 30
            while done.stat().st_size < enough and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.004))
            os.kill(child, signal.SIGKILL)
            assert ended(child, deadline) == -signal.SIGKILL
            assert len(shards_of(folder)) - before >= max(enough, done.stat().st_size) - 1
    stored = len(shards_of(folder))
    assert 0 < stored < len(MANY)
    with rows_of_passes(ready) as rows:
        got = streams(ready, MANY, store=folder, **ONE_BY_ONE)
    assert rows == [1] * (len(MANY) - stored)
    assert torch.equal(everything(got), everything(want))
    ls.ResidualStore(folder).clear()
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("max_bytes", [10**9, 8_000], ids=["room", "evicting"])
def test_processes_on_one_store_at_once_have_the_same_values_also_while_it_is_cleared(
    ready, tmp_path: Path, max_bytes: int
):
    want = streams(ready, MANY[:15], **ONE_BY_ONE)
    kept = ls.ResidualStore(tmp_path, max_bytes=max_bytes)

    def work() -> None:
        for _ in range(2):
            got = streams(ready, MANY[:15], store=kept, **ONE_BY_ONE)
            assert torch.equal(everything(got), everything(want))

    children = [forked(work), forked(work)]
    deadline = time.monotonic() + 60
    for _ in range(4):
        kept.to_frame()
        kept.clear()
        time.sleep(0.02)
    assert [ended(child, deadline) for child in children] == [0, 0]
    rows_in(kept).keep(["the next write trims"], some(1))
    assert 0 < held_in(tmp_path) <= max_bytes
    assert [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"] == []


def test_a_temporary_file_that_is_cleared_away_while_it_is_written_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept, real, calls = ls.ResidualStore(tmp_path), files.save_tensors, []

    def cleared(*args):
        calls.append(1)
        if len(calls) <= 2:
            raise [FileNotFoundError, SafetensorError][len(calls) - 1]
        return real(*args)

    monkeypatch.setattr(store, "save_tensors", cleared)
    rows_in(kept).keep(["a"], some(1))
    assert len(shards_of(tmp_path)) == 1
    monkeypatch.setattr(store, "save_tensors", lambda *args: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.raises(FileError, match="cannot be written"):
        rows_in(kept).keep(["b"], some(1))


def test_a_shard_that_vanishes_after_it_was_listed_is_missing(tmp_path: Path, monkeypatch):
    kept = ls.ResidualStore(tmp_path)
    gone, stays = (keep_aged(kept, text, 0) for text in ("a", "b"))
    listed = kept._shards()
    monkeypatch.setattr(kept, "_shards", lambda key="": listed)
    gone.unlink()
    assert [numbers for numbers, _ in rows_in(kept).find(["a", "b"])] == [[1]]
    assert kept.to_frame()["prompts"].tolist() == [1]
    size = stays.stat().st_size
    assert kept.clear() == size


def test_the_shards_that_were_used_longest_ago_go_first(tmp_path: Path):
    kept = ls.ResidualStore(tmp_path)
    ages = {"old": 300, "older": 400, "used again": 500, "young": 100}
    paths = {text: keep_aged(kept, text, age) for text, age in ages.items()}
    size = paths["old"].stat().st_size
    list(rows_in(kept).find(["used again"]))
    small = ls.ResidualStore(tmp_path, max_bytes=3 * size + 100)
    rows_in(small).keep(["new"], some(1))
    assert {text for text, path in paths.items() if path.exists()} == {"used again", "young"}
    assert len(shards_of(tmp_path)) == 3


def test_a_store_never_holds_more_than_its_bound_and_no_call_evicts_its_own_rows(tiny, tmp_path: Path):
    streams(tiny, store=tmp_path, **ONE_BY_ONE)
    sizes = [path.stat().st_size for path in shards_of(tmp_path)]
    kept = ls.ResidualStore(tmp_path, max_bytes=3 * max(sizes))
    with rows_of_passes(tiny) as rows:
        streams(tiny, [TEXTS[0], *MANY[5:10]], store=kept, **ONE_BY_ONE)
    assert rows == [1] * 5
    assert 0 < held_in(tmp_path) <= kept.max_bytes
    # There was room for the row that the call has read and the first two that it has written.
    with rows_of_passes(tiny) as rows:
        streams(tiny, [TEXTS[0], *MANY[5:10]], store=kept, **ONE_BY_ONE)
    assert rows == [1] * 3


def test_a_call_evicts_nothing_that_it_has_read_or_written_and_stops_writing_where_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    size = keep_aged(ls.ResidualStore(tmp_path), "read", 900).stat().st_size
    keep_aged(ls.ResidualStore(tmp_path), "unused", 0)
    call = rows_in(ls.ResidualStore(tmp_path, max_bytes=3 * size + 100))
    list(call.find(["read"]))
    written, real = [], files.save_tensors
    monkeypatch.setattr(store, "save_tensors", lambda *args: written.append(args[3]) or real(*args))
    for text in ("first", "second", "third", "fourth"):
        call.keep([text], some(1))
    stored = {text for text in ("unused", "read", "first", "second", "third") if held(tmp_path, text)}
    assert stored == {"read", "first", "second"}
    assert len(written) == 3


def test_a_batch_larger_than_the_bound_is_not_kept(tmp_path: Path):
    rows_in(ls.ResidualStore(tmp_path, max_bytes=100)).keep(["a"], some(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".{}.abc.partial", ".tmpG0HxeA"])
def test_temporary_files_of_killed_runs_are_no_shards_and_go(tmp_path: Path, name: str):
    kept = ls.ResidualStore(tmp_path)
    shard = keep_aged(kept, "a", 0)
    left = tmp_path / name.format(shard.name)
    left.write_bytes(b"half a batch")
    assert kept.to_frame()["prompts"].tolist() == [1]
    # It may be a batch that another process writes just now.
    rows_in(kept).keep(["b"], some(1))
    assert left.exists()
    two_hours_ago = time.time() - 7200
    os.utime(left, (two_hours_ago, two_hours_ago))
    rows_in(kept).keep(["c"], some(1))
    assert not left.exists()
    left.write_bytes(b"half a batch")
    size = held_in(tmp_path)
    assert kept.clear() == size + len(b"half a batch")
    assert list(tmp_path.iterdir()) == []


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path):
    kept = ls.ResidualStore(tmp_path, max_bytes=1)
    mine = [tmp_path / name for name in ("model.safetensors", "sweep-1.jsonl", ".x.partial")]
    for path in mine:
        path.write_bytes(b"mine")
        os.utime(path, (0, 0))
    rows_in(kept).keep(["a"], some(1))
    assert kept.to_frame().empty
    assert kept.clear() == 0
    assert sorted(tmp_path.iterdir()) == sorted(mine)


def test_a_damaged_batch_in_the_store_is_refused(tiny, tmp_path: Path):
    streams(tiny, store=tmp_path)
    (shard,) = shards_of(tmp_path)
    whole = shard.read_bytes()
    for damaged in (whole[:-9], b"", b"\x08" + bytes(15), whole.replace(b"layers", b"lawyer")):
        shard.write_bytes(damaged)
        for look in (lambda: streams(tiny, store=tmp_path), ls.ResidualStore(tmp_path).to_frame):
            with pytest.raises(FileError, match=rf"{shard.name} is damaged .*: delete it") as caught:
                look()
            assert "\n" not in str(caught.value)
    assert ls.ResidualStore(tmp_path).clear() > 0


def test_a_shard_of_another_shape_than_its_header_says_is_refused(tmp_path: Path):
    kept = ls.ResidualStore(tmp_path)
    path = keep_aged(kept, "a", 0)
    _, header = files.load_tensors(path, store._KIND)
    files.save_tensors(path, store._KIND, {"rows": torch.zeros(1, 2, D_MODEL)}, header)
    with pytest.raises(FileError, match=r"a tensor of shape \(1, 2, 16\), its header says \(1, 4, 16\)"):
        list(rows_in(kept).find(["a"]))


def test_the_store_lists_itself_and_clears_one_model(tmp_path: Path):
    kept = ls.ResidualStore(tmp_path)
    rows_in(kept).keep(["a", "b"], some(2))
    rows_in(kept, layers=[-1, 0, 2]).keep(["b", "c"], some(2, 3))
    rows_in(kept, name="another", template="raw").keep(["a"], some(1))
    of_another = {path for path in shards_of(tmp_path) if b"another" in path.read_bytes()}
    for path in set(shards_of(tmp_path)) - of_another:
        os.utime(path, (10**9, 10**9))
    frame = kept.to_frame()
    assert frame["model"].tolist() == ["another", "planted"]
    assert frame["template"].tolist() == ["raw", "chat"]
    assert frame["position"].tolist() == ["last", "last"]
    assert frame["layers"].tolist() == ["0 to 2", "0 to 2"]
    assert frame["prompts"].tolist() == [1, 3]
    assert sum(frame["bytes"].tolist()) == held_in(tmp_path)
    assert str(frame["last_used"][1]) == "2001-09-09 01:46:40+00:00"
    shown = kept._repr_html_()
    assert "planted" in shown
    assert "2001-09-09" in shown
    freed = kept.clear(model="planted")
    assert freed == frame["bytes"][1]
    assert set(shards_of(tmp_path)) == of_another
    with pytest.raises(OptionError, match=r"nothing of 'planted': expected one of its models \(another\)"):
        kept.clear(model="planted")
    assert kept.clear() == frame["bytes"][0]
    assert kept.clear() == 0
    with pytest.raises(OptionError, match="it is empty"):
        kept.clear(model="another")


def test_layers_are_listed_with_their_gaps():
    assert store._spans({0, 1, 2, 5, 7, 8}) == "0 to 2, 5, 7 to 8"


def test_prompts_do_not_stand_in_the_store_as_text(tmp_path: Path):
    rows_in(tmp_path).keep(["how to hotwire a kite"], some(1))
    assert b"kite" not in shards_of(tmp_path)[0].read_bytes()


def test_only_the_rows_that_are_wanted_are_found(tmp_path: Path):
    values = some(3)
    rows_in(tmp_path).keep(["a", "b", "c"], values)
    ((numbers, got),) = rows_in(tmp_path, layers=[2, -1]).find(["x", "c", "a", "c"])
    assert sorted(numbers) == [1, 2, 3]
    order = [{1: 2, 2: 0, 3: 2}[number] for number in numbers]
    assert torch.equal(got, values[[3, 0]][:, order])


def test_a_store_that_can_only_be_read_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows_in(tmp_path).keep(["a"], some(1))

    def refused(*args):
        raise PermissionError

    monkeypatch.setattr(store.os, "utime", refused)
    assert len(list(rows_in(tmp_path).find(["a"]))) == 1


@pytest.mark.parametrize("bound", [0, -5])
def test_a_bound_that_is_not_positive_is_refused(tmp_path: Path, bound: int):
    with pytest.raises(OptionError, match=f"max_bytes={bound} given, expected a positive number"):
        ls.ResidualStore(tmp_path, max_bytes=bound)


def test_a_store_that_is_a_file_is_refused(tiny, tmp_path: Path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(FileError, match="is a file, expected a folder"):
        streams(tiny, store=tmp_path / "f")
