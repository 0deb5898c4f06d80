"""A second `blockd` that has done its imports and waits: what makes a restart short.

    python -m stratocache.fs.standby --go-fd N --ready-fd M MODULE ARGUMENT...

Python's start and imports are most of what a guest waits for when `blockd` dies, so they are done
ahead of need. The supervisor's side is `Standby`; the program is the other side: it imports MODULE,
says so, and becomes it (`MODULE.main()`) when told. Every `blockd` starts this way, the first too.
Standard library only.
"""

import argparse
import ctypes
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from stratocache.fs.processes import Child, Launch

_PR_SET_NAME = 15
_IMPORTED, _SERVING, _GO = b"I", b"R", b"G"
_REPORTS_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Pipes:
    """Our ends of the pipes to one process."""

    reports: int
    go: int


class Standby:
    """Starts `active` at once from `spare`, when there is one, and `spare` ahead of need.

    `module` has a `main()` that reads `sys.argv` and writes `R` to `--ready-fd` when it serves.
    """

    def __init__(self, active: Child, spare: Child, module: Sequence[str]) -> None:
        self.active = active
        self.spare = spare
        self._module = list(module)
        self._pipes: dict[Child, _Pipes] = {}

    def start_active(self, arguments: Sequence[str], descriptors: Sequence[int]) -> None:
        """Let the spare become the program, else start one; raises `OSError`."""
        if self.spare.running and not self.spare.wait(0):
            self.active.take_over(self.spare)
            self._pipes[self.active] = self._pipes.pop(self.spare)
        else:
            self._start(self.active, arguments, descriptors)
        with suppress(BrokenPipeError):  # dead already; the loop will see that
            os.write(self._pipes[self.active].go, _GO)

    def start_spare(self, arguments: Sequence[str], descriptors: Sequence[int]) -> None:
        """Start the process that waits; raises `OSError`."""
        self._start(self.spare, arguments, descriptors)

    def _start(self, child: Child, arguments: Sequence[str], descriptors: Sequence[int]) -> None:
        reports, ready = os.pipe2(os.O_CLOEXEC)
        waits, go = os.pipe2(os.O_CLOEXEC)
        ready_fd = ("--ready-fd", str(ready))
        command = [
            sys.executable, "-m", "stratocache.fs.standby", "--go-fd", str(waits), *ready_fd,
            *self._module, *arguments, *ready_fd,
        ]  # fmt: skip
        try:
            child.start(Launch(command, descriptors=(*descriptors, ready, waits)))
        except BaseException:
            os.close(reports)
            os.close(go)
            raise
        finally:
            os.close(ready)
            os.close(waits)
        os.set_blocking(reports, False)
        self._pipes[child] = _Pipes(reports, go)

    def is_ready(self, child: Child) -> bool:
        """Whether the active one said meanwhile that it serves, or the spare that it waits."""
        try:
            said = os.read(self._pipes[child].reports, _REPORTS_BYTES)
        except BlockingIOError:
            return False
        return (_SERVING if child is self.active else _IMPORTED) in said

    def forget(self, child: Child) -> None:
        """Close what connected us to a process that has ended."""
        pipes = self._pipes.pop(child, None)
        if pipes is not None:
            os.close(pipes.reports)
            os.close(pipes.go)


def main() -> None:
    """Import, wait, become the program."""
    parser = argparse.ArgumentParser(prog="standby")
    parser.add_argument("--go-fd", type=int, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    _set_name("standby")
    program = importlib.import_module(given.module)
    os.write(given.ready_fd, _IMPORTED)
    if os.read(given.go_fd, len(_GO)) != _GO:
        return  # nobody needs it any more
    os.close(given.go_fd)
    _set_name(given.module.rpartition(".")[2])
    sys.argv = [given.module, *given.arguments]
    program.main()


def _set_name(name: str) -> None:
    """Set the name that ps and top show (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15])


if __name__ == "__main__":
    main()
