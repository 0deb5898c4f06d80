"""A peer with the site's certificate that has images and gives them rightly only now and then.

What becomes of an answer is one of `FAULTS`, by name, so that a seed says what happens.
"""

import gzip
import hashlib
import random
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from socket import SHUT_RDWR

from stratocache.cache.chunks import CHUNK_BYTES
from support.lazy import index_of
from support.peer_hosts import FalsePeer, Site, answer

_SLOW_PIECES = 16
_PROBLEM = "Content-Type: application/problem+json"

Reply = Callable[["LyingPeer", ssl.SSLSocket, bytes], None]
"""Sends what becomes of a body."""


def _none(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    connection.sendall(answer(body))


def _flip(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    wrong = bytearray(body)
    wrong[peer.chance.randrange(len(wrong))] ^= 1 << peer.chance.randrange(8)
    connection.sendall(answer(bytes(wrong)))


def _other(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    """Another chunk, which is a right one where it belongs."""
    others = [chunk for chunk in peer.chunks.values() if len(chunk) == len(body) and chunk != body]
    connection.sendall(answer(peer.chance.choice([*others, bytes(len(body))])))


def _turned(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    turn = peer.chance.randrange(1, len(body))
    connection.sendall(answer(body[turn:] + body[:turn]))


def _zeros(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    connection.sendall(answer(bytes(len(body))))


def _short(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    connection.sendall(answer(body[: peer.chance.randrange(len(body))]))


def _long(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    connection.sendall(answer(body + body[:4096]))


def _cut(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    connection.sendall(answer(body[: peer.chance.randrange(len(body))], length=len(body)))
    connection.shutdown(SHUT_RDWR)


def _coded(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    connection.sendall(answer(gzip.compress(body, 1), "Content-Encoding: gzip"))


def _garbage(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    connection.sendall(peer.chance.randbytes(500))
    connection.shutdown(SHUT_RDWR)


def _broken(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    connection.sendall(answer(body, status="500 Internal Server Error"))


def _elsewhere(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    connection.sendall(answer(b"", "Location: /v1/chunks/" + "1" * 64, status="302 Found"))


def _refusing(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    connection.sendall(answer(b'{"code": "token-refused"}', status="401 Unauthorized"))


def _silent(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    peer.closing.wait(peer.late_s)


def _slow(peer: "LyingPeer", connection: ssl.SSLSocket, body: bytes) -> None:
    """The right bytes, too late."""
    whole = answer(body)
    for piece in range(_SLOW_PIECES):
        start, end = (len(whole) * at // _SLOW_PIECES for at in (piece, piece + 1))
        connection.sendall(whole[start:end])
        peer.closing.wait(peer.late_s / _SLOW_PIECES)


FAULTS: dict[str, Reply] = {
    "flip": _flip, "other": _other, "turned": _turned, "zeros": _zeros, "short": _short,
    "long": _long, "cut": _cut, "coded": _coded, "garbage": _garbage, "broken": _broken,
    "elsewhere": _elsewhere, "refusing": _refusing, "silent": _silent, "slow": _slow,
}  # fmt: skip
LIES = ("flip", "other", "turned", "zeros")
"""Those whose length is right: only the digest tells."""
FALSE_MANIFEST = "false manifest"
"""Of another image of the same size, which the peer has too."""


class LyingPeer(FalsePeer):
    """Has chunks by digest and manifests by image; `counts` has what became of its answers.

    `fault_rate` of its answers are faults; those that are `late` take `late_s`. What it has not it
    says so, as a probe wants.
    """

    def __init__(self, site: Site, seed: int, *, fault_rate: float, late_s: float) -> None:
        super().__init__(site, self._answer)
        self.chance = random.Random(seed)
        self.late_s = late_s
        self.chunks: dict[str, bytes] = {}
        self.counts: Counter[str] = Counter()
        self.closing = threading.Event()
        self._fault_rate = fault_rate
        self._manifests: dict[str, list[bytes]] = {}
        self._lock = threading.Lock()

    def share(self, identifier: str, image: bytes, folder: Path, *, false: bytes = b"") -> None:
        """Have an image, and the manifest of a false one, with the chunks of both."""
        self._manifests[identifier] = [index_of(one, folder) for one in (image, false) if one]
        for one in (image, false):
            for start in range(0, len(one), CHUNK_BYTES):
                chunk = one[start : start + CHUNK_BYTES]
                self.chunks[hashlib.sha256(chunk).hexdigest()] = chunk

    @property
    def faults(self) -> int:
        """How many answers were faults."""
        return sum(self.counts.values()) - self.counts["none"]

    def _answer(self, connection: ssl.SSLSocket, head: bytes) -> None:
        path = head.split(b" ", 2)[1].decode().partition("?")[0]
        _, _, kind, name, *_ = path.split("/")
        if kind == "chunks":
            self._reply(connection, self.chunks.get(name))
            return
        manifests = self._manifests.get(name, [])
        with self._lock:
            false = len(manifests) > 1 and self.chance.random() < self._fault_rate
            self.counts[FALSE_MANIFEST] += false
        if false:
            connection.sendall(answer(manifests[1]))
        else:
            self._reply(connection, manifests[0] if manifests else None)

    def _reply(self, connection: ssl.SSLSocket, body: bytes | None) -> None:
        if body is None:
            absent = b'{"code": "chunk-unknown"}'
            connection.sendall(answer(absent, _PROBLEM, status="404 Not Found"))
            return
        with self._lock:
            is_fault = self.chance.random() < self._fault_rate
            name = self.chance.choice(sorted(FAULTS)) if is_fault else "none"
            self.counts[name] += 1
        with suppress(OSError):  # who asked may have gone
            (FAULTS[name] if is_fault else _none)(self, connection, body)

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        super().__exit__()
