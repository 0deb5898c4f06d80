"""A proxy on loopback before a web server that does to its answers what bad servers and networks do.

A request takes the fault that `choose` returns for it, or none. What becomes of an answer is one of
`FAULTS`, by name, so that a seed says what happens.
"""

import gzip
import http.client
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from support.web_server import Handler, serving

_TIMEOUT_S = 30
_HANG_S = 3.0
"""Longer than the time-outs of those who test."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass
class Answer:
    """What the server behind said, and how much of it gets through."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut_after: int | None = None
    """Hang up after so many bytes of the body; -1 = without an answer."""
    pause_s: float = 0.0
    """Silence before the head."""
    hangs: bool = False
    """Silence where the cut is."""
    raw: bytes | None = None
    """Sent instead of all that."""

    def replace_body(self, body: bytes) -> None:
        """Send another body, of the length that is declared."""
        self.body = body
        self.headers["Content-Length"] = str(len(body))

    def refuse(self, status: int, **headers: str) -> None:
        """Send a status and no content."""
        self.status = status
        self.headers = {name.replace("_", "-"): text for name, text in headers.items()}
        self.replace_body(b"")


Fault = Callable[[Answer, str, random.Random], None]
"""Changes an answer to a path."""


def _cut_head(answer: Answer, path: str, chance: random.Random) -> None:
    answer.cut_after = -1


def _cut(answer: Answer, path: str, chance: random.Random) -> None:
    answer.cut_after = chance.randrange(len(answer.body) + 1)


def _delay(answer: Answer, path: str, chance: random.Random) -> None:
    answer.pause_s = chance.uniform(0.05, 0.4)


def _hang(answer: Answer, path: str, chance: random.Random) -> None:
    answer.cut_after, answer.hangs = chance.randrange(len(answer.body) + 1), True


def _corrupt(answer: Answer, path: str, chance: random.Random) -> None:
    body = bytearray(answer.body)
    for _ in range(chance.randint(1, 3)):
        if body:
            body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
    answer.body = bytes(body)


def _other_bytes(answer: Answer, path: str, chance: random.Random) -> None:
    """Another part of the file, with the right head."""
    turn = chance.randrange(len(answer.body) + 1)
    answer.body = answer.body[turn:] + answer.body[:turn]


def _redirect(answer: Answer, path: str, chance: random.Random) -> None:
    answer.refuse(chance.choice((301, 302, 303, 307, 308)), Location=path)


def _redirect_loop(answer: Answer, path: str, chance: random.Random) -> None:
    answer.refuse(302, Location="/loop")


def _redirect_scheme(answer: Answer, path: str, chance: random.Random) -> None:
    bad = ("file:///etc/hostname", "ftp://127.0.0.1/image", "//", "javascript:0", "http://[::1")
    answer.refuse(302, Location=chance.choice(bad))


def _whole(answer: Answer, path: str, chance: random.Random) -> None:
    """The whole file to whoever wants a part; see `_forward`."""


def _not_satisfiable(answer: Answer, path: str, chance: random.Random) -> None:
    answer.refuse(416, Content_Range="bytes */5")


def _busy(answer: Answer, path: str, chance: random.Random) -> None:
    answer.refuse(
        429, Retry_After=chance.choice(("0", "1", "999999", "Wed, 21 Oct 2015 07:28:00 GMT"))
    )


def _busy_silent(answer: Answer, path: str, chance: random.Random) -> None:
    answer.refuse(429)


def _unavailable(answer: Answer, path: str, chance: random.Random) -> None:
    answer.refuse(chance.choice((500, 502, 503, 504)))


def _forbidden(answer: Answer, path: str, chance: random.Random) -> None:
    answer.refuse(chance.choice((401, 403, 451)))


def _gone(answer: Answer, path: str, chance: random.Random) -> None:
    answer.refuse(chance.choice((404, 410)))


def _wrong_range(answer: Answer, path: str, chance: random.Random) -> None:
    """A part with the head of another one, of another file, or with none."""
    match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if match is None:
        answer.status, answer.headers["Content-Range"] = 206, "bytes 5-9/10"
        return
    first, last, total = (int(text) for text in match.groups())
    answer.headers["Content-Range"] = chance.choice((
        f"bytes {first + 1}-{last + 1}/{total}", f"bytes {first}-{last}/{total + 1}",
        f"bytes {first}-{last}/*", f"bytes {last}-{first}/{total}", "pages 1-2/3", "",
    ))  # fmt: skip


def _short(answer: Answer, path: str, chance: random.Random) -> None:
    answer.replace_body(answer.body[: chance.randrange(len(answer.body) + 1)])


def _long(answer: Answer, path: str, chance: random.Random) -> None:
    answer.replace_body(answer.body + chance.randbytes(chance.randint(1, 100_000)))


def _changed(answer: Answer, path: str, chance: random.Random) -> None:
    answer.headers["ETag"] = f'"{chance.randrange(10**9)}"'


def _encoded(answer: Answer, path: str, chance: random.Random) -> None:
    answer.headers["Content-Encoding"] = "gzip"
    answer.replace_body(gzip.compress(answer.body, 1))


def _garbage(answer: Answer, path: str, chance: random.Random) -> None:
    answer.raw = chance.choice((
        chance.randbytes(500), b"HTTP/1.1 200\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 206 OK\r\nX: " + b"x" * 200_000, b"\r\n" * 500,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\nabc",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
    ))  # fmt: skip


def _unframed(answer: Answer, path: str, chance: random.Random) -> None:
    """A body without a length, which ends where the connection does: anywhere."""
    head = f"HTTP/1.1 {answer.status} OK\r\nConnection: close\r\n"
    for name in ("ETag", "Content-Range", "Last-Modified"):
        if name in answer.headers:
            head += f"{name}: {answer.headers[name]}\r\n"
    end = chance.choice((len(answer.body), chance.randrange(len(answer.body) + 1)))
    answer.raw = head.encode() + b"\r\n" + answer.body[:end]


FAULTS: dict[str, Fault] = {
    "cut-head": _cut_head, "cut": _cut, "delay": _delay, "hang": _hang, "corrupt": _corrupt,
    "other-bytes": _other_bytes, "redirect": _redirect, "redirect-loop": _redirect_loop,
    "redirect-scheme": _redirect_scheme, "whole": _whole, "not-satisfiable": _not_satisfiable,
    "busy": _busy, "busy-silent": _busy_silent, "unavailable": _unavailable,
    "forbidden": _forbidden, "gone": _gone, "wrong-range": _wrong_range, "short": _short,
    "long": _long, "changed": _changed, "encoded": _encoded, "garbage": _garbage,
    "unframed": _unframed,
}  # fmt: skip


@dataclass
class FaultyProxy:
    """Requests for the server behind `url`; `counts` has the faults so far, "none" too."""

    url: str
    counts: Counter[str] = field(default_factory=Counter)
    choose: Callable[[], str | None] = lambda: None
    """Returns the name of the next request's fault; None = it goes through as it is."""
    chance: random.Random = field(default_factory=random.Random)
    """Says what else is left to chance; one request at a time uses it."""

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def misbehave(self, seed: int, rate: float) -> None:
        """From now on let each request meet a fault with a probability."""
        self.chance = random.Random(seed)
        names = sorted(FAULTS)
        self.choose = lambda: self.chance.choice(names) if self.chance.random() < rate else None


@contextmanager
def faulty_proxy(target_port: int) -> Iterator[FaultyProxy]:
    """Run a proxy for the time of a `with` block."""
    stopped = threading.Event()
    lock = threading.Lock()

    class Faulty(Handler):
        timeout = _TIMEOUT_S

        def do_GET(self) -> None:
            with lock:
                name = proxy.choose()
                proxy.counts[name or "none"] += 1
            answer = _forward(self, target_port, whole=name == "whole")
            if name is not None:
                with lock:
                    FAULTS[name](answer, self.path, proxy.chance)
            if self.path == "/loop":
                answer.refuse(302, Location="/loop")
            _send(self, answer, stopped)

    with serving(Faulty) as url:
        proxy = FaultyProxy(url)
        try:
            yield proxy
        finally:
            stopped.set()


def _forward(handler: Handler, target_port: int, *, whole: bool) -> Answer:
    wanted = ("If-Range", "Accept-Encoding") if whole else ("Range", "If-Range", "Accept-Encoding")
    headers = {name: handler.headers[name] for name in wanted if name in handler.headers}
    connection = http.client.HTTPConnection("127.0.0.1", target_port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", handler.path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    kept = ("ETag", "Last-Modified", "Content-Range", "Content-Length", "Location")
    found = {name: answer.headers[name] for name in kept if name in answer.headers}
    return Answer(answer.status, found, body)


def _send(handler: Handler, answer: Answer, stopped: threading.Event) -> None:
    stopped.wait(answer.pause_s)
    if answer.cut_after == -1 or answer.raw is not None:
        handler.close_connection = True
        handler.wfile.write(answer.raw or b"")
        _hang_up(handler)
        return
    handler.send_response(answer.status)
    for name, text in answer.headers.items():
        handler.send_header(name, text)
    handler.end_headers()
    handler.wfile.write(answer.body[: answer.cut_after])
    if answer.cut_after is not None:
        handler.wfile.flush()
        stopped.wait(_HANG_S if answer.hangs else 0)
        handler.close_connection = True
        _hang_up(handler)


def _hang_up(handler: Handler) -> None:
    handler.wfile.flush()
    with suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)
