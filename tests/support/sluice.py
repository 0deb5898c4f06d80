"""A web server on loopback, with ranges, of which one file only flows as far as a test lets it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_PIECE_BYTES = 64 * 1024


class Sluice:
    """Serves the files of a folder; no byte of `held` beyond `open_bytes` before `let` says so."""

    def __init__(self, folder: Path, held: str, open_bytes: int) -> None:
        self.folder = folder
        self.held = held
        self.url = ""
        self._open_bytes = open_bytes
        self._closed = False
        self._news = threading.Condition()

    def let(self, open_bytes: int) -> None:
        """Let the held file flow as far as that."""
        with self._news:
            self._open_bytes = open_bytes
            self._news.notify_all()

    def close(self) -> None:
        """Let those who wait give up."""
        with self._news:
            self._closed = True
            self._news.notify_all()

    def wait(self, name: str, offset: int) -> int:
        """Return how many bytes may be sent from an offset on, once there are any; 0 = none ever."""
        if name != self.held:
            return _PIECE_BYTES
        with self._news:
            self._news.wait_for(lambda: self._closed or self._open_bytes > offset)
            return 0 if self._closed else min(_PIECE_BYTES, self._open_bytes - offset)


@contextmanager
def sluice(folder: Path, held: str, open_bytes: int) -> Iterator[Sluice]:
    """Run the server for the time of a `with` block."""
    gate = Sluice(folder, held, open_bytes)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(self, gate)

        def handle(self) -> None:
            # Clients that wait in vain hang up, and come again.
            with suppress(OSError):
                super().handle()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    gate.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield gate
    finally:
        gate.close()
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(handler: BaseHTTPRequestHandler, gate: Sluice) -> None:
    path = gate.folder / handler.path.lstrip("/")
    if not path.is_file():
        handler.send_response(404)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    size = path.stat().st_size
    wanted = handler.headers.get("Range", "")
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start, end = int(first or 0), min(int(last or size) + 1, size)
    handler.send_response(206 if wanted else 200)
    handler.send_header("Content-Length", str(end - start))
    handler.send_header("ETag", '"one"')
    if wanted:
        handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
    handler.end_headers()
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            piece = file.read(min(gate.wait(path.name, start), end - start))
            if not piece:
                handler.close_connection = True
                return
            handler.wfile.write(piece)
            start += len(piece)
