"""Question: do time and memory of extraction stay in proportion when there are many prompts?

Method: the residual streams of 100, 500, 1,000 and 10,000 short chat prompts, all different, each number in a
process of its own: seconds a prompt, and the peak of its resident memory during `residual_streams`, less the
result (every layer of every prompt, which is what was asked for). The prompts are those of the public data
sets in the folder that LENS_SAFETY_DATA names, in a shuffled order; without it, built-in ones in variations.
Control: what the process held before it began (model, libraries) stands beside the peak.
Reading: `memory_growth` is the peak at the most prompts over that at 500, `time_growth` the seconds a prompt
at the most over those at the fewest: flat is 1.

    python analyses/benchmarks/scaling.py --engine hooked [--sizes 100 500 1000 10000] [--json] [--csv FILE]
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import Conditions, Row, conditions, keep, options_of, rounded

import lens_safety as ls
from lens_safety.prompts import BUILT_IN, DATA_VARIABLE

SIZES = (100, 500, 1000, 10000)
MEMORY_FROM = 500
SHORTEST, LONGEST = 20, 120
"""Characters of a short prompt. The longest must be as long among few as among many."""
MEMORY_ASKED = 1.1
ROUNDS, IN_ALL = 3, 1000
"""Rounds of which the median is taken; one where they would run more prompts than this in all."""
MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """One number of prompts: seconds a prompt, and MiB before, at the peak, and of the result."""

    n: int
    seconds: float
    before: float
    peak: float
    result: float
    rounds: int
    conditions: dict[str, Any]

    @property
    def beyond_result(self) -> float:
        return self.peak - self.result


def main() -> None:
    options = arguments()
    if options.one:
        print(json.dumps(measured(options).__dict__))
        return
    found: list[Measured] = []
    for n in sorted(set(options.sizes)):
        found.append(in_fresh_process(n))
        one = found[-1]
        under = Conditions(**one.conditions)
        keep(options.csv, [row_of(one)], under)
        print(
            f"{one.n} prompts: {1000 * one.seconds:.1f} ms a prompt; {one.beyond_result:.0f} MiB at the peak "
            f"beside the result's {one.result:.0f}, {one.before:.0f} before",
            file=sys.stderr if options.json else sys.stdout,
        )
    rows = growth(found)
    keep(options.csv, rows, Conditions(**found[-1].conditions))
    if options.json:
        print(json.dumps({row.key: row.ratio for row in rows}))
        return
    for row in rows:
        asked = "" if row.asked is None else f", asked for: at most {row.asked:g}"
        print(f"{row.key}: {row.ratio} ({row.ours} over {row.theirs}{asked})")


def arguments() -> argparse.Namespace:
    parser = options_of(__doc__, rounds=None)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of prompts")
    parser.add_argument("--one", type=int, metavar="N", help="measure N prompts in this process")
    return parser.parse_args()


def in_fresh_process(n: int) -> Measured:
    """`measured` by this script itself, with the options it was given."""
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--one", str(n)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout))


def measured(options: argparse.Namespace) -> Measured:
    n = options.one
    texts = short_prompts(n)
    rounds = max(1, min(ROUNDS, IN_ALL // n))
    model = ls.load_model(options.model, engine=options.engine)
    ls.residual_streams(model, texts[:32], progress=False)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins here, not in loading the model.
    seconds, size = [], 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        cache = ls.residual_streams(model, texts, progress=False)
        seconds.append((time.perf_counter() - start) / n)
        size = (cache.resid.nbytes + cache.embed.nbytes) / MIB
        peak = resident("VmHWM")
        del cache
    under = conditions(model, n, rounds).__dict__
    return Measured(n, statistics.median(seconds), before, peak, size, rounds, under)


def resident(what: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at the peak. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) / 1024


def short_prompts(n: int) -> list[str]:
    """n different short prompts; fewer are the beginning of more."""
    folder = os.environ.get(DATA_VARIABLE)
    names = sorted(path.stem for path in Path(folder).glob("*.jsonl")) if folder else []
    every = [text.strip() for name in [*BUILT_IN, *names] for text in ls.load_prompts(name).texts]
    short = sorted({text for text in every if SHORTEST <= len(text) <= LONGEST and text.isascii()})
    random.Random(0).shuffle(short)
    varied = [f"{text} (Version {number}.)" for number in range(2, 2 + n // len(short)) for text in short]
    return [*short, *varied][:n]


def row_of(one: Measured) -> Row:
    return Row(
        "scaling",
        f"at_{one.n}",
        f"residual_streams, a prompt of {one.n}",
        seconds_ours=rounded(one.seconds),
        mib_ours=round(one.beyond_result, 1),
        note=f"peak without the result's {one.result:.0f} MiB; {one.before:.0f} MiB before",
    )


def growth(found: list[Measured]) -> list[Row]:
    """The most prompts beside the fewest (time) and beside 500, or the next that was measured (memory)."""
    fewest, most = found[0], found[-1]
    some = next((one for one in found if one.n >= MEMORY_FROM), fewest)
    return [
        Row(
            "scaling",
            "time_growth",
            f"a prompt of {most.n}",
            f"a prompt of {fewest.n}",
            seconds_ours=rounded(most.seconds),
            seconds_theirs=rounded(fewest.seconds),
            ratio=round(most.seconds / fewest.seconds, 3),
        ),
        Row(
            "scaling",
            "memory_growth",
            f"peak at {most.n}",
            f"peak at {some.n}",
            mib_ours=round(most.beyond_result, 1),
            mib_theirs=round(some.beyond_result, 1),
            ratio=round(most.beyond_result / some.beyond_result, 3),
            asked=MEMORY_ASKED,
            note="without the result itself",
        ),
    ]


if __name__ == "__main__":
    main()
