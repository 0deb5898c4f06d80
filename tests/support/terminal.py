"""A program on a terminal of its own, and what somebody in front of it sees."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyte

_PATIENCE_S = 60
ROWS, COLUMNS = 24, 100


class Terminal:
    """A program whose standard streams are a terminal; `raw` is all that it wrote."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self.raw = b""
        self._master = master
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)

    @property
    def lines(self) -> list[str]:
        """What the screen shows, without blanks at the ends of lines."""
        return [line.rstrip() for line in self._screen.display]

    @property
    def text(self) -> str:
        """What the screen shows."""
        return "\n".join(self.lines)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        """Change the window's size, as its user does with the mouse."""
        self._screen.resize(rows, columns)
        _set_size(self._master, rows, columns)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Read until what is seen is as expected; fails with what is seen when it never is."""
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            assert self._read(deadline), f"ended with:\n{self.text}\n{self.raw!r}"

    def wait_for_text(self, text: str) -> None:
        """Read until a text is on the screen."""
        self.wait_for(lambda: text in self.text)

    def wait_for_end(self) -> int:
        """Read until the program has ended; return its status."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._read(deadline):
            pass
        return self.process.wait(_PATIENCE_S)

    def _read(self, deadline: float) -> bool:
        left_s = deadline - time.monotonic()
        assert left_s > 0, f"not seen in time; this is:\n{self.text}"
        if not select.select([self._master], [], [], left_s)[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: nobody has the other end any more
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)


@contextmanager
def on_terminal(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Terminal]:
    """Run a program on a terminal until the end of the block."""
    master, slave = pty.openpty()
    _set_size(master, ROWS, COLUMNS)
    with subprocess.Popen(
        ["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave,
        env={"TERM": "xterm", "LANG": "C.UTF-8", **environment, "COLUMNS": "", "LINES": ""},
    ) as process:  # fmt: skip
        os.close(slave)
        try:
            yield Terminal(process, master)
        finally:
            process.kill()
            os.close(master)


def _set_size(descriptor: int, rows: int, columns: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
