"""Question: is the default batch a good one on this machine, and does bfloat16 pay?

Method: the residual streams of 128 chat prompts, at every layer, in batches of 512 to 16,384 padded tokens,
and in bfloat16 in the default batch. They take turns; medians of several rounds.
Control: the default (`BATCH_TOKENS`, float32), whose ratio to itself is 1.
Reading: a ratio well below 1 asks for `batch_tokens=...` (or `load_model(dtype="bfloat16")`, whose drift
`lens-safety doctor --dtype bfloat16` shows) in your calls.

    python analyses/benchmarks/shapes.py --engine hooked [--json] [--csv FILE]
"""

import argparse
import json
from functools import partial

from extraction import benchmark_prompts
from measuring import conditions, keep, medians_of, options_of, take_turns, timed

import lens_safety as ls
from lens_safety.passes import BATCH_TOKENS

SIZES = (512, 1024, 2048, 4096, 8192, 16384)
DEFAULT, HALF = f"{BATCH_TOKENS} tokens a batch", "bfloat16"


def main() -> None:
    options = arguments()
    model = ls.load_model(options.model, engine=options.engine)
    half = ls.load_model(options.model, engine=options.engine, dtype="bfloat16")
    prompts = benchmark_prompts(options.prompts)
    runs = {
        f"{size} tokens a batch": partial(
            ls.residual_streams, model, prompts, batch_tokens=size, progress=False
        )
        for size in SIZES
    }
    runs[HALF] = partial(ls.residual_streams, half, prompts, progress=False)
    runs[DEFAULT]()
    seconds, _ = take_turns(runs, options.rounds)
    medians = medians_of(seconds)
    rows = [timed("shapes", name, medians, name, DEFAULT) for name in runs if name != DEFAULT]
    keep(options.csv, rows, conditions(model, len(prompts), options.rounds))
    if options.json:
        print(json.dumps({row.key: row.ratio for row in rows}))
        return
    for row in rows:
        print(f"  {row.key:<24}{row.seconds_ours:8.2f} s{row.ratio:8.2f} of the default's")


def arguments() -> argparse.Namespace:
    parser = options_of(__doc__)
    parser.add_argument("--prompts", type=int, default=128, help="how many prompts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
