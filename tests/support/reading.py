"""A thread that reads a file all the time and says what was not as it should be."""

import os
import random
import threading
from pathlib import Path

PIECE_BYTES = 128 * 1024


class Reader(threading.Thread):
    """Reads pieces of a file at random, past the page cache, and compares them."""

    def __init__(self, path: Path, content: bytes, seed: int) -> None:
        super().__init__(name=f"reader of {path.name}")
        self._path = path
        self._content = content
        self._chance = random.Random(seed)
        self._stop_asked = threading.Event()
        self.pieces = 0
        self.wrong: list[int] = []
        self.failures: list[str] = []

    def run(self) -> None:
        """Read until asked to stop."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            self.failures.append(f"{self._path.name}: {error}")
            return
        try:
            while not self._stop_asked.is_set():
                self._read(descriptor)
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int) -> None:
        offset = self._chance.randrange(len(self._content) // 4096) * 4096
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            piece = os.pread(descriptor, PIECE_BYTES, offset)
        except OSError as error:
            self.failures.append(f"{self._path.name} at {offset}: {error}")
            return
        self.pieces += 1
        wanted = self._content[offset : offset + PIECE_BYTES]
        if piece != wanted[: len(piece)]:
            self.wrong.append(offset)
        elif len(piece) != len(wanted):
            self.failures.append(f"{self._path.name} at {offset}: only {len(piece)} bytes")

    def finish(self) -> None:
        """Stop and wait."""
        self._stop_asked.set()
        self.join(60)
        assert not self.is_alive()
