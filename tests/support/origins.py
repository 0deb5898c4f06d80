"""A real HTTP server on loopback that serves byte strings and fails on demand.

Each resource has a queue of faults; a request takes the next one, and is served properly when
none is left. The server logs what it was asked and what it sent.
"""

import random
import re
import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from support.web_server import Handler

_PIECE_BYTES = 64 * 1024
_SETTLED_S = 60


@dataclass
class Fault:
    """What goes wrong with one answer; the default is nothing."""

    status: int | None = None
    """Answer this status and no content."""
    headers: dict[str, str] = field(default_factory=dict)
    """Sent as well, or instead."""
    cut_after_bytes: int | None = None
    """Close the connection after so many bytes of the body."""
    ignore_range: bool = False
    """Answer 200 and everything."""
    corrupt: bool = False
    """Change the first byte of a part."""
    hold: threading.Event | None = None
    """Wait for this event where the cut would be, then go on."""


@dataclass
class Resource:
    """What one path serves."""

    data: bytes
    etag: str | None = '"v1"'
    last_modified: str | None = None
    declare_length: bool = True
    """Without a length the body ends with the connection."""
    faults: deque[Fault] = field(default_factory=deque)
    chance: random.Random | None = None
    """Decides, when there is one, whether a request meets one of `accidents`."""
    accidents: tuple[Fault, ...] = ()
    accident_rate: float = 0.5

    blocked: threading.Event | None = None
    """While there is one, answers to all but the first `free` requests wait until it is set."""
    free: int = 0

    def hold(self, *, after: int) -> None:
        """Let all answers but the first so many wait for `let_go`."""
        self.blocked, self.free = threading.Event(), after

    def let_go(self) -> None:
        """Let all answers go on."""
        assert self.blocked is not None
        self.blocked.set()

    def next_fault(self) -> Fault:
        """Return what goes wrong with the next answer."""
        if self.faults:
            return self.faults.popleft()
        if self.chance is not None and self.chance.random() < self.accident_rate:
            return self.chance.choice(self.accidents)
        return Fault()


@dataclass
class Request:
    """One line of the log."""

    method: str
    path: str
    range: str | None
    if_range: str | None
    status: int = 0
    sent_bytes: int = 0


class _Server(ThreadingHTTPServer):
    """Knows how many connections it has."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[Handler]) -> None:
        super().__init__(address, handler)
        self._connections = 0
        self._changed = threading.Condition()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin with a connection, in the thread that accepts all of them."""
        self._count(1)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer until the client has gone."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._changed:
            self._connections += change
            self._changed.notify_all()

    def wait_until_idle(self) -> None:
        """Return when nobody is connected."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._connections, _SETTLED_S)


class OriginServer:
    """Serves `resources`; its `log` grows with every request."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        self.resources: dict[str, Resource] = {}
        self.log: list[Request] = []
        self._address = address
        self._server = _Server((address, port), _handler(self))
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def settle(self) -> None:
        """Return when all connections so far have ended, as those of clients that died will.

        Until then the server may find a request in what a client sent before its death.
        """
        with socket.create_connection((self._address, self.port), _SETTLED_S) as last:
            last.sendall(b"GET /settled HTTP/1.0\r\n\r\n")
            while last.recv(_PIECE_BYTES):
                pass  # accepted in turn: all before it have been, too
        self._server.wait_until_idle()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """The server's address without a trailing slash."""
        return f"http://{self._address}:{self.port}"

    def add(self, path: str, resource: Resource | bytes) -> str:
        """Serve a resource; return its URL."""
        self.resources[path] = resource if isinstance(resource, Resource) else Resource(resource)
        return self.url + path

    def sent_bytes(self, path: str) -> int:
        """Return how many bytes of bodies went out for a path."""
        return sum(request.sent_bytes for request in self.log if request.path == path)


@contextmanager
def origin_server() -> Iterator[OriginServer]:
    """Run a server for the time of a `with` block."""
    with OriginServer() as server:
        yield server


def _handler(server: OriginServer) -> type[Handler]:
    class Answering(Handler):
        def do_GET(self) -> None:
            _answer(self, server)

        do_HEAD = do_GET

    return Answering


def _answer(handler: Handler, server: OriginServer) -> None:
    request = Request(
        handler.command, handler.path, handler.headers["Range"], handler.headers["If-Range"]
    )
    server.log.append(request)
    resource = server.resources.get(handler.path)
    if resource is None:
        request.status = 404
        _send_head(handler, 404, {"Content-Length": "0"})
        return
    if resource.blocked is not None:
        resource.free -= 1
        if resource.free < 0:
            resource.blocked.wait(60)
    fault = resource.next_fault()
    if fault.status is not None:
        request.status = fault.status
        _send_head(handler, fault.status, {"Content-Length": "0"} | fault.headers)
        return
    status, headers, body = _content(resource, request, fault)
    request.status = status
    if not resource.declare_length:
        handler.close_connection = True
        headers = {"Connection": "close"} | {
            name: text for name, text in headers.items() if name != "Content-Length"
        }
    _send_head(handler, status, headers | fault.headers)
    _send_body(handler, request, body, fault)


def _content(
    resource: Resource, request: Request, fault: Fault
) -> tuple[int, dict[str, str], memoryview]:
    data = memoryview(resource.data)
    headers = {"Content-Length": str(len(data))}
    if resource.etag:
        headers["ETag"] = resource.etag
    if resource.last_modified:
        headers["Last-Modified"] = resource.last_modified
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range or "")
    same = request.if_range in (None, resource.etag, resource.last_modified)
    if match is None or fault.ignore_range or not same:
        return 200, headers, data
    start = int(match[1])
    if start >= len(data):
        return 416, {"Content-Length": "0"}, data[:0]
    end = min(int(match[2] or len(data) - 1), len(data) - 1) + 1
    headers["Content-Length"] = str(end - start)
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
    body = data[start:end]
    if fault.corrupt:
        body = memoryview(bytes([body[0] ^ 1]) + bytes(body[1:]))
    return 206, headers, body


def _send_head(handler: Handler, status: int, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, text in headers.items():
        handler.send_header(name, text)
    handler.end_headers()


def _send_body(handler: Handler, request: Request, body: memoryview, fault: Fault) -> None:
    stop = len(body) if fault.cut_after_bytes is None else fault.cut_after_bytes
    try:
        _write(handler, request, body[:stop])
        if fault.hold is not None:
            fault.hold.wait(60)
            _write(handler, request, body[stop:])
        elif stop < len(body):
            handler.close_connection = True
    except OSError:
        handler.close_connection = True  # the client went away


def _write(handler: Handler, request: Request, data: memoryview) -> None:
    for start in range(0, len(data), _PIECE_BYTES):
        piece = data[start : start + _PIECE_BYTES]
        handler.wfile.write(piece)
        request.sent_bytes += len(piece)
    handler.wfile.flush()
