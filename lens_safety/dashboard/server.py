"""How the dashboard is started: the command of its server, and what has to be there first."""

import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from ..types import OptionError

SCRIPT = Path(__file__).parent / "app.py"

_SETTINGS = {
    "server.headless": "true",
    "server.fileWatcherType": "none",
    "server.showEmailPrompt": "false",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "client.showErrorDetails": "none",
    "theme.light.primaryColor": "#0072B2",
    "theme.dark.primaryColor": "#56B4E9",
}


def command(*, model: str | None, engine: str, runs: Path, host: str, port: int) -> list[str]:
    """The command that serves the dashboard at `host:port`. It reports to nobody and opens no browser.

    Raises:
        OptionError: Streamlit is not installed, or the port is out of range or taken.
    """
    if find_spec("streamlit") is None:
        raise OptionError(
            "the dashboard needs Streamlit, which is not installed: pip install 'lens-safety[dashboard]'"
        )
    require_free_port(host, port)
    settings = _SETTINGS | {"server.address": host, "server.port": str(port)}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    own = ["--engine", engine, "--runs", str(runs), *([] if model is None else ["--model", model])]
    return [sys.executable, "-m", "streamlit", "run", str(SCRIPT), *flags, "--", *own]


def require_free_port(host: str, port: int) -> None:
    """Raise `OptionError` unless a server can listen there."""
    if not 1 <= port <= 65535:
        raise OptionError(f"--port {port} given, expected 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        # As the server does: a port that was left a moment ago is free.
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise OptionError(
                f"--host {host} --port {port} given, and no server can listen there ({error.strerror}): "
                "give another --port, or stop the program that has it"
            ) from error


def address(host: str, port: int) -> str:
    """Where the pages are."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
