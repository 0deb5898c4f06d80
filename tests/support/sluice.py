"""A web server on loopback, with ranges, of which one file only flows as far as a test lets it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.web_server import Handler, begin_file, serving

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

    class Gated(Handler):
        def do_GET(self) -> None:
            _answer(self, gate)

    with serving(Gated) as gate.url:
        try:
            yield gate
        finally:
            gate.close()


def _answer(handler: Handler, gate: Sluice) -> None:
    found = begin_file(handler, gate.folder)
    if found is None:
        return
    path, start, end = found
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            piece = file.read(min(gate.wait(path.name, start), end - start))
            if not piece:
                handler.close_connection = True
                return
            handler.wfile.write(piece)
            start += len(piece)
