import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    D_MODEL,
    FINGERPRINT,
    N_LAYERS,
    constant_cache,
    every_position,
    labelled,
    planted_cache,
)
from gguf import GGUFReader, GGUFWriter

import lens_safety as ls

OTHER = replace(FINGERPRINT, name="other", probe=(9.0, 9.0, 9.0, 9.0))
WIDER = replace(FINGERPRINT, name="wider", d_model=D_MODEL + 1)
TENSORS = ("vectors", "safe_mean", "dangerous_mean", "resid_norm")


def same(a: ls.ContentVectors, b: ls.ContentVectors) -> bool:
    """Equal in every field, tensors bit for bit (NaN equal to NaN)."""
    mine, theirs = ([getattr(each, field.name) for field in fields(each)] for each in (a, b))
    return all(
        torch.equal(x.view(torch.int32), y.view(torch.int32)) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(mine, theirs, strict=True)
    )


def planted(**changes) -> ls.ContentVectors:
    return replace(1.3 * ls.content_vectors(planted_cache()[0]), **changes)


def numbered(*layers: int, d_model: int = D_MODEL) -> dict[int, np.ndarray]:
    """A direction a layer, each known by its numbers."""
    return {layer: layer + np.arange(1, d_model + 1, dtype=np.float32) / 7 for layer in layers}


def write_as_repeng(
    path: Path,
    directions: Mapping[Any, np.ndarray],
    *,
    architecture: str = "controlvector",
    hint: str = "llama",
    keys: Mapping[str, str] | None = None,
) -> Path:
    """The calls of repeng's `ControlVector.export_gguf`, with other tensor names and keys on demand."""
    writer = GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", hint)
    writer.add_uint32(f"{architecture}.layer_count", len(directions))
    for key, text in (keys or {}).items():
        writer.add_string(key, text)
    for layer, direction in directions.items():
        name = layer if isinstance(layer, str) else f"direction.{layer}"
        writer.add_tensor(name, direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    assert field is not None
    return bytes(field.parts[-1]).decode()


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


def keys_of(path: Path) -> dict[str, str]:
    return {key: text(GGUFReader(path), key) for key in ("lens_safety.header", "lens_safety.tensors")}


def test_what_was_written_comes_back_bit_for_bit_layer_0_and_means_and_all(tmp_path):
    vectors = planted()
    back = ls.read_gguf(ls.write_gguf(vectors, tmp_path / "v.gguf"))
    assert 0 in back.layers
    assert same(back, vectors)
    assert not same(back, planted(safe_mean=vectors.safe_mean + 1e-6))
    assert same(ls.read_gguf(tmp_path / "v.gguf", FINGERPRINT), vectors)


def test_the_safetensors_file_with_its_json_card_is_as_exact(tmp_path):
    vectors = planted()
    assert same(ls.ContentVectors.load(vectors.save(tmp_path / "v.safetensors")), vectors)


def test_layers_in_any_order_and_some_of_them_come_back_as_they_were(tmp_path):
    whole = planted()
    rows = {name: getattr(whole, name)[[2, 0]] for name in TENSORS}
    picked = replace(whole, layers=(2, 0), **rows)
    path = ls.write_gguf(picked, tmp_path / "v.gguf")
    assert same(ls.read_gguf(path), picked)
    assert list(tensors_of(path)) == ["direction.2"]


def test_the_file_has_the_keys_names_and_numbers_of_repeng_and_no_tensor_beside_them(tmp_path):
    vectors = planted()
    path = ls.write_gguf(vectors, tmp_path / "v.gguf", model_hint="llama")
    reader = GGUFReader(path)
    assert text(reader, "general.architecture") == "controlvector"
    assert text(reader, "controlvector.model_hint") == "llama"
    count = reader.get_field("controlvector.layer_count")
    assert count is not None
    assert (int(count.parts[-1][0]), count.types[0].name) == (N_LAYERS - 1, "UINT32")
    written = tensors_of(path)
    assert list(written) == ["direction.1", "direction.2"]
    for layer in (1, 2):
        direction = written[f"direction.{layer}"]
        assert (direction.dtype, direction.shape) == (np.dtype("float32"), (D_MODEL,))
        assert np.array_equal(direction, vectors.layer(layer).numpy())


def llama_cpp_buffer(path: Path, n_layers: int) -> dict[int, np.ndarray]:
    """What llama.cpp adds to the output of each 0-based block: its loader, then its adapter, in numpy."""
    data = np.zeros(0, dtype=np.float32)
    for tensor in GGUFReader(path).tensors:
        name, number = tensor.name.split(".")
        assert name == "direction"
        assert int(number) > 0
        assert tensor.tensor_type.name == "F32"
        assert len(tensor.shape) == 1
        width, offset = len(tensor.data), len(tensor.data) * (int(number) - 1)
        data = np.pad(data, (0, max(0, offset + width - len(data))))
        data[offset : offset + width] += tensor.data
    return {il: data[D_MODEL * (il - 1) : D_MODEL * il] for il in range(1, n_layers)}


def test_llama_cpp_adds_each_direction_to_the_block_it_was_read_from(tmp_path):
    vectors = planted()
    added = llama_cpp_buffer(ls.write_gguf(vectors, tmp_path / "v.gguf"), N_LAYERS)
    assert list(added) == [1, 2]
    for il, direction in added.items():
        assert np.array_equal(direction, vectors.layer(il).numpy())
        assert not np.array_equal(direction, vectors.layer(il - 1).numpy())


def test_a_file_laid_out_as_repeng_does_is_read_to_the_same_layers(tmp_path):
    given = numbered(2, 1)  # repeng goes from the last layer down
    vectors = ls.read_gguf(write_as_repeng(tmp_path / "happy.gguf", given), FINGERPRINT)
    assert vectors.layers == (1, 2)
    for layer, direction in given.items():
        assert np.array_equal(vectors.layer(layer).numpy(), direction)
    assert (vectors.method, vectors.source) == ("imported", "happy.gguf (llama)")
    assert (vectors.n_safe, vectors.n_dangerous, vectors.position) == (0, 0, "unknown")
    assert vectors.model == FINGERPRINT


def test_repengs_direction_0_is_layer_0(tmp_path):
    vectors = ls.read_gguf(write_as_repeng(tmp_path / "v.gguf", numbered(0, 2)), FINGERPRINT)
    assert vectors.layers == (0, 2)
    assert np.array_equal(vectors.layer(0).numpy(), numbered(0)[0])


def test_half_precision_and_a_row_matrix_are_read_as_well(tmp_path):
    given = {1: numbered(1)[1].astype(np.float16), 2: numbered(2)[2][None]}
    vectors = ls.read_gguf(write_as_repeng(tmp_path / "v.gguf", given), FINGERPRINT)
    assert vectors.vectors.dtype == torch.float32
    assert np.array_equal(vectors.layer(1).numpy(), given[1].astype(np.float32))
    assert np.array_equal(vectors.layer(2).numpy(), given[2][0])


def test_the_live_model_names_itself_and_its_architecture(tiny, tiny_folders, tmp_path):
    cache = ls.residual_streams(tiny, labelled(), progress=False)
    vectors = ls.content_vectors(cache)
    path = ls.write_gguf(vectors, tmp_path / "v.gguf", model_hint=tiny)
    assert text(GGUFReader(path), "controlvector.model_hint") == "llama"
    assert same(ls.read_gguf(path, tiny), vectors)
    given = write_as_repeng(tmp_path / "theirs.gguf", numbered(1, 2))
    assert ls.read_gguf(given, tiny).model == ls.fingerprint(tiny)
    with pytest.raises(ls.MismatchError, match="the vectors was made with planted"):
        ls.write_gguf(planted(), path, model_hint=tiny)


def test_directions_number_the_hidden_states_of_hugging_face_as_repeng_does(tiny_folders, tmp_path):
    """repeng reads direction.N from hidden_states[N + 1]: here that very difference."""
    import transformers as hf

    model = ls.load_model(tiny_folders["llama"])
    texts = ("a kite for the garden", "how do I make a cake")
    theirs = hf.AutoModelForCausalLM.from_pretrained(tiny_folders["llama"])
    states, ours = [], []
    for prompt in texts:
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            states.append([h[0, -1] for h in theirs(ids, output_hidden_states=True).hidden_states])
        ours.append(every_position(model, ids[0])[1:, -1])
    # Not the last layer: there hidden_states is after the final norm.
    given = {n: (states[1][n + 1] - states[0][n + 1]).numpy() for n in range(N_LAYERS - 1)}
    read = ls.read_gguf(write_as_repeng(tmp_path / "v.gguf", given), model)
    for layer in given:
        assert torch.allclose(read.layer(layer), (ours[1] - ours[0])[layer], atol=1e-4)
        assert not torch.allclose(read.layer(layer), (ours[1] - ours[0])[layer + 1], atol=1e-1)


def test_the_hint_is_the_models_name_unless_told(tmp_path):
    path = ls.write_gguf(planted(), tmp_path / "v.gguf")
    assert text(GGUFReader(path), "controlvector.model_hint") == "planted"


def test_vectors_of_layer_0_alone_have_no_place_in_the_format(tmp_path):
    vectors = ls.from_dict(numbered(0), FINGERPRINT)
    with pytest.raises(ls.OptionError, match="no place for layer 0"):
        ls.write_gguf(vectors, tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TENSORS[:3])
def test_nan_is_not_written_and_the_old_file_stays(name: str, tmp_path):
    path = ls.write_gguf(planted(), tmp_path / "v.gguf")
    broken = getattr(planted(), name).clone()
    broken[1, 3] = torch.nan
    with pytest.raises(ls.FileError, match=f"{name} holds NaN"):
        ls.write_gguf(planted(**{name: broken}), path)
    assert same(ls.read_gguf(path), planted())
    assert [each.name for each in tmp_path.iterdir()] == ["v.gguf"]


def test_a_missing_damaged_or_foreign_file_is_refused_with_one_sentence(tmp_path):
    whole = ls.write_gguf(planted(), tmp_path / "whole").read_bytes()
    for cut in (0, 3, 30, 200, len(whole) // 2, len(whole) - 5):
        (tmp_path / f"cut {cut}").write_bytes(whole[:cut])
        with pytest.raises(ls.FileError, match="is damaged or no GGUF file"):
            ls.read_gguf(tmp_path / f"cut {cut}")
    (tmp_path / "text").write_text("not a GGUF file, not at all")
    planted().save(tmp_path / "safetensors")
    write_as_repeng(tmp_path / "model", numbered(1), architecture="llama")
    write_as_repeng(tmp_path / "none", {})
    write_as_repeng(tmp_path / "extra", {**numbered(1), "safe_mean.1": numbered(1)[1]})
    write_as_repeng(tmp_path / "unnumbered", {"direction.one": numbered(1)[1]})
    write_as_repeng(tmp_path / "integers", {1: np.arange(D_MODEL, dtype=np.int32)})
    write_as_repeng(tmp_path / "nan", {1: np.full(D_MODEL, np.nan, dtype=np.float32)})
    says = {
        "absent": "no file",
        "text": "is damaged or no GGUF file",
        "safetensors": "is damaged or no GGUF file",
        "model": "holds llama, expected a control vector",
        "none": "holds no directions",
        "extra": "a tensor safe_mean.1 of type F32, expected direction.N alone",
        "unnumbered": "a tensor direction.one",
        "integers": "a tensor direction.1 of type I32",
        "nan": "NaN or infinity in direction.1",
    }
    for name, reason in says.items():
        with pytest.raises(ls.FileError, match=reason):
            ls.read_gguf(tmp_path / name, FINGERPRINT)


def test_directions_that_were_edited_behind_the_header_are_refused(tmp_path):
    path = ls.write_gguf(planted(), tmp_path / "v.gguf")
    keys = keys_of(path)
    rows = {layer: planted().layer(layer).numpy() for layer in (1, 2)}
    unchanged = write_as_repeng(tmp_path / "unchanged", rows, keys=keys)
    assert same(ls.read_gguf(unchanged), planted())
    edits = {"moved": {**rows, 2: rows[1]}, "fewer": {2: rows[2]}, "more": {**rows, 3: rows[1]}}
    for name, edited in edits.items():
        with pytest.raises(ls.FileError, match=r"was edited: its direction\.\d"):
            ls.read_gguf(write_as_repeng(tmp_path / name, edited, keys=keys))
    assert ls.read_gguf(write_as_repeng(tmp_path / "bare", edits["moved"]), FINGERPRINT).layers == (1, 2)


def test_a_header_that_does_not_fit_is_refused(tmp_path):
    path = ls.write_gguf(planted(), tmp_path / "v.gguf")
    keys, rows = keys_of(path), {layer: planted().layer(layer).numpy() for layer in (1, 2)}
    header = json.loads(keys["lens_safety.header"])

    def changed(**changes) -> dict[str, str]:
        return {**keys, "lens_safety.header": json.dumps({**header, **changes})}

    says = {
        "holds other, expected ContentVectors": changed(kind="other"),
        "format version 0": changed(version=0),
        "vectors of shape": changed(layers=[0, 1]),
        "does not hold what its header says": changed(model={}),
        "something else": {**keys, "lens_safety.header": "[]"},
        r"holds what its header says \(.*Expecting|not hold": {**keys, "lens_safety.header": "{"},
        "does not hold": {**keys, "lens_safety.tensors": "AAAA"},
        "does not hold what": {**keys, "lens_safety.tensors": "no base64!"},
        "lens_safety.tensors": {"lens_safety.header": keys["lens_safety.header"]},
    }
    for number, (reason, wrong) in enumerate(says.items()):
        with pytest.raises(ls.FileError, match=reason):
            ls.read_gguf(write_as_repeng(tmp_path / f"{number}", rows, keys=wrong))


def test_another_model_or_width_or_layer_is_refused(tmp_path):
    ours = ls.write_gguf(planted(), tmp_path / "ours.gguf")
    with pytest.raises(ls.MismatchError, match="other weights"):
        ls.read_gguf(ours, OTHER)
    theirs = write_as_repeng(tmp_path / "theirs.gguf", numbered(1, 2))
    with pytest.raises(ls.MismatchError, match=r"shape \(16,\) given for layer 1, expected \(17,\)"):
        ls.read_gguf(theirs, WIDER)
    deeper = write_as_repeng(tmp_path / "deeper.gguf", numbered(1, N_LAYERS))
    with pytest.raises(ls.MismatchError, match="layer 3 given, expected layers 0 to 2"):
        ls.read_gguf(deeper, FINGERPRINT)
    with pytest.raises(ls.OptionError, match="does not say which model it is of, only 'llama'"):
        ls.read_gguf(theirs)


def test_a_dict_holds_copies_and_comes_back_as_the_same_vectors():
    vectors = planted()
    rows = ls.to_dict(vectors)
    assert list(rows) == list(vectors.layers)
    back = ls.from_dict(rows, vectors.model)
    assert torch.equal(back.vectors, vectors.vectors)
    rows[1].zero_()
    assert torch.equal(vectors.vectors, planted().vectors)
    assert torch.equal(back.vectors, planted().vectors)


def test_a_dict_may_hold_numpy_arrays_of_any_precision_in_any_order():
    given = {
        2: np.arange(D_MODEL, dtype=np.float64),
        1: torch.arange(D_MODEL, dtype=torch.float64),
        0: torch.ones(D_MODEL, dtype=torch.bfloat16),
    }
    vectors = ls.from_dict(given, FINGERPRINT, method="probe", source="a paper")
    assert (vectors.layers, vectors.method, vectors.source) == ((0, 1, 2), "probe", "a paper")
    assert vectors.vectors.dtype == torch.float32
    assert torch.equal(vectors.vectors[1:], torch.arange(D_MODEL).float().expand(2, -1))


def test_without_a_cache_means_say_no_more_than_the_direction_and_doses_are_not_defined(tmp_path):
    zero = np.zeros(D_MODEL, dtype=np.float32)
    vectors = ls.from_dict({**numbered(1), 2: zero}, FINGERPRINT)
    assert torch.equal(vectors.dangerous_mean - vectors.safe_mean, vectors.vectors)
    assert torch.equal(vectors.dangerous_mean, -vectors.safe_mean)
    assert vectors.is_zero.tolist() == [False, True]
    assert np.isnan(vectors.dose(1.0)).tolist() == [True, False]
    assert torch.allclose(vectors.unit.norm(dim=1), torch.tensor([1.0, 0.0]))
    assert same(ls.read_gguf(ls.write_gguf(vectors, tmp_path / "v.gguf")), vectors)
    with pytest.raises(ls.FileError, match="resid_norm holds NaN"):
        vectors.save(tmp_path / "v.safetensors")


def test_with_a_cache_doses_are_those_of_vectors_made_here(tmp_path):
    cache, _ = planted_cache()
    made = ls.content_vectors(cache)
    back = ls.from_dict(ls.to_dict(made), cache=cache)
    assert torch.equal(back.vectors, made.vectors)
    assert np.array_equal(back.dose(0.7), made.dose(0.7))
    for name in ("safe_mean", "dangerous_mean"):
        assert torch.allclose(getattr(back, name), getattr(made, name), atol=1e-5)
    assert same(ls.ContentVectors.load(back.save(tmp_path / "v.safetensors")), back)
    theirs = write_as_repeng(tmp_path / "theirs.gguf", numbered(2))
    assert torch.equal(ls.read_gguf(theirs, cache=cache).resid_norm, made.resid_norm[2:])


def test_imported_vectors_steer_by_a_multiplier_and_with_a_cache_by_a_dose(tiny):
    cache = ls.residual_streams(tiny, labelled(), progress=False)
    rows = ls.to_dict(ls.content_vectors(cache))
    bare, known = ls.from_dict(rows, tiny), ls.from_dict(rows, tiny, cache=cache)
    ls.steering_plan(tiny, bare, layers=[1], multiplier=2.0)
    ls.steering_plan(tiny, known, layers=[1], multiplier=ls.Dose(0.1))


def test_a_dose_of_imported_vectors_without_a_cache_is_refused(tiny):
    bare = ls.from_dict(numbered(1), tiny)
    with pytest.raises(ls.OptionError, match="whose residual norm is unknown"):
        ls.steering_plan(tiny, bare, layers=[1], multiplier=ls.Dose(0.1))


def test_unusable_dicts_are_refused():
    nan = {1: np.full(D_MODEL, np.nan)}
    cases = [
        (ls.OptionError, "no directions given", {}),
        (ls.OptionError, "layer 1 holds NaN", nan),
        (ls.MismatchError, "layer -1 given, expected layers 0 to 2", numbered(-1)),
        (ls.MismatchError, "layer 3 given, expected layers 0 to 2", numbered(3)),
        (ls.MismatchError, r"shape \(5,\) given for layer 2", {**numbered(1), **numbered(2, d_model=5)}),
        (ls.MismatchError, r"shape \(1, 16\) given", {1: numbered(1)[1][None]}),
    ]
    for error, reason, given in cases:
        with pytest.raises(error, match=reason):
            ls.from_dict(given, FINGERPRINT)
    with pytest.raises(ls.OptionError, match="neither a model nor a cache"):
        ls.from_dict(numbered(1))
    with pytest.raises(ls.MismatchError, match="the cache was made with"):
        ls.from_dict(numbered(1), OTHER, cache=planted_cache()[0])
    fewer = replace(planted_cache()[0], resid=planted_cache()[0].resid[:1], layers=(0,))
    with pytest.raises(ls.MismatchError, match="layer 1 given, expected one of the cached layers"):
        ls.from_dict(numbered(1), cache=fewer)


def test_vectors_without_a_direction_survive_too(tmp_path):
    vectors = ls.content_vectors(constant_cache())
    assert same(ls.read_gguf(ls.write_gguf(vectors, tmp_path / "v.gguf")), vectors)


def test_repeng_itself_reads_ours_and_we_read_its_own(tmp_path):
    repeng = pytest.importorskip("repeng")
    vectors = planted()
    path = str(ls.write_gguf(vectors, tmp_path / "ours.gguf", model_hint="llama"))
    read = repeng.ControlVector.import_gguf(path)
    assert (read.model_type, sorted(read.directions)) == ("llama", [1, 2])
    assert all(np.array_equal(read.directions[layer], vectors.layer(layer).numpy()) for layer in (1, 2))
    repeng.ControlVector(model_type="llama", directions=numbered(2, 1)).export_gguf(tmp_path / "theirs.gguf")
    back = ls.read_gguf(tmp_path / "theirs.gguf", FINGERPRINT)
    assert all(np.array_equal(back.layer(layer).numpy(), numbered(layer)[layer]) for layer in (1, 2))
