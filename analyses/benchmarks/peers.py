"""Packages from PyPI that do what a benchmark measures, each in its own environment and its own process."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "peer_scripts"
PEERS = {
    "repeng": "repeng==0.4.0",
    "steering-vectors": "steering-vectors==0.12.2",
    "nnsight": "nnsight==0.8.1",
    "saklas": "saklas==5.3.0",
}
"""Each package as pip is asked for it."""


class PeerError(Exception):
    """A peer that does not install or run; the message is the last line that it wrote."""


def add_envs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--envs",
        type=Path,
        default=ROOT / "runs" / "benchmark_envs",
        help="folder of the peers' environments",
    )


def start_peers(
    stack: ExitStack, script: str, requirements: Mapping[str, str], job: Mapping[str, Any], envs: Path
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any], dict[str, str]]:
    """The peers that run here, named with their versions, and their first answers; and why the others do not.

    Each runs `peer_scripts/{script}` on `job`, and answers each call in its own process, which stays until
    `stack` ends.
    """
    ready: dict[str, Callable[[], Any]] = {}
    first: dict[str, Any] = {}
    absent: dict[str, str] = {}
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    for name, requirement in requirements.items():
        with ExitStack() as own:
            try:
                python = environment(envs / name, requirement)
                command = [str(python), str(SCRIPTS / script), name, str(path)]
                shown, run = own.enter_context(peer(command, folder / f"{name}.log"))
                first[shown] = run()
            except PeerError as error:
                absent[requirement] = str(error)
            else:
                ready[shown] = run
                stack.enter_context(own.pop_all())
    return ready, first, absent


def environment(folder: Path, requirement: str) -> Path:
    """The Python of a virtual environment with our torch and the peer, made where there is none."""
    python = folder / "bin" / "python"
    if not python.is_file():
        call([sys.executable, "-m", "venv", str(folder)])
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    ours = next(line for line in lines if line.startswith("torch=="))
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    call([*pip, ours])
    call([*pip, ours, requirement])
    return python


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PeerError(last_line(done.stderr or done.stdout))


@contextmanager
def peer(command: list[str], log: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Its name with versions, and its work, which runs in its own process each time it is called."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
    # Its own environment is all that it is to import from.
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=outside | quiet,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        ask, answers = process.stdin, process.stdout

        def answer() -> Any:
            line = answers.readline()
            if not line:
                raise PeerError(last_line(log.read_text(encoding="utf-8")))
            return json.loads(line)

        def run() -> Any:
            print("run", file=ask, flush=True)
            return answer()

        yield answer(), run


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
