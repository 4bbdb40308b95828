"""Question: what does reading every layer cost beside the forward pass that has to run anyway?

Method: the residual streams of 256 chat prompts and of the same prompts as plain text (`residual_streams`:
encoding, batching, hooks, all layers), against a bare forward pass (no unembedding, no hooks) over the same
prompts, whole, sorted by length and batched: through Hugging Face's body and through the same engine's;
against `run_with_cache` of everything as it is called by hand (the prompts in the order given, 32 at a
time), and over our batches, which are sorted by length, of everything and of the residual streams alone,
also on a TransformerBridge. With `--peers` also against packages from PyPI, each called as its documentation
says and in its own environment: they read the last token, so ours is then read there too, which takes
longer than the content tokens. Gemma 3 270M, with its wide unembedding, against a full forward pass over the
same batches. All take turns, so that a slow minute hits each of them; medians of several rounds.
Control: the bare bodies. No extraction that runs every token can be faster on the same batches. And a peer
counts only where the vectors that it reads are ours (cosine at a middle layer above 0.999).
Reading: `chat_vs_floor` below 1 is what the shared beginning of the chat template saves, against Hugging
Face's body; `plain_vs_floor` near 1 means that the hooks cost nothing, against the same engine's body;
`vs_run_with_cache` is what is saved in all, and `vs_run_with_cache_sorted` how much of that is not due to
sorting; `vs_fastest_peer` is null where none was run; `gemma_vs_full_forward` is what the unembedding costs.

    python analyses/benchmarks/extraction.py --engine hooked --rounds 3 [--peers] [--json] [--csv FILE]
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from measuring import Conditions, Row, conditions, keep, medians_of, options_of, take_turns, timed
from peers import PEERS, add_envs, start_peers

import lens_safety as ls
from lens_safety.models import borrowed, device_of, engine_of, fingerprint, full_logits, resid_hook
from lens_safety.passes import BATCH_TOKENS
from lens_safety.prompts import PromptSet
from lens_safety.tokens import Batch, Encoded, batches, encode, pad
from lens_safety.types import ModelError

N_PROMPTS = 256
N_GEMMA = 64
BY_HAND = 32
CHAT, PLAIN = "residual_streams, chat", "residual_streams, plain"
LAST = "residual_streams, chat, last token"
FLOOR, BODY, PLAIN_BODY = "Hugging Face body, chat", "body, chat", "body, plain"
EVERYTHING, SORTED = "run_with_cache", "run_with_cache, sorted"
NAMES, BRIDGE = "run_with_cache, names, sorted", "TransformerBridge run_with_cache, names, sorted"
GEMMA, GEMMA_FULL = "residual_streams, Gemma", "full forward with logits, Gemma"
RATIOS: tuple[tuple[str, str, str, float | None], ...] = (
    ("chat_vs_floor", CHAT, FLOOR, 0.62),
    ("chat_vs_body", CHAT, BODY, None),
    ("chat_last_vs_floor", LAST, FLOOR, None),
    ("plain_vs_floor", PLAIN, PLAIN_BODY, 1.1),
    ("vs_run_with_cache", CHAT, EVERYTHING, None),
    ("vs_run_with_cache_sorted", CHAT, SORTED, None),
    ("vs_run_with_cache_names", CHAT, NAMES, None),
    ("vs_bridge_run_with_cache_names", CHAT, BRIDGE, None),
)
"""Each ratio as (key, ours, theirs, what it may be)."""
NULL_UNLESS_RUN = ("vs_fastest_peer",)
PEER_ASKED, GEMMA_ASKED, SAME = 0.75, 0.5, 0.999

Contenders = dict[str, Callable[[], Any]]


def main() -> None:
    options = arguments()
    model = ls.load_model(options.model, engine=options.engine, dtype=options.dtype)
    reference = model
    if engine_of(model) == "hooked":
        reference = ls.load_model(options.model, engine="bridge", dtype=options.dtype)
    prompts = benchmark_prompts(options.prompts)
    encoded = encode(model, prompts.texts)
    with ExitStack() as stack:
        runs = contenders(model, reference, prompts, encoded)
        peers = peers_of(stack, model, prompts, encoded, options) if options.peers else Peers()
        stack.enter_context(borrowed(model))
        stack.enter_context(borrowed(reference))
        runs[BODY]()
        seconds, _ = take_turns(runs | peers.runs, options.rounds)
    medians = medians_of(seconds)
    rows = [
        timed("extraction", key, medians, ours, theirs, asked=asked)
        for key, ours, theirs, asked in RATIOS
        if theirs in medians
    ]
    rows += peer_rows(medians, peers)
    under = conditions(model, len(prompts), options.rounds)
    keep(options.csv, rows, under)
    # Gemma's logits need the room.
    del model, reference, runs
    rows.append(gemma_row(options, seconds, under))
    if options.json:
        print(json.dumps({key: None for key in NULL_UNLESS_RUN} | {row.key: row.ratio for row in rows}))
        return
    show(rows, seconds, f"{under}, {sum(map(len, encoded))} chat tokens")


def arguments() -> argparse.Namespace:
    parser = options_of(__doc__)
    parser.add_argument("--gemma", default="gemma-3-270m", help="the model with the wide unembedding")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--prompts", type=int, default=N_PROMPTS, help="how many prompts")
    parser.add_argument("--peers", action="store_true", help="the PyPI packages too")
    add_envs(parser)
    return parser.parse_args()


def benchmark_prompts(n: int) -> PromptSet:
    """The first n of the built-in prompts, all sets in a row."""
    every = [p for name in ("content", "validation", "adversarial") for p in ls.load_prompts(name)]
    return PromptSet(tuple(every[:n]), "benchmark prompts")


def contenders(model: Any, reference: Any, prompts: PromptSet, encoded: list[Encoded]) -> Contenders:
    chat = list(batches(model, encoded, batch_tokens=BATCH_TOKENS))
    plain = list(batches(model, encode(model, prompts.texts, template="raw"), batch_tokens=BATCH_TOKENS))
    in_order = [
        pad(model, encoded, range(start, min(start + BY_HAND, len(encoded))))
        for start in range(0, len(encoded), BY_HAND)
    ]
    ours = partial(ls.residual_streams, model, prompts, progress=False)
    names = [resid_hook(layer) for layer in range(model.cfg.n_layers)]
    every: Contenders = {
        CHAT: ours,
        LAST: partial(ours, position="last"),
        FLOOR: lambda: on_each(chat, bare_body(reference)),
        BODY: lambda: on_each(chat, bare_body(model)),
        EVERYTHING: lambda: on_each(in_order, model.run_with_cache),
        SORTED: lambda: on_each(chat, model.run_with_cache),
        NAMES: lambda: on_each(chat, partial(model.run_with_cache, names_filter=names)),
        PLAIN: partial(ours, template="raw"),
        PLAIN_BODY: lambda: on_each(plain, bare_body(model)),
    }
    if reference is not model:
        every[BRIDGE] = lambda: on_each(chat, partial(reference.run_with_cache, names_filter=names))
    return every


def bare_body(model: Any) -> Callable[[torch.Tensor], object]:
    """The forward pass up to the final norm, without unembedding and without hooks."""
    if engine_of(model) == "hooked":
        return lambda tokens: model(tokens, stop_at_layer=model.cfg.n_layers, padding_side="right")
    return lambda tokens: model.original_model.base_model(tokens, use_cache=False)


def on_each(ready: list[Batch], run: Callable[[torch.Tensor], object]) -> None:
    for batch in ready:
        run(batch.tokens)


@dataclass(frozen=True)
class Peers:
    """The peers that run here, by name with versions; what is to be said of them; why others do not run."""

    runs: Contenders = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def peers_of(
    stack: ExitStack, model: Any, prompts: PromptSet, encoded: list[Encoded], options: argparse.Namespace
) -> Peers:
    job = job_of(model, encoded, options.model)
    runs, found, absent = start_peers(stack, "hidden_states.py", PEERS, job, options.envs)
    own = ls.residual_streams(model, prompts[job["rows"]], position="last", progress=False)
    notes = {}
    for shown, vectors in found.items():
        middle, last = (
            float(torch.cosine_similarity(torch.tensor(theirs), own.layer(layer), dim=1).min())
            for layer, theirs in zip(job["layers"], vectors, strict=True)
        )
        notes[shown] = f"cosine with ours at layer {job['layers'][0]}: {middle:.4f}"
        if last < SAME:
            notes[shown] += f"; at the last layer {last:.4f}: read after the final norm"
        if middle < SAME:
            del runs[shown]
            absent[shown] = f"reads something else, {notes[shown]}"
    return Peers(runs, notes, absent)


def job_of(model: Any, encoded: list[Encoded], name: str | None) -> dict[str, Any]:
    from lens_safety.models import _source

    n_layers = model.cfg.n_layers
    ids = [one.ids.tolist() for one in encoded]
    return {
        "folder": _source(name)[0],
        "texts": model.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False),
        "ids": ids,
        "batch_size": BY_HAND,
        # What is compared: a middle and the last layer of four prompts from the first to the last.
        "layers": [n_layers // 2, n_layers - 1],
        "rows": sorted({len(ids) * i // 4 for i in range(4)} | {len(ids) - 1}),
        "threads": torch.get_num_threads(),
        "dtype": fingerprint(model).dtype,
        "device": device_of(model).type,
    }


def peer_rows(medians: Mapping[str, float], peers: Peers) -> list[Row]:
    """Each peer, the reasons of those that did not run, and the fastest."""
    rows = [
        timed("extraction", f"vs_{shown.split()[0]}", medians, LAST, shown, note=peers.notes[shown])
        for shown in peers.runs
    ]
    for asked_for, why in peers.absent.items():
        key = f"vs_{re.split('[ =]', asked_for)[0]}"
        rows.append(Row("extraction", key, LAST, asked_for, note=f"none: {why}"))
    if peers.runs:
        fastest = min(peers.runs, key=lambda shown: medians[shown])
        rows.append(timed("extraction", "vs_fastest_peer", medians, LAST, fastest, asked=PEER_ASKED))
    return rows


def gemma_row(options: argparse.Namespace, seconds: dict[str, list[float]], under: Conditions) -> Row:
    """The wide unembedding's row, kept; its seconds are added to the others."""
    key = "gemma_vs_full_forward"
    try:
        model = ls.load_model(options.gemma, engine=options.engine, dtype=options.dtype)
    except ModelError as error:
        print(f"{key}: {error}", file=sys.stderr)
        row = Row("extraction", key, GEMMA, GEMMA_FULL, note=f"none: {error}")
        keep(options.csv, [row], replace(under, model=options.gemma))
        return row
    prompts = benchmark_prompts(min(options.prompts, N_GEMMA))
    ready = list(batches(model, encode(model, prompts.texts), batch_tokens=BATCH_TOKENS))
    runs: Contenders = {
        GEMMA: lambda: ls.residual_streams(model, prompts, progress=False),
        GEMMA_FULL: lambda: on_each(ready, partial(full_logits, model)),
    }
    on_each(ready[:1], partial(full_logits, model))
    own, _ = take_turns(runs, options.rounds)
    seconds |= own
    # The base model has no chat template: nothing that the prompts begin with is shared.
    row = timed("extraction", key, medians_of(own), GEMMA, GEMMA_FULL, asked=GEMMA_ASKED, note="plain text")
    keep(options.csv, [row], conditions(model, len(prompts), options.rounds))
    return row


def show(rows: list[Row], seconds: dict[str, list[float]], under: str) -> None:
    print(under)
    for name, median in medians_of(seconds).items():
        rounds = ", ".join(f"{one:.2f}" for one in seconds[name])
        print(f"  {name:<48}{median:8.2f} s   (rounds: {rounds})")
    for row in rows:
        value = f"{'none':>8}" if row.ratio is None else f"{row.ratio:8.2f}"
        asked = "" if row.asked is None else f"asked for: at most {row.asked:g}"
        print(f"  {row.key:<48}{value}     {'; '.join(filter(None, [row.theirs, asked, row.note]))}")


if __name__ == "__main__":
    main()
