"""The dashboard: pages in a browser, live from one model and results on disk (extra `dashboard`)."""

from .server import address, command, require_free_port

__all__ = ["address", "command", "require_free_port"]
