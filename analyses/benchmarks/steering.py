"""Question: what does a steering strength more cost, and what does steering cost at all?

Method: one prompt under 8 multipliers, greedy, 40 new tokens: all in one batch (`steering` with a number a
row) against one run each. Once with a short prompt that is steered at every token, and once with one of
about 200 tokens, steered while it is continued, so that the batch runs it a single time. Then 8 prompts of
one length, steered (a multiplier a row) against unsteered, whole and their first token alone. With `--peers`
also the short sweep as repeng and steering-vectors run it: through Hugging Face, one multiplier after the
other, each in its own environment. All take turns, so that a slow minute hits each of them; medians of
several rounds.
Control: the eight runs must write the batch's tokens, or speed means nothing. The unsteered batch, for what
the hooks cost; and `HookedTransformer.generate` on a copy with its weights as TransformerLens lays them out.
Reading: `batched_*` is how many times faster the batch is than its rows one by one (8 would be free);
`steered_over_unsteered` near 1 means that steering costs nothing; `generate_vs_hooked` is our decoding
against the stock one's, and there is none on the bridge. `first_token_s_*` is the wait for the first token of
a batch of 8, encoding and (steered) hooks included, `per_token_s_*` what each token more takes.

    python analyses/benchmarks/steering.py --engine hooked --rounds 3 [--json] [--peers] [--csv FILE]
"""

import argparse
import copy
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from measuring import Conditions, Row, conditions, keep, medians_of, options_of, rounded, take_turns, timed
from peers import PEERS, add_envs, start_peers

import lens_safety as ls
from lens_safety.decoding import greedy_continuations
from lens_safety.models import device_of, engine_of, fingerprint
from lens_safety.tokens import encode

MULTIPLIERS = np.linspace(-2, 2, 8).tolist()
N_TRAIN = 64
LONG = 200
SHORT_PROMPT = "Tell me about the history of your favourite city."
STORY = """Continue this story, and tell it as slowly as it begins. The hotel stood at the end of the
harbour road, where the last lamps were, and for most of the year nobody came to it but the people who sold
rope and paint to the boats. Its rooms were narrow and clean. In each there was a bed, a chair, a basin with
blue flowers on it, and a window that looked either at the sea or at the yard, and the guests who knew the
house asked for the yard, because the wind did not reach it and because in the mornings the cook fed the
gulls there and talked to them. She had been in the house for thirty years. She had seen two owners die and
a third one leave, and she had kept the keys each time until somebody came to ask for them. On the first
evening of October a woman with a small brown suitcase walked down the road from the station, stopped under
the last lamp, and read the name over the door twice, as if she had expected another one. Then she went in,
put the suitcase down beside the stairs, and rang the bell that nobody had rung since the end of August."""

RATIOS = {
    "batched_short": ("runs_short", "batch_short", 3.5),
    "batched_long": ("runs_long", "batch_long", 4.5),
    "steered_over_unsteered": ("unsteered", "steered", 0.95),
    "generate_vs_hooked": ("stock_hooked", "unsteered", 2.0),
}
"""Which contender's seconds stand over which other's, and what is asked of the quotient."""

FIRST_TOKEN = {"steered": "steered_first", "unsteered": "unsteered_first"}
"""Which contender writes the first token alone of another's text."""

SAME_TOKENS = (("batch_short", "runs_short"), ("batch_long", "runs_long"), ("unsteered", "stock_hooked"))

Write = Callable[["Task", Sequence[str]], list[Any]]
Contenders = dict[str, Callable[[], list[Any]]]


@dataclass(frozen=True)
class Task:
    """What every contender is given; `eight` are prompts of one length, so that none has pads."""

    model: Any
    vectors: ls.ContentVectors
    layer: int
    new_tokens: int
    short: str
    long: str
    eight: list[str]

    def steering(self, multiplier: Any, positions: str) -> Any:
        return ls.steering(
            self.model, self.vectors, layers=[self.layer], multiplier=multiplier, positions=positions
        )

    def texts(self, prompts: Sequence[str]) -> list[str]:
        return ls.generate(self.model, prompts, max_new_tokens=self.new_tokens)

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The token ids of what `texts` returns as text."""
        encoded, starts = greedy_continuations(self.model, prompts, self.new_tokens)
        return [one.ids[start:].tolist() for one, start in zip(encoded, starts, strict=True)]


def main() -> None:
    options = arguments()
    model = ls.load_model(options.model, engine=options.engine)
    task = prepare(model, options.layer, options.tokens)
    stock = stock_copy(model) if engine_of(model) == "hooked" else None
    steers = {name: PEERS[name] for name in ("repeng", "steering-vectors")}
    with ExitStack() as stack:
        peers, theirs, absent = {}, {}, {}
        if options.peers:
            job = job_of(task, options.model)
            peers, theirs, absent = start_peers(stack, "sweep.py", steers, job, options.envs)
        ids = {name: run() for name, run in contenders(task, Task.ids, stock).items()} | theirs
        seconds, texts = take_turns(contenders(task, Task.texts, stock) | peers, options.rounds)
    medians = medians_of(seconds)
    results: dict[str, float | bool | None] = {
        name: round(medians[over] / medians[under], 3) if over in medians else None
        for name, (over, under, _) in RATIOS.items()
    }
    results |= waits(medians, ids)
    results["tokens_identical"] = same_tokens(ids) and same_tokens(texts)
    kept = rows(medians, results, peers, absent)
    under = conditions(model, len(MULTIPLIERS), options.rounds)
    keep(options.csv, kept, under)
    if options.json:
        print(json.dumps(results))
        return
    print(shown_conditions(task, under))
    show_seconds(seconds, medians, ids)
    show_ratios(results)
    if options.peers:
        show_peers(peers, absent, medians, ids)


def arguments() -> argparse.Namespace:
    parser = options_of(__doc__)
    parser.add_argument("--layer", type=int, default=20, help="the steered layer")
    parser.add_argument("--tokens", type=int, default=40, help="new tokens a row")
    parser.add_argument("--peers", action="store_true", help="the short sweep with the PyPI packages too")
    add_envs(parser)
    return parser.parse_args()


def prepare(model: Any, layer: int, new_tokens: int) -> Task:
    train = ls.residual_streams(model, ls.load_prompts("content")[:N_TRAIN], progress=False)
    return Task(
        model=model,
        vectors=ls.content_vectors(train),
        layer=layer,
        new_tokens=new_tokens,
        short=SHORT_PROMPT,
        long=cut(model, STORY.replace("\n", " ")),
        eight=of_one_length(model, len(MULTIPLIERS), new_tokens),
    )


def cut(model: Any, text: str) -> str:
    """The words from the beginning that make, with the template, at most `LONG` tokens."""
    words = text.split(" ")
    while len(encode(model, [" ".join(words)])[0]) > LONG:
        words.pop()
    return " ".join(words)


def of_one_length(model: Any, n: int, new_tokens: int) -> list[str]:
    """n built-in prompts with as many tokens as each other, whose continuations use all `new_tokens`."""
    texts = [*ls.load_prompts("neutral").texts, *ls.load_prompts("content").texts]
    lengths = [len(one) for one in encode(model, texts)]
    usual = Counter(lengths).most_common(1)[0][0]
    candidates = [text for text, length in zip(texts, lengths, strict=True) if length == usual][: 3 * n]
    continued, starts = greedy_continuations(model, candidates, new_tokens)
    full = [
        text
        for text, one, start in zip(candidates, continued, starts, strict=True)
        if len(one) - start == new_tokens
    ]
    if len(full) < n:
        sys.exit(
            f"{len(full)} prompts of {usual} tokens are continued to the end, expected {n}: lower --tokens"
        )
    return full[:n]


def stock_copy(model: Any) -> Any:
    """The same model with its weights as TransformerLens lays them out, which `lay_out` had changed."""
    stock = copy.deepcopy(model)
    for parameter in stock.parameters():
        parameter.data = parameter.data.contiguous()
    return stock


def contenders(task: Task, write: Write, stock: Any | None) -> Contenders:
    """Each of them returns its rows as `write` does: as texts or as token ids."""
    first = replace(task, new_tokens=1)
    every: Contenders = {
        "batch_short": lambda: in_one_batch(task, write, [task.short] * len(MULTIPLIERS), "all"),
        "runs_short": lambda: one_by_one(task, write, task.short, "all"),
        "batch_long": lambda: in_one_batch(task, write, [task.long] * len(MULTIPLIERS), "generated"),
        "runs_long": lambda: one_by_one(task, write, task.long, "generated"),
        "steered": lambda: in_one_batch(task, write, task.eight, "all"),
        "unsteered": lambda: write(task, task.eight),
        "steered_first": lambda: in_one_batch(first, write, task.eight, "all"),
        "unsteered_first": lambda: write(first, task.eight),
    }
    if stock is not None:
        every["stock_hooked"] = lambda: stock_generate(task, write, stock)
    return every


def in_one_batch(task: Task, write: Write, prompts: list[str], positions: str) -> list[Any]:
    with task.steering(MULTIPLIERS, positions):
        return write(task, prompts)


def one_by_one(task: Task, write: Write, prompt: str, positions: str) -> list[Any]:
    rows = []
    for multiplier in MULTIPLIERS:
        with task.steering(multiplier, positions):
            rows += write(task, [prompt])
    return rows


def stock_generate(task: Task, write: Write, stock: Any) -> list[Any]:
    tokens = torch.tensor(np.stack([one.ids for one in encode(task.model, task.eight)]))
    out = stock.generate(
        tokens,
        max_new_tokens=task.new_tokens,
        do_sample=False,
        stop_at_eos=False,
        use_past_kv_cache=True,
        prepend_bos=False,
        verbose=False,
    )[:, tokens.shape[1] :].tolist()
    if write is Task.ids:
        return out
    return [stock.tokenizer.decode(row, skip_special_tokens=True) for row in out]


def waits(medians: dict[str, float], ids: dict[str, list[Any]]) -> dict[str, float | None]:
    """Seconds to the first token of the batch, and for each one that follows in its longest row."""
    found: dict[str, float | None] = {}
    for whole, first in FIRST_TOKEN.items():
        more = max(map(len, ids[whole])) - 1
        found[f"first_token_s_{whole}"] = rounded(medians[first])
        each = (medians[whole] - medians[first]) / more if more else None
        found[f"per_token_s_{whole}"] = rounded(each)
    return found


def rows(
    medians: dict[str, float],
    results: dict[str, float | bool | None],
    peers: Contenders,
    absent: dict[str, str],
) -> list[Row]:
    """The rows to keep, in which ours is over theirs: the inverse of the factors that are printed."""
    made = [
        timed("steering", name, medians, under, over, asked=round(1 / target, 3))
        for name, (over, under, target) in RATIOS.items()
        if over in medians
    ]
    for what in ("first_token_s", "per_token_s"):
        ours, theirs = (results[f"{what}_{kind}"] for kind in FIRST_TOKEN)
        if ours is not None and theirs:
            seconds = {"steered": ours, "unsteered": theirs}
            note = f"a batch of {len(MULTIPLIERS)} prompts"
            made.append(timed("steering", what, seconds, "steered", "unsteered", note=note))
    made += [timed("steering", f"vs_{name.split()[0]}", medians, "batch_short", name) for name in peers]
    for wanted, why in absent.items():
        key = f"vs_{wanted.split('==')[0]}"
        made.append(Row("steering", key, "batch_short", wanted, note=f"none: {why}"))
    return made


def same_tokens(rows: dict[str, list[Any]]) -> bool:
    return all(rows[one] == rows[other] for one, other in SAME_TOKENS if {one, other} <= set(rows))


def shown_conditions(task: Task, under: Conditions) -> str:
    short, long, *eight = (len(one) for one in encode(task.model, [task.short, task.long, *task.eight]))
    return (
        f"{under.engine} engine, {under.versions}, {under.threads} threads, "
        f"median of {under.rounds} rounds\n{task.vectors.model.name}, layer {task.layer}, "
        f"{len(MULTIPLIERS)} multipliers from {MULTIPLIERS[0]:g} to {MULTIPLIERS[-1]:g}, {task.new_tokens} "
        f"new tokens, greedy; prompts of {short} (short), {long} (long) and {len(eight)} x {eight[0]} tokens"
    )


def show_seconds(
    seconds: dict[str, list[float]], medians: dict[str, float], ids: dict[str, list[list[int]]]
) -> None:
    for name, median in medians.items():
        rounds = ", ".join(f"{one:.2f}" for one in seconds[name])
        shortest = min(map(len, ids[name]))
        print(f"  {name:<48}{median:8.2f} s   (rounds: {rounds}; shortest row: {shortest} tokens)")


def show_ratios(results: dict[str, float | bool | None]) -> None:
    for name, (_, _, target) in RATIOS.items():
        value = results[name]
        shown = f"{'none':>8}" if value is None else f"{value:8.2f}"
        print(f"  {name:<48}{shown}     (asked for: at least {target:g})")
    for what in ("first_token_s", "per_token_s"):
        for kind in FIRST_TOKEN:
            value = results[f"{what}_{kind}"]
            print(f"  {f'{what}_{kind}':<48}{'none' if value is None else f'{value:.4f}':>8} s")
    print(f"  {'tokens_identical':<48}{'yes' if results['tokens_identical'] else 'NO':>8}")


def show_peers(
    peers: Contenders, absent: dict[str, str], medians: dict[str, float], ids: dict[str, list[Any]]
) -> None:
    print("The short sweep, and how many times as long as our batch it takes:")
    for name in ("batch_short", "runs_short", *peers):
        same = sum(one == ours for one, ours in zip(ids[name], ids["batch_short"], strict=True))
        ratio = medians[name] / medians["batch_short"]
        print(f"  {name:<48}{medians[name]:8.2f} s{ratio:8.2f}   ({same} of {len(ids[name])} rows as ours)")
    for name, why in absent.items():
        print(f"  {name:<48}    none: {why}")


def job_of(task: Task, model: str | None) -> dict[str, Any]:
    from lens_safety.models import _source

    return {
        "folder": _source(model)[0],
        "ids": encode(task.model, [task.short])[0].ids.tolist(),
        "vector": task.vectors.layer(task.layer).tolist(),
        "layer": task.layer,
        "dtype": fingerprint(task.model).dtype,
        "device": device_of(task.model).type,
        "multipliers": MULTIPLIERS,
        "new_tokens": task.new_tokens,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
