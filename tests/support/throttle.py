"""A TCP relay on loopback through which all connections together carry a limited rate downstream."""

import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Self

_PIECE_BYTES = 16 * 1024


class Throttle:
    """A context manager before `127.0.0.1:target_port`; counts what it carries to clients."""

    def __init__(self, target_port: int, bytes_per_s: float) -> None:
        self._target_port = target_port
        self._bytes_per_s = bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.carried_bytes = 0
        self._lock = threading.Lock()
        self._free_at = time.monotonic()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    @property
    def url(self) -> str:
        """The relay's address without a trailing slash."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target_port))
            self._sockets += [client, server]
            for one in (client, server):  # a link waits for no acknowledgements
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink, limited in ((client, server, False), (server, client, True)):
                thread = threading.Thread(
                    target=self._carry, args=(source, sink, limited), daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _carry(self, source: socket.socket, sink: socket.socket, limited: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE_BYTES):
                if limited:
                    self._wait_for_turn(len(data))
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _wait_for_turn(self, size_bytes: int) -> None:
        """Take the link for as long as these bytes need it, after whoever asked before."""
        with self._lock:
            start = max(self._free_at, time.monotonic() - 0.02)
            self._free_at = start + size_bytes / self._bytes_per_s
            self.carried_bytes += size_bytes
            ready = self._free_at
        pause_s = ready - time.monotonic()
        if pause_s > 0:
            time.sleep(pause_s)
