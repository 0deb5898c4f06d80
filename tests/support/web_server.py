"""The frame of web servers for tests: on loopback, silent, and used to clients that hang up."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseServer


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; subclasses say how."""

    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        """Answer until the client hangs up, which is what many tests are about."""
        with suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def running(server: BaseServer) -> Iterator[None]:
    """Let a server answer until the end of the block."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    with server:
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serving(handler: type[Handler]) -> Iterator[str]:
    """Serve until the end of the block; yields the base URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    with running(server):
        yield f"http://127.0.0.1:{server.server_port}"


def begin_file(handler: Handler, folder: Path) -> tuple[Path, int, int] | None:
    """Send the head of the answer for a file of a folder, or for the part of it that is asked for.

    Returns the file and which bytes are to follow; None when there is no such file, which is said.
    """
    path = folder / handler.path.lstrip("/")
    if not path.is_file():
        handler.send_response(404)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return None
    size_bytes = path.stat().st_size
    wanted = handler.headers.get("Range", "")
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, end = int(first or 0), min(int(last or size_bytes) + 1, size_bytes)
    handler.send_response(206 if wanted else 200)
    handler.send_header("Content-Length", str(end - start))
    handler.send_header("ETag", '"one"')
    if wanted:
        handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{size_bytes}")
    handler.end_headers()
    return path, start, end
