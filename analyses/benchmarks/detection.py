"""Question: what does a detector's score of one prompt cost beside the forward pass that answers it?

Method: a two-vector detector that reads the layer at a third of the depth scores chat prompts one at a time
(`Detector.score`: encoding, checks, hooks), against a full forward pass with logits through the same
TransformerLens model over the same tokens, encoded before. They take turns at each prompt; medians over all
prompts and rounds.
Control: the blocks that a score enters are counted: `blocks_run` is to be `blocks_needed`.
Reading: `detect_third_vs_full_forward` would be 0.37 for 11 of 30 blocks if blocks were all that costs time;
the unembedding, and the template's tokens behind the content, which are not read, make it less.

    python analyses/benchmarks/detection.py --engine hooked [--json] [--csv FILE]
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import conditions, keep, options_of, take_turns, timed

import lens_safety as ls
from lens_safety.models import borrowed
from lens_safety.tokens import encode, pad

N_TRAIN, N_PROMPTS = 64, 64
KEY, OURS, THEIRS, ASKED = "detect_third_vs_full_forward", "Detector.score", "full forward with logits", 0.45


def main() -> None:
    options = arguments()
    model = ls.load_model(options.model, engine=options.engine, dtype=options.dtype)
    layer = model.cfg.n_layers // 3
    detector = detector_at(model, layer)
    texts = list(ls.load_prompts("validation")[: options.prompts].texts)
    seconds: dict[str, list[float]] = {OURS: [], THEIRS: []}
    with borrowed(model):
        for text in [texts[0], *texts]:
            runs = {OURS: partial(detector.score, [text], model=model), THEIRS: full_forward(model, text)}
            one, _ = take_turns(runs, options.rounds)
            for name, values in one.items():
                seconds[name] += values
    # The first prompt ran once more, to warm up.
    medians = {name: statistics.median(values[options.rounds :]) for name, values in seconds.items()}
    run = blocks_run(model, lambda: detector.score([texts[0]], model=model))
    note = f"one prompt at a time, layer {layer}; {run} blocks run, {layer + 1} needed"
    row = timed("detection", KEY, medians, OURS, THEIRS, asked=ASKED, note=note)
    keep(options.csv, [row], conditions(model, len(texts), options.rounds))
    if options.json:
        print(json.dumps({KEY: row.ratio, "blocks_run": run, "blocks_needed": layer + 1}))
        return
    for name, median in medians.items():
        print(f"  {name:<32}{1000 * median:8.1f} ms")
    print(f"  {KEY:<32}{row.ratio:8.2f}      (asked for: at most {ASKED}; {note})")


def arguments() -> argparse.Namespace:
    parser = options_of(__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--prompts", type=int, default=N_PROMPTS, help="how many prompts")
    return parser.parse_args()


def detector_at(model: Any, layer: int) -> ls.Detector:
    train = ls.residual_streams(model, ls.load_prompts("content")[:N_TRAIN], layers=[layer], progress=False)
    return ls.Detector.fit(train)


def full_forward(model: Any, text: str) -> Callable[[], torch.Tensor]:
    tokens = pad(model, encode(model, [text]), [0]).tokens
    return lambda: model(tokens)


def blocks_run(model: Any, run: Callable[[], object]) -> int:
    """How many blocks `run` enters, each as often as it does."""
    entered = []
    # Not through TransformerLens: with a hook of the caller on the model, prompts are run whole.
    handles = [
        block.register_forward_pre_hook(lambda module, given: entered.append(module))
        for block in model.blocks
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return len(entered)


if __name__ == "__main__":
    main()
