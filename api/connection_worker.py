"""gunicorn's threaded worker, which a client cannot hold up by being slow.

A new connection gets a thread when it has sent something, not before. From then on the head of a
request must be there in time, a body must come at a rate, and an answer must be taken. Of one
network address so many connections are kept, so that others get theirs.
"""

import errno
import ipaddress
import selectors
import socket
import threading
import time
import weakref
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import Any

from gunicorn.workers.gthread import ThreadWorker  # type: ignore[import-untyped]

from stratocache.api.unreadable_request import answer_to

_FIRST_BYTE_S = 10.0
_HEAD_S = 10.0
"""From the first byte of a request to the end of its head."""
_BODY_GRACE_S = 60.0
_BODY_BYTES_PER_S = 1024
"""So much longer than the grace a body may take; only the time that we wait for it counts."""
_STALL_S = 60.0
"""A client that sends or takes nothing for so long is gone."""
_PER_ADDRESS = 256
"""Connections of one address to one worker."""


class Patience:
    """Goes before a socket's class: reading and writing end when the client takes too long."""

    _due_s: float | None = None  # of the head; None = a body is read
    _waited_s = 0.0
    _received_bytes = 0

    def expect_head(self) -> None:
        """Begin the time for a request's head."""
        self._due_s = time.monotonic() + _HEAD_S

    def expect_body(self) -> None:
        """Begin to measure the rate of a body."""
        self._due_s, self._waited_s, self._received_bytes = None, 0.0, 0

    def recv(self, *arguments: Any) -> bytes:
        """Receive; raises `ConnectionResetError` when that takes too long."""
        began_s = time.monotonic()
        if self._due_s is not None:
            left_s = self._due_s - began_s
        else:
            earned_s = self._received_bytes / _BODY_BYTES_PER_S
            left_s = _BODY_GRACE_S + earned_s - self._waited_s
        if left_s <= 0:
            raise _too_slow()
        me: Any = self
        me.settimeout(min(left_s, _STALL_S))
        try:
            data: bytes = super().recv(*arguments)  # type: ignore[misc]
        except TimeoutError:
            raise _too_slow() from None
        finally:
            self._waited_s += time.monotonic() - began_s
        self._received_bytes += len(data)
        return data

    def sendall(self, *arguments: Any) -> None:
        """Send; raises `ConnectionResetError` when that takes too long."""
        me: Any = self
        me.settimeout(_STALL_S)
        try:
            super().sendall(*arguments)  # type: ignore[misc]
        except TimeoutError:
            raise _too_slow() from None


class PatientSocket(Patience, socket.socket):
    """A connection without TLS."""


class ConnectionWorker(ThreadWorker):  # type: ignore[misc]
    """Keeps all connections within their limits."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()

    def enqueue_req(self, conn: Any) -> None:
        """Give a connection with something to read a thread; let a new one wait without."""
        if conn.initialized or conn.data_ready:
            super().enqueue_req(conn)
            return
        if not self._admit(conn):
            self.nr_conns -= 1
            conn.close()
            return
        if type(conn.sock) is socket.socket:
            conn.sock = PatientSocket(fileno=conn.sock.detach())
        conn.sock.setblocking(False)
        conn.timeout = time.monotonic() + _FIRST_BYTE_S
        self.pending_conns.append(conn)
        readable = partial(self.on_pending_socket_readable, conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, readable)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Answer a request that cannot be read; all else is gunicorn's to log and to answer."""
        answer = answer_to(exc)
        if answer is None:
            super().handle_error(req, client, addr, exc)
            return
        self.log.warning("a request cannot be read: %s", exc)
        with suppress(OSError):
            client.sendall(answer)

    def _admit(self, conn: Any) -> bool:
        """Count a connection as long as it lives; tell whether its address may have it."""
        address = _counted_as(conn.client, behind_proxy=not self.cfg.is_ssl)
        if address is None:
            return True
        with self._lock:
            if self._open[address] >= _PER_ADDRESS:
                return False
            self._open[address] += 1
        weakref.finalize(conn, self._forget, address)
        return True

    def _forget(self, address: str) -> None:
        with self._lock:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]

    def handle(self, conn: Any) -> Any:
        """Read a request and answer it. Runs in a thread."""
        if isinstance(conn.sock, Patience):
            conn.sock.expect_head()
        return super().handle(conn)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request whose head is there."""
        if isinstance(conn.sock, Patience):
            conn.sock.expect_body()
        return super().handle_request(req, conn)


def _counted_as(client: Any, *, behind_proxy: bool) -> str | None:
    """Return what connections of a client are counted by; None for a Unix socket's and a proxy's."""
    if not isinstance(client, tuple):
        return None
    address = ipaddress.ip_address(client[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if behind_proxy and address.is_loopback:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))  # a household's
    return str(address)


def _too_slow() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "the client is too slow")
