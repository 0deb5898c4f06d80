"""A second `blockd` that has done its imports and waits: what makes a restart short.

    python -m stratocache.fs.standby --go-fd N --ready-fd M MODULE ARGUMENT...

Python's start and imports are most of what a guest waits for when `blockd` dies, so they are done
ahead of need. The supervisor's side is `Standby`; the program is the other side: it imports MODULE,
and what MODULE can do without at first (`MODULE.prepare()`) unless it is told to go already, says
so, and becomes it (`MODULE.main()`) when told. Every `blockd` starts this way, the first too.
Standard library only.
"""

import argparse
import ctypes
import importlib
import os
import select
import sys
from collections.abc import Sequence
from contextlib import suppress

from stratocache.fs.confinement import Confinement
from stratocache.fs.processes import Child, Launch

_PR_SET_NAME = 15
_IMPORTED, _SERVING, _GO = b"I", b"R", b"G"
_REPORTS_BYTES = 16
REPORTS_LINK, _GO_LINK = "reports", "go"


class Standby:
    """Starts `active` at once from `spare`, when there is one, and `spare` ahead of need.

    `module` has a `prepare()`, and a `main()` that reads `sys.argv` and writes `R` to `--ready-fd` when it serves.
    """

    def __init__(
        self, active: Child, spare: Child, module: Sequence[str], confinement: Confinement
    ) -> None:
        self.active = active
        self.spare = spare
        self._module = list(module)
        self._confinement = confinement

    def start_active(self, arguments: Sequence[str], descriptors: Sequence[int]) -> None:
        """Let the spare become the program, else start one; raises `OSError`."""
        if self.spare.running and not self.spare.wait(0):
            self.active.take_over(self.spare)
        else:
            self._start(self.active, arguments, descriptors)
        with suppress(BrokenPipeError):  # dead already; the loop will see that
            os.write(self.active.links[_GO_LINK], _GO)

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
        launch = Launch(
            command, descriptors=(*descriptors, ready, waits), confinement=self._confinement
        )
        try:
            child.start(launch, {REPORTS_LINK: reports, _GO_LINK: go})
        except BaseException:
            os.close(reports)
            os.close(go)
            raise
        finally:
            os.close(ready)
            os.close(waits)

    def is_ready(self, child: Child) -> bool:
        """Whether the active one said meanwhile that it serves, or the spare that it waits."""
        return (_SERVING if child is self.active else _IMPORTED) in reports(child)


def reports(child: Child) -> bytes:
    """Return what a child wrote to its `--ready-fd` since we last looked."""
    os.set_blocking(child.links[REPORTS_LINK], False)
    try:
        return os.read(child.links[REPORTS_LINK], _REPORTS_BYTES)
    except BlockingIOError:
        return b""


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
    if not _is_told(given.go_fd):
        program.prepare()
    os.write(given.ready_fd, _IMPORTED)
    if os.read(given.go_fd, len(_GO)) != _GO:
        return  # nobody needs it any more
    os.close(given.go_fd)
    _set_name(given.module.rpartition(".")[2])
    sys.argv = [given.module, *given.arguments]
    program.main()


def _is_told(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _set_name(name: str) -> None:
    """Set the name that ps and top show (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15])


if __name__ == "__main__":
    main()
