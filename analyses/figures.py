"""Draws the figures of README.md again, from the result files beside them, without a model.

An analysis keeps what a figure shows as `results/NN_name.MODEL.json`; a change of a plot is in the README
after this. Where such a file is missing its figure stays as it is, and the command that makes it is named.

    python analyses/figures.py [--results results] [--readme README.md]
"""

import argparse
import re
from pathlib import Path

from lens_safety.plots import save_image
from lens_safety.session import drawn_again, run
from lens_safety.types import FileError, OptionError

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in Path(__file__).parent.glob("[01]*.py"))
BUILT_IN = "smollm2-135m-instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    given = parser.parse_args()
    missing = []
    for name in shown(given.readme):
        kept = given.results / f"{name}.json"
        if kept.is_file():
            print(save_image(drawn_again(kept), given.results / f"{name}.png", width=900))
        else:
            missing.append(f"{kept.name} (made by `{command(name)}`)")
    if missing:
        raise FileError(f"figures without their result file stay as they are: {', '.join(missing)}")


def shown(readme: Path) -> list[str]:
    """The names of the pictures in results/ that a text shows, without their ending."""
    names = re.findall(r"!\[[^]]*\]\(results/([^)]+)\.png\)", readme.read_text(encoding="utf-8"))
    if not names:
        raise OptionError(f"{readme} shows no picture of results/: expected the README")
    return list(dict.fromkeys(names))


def command(name: str) -> str:
    """What makes a result file: `NN_analysis_part.MODEL`."""
    made, _, model = name.partition(".")
    script = max((stem for stem in SCRIPTS if made.startswith(stem)), key=len, default=made)
    return f"python analyses/{script}.py{'' if model == BUILT_IN else f' --model {model}'}"


if __name__ == "__main__":
    run(main)
