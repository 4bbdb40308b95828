"""Progress while something long runs: on stderr in a terminal, one bar in a notebook, silent elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from html import escape
from time import monotonic
from typing import Any, TypeVar

Item = TypeVar("Item")
Advance = Callable[[int], None]

_EVERY = 0.1


def track(
    items: Sequence[Item],
    what: str,
    show: bool = True,
    *,
    size: Callable[[Item], int] = lambda _: 1,
) -> Iterator[Item]:
    """Yield `items`, with a bar that advances by `size(item)` after each and vanishes at the end."""
    with _bar(what, sum(size(item) for item in items), show) as advance:
        for item in items:
            yield item
            advance(size(item))


def _bar(what: str, total: int, show: bool) -> AbstractContextManager[Advance]:
    from rich.console import Console

    console = Console(stderr=True)
    if show and console.is_jupyter:
        return _notebook_bar(what, total)
    return _terminal_bar(console, what, total, show and console.is_terminal)


@contextmanager
def _terminal_bar(console: Any, what: str, total: int, show: bool) -> Iterator[Advance]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not show, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)


@contextmanager
def _notebook_bar(what: str, total: int) -> Iterator[Advance]:
    """rich's own bar leaves a dead widget in a saved notebook; an output that is emptied leaves nothing."""
    from IPython.display import display

    start, drawn, done = monotonic(), 0.0, 0

    def shown(html: str, text: str) -> dict[str, str]:
        return {"text/html": html, "text/plain": text}

    def now() -> dict[str, str]:
        text = f"{what}: {done}/{total}, {monotonic() - start:.0f} s"
        bar = f'<progress value="{done}" max="{max(total, 1)}" style="vertical-align: middle"></progress>'
        return shown(f"<div>{bar} {escape(text)}</div>", text)

    def advance(n: int) -> None:
        nonlocal done, drawn
        done += n
        if monotonic() - drawn >= _EVERY:
            drawn = monotonic()
            handle.update(now(), raw=True)

    handle: Any = display(now(), raw=True, display_id=True)
    try:
        yield advance
    finally:
        handle.update(shown("", ""), raw=True)
