"""What the demonstration says: chapters, and one line per step with its time."""

import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager

_WIDTH = 96
_BOLD, _GREEN, _RED, _PLAIN = "\x1b[1m", "\x1b[32m", "\x1b[31m", "\x1b[0m"


class StepFailed(Exception):
    """A step of the demonstration did not give what it should."""


class Narrator:
    """Tells on standard output; remembers how long each named step took."""

    def __init__(self) -> None:
        self._colours = sys.stdout.isatty()
        self._chapters = 0
        self._current = "the beginning"
        self.durations_s: dict[str, float] = {}

    @property
    def current_step(self) -> str:
        """The step that runs or ran last, for the message when it fails."""
        return self._current

    def chapter(self, title: str, *sentences: str) -> None:
        """Begin a chapter: its title and why it is worth seeing."""
        self._chapters += 1
        self._print(f"\n{self._paint(_BOLD, f'{self._chapters}. {title}')}")
        for sentence in sentences:
            self._print(textwrap.indent(textwrap.fill(sentence, _WIDTH - 3), "   "))

    def note(self, sentence: str) -> None:
        """Say something that is worth knowing and is no step."""
        self._print(f"               {sentence}")

    @contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        """Time the block and print one line for it; texts put into the list are added to it."""
        self._current = what
        details: list[str] = []
        start = time.monotonic()
        try:
            yield details
        except BaseException:
            self._print(f"   {self._paint(_RED, 'failed')}      {what}")
            raise
        self.durations_s[what] = time.monotonic() - start
        line = ": ".join([what, ", ".join(details)] if details else [what])
        self._print(f"   {self._paint(_GREEN, 'ok')} {self.durations_s[what]:7.1f} s  {line}")

    def _paint(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_PLAIN}" if self._colours else text

    @staticmethod
    def _print(text: str) -> None:
        print(text, flush=True)


def require(condition: bool, otherwise: str) -> None:
    """Raise `StepFailed` with `otherwise` unless `condition` holds."""
    if not condition:
        raise StepFailed(otherwise)
