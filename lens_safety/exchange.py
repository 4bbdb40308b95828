"""Exchange: content vectors in the form others keep them, repeng's and llama.cpp's GGUF or a plain dict.

A control-vector GGUF holds one float32 tensor `direction.N` a layer, and N is our layer, with no shift:

    resid_post[N] + multiplier * direction.N        (repeng: coeff; llama.cpp: the scale of the file)

llama.cpp puts direction.N at data[d_model * (N - 1)] (common/common.cpp, common_control_vector_load_one)
and adds data[d_model * (il - 1)] to the output of its 0-based block il (src/llama-adapter.cpp,
llama_adapter_cvec::apply; build_cvec before "l_out"), so that il = N. repeng reads direction.N from
Hugging Face's hidden_states[N + 1], which is the output of block N, and adds it there (repeng/extract.py,
batched_get_hiddens; repeng/control.py, ControlModule). Two things do not carry over:

- Layer 0: llama.cpp refuses a whole file that has a direction.0.
- What the numbers were measured on: repeng's direction of the last layer is read after the final norm,
  and llama.cpp's cvector-generator stores what it reads at block N - 1 as direction.N. They are taken as
  the layer that they are added to.

Signs agree: ours point from safe to dangerous, theirs from the negative to the positive prompts. Lengths
do not: ours are raw, theirs mostly of norm 1.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .directions import ContentVectors, median_norm
from .files import VERSION, atomic_path, building_from, check_kind
from .models import ModelFingerprint, fingerprint
from .residuals import ResidualCache
from .types import FileError, MismatchError, OptionError, ResidualModel

_ARCHITECTURE = "controlvector"
_PREFIX = "direction."
_KIND = "ContentVectors"
# Keys, not tensors: llama.cpp refuses a file with a tensor that is no direction, and skips unknown keys.
_HEADER = "lens_safety.header"
_TENSORS = "lens_safety.tensors"
_MODEL_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def write_gguf(
    vectors: ContentVectors, path: str | Path, *, model_hint: str | ResidualModel | None = None
) -> Path:
    """Write a control-vector GGUF that repeng and llama.cpp (`--control-vector-scaled`) read; whole or not.

    direction.L = vectors[layer L], float32, for every layer L >= 1. Layer 0 has no place in the format:
    it is left out of the directions. The file also carries everything that `ContentVectors` holds (layer
    0 too) in keys that only `read_gguf` reads, so that vectors come back bit for bit.

    Args:
        model_hint: the model's architecture ("llama", "qwen2", ...), or the model to take it from; by
            default the model's name. llama.cpp does not read it; repeng warns where hints differ in a sum.

    Raises:
        OptionError: there is no layer but layer 0.
        FileError: a vector or mean holds NaN or infinity; nothing is written then.
        MismatchError: the vectors are of another model than `model_hint`.
    """
    from gguf import GGUFWriter

    carried = [layer for layer in vectors.layers if layer > 0]
    if not carried:
        raise OptionError(
            "vectors of layer 0 alone given: a control-vector GGUF has no place for layer 0; give later "
            "layers, or save them as safetensors with vectors.save(path)"
        )
    for name in ("vectors", "safe_mean", "dangerous_mean"):
        if not bool(getattr(vectors, name).isfinite().all()):
            raise FileError(f"{name} holds NaN or infinity; nothing was written to {path}")
    hint, (header, tensors) = _hint(vectors, model_hint), _card(vectors)
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", hint)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(carried))
        writer.add_string(_HEADER, header)
        writer.add_string(_TENSORS, tensors)
        for layer in carried:
            writer.add_tensor(f"{_PREFIX}{layer}", _as_row(vectors.layer(layer)).numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return Path(path)


def read_gguf(
    path: str | Path,
    model: ResidualModel | ModelFingerprint | None = None,
    *,
    cache: ResidualCache | None = None,
) -> ContentVectors:
    """Read a control-vector GGUF: what `write_gguf` wrote, bit for bit, or one of repeng or llama.cpp.

    The direction of layer L is direction.L. A file of `write_gguf` knows its model and needs neither
    option; `model` is then checked. A file of others holds directions alone: the model comes from
    `model` or `cache`, and means and norms are those of `from_dict`.

    Raises:
        FileError: no such file, a damaged one, one of another kind, or directions that were edited.
        MismatchError: another model, another width, or a layer that the model does not have.
        OptionError: a file of others and neither a model nor a cache.
    """
    keys, directions = _read(path)
    if _HEADER in keys:
        vectors = _from_card(path, keys)
        _require_unedited(path, vectors, directions)
        if model is not None:
            vectors.model.require(_fingerprint(model), str(path))
        return vectors
    hint = keys.get(f"{_ARCHITECTURE}.model_hint", "unknown")
    if model is None and cache is None:
        raise OptionError(
            f"{path} does not say which model it is of, only {hint!r}: give the model, as in "
            "read_gguf(path, model)"
        )
    return from_dict(directions, model, cache=cache, source=f"{Path(path).name} ({hint})")


def to_dict(vectors: ContentVectors) -> dict[int, Float[Tensor, " d_model"]]:
    """layer -> its raw vector, a copy; layer L is `blocks.L.hook_resid_post`."""
    return {layer: vectors.layer(layer).clone() for layer in vectors.layers}


# The directions carry no shapes in the signature: wrong ones are what the function is there to refuse.
def from_dict(
    directions: Mapping[int, Tensor | np.ndarray],
    model: ResidualModel | ModelFingerprint | None = None,
    *,
    cache: ResidualCache | None = None,
    method: str = "imported",
    source: str = "a dict",
) -> ContentVectors:
    """Directions from elsewhere, layer -> `[d_model]`, as float32 `ContentVectors`, layers ascending.

    vectors[L] = directions[L]; safe_mean, dangerous_mean = middle -/+ vectors / 2

    Nobody knows what they were fitted on (`n_safe` = `n_dangerous` = 0, position "unknown"), so the means
    say no more than the direction. `cache` gives what the model's residual streams are like: `middle` is
    its mean and `resid_norm` its median norm. Without it `middle` is 0 and `resid_norm` NaN: multipliers
    work, but doses are NaN, the operator `toward` has no meaning, and `save` refuses them (`write_gguf`
    does not). A direction of zeros is zero all the same: its `resid_norm` is then 0.

    Args:
        model: the model they belong to; by default the cache's.
        cache: residual streams of that model, for any prompts and at least these layers.

    Raises:
        OptionError: no directions, NaN or infinity in one, or neither a model nor a cache.
        MismatchError: another width or shape, a layer that the model or the cache does not have, or a
            cache of another model.
    """
    owner = _owner(model, cache)
    layers = tuple(sorted(directions))
    if not layers:
        raise OptionError("no directions given, expected at least one layer -> vector")
    vectors = torch.stack([_checked(directions[layer], layer, owner) for layer in layers])
    if cache is None:
        middle = torch.zeros_like(vectors)
        resid_norm = torch.where(vectors.norm(dim=1) == 0, 0.0, torch.nan)
    else:
        resid = torch.stack([cache.layer(layer) for layer in layers])
        middle, resid_norm = resid.mean(dim=1), median_norm(resid)
    return ContentVectors(
        vectors=vectors,
        safe_mean=middle - vectors / 2,
        dangerous_mean=middle + vectors / 2,
        resid_norm=resid_norm,
        layers=layers,
        method=method,
        n_safe=0,
        n_dangerous=0,
        position="unknown",
        template="unknown",
        source=source,
        model=owner,
    )


def _fingerprint(model: ResidualModel | ModelFingerprint) -> ModelFingerprint:
    return model if isinstance(model, ModelFingerprint) else fingerprint(model)


def _owner(model: ResidualModel | ModelFingerprint | None, cache: ResidualCache | None) -> ModelFingerprint:
    if model is None:
        if cache is None:
            raise OptionError("neither a model nor a cache given: expected the model of the directions")
        return cache.model
    owner = _fingerprint(model)
    if cache is not None:
        cache.model.require(owner, "the cache")
    return owner


def _as_row(given: Tensor | np.ndarray) -> Tensor:
    """A float32 copy on the CPU."""
    if isinstance(given, np.ndarray):
        return torch.from_numpy(np.array(given, dtype=np.float32))
    return given.detach().to("cpu", torch.float32, copy=True).contiguous()


def _checked(given: Tensor | np.ndarray, layer: int, model: ModelFingerprint) -> Float[Tensor, " d_model"]:
    if not 0 <= layer < model.n_layers:
        raise MismatchError(
            f"a direction of layer {layer} given, expected layers 0 to {model.n_layers - 1}, which are "
            f"those of {model.name}"
        )
    if tuple(given.shape) != (model.d_model,):
        raise MismatchError(
            f"a direction of shape {tuple(given.shape)} given for layer {layer}, expected "
            f"({model.d_model},), the width of {model.name}"
        )
    row = _as_row(given)
    if not bool(row.isfinite().all()):
        raise OptionError(f"the direction of layer {layer} holds NaN or infinity; make it again")
    return row


def _hint(vectors: ContentVectors, given: str | ResidualModel | None) -> str:
    """The architecture as repeng and llama.cpp name most: LlamaForCausalLM is llama."""
    if isinstance(given, str):
        return given or "unknown"
    if given is not None:
        vectors.model.require(fingerprint(given), "the vectors")
        name = getattr(given.cfg, "architecture", None) or getattr(given.cfg, "original_architecture", None)
        for ending in _MODEL_CLASSES:
            name = str(name or "").removesuffix(ending)
        if name:
            return name.lower()
    return vectors.model.name or "unknown"


def _card(vectors: ContentVectors) -> tuple[str, str]:
    """Everything that the vectors hold, as (JSON, safetensors in base64)."""
    from safetensors.torch import save

    values = {field.name: getattr(vectors, field.name) for field in fields(vectors)}
    tensors = {
        name: values.pop(name).detach().cpu().contiguous().clone()
        for name in list(values)
        if isinstance(values[name], Tensor)
    }
    header = {"kind": _KIND, "version": VERSION, **values, "model": vectors.model.to_dict()}
    return json.dumps(header, ensure_ascii=False), base64.b64encode(save(tensors)).decode()


def _from_card(path: str | Path, keys: Mapping[str, str]) -> ContentVectors:
    """The vectors that `_card` described. Raises `FileError` where its two parts do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    with building_from(path):
        header = json.loads(keys[_HEADER])
        try:
            tensors: dict[str, Any] = load(base64.b64decode(keys[_TENSORS], validate=True))
        except SafetensorError as error:
            raise ValueError(error) from error
        check_kind(path, header if isinstance(header, dict) else {}, _KIND)
        header |= {"layers": tuple(header["layers"]), "model": ModelFingerprint.from_dict(header["model"])}
        whole = (len(header["layers"]), header["model"].d_model)
        for name in ("vectors", "safe_mean", "dangerous_mean", "resid_norm"):
            found, shape = tuple(tensors[name].shape), whole[:1] if name == "resid_norm" else whole
            if found != shape:
                raise ValueError(f"{name} of shape {found} instead of {shape}")
        values = {**header, **tensors}
        return ContentVectors(**{field.name: values[field.name] for field in fields(ContentVectors)})


def _require_unedited(
    path: str | Path, vectors: ContentVectors, directions: Mapping[int, Float[Tensor, "..."]]
) -> None:
    """Raise `FileError` unless the directions that others read are the vectors that we read."""
    for layer in sorted({*directions, *vectors.layers} - {0}):
        row = directions.get(layer)
        if row is None or layer not in vectors.layers or not torch.equal(row, _as_row(vectors.layer(layer))):
            raise FileError(
                f"{path} was edited: its {_PREFIX}{layer} is not what its {_HEADER} key says; write it "
                "again, or drop the lens_safety keys to read the directions alone"
            )


def _read(path: str | Path) -> tuple[dict[str, str], dict[int, Tensor]]:
    """The text keys and the directions of a control-vector GGUF."""
    from gguf import GGUFReader, GGUFValueType

    if not Path(path).is_file():
        raise FileError(f"no file {path}: expected a control-vector GGUF")
    try:
        reader = GGUFReader(path)
        keys = {
            name: bytes(field.parts[-1]).decode("utf-8")
            for name, field in reader.fields.items()
            if field.types[:1] == [GGUFValueType.STRING]
        }
    except (ValueError, LookupError, TypeError, OverflowError, OSError, MemoryError) as error:
        raise FileError(f"{path} is damaged or no GGUF file ({error}); make it again") from error
    architecture = keys.get("general.architecture", "something without a name")
    if architecture != _ARCHITECTURE:
        raise FileError(f"{path} holds {architecture}, expected a control vector ({_ARCHITECTURE})")
    directions = dict(_direction(path, tensor) for tensor in reader.tensors)
    if not directions:
        raise FileError(f"{path} holds no directions, expected tensors {_PREFIX}N")
    return keys, directions


def _direction(path: str | Path, tensor: Any) -> tuple[int, Tensor]:
    """(layer, row) of one tensor of the file."""
    number = tensor.name.removeprefix(_PREFIX)
    layer = int(number) if number.isdecimal() else -1
    if tensor.name != f"{_PREFIX}{layer}" or tensor.data.dtype.kind != "f":
        raise FileError(
            f"{path} holds a tensor {tensor.name} of type {tensor.tensor_type.name}, expected "
            f"{_PREFIX}N alone, not quantised"
        )
    row = _as_row(np.squeeze(tensor.data))
    if not bool(row.isfinite().all()):
        raise FileError(f"{path} holds NaN or infinity in {tensor.name}; make it again")
    return layer, row
