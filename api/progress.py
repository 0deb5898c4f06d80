"""Progress of long work on standard error: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from stratocache.api import terminal
from stratocache.api.client import Report
from stratocache.api.sizes import format_size

_LINE_INTERVAL_S = 5.0


@contextmanager
def shown(title: str, *, quiet: bool = False) -> Iterator[Report]:
    """Show progress while the block runs; what is yielded is told of bytes done and in all."""
    if quiet:
        yield lambda _done_bytes, _total_bytes: None
    elif terminal.is_terminal(errors=True):
        with _bar(title) as report:
            yield report
    else:
        yield _Lines(title)


@contextmanager
def _bar(title: str) -> Iterator[Report]:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(
        *columns, console=terminal.console(errors=True), transient=True
    ) as display:
        task = display.add_task(title, total=None)

        def report(done_bytes: int, total_bytes: int | None) -> None:
            display.update(task, completed=done_bytes, total=total_bytes)

        yield report


class _Lines:
    """Writes a line when something was done, at most every `_LINE_INTERVAL_S`."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._next_s = time.monotonic() + _LINE_INTERVAL_S
        self._last: tuple[int, int | None] = (0, None)

    def __call__(self, done_bytes: int, total_bytes: int | None) -> None:
        complete = done_bytes > 0 and done_bytes == total_bytes
        if (done_bytes, total_bytes) == self._last:
            return
        if time.monotonic() < self._next_s and not complete:
            return
        self._last = (done_bytes, total_bytes)
        self._next_s = time.monotonic() + _LINE_INTERVAL_S
        print(f"{self._title}: {progress_text(done_bytes, total_bytes)}", file=sys.stderr)


def progress_text(done_bytes: int, total_bytes: int | None) -> str:
    """Return `12 MiB of 100 MiB (12 %)`, or `12 MiB` when the total is not known."""
    if not total_bytes:
        return format_size(done_bytes)
    percent = 100 * done_bytes // total_bytes
    return f"{format_size(done_bytes)} of {format_size(total_bytes)} ({percent} %)"
