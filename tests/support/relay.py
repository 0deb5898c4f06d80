"""A relay between a client and a server on Unix sockets that cuts or stops a connection."""

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

_PIECE_BYTES = 64 * 1024


@dataclass
class Limit:
    """What one connection may carry in one direction before something happens to it."""

    direction: Literal["up", "down"]
    size_bytes: int
    holds: bool = False
    """Carry nothing more, rather than hang up."""
    reached: threading.Event = field(default_factory=threading.Event)


class Relay:
    """Connections take the next of `limits` each; without one they carry everything."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self.limits: deque[Limit] = deque()
        self.connections = 0
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._target))
            self.connections += 1
            limit = self.limits.popleft() if self.limits else None
            self._sockets += [client, server]
            ended = threading.Event()
            for source, sink, direction in ((client, server, "up"), (server, client, "down")):
                mine = limit if limit and limit.direction == direction else None
                thread = threading.Thread(target=self._carry, args=(source, sink, mine, ended))
                self._threads.append(thread)
                thread.start()

    def _carry(
        self,
        source: socket.socket,
        sink: socket.socket,
        limit: Limit | None,
        ended: threading.Event,
    ) -> None:
        carried = 0
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE_BYTES):
                if limit and carried + len(data) >= limit.size_bytes:
                    sink.sendall(data[: limit.size_bytes - carried])
                    limit.reached.set()
                    if limit.holds and limit.direction == "up":
                        while source.recv(_PIECE_BYTES):
                            pass
                    elif limit.holds:
                        ended.wait()
                    break
                try:
                    sink.sendall(data)
                except (BrokenPipeError, ConnectionResetError):
                    return  # what it said before it hung up is still on its way
                carried += len(data)
        ended.set()
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up everywhere."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()


@contextmanager
def relay(path: Path, target: Path) -> Iterator[Relay]:
    """Relay connections to `path` to the socket `target` until the end of the block."""
    made = Relay(path, target)
    try:
        yield made
    finally:
        made.close()
