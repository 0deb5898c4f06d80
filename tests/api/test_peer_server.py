"""The real process that serves peers: who gets in, what is there, and how much of it."""

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.api_daemon import Api, problem
from support.lazy import entry_of, manifest_of, some_image
from support.peer_hosts import HOST, PeerHost, Site

from stratocache.api.judgement import Verdict
from stratocache.api.peer_ration import PeerRation
from stratocache.api.service_checks import judge_peers
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.errors import Unreachable
from stratocache.fs.peer_record import PeerService, add_service, peer_service
from stratocache.fs.state import Database

MIB = 1024**2
IMAGE = some_image(4, tail_bytes=5000)
ENTRY = entry_of(IMAGE, "http://192.0.2.1/image")
CHUNK = f"/v1/chunks/{manifest_of(IMAGE).digest(0).hex()}"
MANIFEST = f"/v1/images/{ENTRY.identifier}/manifest"
TIMEOUT_S = 30

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A token, an authority and a certificate."""
    return Site(tmp_path_factory.mktemp("peers") / "site")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[PeerHost]:
    """A host that serves an image."""
    host = PeerHost(tmp_path_factory.mktemp("host") / "host", site.settings())
    host.configuration = host.configuration.model_copy(update={"log_level": "debug"})
    host.add(IMAGE, ENTRY)
    with host.served():
        yield host
    host.close()


def _context(site: Site) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(site.folder / "ca.pem"))


def _ask(
    host: PeerHost, site: Site, path: str, authorization: str | None, method: str = "GET"
) -> tuple[int, bytes]:
    connection = http.client.HTTPSConnection(
        HOST, host.port, timeout=TIMEOUT_S, context=_context(site)
    )
    with closing(connection):
        headers = {} if authorization is None else {"Authorization": authorization}
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_two_routes_and_nothing_else(host: PeerHost, site: Site) -> None:
    """With the token, chunks and manifests are given; every other path and method of the API is not
    there."""
    bearer = f"Bearer {site.token}"

    assert _ask(host, site, CHUNK, bearer) == (200, IMAGE[:CHUNK_BYTES])
    assert _ask(host, site, f"{CHUNK}?image={ENTRY.identifier}", bearer)[0] == 200
    assert _ask(host, site, MANIFEST, bearer) == (200, manifest_of(IMAGE).to_bytes())
    elsewhere = ("/", "/v1", "/healthz", "/v1/images", "/v1/disks", "/v1/cache", "/v1/operations")
    assert {_ask(host, site, path, bearer)[0] for path in elsewhere} == {404}
    assert _ask(host, site, "/v1/images/..%2f..%2fstate/manifest", bearer)[0] == 404
    assert _ask(host, site, "/v1/chunks/..%2f..%2fstate.db", bearer)[0] in (400, 404)
    assert _ask(host, site, "/v1/chunks/" + "A" * 64, bearer)[0] == 400
    assert _ask(host, site, "/v1/chunks/" + "0" * 64, bearer)[0] == 404
    for method in ("PUT", "POST", "DELETE", "PATCH"):
        assert _ask(host, site, CHUNK, bearer, method)[0] == 405


def test_nobody_gets_in_without_the_token(host: PeerHost, site: Site) -> None:
    """Without a token, with another, or with the right one in another scheme, every path answers
    the same 401; neither the log nor the process list has the token, at the level debug."""
    wrong = (None, "", "Bearer", f"Bearer {site.token[:-1]}", f"Bearer {site.token}x", site.token,
             f"Basic {site.token}", "Bearer \xff", "Bearer " + "x" * 4000)  # fmt: skip
    answers = {
        _ask(host, site, path, token)
        for path in (CHUNK, MANIFEST, "/v1", "/nothing")
        for token in wrong
    }

    assert {status for status, _ in answers} == {401}
    assert len({body for _, body in answers}) == 1
    assert _ask(host, site, CHUNK, f"Bearer {site.token}")[0] == 200
    assert site.token.encode() not in host.log.read_bytes()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            shown = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        assert site.token.encode() not in shown


def test_only_tls_of_today_is_spoken(host: PeerHost, site: Site) -> None:
    """Plain HTTP and TLS below 1.3 get nothing."""
    with socket.create_connection((HOST, host.port), timeout=TIMEOUT_S) as plain:
        request = f"GET {CHUNK} HTTP/1.1\r\nAuthorization: Bearer {site.token}\r\n\r\n"
        plain.sendall(request.encode())
        try:
            answer = plain.recv(4096)
        except ConnectionResetError:
            answer = b""
        assert b"200" not in answer[:32]
    old = _context(site)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection((HOST, host.port), timeout=TIMEOUT_S) as plain,
        pytest.raises(ssl.SSLError),
    ):
        old.wrap_socket(plain, server_hostname=HOST)


def test_those_who_say_nothing_keep_nobody_out(host: PeerHost, site: Site) -> None:
    """More connections than there are threads, each with half a handshake, do not keep a peer from
    its chunk for longer than a stall is borne."""
    silent = [socket.create_connection((HOST, host.port), timeout=TIMEOUT_S) for _ in range(24)]
    try:
        for connection in silent:
            connection.sendall(b"\x16\x03\x01\x02\x00\x01")
        assert _ask(host, site, CHUNK, f"Bearer {site.token}")[0] == 200
    finally:
        for connection in silent:
            connection.close()


def test_what_was_given_is_counted(host: PeerHost, site: Site) -> None:
    """Chunks, manifests, bytes, what was absent and who was refused are in the state within
    seconds."""
    before = peer_service(host.db)
    bearer = f"Bearer {site.token}"
    _ask(host, site, CHUNK, bearer)
    _ask(host, site, MANIFEST, bearer)
    _ask(host, site, "/v1/chunks/" + "0" * 64, bearer)
    _ask(host, site, CHUNK, "Bearer " + "x" * 40)
    deadline = time.monotonic() + TIMEOUT_S
    while peer_service(host.db).refused < before.refused + 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    after = peer_service(host.db)

    assert after.chunks >= before.chunks + 1 and after.manifests >= before.manifests + 1
    assert after.absent >= before.absent + 1
    assert after.sent_bytes >= before.sent_bytes + CHUNK_BYTES


def test_doctor_is_content_with_a_peer_that_serves(host: PeerHost, site: Site) -> None:
    """A host that serves peers, and knows the token, is fine."""
    settings = site.settings(hosts=(host.name,), timeout_s=8)
    found = judge_peers(host.configuration.model_copy(update={"peers": settings}))
    assert found.verdict is Verdict.OK and host.name in found.detail


def test_administrators_read_the_same_on_the_unix_socket(host: PeerHost) -> None:
    """Chunks and manifests are given to administrators of the API, to nobody else there."""
    api = Api(host.configuration)
    with api.caller(0) as root, api.caller(12345) as somebody:
        assert root("GET", CHUNK).content == IMAGE[:CHUNK_BYTES]
        assert root("GET", MANIFEST).content == manifest_of(IMAGE).to_bytes()
        problem(root("GET", "/v1/chunks/" + "0" * 64), 404, "chunk-unknown")
        for path in (CHUNK, MANIFEST):
            assert somebody("GET", path).status_code == 403
    api.db.close()


def test_bytes_are_rationed() -> None:
    """Peers together get so many bytes a second; who would wait for long is sent elsewhere."""
    ration = PeerRation(bytes_per_s=8 * MIB, parallel=4)
    begun = time.monotonic()
    sent = refused = 0
    while time.monotonic() < begun + 1.0:
        try:
            ration.send(MIB, manifest=False)
            sent += 1
        except Unreachable as error:
            assert error.code == "peer-busy"
            refused += 1
            time.sleep(0.01)
    elapsed_s = time.monotonic() - begun

    assert sent - 1 <= 8 * elapsed_s + 1
    counts = ration.take_counts()
    assert counts is not None
    assert (counts.chunks, counts.sent_bytes, counts.busy) == (sent, sent * MIB, refused)
    waiting = [threading.Thread(target=_send, args=(ration,)) for _ in range(32)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    counts = ration.take_counts()
    assert counts is not None and counts.chunks + counts.busy == 32 and counts.busy >= 20


def _send(ration: PeerRation) -> None:
    try:
        ration.send(MIB, manifest=False)
    except Unreachable:
        return


def test_turns_are_few() -> None:
    """So many requests are answered at a time; the next one is told to ask elsewhere."""
    ration = PeerRation(bytes_per_s=2**30, parallel=2)
    with (
        ration.turn(),
        ration.turn(),
        pytest.raises(Unreachable, match="ask another"),
        ration.turn(),
    ):
        raise AssertionError("a third turn")
    with ration.turn():
        counts = ration.take_counts()
    assert counts == PeerService(busy=1)


def test_counts_add_up(tmp_path: Path) -> None:
    """What several intervals counted is summed."""
    db = Database(tmp_path / "state.db")
    db.migrate()
    add_service(db, PeerService(chunks=2, sent_bytes=10))
    add_service(db, PeerService(chunks=1, refused=1))
    assert peer_service(db) == PeerService(chunks=3, sent_bytes=10, refused=1)
    db.close()
