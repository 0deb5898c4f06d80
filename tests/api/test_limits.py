"""Slow clients, many connections, large requests and frequent callers, on the real server."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from support.api_daemon import Api, serving
from support.network_client import Stranger

from stratocache.api import connection_worker
from stratocache.api.connection_worker import PatientSocket
from stratocache.api.rate_limit import Buckets
from stratocache.cache.configuration import ApiSettings, Configuration

pytestmark = pytest.mark.root

SLOW = ApiSettings(requests_per_s=0.001)
"""One request, and another a good while later: a slow machine changes nothing."""
HURRY = "import stratocache.api.connection_worker as w; w._HEAD_S = 1.0; w._BODY_GRACE_S = 1.0"
"""Less patience than a user would want, so that tests need not wait for it."""


@pytest.fixture
def small(configuration: Configuration) -> Configuration:
    """One worker with four threads."""
    return configuration.model_copy(update={"api": ApiSettings(workers=1, threads=4)})


def _ask(
    path: Path, method: str = "GET", address: str = "/v1", **options: object
) -> httpx.Response:
    transport = httpx.HTTPTransport(uds=str(path))
    with httpx.Client(transport=transport, base_url="http://x", timeout=60) as client:
        return client.request(method, address, **options)  # type: ignore[arg-type]


@contextmanager
def _connected(path: Path, count: int, first: bytes = b"") -> Iterator[list[socket.socket]]:
    with ExitStack() as opened:
        made = [opened.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(count)]
        for each in made:
            each.settimeout(30)
            each.connect(str(path))
            each.sendall(first)
        yield made


def test_silent_connections_hold_no_thread(small: Configuration, api: Api) -> None:
    """Many more connections than threads, on which nothing is said, delay nobody."""
    with serving(small), _connected(small.api_socket, 64):
        began_s = time.monotonic()
        assert _ask(small.api_socket).status_code == 200
        assert time.monotonic() - began_s < 4  # gunicorn's own patience with each is 5 s


def test_slow_heads_are_given_up(small: Configuration, api: Api) -> None:
    """Requests that do not become complete in time are ended, one byte at a time too, and others
    are answered."""
    dripping = threading.Event()

    def drip(each: socket.socket) -> None:
        try:
            while not dripping.wait(0.2):
                each.sendall(b"x")
        except OSError:
            return

    with (
        serving(small, HURRY),
        _connected(small.api_socket, 12, b"GET /v1 HTTP/1.1\r\nX-A: ") as slow,
    ):
        threads = [threading.Thread(target=drip, args=(each,)) for each in slow[:6]]
        for thread in threads:
            thread.start()
        assert _ask(small.api_socket).status_code == 200
        ends = [_end(each) for each in slow]
        dripping.set()
        for thread in threads:
            thread.join()

    assert ends == [b""] * len(slow)


def _end(connection: socket.socket) -> bytes:
    """Return what comes until the connection ends, however."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionError:
        pass
    return received


def test_slow_bodies_are_given_up(small: Configuration, api: Api) -> None:
    """A body that stops coming is answered by 408, and leaves nothing behind."""
    head = b"POST /v1/disks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with serving(small, HURRY):
        with _connected(small.api_socket, 6, head + b"Content-Length: 99\r\n\r\n{") as slow:
            assert _ask(small.api_socket).status_code == 200
            answers = [_end(each) for each in slow]
        assert _ask(small.api_socket, address="/v1/disks").json()["disks"] == []

    assert {answer.split(b"\r\n")[0] for answer in answers} == {b"HTTP/1.1 408 Request Timeout"}
    assert all(b'"code": "client-too-slow"' in answer for answer in answers)


def test_bodies_earn_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who keeps sending may send for long, who sends less than the rate may not, and the time that
    we do not wait for the client is not the client's."""
    monkeypatch.setattr(connection_worker, "_BODY_GRACE_S", 0.2)
    monkeypatch.setattr(connection_worker, "_BODY_BYTES_PER_S", 4096)
    ours, theirs = socket.socketpair()
    with PatientSocket(fileno=ours.detach()) as patient, theirs:
        patient.expect_body()
        theirs.sendall(bytes(4096))
        assert len(patient.recv(4096)) == 4096
        time.sleep(0.5)  # our own pause
        began_s = time.monotonic()
        with pytest.raises(ConnectionResetError):
            patient.recv(1)
        assert 0.9 < time.monotonic() - began_s < 30  # a second was earned


def test_answers_must_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not read its answer holds the thread for a while only."""
    monkeypatch.setattr(connection_worker, "_STALL_S", 0.2)
    ours, theirs = socket.socketpair()
    with (
        PatientSocket(fileno=ours.detach()) as patient,
        theirs,
        pytest.raises(ConnectionResetError),
    ):
        patient.sendall(bytes(64 * 1024**2))


TOO_MUCH = [
    (b"GET /v1/" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n", 414),
    (b"GET /v1 HTTP/1.1\r\nX-Long: " + b"x" * 9000 + b"\r\n\r\n", 431),
    (b"GET /v1 HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % n for n in range(80)) + b"\r\n", 431),
    (b"POST /v1 HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (b"GET /v1 HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    (b"GET /v1 HTTP/9.9\r\n\r\n", 400),
]


def test_large_and_ambiguous_requests_are_refused(small: Configuration, api: Api) -> None:
    """Too long a line or header, too many headers, and two opinions on a body's length end the
    connection with an error of HTTP, described as all are."""
    with serving(small):
        for head, status in TOO_MUCH:
            with _connected(small.api_socket, 1, head) as (connection,):
                answer = _end(connection)
            assert int(answer.split()[1]) == status, head[:80]
            assert b"Content-Type: application/problem+json" in answer
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["status"] == status


def test_buckets_refill(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst passes, then as many as the rate allows; others' buckets are their own."""
    clock_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock_s)
    buckets = Buckets(10, 5)

    assert [buckets.wait_s("a", take=True) for _ in range(6)] == [0, 0, 0, 0, 0, pytest.approx(0.1)]
    assert buckets.wait_s("b", take=True) == 0
    clock_s += 0.25
    assert [buckets.wait_s("a", take=True) for _ in range(3)] == [0, 0, pytest.approx(0.05)]
    assert buckets.wait_s("a", take=False) > 0
    clock_s += 100
    assert [buckets.wait_s("a", take=True) for _ in range(6)][4:] == [0, pytest.approx(0.1)]


def test_a_caller_who_asks_too_often_is_sent_away(configuration: Configuration) -> None:
    """Beyond its rate a caller gets 429 with the time to wait; others are served, and so are
    administrators of this host."""
    slow = configuration.model_copy(update={"api": SLOW})
    with Api(slow).caller(65534) as user:
        first, second = user("GET", "/v1"), user("GET", "/v1")
        assert (first.status_code, second.status_code) == (200, 429)
        assert second.json["code"] == "rate-limited"
        assert 900 < int(second.headers["Retry-After"]) <= 1000
        assert user("GET", "/healthz").status_code == 200


def test_administrators_of_this_host_are_not_limited(configuration: Configuration) -> None:
    """Root on the Unix socket may ask as often as it likes."""
    slow = configuration.model_copy(update={"api": SLOW})
    with Api(slow).caller() as root:
        assert {root("GET", "/v1").status_code for _ in range(20)} == {200}


def test_strangers_who_ask_too_often_are_sent_away(configuration: Configuration) -> None:
    """An address without credentials is soon told to wait, before anything else; other addresses,
    and callers that we know, are not kept out by it."""
    api = Api(configuration.model_copy(update={"api": SLOW}))
    one, other = Stranger(api.client), Stranger(api.client, address="192.0.2.8")
    first, second = one("GET", "/v1/disks"), one("GET", "/healthz")

    assert (first.status_code, second.status_code) == (401, 429)
    assert int(second.headers["Retry-After"]) > 900
    assert other("GET", "/v1/disks").status_code == 401
    with api.caller() as root:
        assert root("GET", "/v1/disks").status_code == 200
