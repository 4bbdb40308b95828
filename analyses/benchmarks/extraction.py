"""Question: what does reading every layer cost beside the forward pass that has to run anyway?

Method: the residual streams of 256 chat prompts and of the same prompts as plain text (`residual_streams`:
encoding, batching, hooks, all layers), against a bare forward pass (no unembedding, no hooks) over the same
prompts, whole, sorted by length and batched: through Hugging Face's body and through the same engine's;
against `run_with_cache` of everything as it is called by hand (the prompts in the order given, 32 at a
time); and against `run_with_cache` over our batches, which are sorted by length. They take turns, so that a
slow minute hits all of them; medians of several rounds.
Control: the bare bodies. No extraction that runs every token can be faster on the same batches.
Reading: `chat_vs_floor` below 1 is what the shared beginning of the chat template saves, against Hugging
Face's body; `plain_vs_floor` near 1 means that the hooks cost nothing, against the same engine's body;
`vs_run_with_cache` is what is saved in all, and `vs_run_with_cache_sorted` how much of that is not due to
sorting.

    python analyses/benchmarks/extraction.py --engine hooked --rounds 3 [--json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import lens_safety as ls
from lens_safety.models import borrowed, engine_of
from lens_safety.prompts import PromptSet
from lens_safety.residuals import BATCH_TOKENS
from lens_safety.tokens import Batch, batches, encode, pad

N_PROMPTS = 256
BY_HAND = 32
RATIOS = {
    "chat_vs_floor": ("residual_streams, chat", "Hugging Face body, chat"),
    "chat_vs_body": ("residual_streams, chat", "body, chat"),
    "plain_vs_floor": ("residual_streams, plain", "body, plain"),
    "vs_run_with_cache": ("residual_streams, chat", "run_with_cache"),
    "vs_run_with_cache_sorted": ("residual_streams, chat", "run_with_cache, sorted"),
}
"""Each ratio as (ours, theirs)."""


def main() -> None:
    options = arguments()
    model = ls.load_model(options.model, engine=options.engine)
    reference = model if engine_of(model) == "bridge" else ls.load_model(options.model, engine="bridge")
    prompts = benchmark_prompts(options.prompts)
    encoded = encode(model, prompts.texts)
    chat = list(batches(model, encoded, batch_tokens=BATCH_TOKENS))
    plain = list(batches(model, encode(model, prompts.texts, template="raw"), batch_tokens=BATCH_TOKENS))
    in_order = [
        pad(model, encoded, range(start, min(start + BY_HAND, len(encoded))))
        for start in range(0, len(encoded), BY_HAND)
    ]
    body, hugging_face = bare_body(model), bare_body(reference)
    contenders: dict[str, Callable[[], object]] = {
        "residual_streams, chat": lambda: ls.residual_streams(model, prompts, progress=False),
        "Hugging Face body, chat": lambda: on_each(chat, hugging_face),
        "body, chat": lambda: on_each(chat, body),
        "run_with_cache": lambda: on_each(in_order, model.run_with_cache),
        "run_with_cache, sorted": lambda: on_each(chat, model.run_with_cache),
        "residual_streams, plain": lambda: ls.residual_streams(
            model, prompts, template="raw", progress=False
        ),
        "body, plain": lambda: on_each(plain, body),
    }
    with borrowed(model), borrowed(reference):
        on_each(chat[:1], body)
        on_each(chat[:1], hugging_face)
        seconds = take_turns(contenders, options.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: round(medians[ours] / medians[theirs], 3) for name, (ours, theirs) in RATIOS.items()}
    if options.json:
        print(json.dumps(ratios))
        return
    n_tokens = int(sum(batch.lengths.sum() for batch in chat))
    print(
        f"{engine_of(model)} engine, {len(prompts)} prompts, {n_tokens} chat tokens, "
        f"{torch.get_num_threads()} threads, median of {options.rounds} rounds"
    )
    for name, value in medians.items():
        print(f"  {name:<26}{value:8.2f} s   (rounds: {', '.join(f'{s:.2f}' for s in seconds[name])})")
    for name, value in ratios.items():
        print(f"  {name:<26}{value:8.2f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("auto", "hooked", "bridge"), default="auto")
    parser.add_argument("--model", help="hub name, folder or .gguf file; the built-in model by default")
    parser.add_argument("--prompts", type=int, default=N_PROMPTS, help="how many prompts")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median is taken")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the ratios")
    return parser.parse_args()


def benchmark_prompts(n: int) -> PromptSet:
    """The first n of the built-in prompts, all sets in a row."""
    every = [p for name in ("content", "validation", "adversarial") for p in ls.load_prompts(name)]
    return PromptSet(tuple(every[:n]), "benchmark prompts")


def bare_body(model: Any) -> Callable[[torch.Tensor], object]:
    """The forward pass up to the final norm, without unembedding and without hooks."""
    if engine_of(model) == "hooked":
        return lambda tokens: model(tokens, stop_at_layer=model.cfg.n_layers, padding_side="right")
    return lambda tokens: model.original_model.base_model(tokens, use_cache=False)


def on_each(ready: list[Batch], run: Callable[[torch.Tensor], object]) -> None:
    for batch in ready:
        run(batch.tokens)


def take_turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
