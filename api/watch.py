"""`--watch`: a command's answer again and again, until Ctrl-C.

On a terminal the screen is drawn anew; elsewhere what has changed is written, a line each, or with
`--json` one document a change. A daemon that goes away is waited for.
"""

import functools
import io
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import datetime
from typing import Any, Never, Protocol, TextIO

import click

from stratocache.api import terminal
from stratocache.api.session import Command, Session, plain
from stratocache.cache.errors import StratocacheError, Unreachable

_INTERVAL_S = 2.0
_INTERVAL_S_MIN, _INTERVAL_S_MAX = 0.1, 3600

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"  # another screen, no cursor, long lines are cut
_LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
_HEAD_LINES = 2
_WATCHED = __name__


def is_watched(context: click.Context) -> bool:
    """Tell whether a command was called with `--watch`."""
    return bool(context.meta.get(_WATCHED))


def watch_option(command: Command) -> Command:
    """Add `--watch` and `--interval` to a command that shows something."""

    @functools.wraps(command)
    def run(*arguments: Any, watch: bool, interval_s: float, **options: Any) -> Any:
        if not watch:
            return command(*arguments, **options)
        context = click.get_current_context()
        context.meta[_WATCHED] = True
        session = context.ensure_object(Session)
        return _follow(session, lambda: command(*arguments, **options), interval_s)

    options = (
        click.option("-w", "--watch", is_flag=True, help="Show it again and again, until Ctrl-C."),
        click.option(
            "--interval", "interval_s", type=click.FloatRange(_INTERVAL_S_MIN, _INTERVAL_S_MAX),
            default=_INTERVAL_S, show_default=True, metavar="SECONDS", help="With --watch.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        run = option(run)
    return run  # type: ignore[return-value]


class _Display(Protocol):
    """Where what a command says is shown."""

    def draw(self, text: str) -> None: ...
    def complain(self, error: StratocacheError) -> None: ...
    def close(self) -> None: ...


def _follow(session: Session, show: Callable[[], Any], interval_s: float) -> None:
    """Show until Ctrl-C; raises what the command raises, but waits for a daemon that was there."""
    text = _said(show)
    display: _Display = _Changes(session)
    if terminal.is_terminal() and not session.as_json:
        display = _Screen(interval_s)
    with _signals(), suppress(KeyboardInterrupt):
        try:
            display.draw(text)
            while True:
                signal.sigtimedwait({signal.SIGWINCH}, interval_s)  # a new size is seen at once
                try:
                    text = _said(show)
                except Unreachable as error:
                    display.complain(error)
                else:
                    display.draw(text)
        finally:
            display.close()


@contextmanager
def _signals() -> Iterator[None]:
    """Keep changes of the window's size for `sigtimedwait`, and end in order on SIGTERM."""

    def end(number: int, _frame: object) -> Never:
        raise SystemExit(128 + number)

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
    handler = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Page(io.StringIO):
    """What a command writes, which it believes to write to standard output."""

    def __init__(self, beneath: TextIO) -> None:
        super().__init__()
        self._beneath = beneath

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of standard output."""
        return self._beneath.encoding

    def isatty(self) -> bool:
        """Tell what standard output is."""
        return self._beneath.isatty()


def _said(show: Callable[[], Any]) -> str:
    """Return what a command writes to standard output; its exit status is nobody's."""
    page = _Page(sys.stdout)
    with redirect_stdout(page), suppress(click.exceptions.Exit):
        show()
    return page.getvalue()


class _Screen:
    """A terminal: the top of what was said, and above it when."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._shown: list[str] = []
        _write(_ENTER)

    def draw(self, text: str) -> None:
        """Draw the lines that fit."""
        rows = max(1, shutil.get_terminal_size().lines - _HEAD_LINES)
        lines = text.splitlines()
        if len(lines) > rows:
            lines = [*lines[: rows - 1], f"… {len(lines) - rows + 1} more lines"]
        self._shown = lines
        self._paint(f"every {self._interval_s:g} s, Ctrl-C ends")

    def complain(self, error: StratocacheError) -> None:
        """Say above what was seen last that it is old."""
        self._paint(f"[{error.code}] {plain(error.message)}")

    def _paint(self, words: str) -> None:
        command = click.get_current_context().command_path
        head = f"{command}: {datetime.now():%H:%M:%S}, {words}"
        lines = (f"{line}{_REST_OF_LINE}" for line in (head, "", *self._shown))
        _write(_HOME + "\r\n".join(lines) + _REST_OF_SCREEN)

    def close(self) -> None:
        """Give the terminal back, with what was seen last."""
        _write(_LEAVE + "".join(f"{line}\n" for line in self._shown))


class _Changes:
    """A pipe or a file: what is new, line by line; with `--json` whole documents."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._last: dict[str, str] = {}
        self._complained = False

    def draw(self, text: str) -> None:
        """Write what has changed."""
        self._complained = False
        if self._session.as_json:
            text = json.dumps(json.loads(text))  # one document, one line
        lines = {_subject(line): line for line in text.splitlines() if line}
        if self._session.as_json:
            lines = {"": text}
        changed = [line for subject, line in lines.items() if self._last.get(subject) != line]
        gone = [f"gone: {subject}" for subject in self._last if subject not in lines]
        self._last = lines
        _write("".join(f"{line}\n" for line in (*changed, *gone)))

    def complain(self, error: StratocacheError) -> None:
        """Write the error, once."""
        if not self._complained:
            self._session.show_error(error)
        self._complained = True

    def close(self) -> None:
        """Leave everything as it is."""


def _subject(line: str) -> str:
    """Return what a line is about: the first cell of a row, or the name before a colon."""
    return line.partition("\t")[0] if "\t" in line else line.partition(": ")[0]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
