"""Files are written whole or not at all, and say what is wrong when they cannot be read."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lens_safety import files
from lens_safety.files import (
    Result,
    atomic_path,
    load_tensors,
    save_tensors,
    write_csv,
    write_json,
)
from lens_safety.types import FileError


@dataclass(frozen=True)
class Table(Result):
    table: pd.DataFrame
    scores: np.ndarray
    flags: np.ndarray
    layers: tuple[int, ...]
    name: str
    threshold: float
    note: str | None = None


TABLE = Table(
    table=pd.DataFrame({"layer": [0, 1], "auroc": [0.1 + 0.2, float("nan")], "kind": ["ü", "b"]}),
    scores=np.array([[1.5, -2.0, 1 / 3]]),
    flags=np.array([True, False]),
    layers=(3, 1),
    name='a "quoted" name',
    threshold=float("inf"),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_tensors(tmp_path / "a.safetensors", "cat", {"x": torch.arange(6.0)}, {"n": "ü"})


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}
    assert list(path.parent.iterdir()) == [path]


def test_an_exception_while_writing_leaves_the_old_file_and_no_partial_one(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    writing = atomic_path(path)
    writing.__enter__().write_text("half of the n")
    assert len(list(tmp_path.iterdir())) == 2
    interrupt = KeyboardInterrupt()
    assert not writing.__exit__(KeyboardInterrupt, interrupt, None)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_mode_of_any_other(tmp_path: Path):
    plain = tmp_path / "plain"
    plain.write_text("")
    written = write_json(tmp_path / "a.json", 1)
    assert written.stat().st_mode == plain.stat().st_mode


def test_csv_has_six_significant_digits(tmp_path: Path):
    path = write_csv(tmp_path / "a.csv", pd.DataFrame({"a": [1 / 3], "b": [20]}))
    assert path.read_text() == "a,b\n0.333333,20\n"


def test_tensors_and_header_come_back_as_they_were(saved: Path):
    tensors, header = load_tensors(saved, "cat")
    assert tensors["x"].tolist() == [0, 1, 2, 3, 4, 5]
    assert header["n"] == "ü"


def test_a_transposed_tensor_is_saved_with_its_own_values(tmp_path: Path):
    x = torch.arange(6.0).reshape(2, 3).T
    tensors, _ = load_tensors(save_tensors(tmp_path / "a", "cat", {"x": x}, {}), "cat")
    assert torch.equal(tensors["x"], x)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_tensors_that_are_not_finite_are_refused_and_the_old_file_stays(saved: Path, bad: float):
    before = saved.read_bytes()
    with pytest.raises(FileError, match=r"^y holds NaN or infinity; nothing was written"):
        save_tensors(saved, "cat", {"x": torch.ones(2), "y": torch.tensor([1.0, bad])}, {})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileError, match=r"no file .*gone\.safetensors: expected a saved cat"):
        load_tensors(tmp_path / "gone.safetensors", "cat")
    with pytest.raises(FileError, match=r"no file .*: expected a saved Table"):
        Table.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_truncated_file_is_damaged(saved: Path, kept: int):
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(FileError, match="is damaged or no safetensors file"):
        load_tensors(saved, "cat")


def test_a_file_of_another_kind_is_refused_by_name(saved: Path, tmp_path: Path):
    with pytest.raises(FileError, match="holds cat, expected dog"):
        load_tensors(saved, "dog")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(FileError, match="holds something else, expected cat"):
        load_tensors(tmp_path / "foreign", "cat")


def test_a_file_of_another_version_is_refused_by_number(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    table = TABLE.save(tmp_path / "t.json")
    monkeypatch.setattr(files, "VERSION", 2)
    with pytest.raises(FileError, match="format version 1, expected 2; make it again"):
        load_tensors(saved, "cat")
    with pytest.raises(FileError, match="format version 1, expected 2; make it again"):
        Table.load(table)


def test_a_result_comes_back_as_it_was(tmp_path: Path):
    back = Table.load(TABLE.save(tmp_path / "t.json"))
    pd.testing.assert_frame_equal(back.table, TABLE.table, check_exact=True)
    for name in ("scores", "flags"):
        mine, theirs = getattr(TABLE, name), getattr(back, name)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    plain = ("layers", "name", "threshold", "note")
    assert [getattr(back, name) for name in plain] == [getattr(TABLE, name) for name in plain]
    assert isinstance(back.layers, tuple)


def test_a_result_of_another_class_is_refused_by_name(tmp_path: Path):
    @dataclass(frozen=True)
    class Chart(Result):
        name: str

    path = Chart("c").save(tmp_path / "c.json")
    with pytest.raises(FileError, match="holds Chart, expected Table"):
        Table.load(path)


@pytest.mark.parametrize("content", [b"", b'{"kind": "Tab', b"\xff\xfe", b"[1, 2]"])
def test_a_damaged_result_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"t\.json (is damaged or no JSON|holds something else)"):
        Table.load(path)


def test_a_result_without_one_of_its_fields_is_refused(tmp_path: Path):
    path = TABLE.save(tmp_path / "t.json")
    values = json.loads(path.read_text())
    del values["scores"]
    path.write_text(json.dumps(values))
    with pytest.raises(FileError, match=r"does not hold what its header says \('scores'\)"):
        Table.load(path)


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    path = TABLE.save(tmp_path / "t.json")
    before = path.read_bytes()
    with pytest.raises(TypeError):
        replace(TABLE, note=object()).save(path)  # type: ignore[arg-type]
    assert path.read_bytes() == before
