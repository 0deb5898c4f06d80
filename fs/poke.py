"""The datagram that tells `blockd` to look at the state database.

A poke says nothing but "look"; several before `blockd` gets to it are one. Losing one loses
nothing, as `blockd` also looks at its start and on a timer.
"""

import contextlib
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

_DRAINED_AT_ONCE_MAX = 1024


def poke(path: Path) -> None:
    """Poke whoever listens at `path`, without waiting. No listener is not an error."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        # a full queue means that a poke is already on its way
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            sender.sendto(b"\0", os.fspath(path))


class PokeListener:
    """The receiving end, bound by `blockd`; replaces what a dead predecessor left."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            path.unlink(missing_ok=True)
            self._socket.bind(os.fspath(path))
            path.chmod(0o600)
        except BaseException:
            self._socket.close()
            raise

    async def wait(self) -> None:
        """Return when at least one poke has arrived since the last return."""
        import trio  # here, because the supervisor pokes and must not load trio

        await trio.lowlevel.wait_readable(self._socket)
        with contextlib.suppress(BlockingIOError):
            for _ in range(_DRAINED_AT_ONCE_MAX):
                self._socket.recv(1)

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
