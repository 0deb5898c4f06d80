"""The last to hold the FUSE connection: ends tgtd before the connection may end.

    python -m stratocache.fs.holder FD [MOUNT]

A dying process closes its files before its children get their signal, so a killed supervisor would
abort the FUSE connection, if nobody else holds it, while tgtd still answers its initiators: they
would get errors. `Holder` is the supervisor's side of a small process that holds `/dev/fuse` too and
outlives the supervisor for a moment: when the socket between them closes, it kills tgtd by pidfd and
only then ends. With LIO it is the kernel that answers initiators: its targets on files of MOUNT are
suspended then. Standard library only. `SUPERVISOR.md`, "Deaths".
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stratocache.fs import lio_switch
from stratocache.fs.confinement import Confinement
from stratocache.fs.processes import Child, Launch

_HOLD = b"H"
_DESCRIPTORS_MAX = 2
_SOCKET = "socket"
_PROGRAM = (sys.executable, "-m", "stratocache.fs.holder")


class Holder:
    """The supervisor's side; `child` is its process."""

    def __init__(
        self, child: Child, confinement: Confinement | None, suspended: Path | None = None
    ) -> None:
        self.child = child
        self._confinement = confinement
        self._suspended = [] if suspended is None else [str(suspended)]

    def start(self) -> None:
        """Start the process, which holds nothing yet; raises `OSError`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with ours, theirs:
            launch = Launch(
                [*_PROGRAM, str(theirs.fileno()), *self._suspended],
                descriptors=(theirs.fileno(),),
                dies_with_us=False,
                confinement=self._confinement,
            )
            self.child.start(launch, {_SOCKET: ours.fileno()})
            ours.detach()

    def hold(self, connection: int, tgtd: int) -> None:
        """Hold a FUSE connection until a tgtd, given by its pidfd, is dead; nothing else any more."""
        if _SOCKET in self.child.links:
            with (
                socket.socket(fileno=os.dup(self.child.links[_SOCKET])) as process,
                suppress(BrokenPipeError),  # dead; the next one is told when it starts
            ):
                socket.send_fds(process, [_HOLD], [connection, tgtd])

    def forget(self) -> None:
        """Close what connects us, upon which the process ends."""
        self.child.close_link(_SOCKET)


def main(arguments: Sequence[str]) -> None:
    """Hold what is sent; when nobody is left to send, kill tgtd and let go."""
    held: list[int] = []
    with socket.socket(fileno=int(arguments[0])) as supervisor:
        while True:
            message, received, _, _ = socket.recv_fds(supervisor, len(_HOLD), _DESCRIPTORS_MAX)
            if message != _HOLD:
                break
            for descriptor in held:
                os.close(descriptor)
            held = received
    if len(arguments) > 1:
        lio_switch.suspend(Path(arguments[1]))
    if held:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(held[1], signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
