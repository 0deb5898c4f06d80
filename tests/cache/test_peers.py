"""Peers: asked before the origin, believed nothing, and never waited for for long."""

import gzip
import hashlib
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import trio
from support.lazy import entry_of, index_of, manifest_of, some_image
from support.origins import OriginServer
from support.peer_hosts import HOST, AskingHost, FalsePeer, Misbehaviour, PeerHost, Site, answer

from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.completion import Completion
from stratocache.cache.configuration import FetchSettings
from stratocache.cache.endorsed_index import read_index
from stratocache.cache.entry import EndorsedIndex, Entry
from stratocache.cache.origin import Backoff
from stratocache.cache.peers import Peers, PeerStatistics
from stratocache.cache.restoration import EntryOrigins

IMAGE = some_image(10, tail_bytes=70001, zero=(3,))
STORED = [index for index in range(11) if index != 3]
OTHER = hashlib.shake_128(b"other").digest(len(IMAGE))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A token, an authority and a certificate."""
    return Site(tmp_path_factory.mktemp("peers") / "site")


@pytest.fixture
def origin() -> Iterator[OriginServer]:
    """A server that has the image, raw and compressed."""
    with OriginServer() as server:
        server.add("/image", IMAGE)
        server.add("/image.gz", gzip.compress(IMAGE, 1))
        yield server


def _raw(origin: OriginServer, **changes: object) -> Entry:
    return entry_of(IMAGE, f"{origin.url}/image", **changes)  # type: ignore[arg-type]


def _compressed(origin: OriginServer) -> Entry:
    return entry_of(IMAGE, f"{origin.url}/image.gz", compression="gz")


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[PeerHost]:
    """Another host, which has the image and serves it."""
    host = PeerHost(tmp_path_factory.mktemp("peer") / "host", site.settings())
    host.add(IMAGE, entry_of(IMAGE, "http://192.0.2.1/image"))
    with host.served():
        yield host
    host.close()


def _asking(
    tmp_path: Path, site: Site, *peers: str, rest_s: float = 30, **changes: object
) -> AskingHost:
    settings = site.settings(hosts=peers, **{"timeout_s": 8, **changes})
    return AskingHost(tmp_path / "state", settings, backoff=Backoff(base_s=rest_s))


@contextmanager
def _damaged(peer: PeerHost, chunk: bytes, content: bytes) -> Iterator[None]:
    """Let a chunk's file have another content, none when that is empty."""
    path = peer.chunk_path(chunk)
    path.unlink()
    if content:
        path.write_bytes(content)
    yield
    path.write_bytes(chunk)


def _last_statistics(host: AskingHost) -> list[PeerStatistics]:
    async def look() -> list[PeerStatistics]:
        return host.peers.statistics()

    return trio.run(look)


async def _fetch_all(host: AskingHost, identifier: str) -> None:
    for index in STORED:
        await host.chunk_fetcher.fetch(identifier, index)


@pytest.mark.root
def test_a_peer_that_has_an_image_spares_the_origin(
    tmp_path: Path, site: Site, origin: OriginServer, peer: PeerHost
) -> None:
    """Readers' chunks, the rest, a repair and a whole compressed image all come from the peer, the
    bytes are right, and the origin is asked for none of them."""
    host = _asking(tmp_path, site, peer.name)
    entry = _raw(origin)
    identifier = host.add(IMAGE, entry)

    async def script(host: AskingHost) -> None:
        await host.chunk_fetcher.fetch(identifier, 5)
        done = await Completion(host.chunk_fetcher, host.images, attempts=2).complete(
            entry, [7], lambda *_: None
        )
        assert done.sha256 == entry.digests["sha256"]
        counted = host.chunk_fetcher.traffic.images[identifier]
        assert counted.peer_bytes == counted.remote_bytes == len(IMAGE) - CHUNK_BYTES
        async with trio.open_nursery() as nursery:
            origins = EntryOrigins(
                host.images, host.fetcher, host.chunk_fetcher, host.entries.get, nursery
            )
            host.chunks.remove({host.images.manifest(identifier).digest(2)})
            await origins.restore(identifier, 2)
            host.images.manifest_path(identifier).write_bytes(b"damaged")
            await origins.remake(identifier)
        assert host.read(identifier) == IMAGE
        host.images.remove(identifier)
        assert host.chunks.statistics().chunks == 0
        assert not origin.log
        fetched = await host.fetcher.fetch(_compressed(origin), lambda *_: None)
        assert fetched.sha256 == entry.digests["sha256"]
        (statistics,) = host.peers.statistics()
        assert statistics.asked == statistics.served and not statistics.fault

    host.run(script)
    assert host.read(identifier) == IMAGE
    assert not origin.log
    host.close()


def _corrupt(connection: ssl.SSLSocket, head: bytes) -> None:
    """Answer every chunk with bytes of the right length and another digest."""
    size = 70001 if manifest_of(IMAGE).digest(10).hex().encode() in head else CHUNK_BYTES
    connection.sendall(answer(OTHER[:size]))


def _late(connection: ssl.SSLSocket, head: bytes) -> None:
    """Send a byte now and then, for ever."""
    connection.sendall(answer(b"", length=CHUNK_BYTES))
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def _silent(connection: ssl.SSLSocket, head: bytes) -> None:
    """Say nothing."""
    connection.recv(1)


def _endless(connection: ssl.SSLSocket, head: bytes) -> None:
    """Answer 200 with bytes that never end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")


def _endless_until_closed(connection: ssl.SSLSocket, head: bytes) -> None:
    """Answer 200 without any length."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        connection.sendall(bytes(0x10000))


def _too_much(connection: ssl.SSLSocket, head: bytes) -> None:
    """Announce a terabyte, and begin it."""
    connection.sendall(answer(bytes(0x10000), length=1024**4))
    while True:
        connection.sendall(bytes(0x10000))


def _bomb(connection: ssl.SSLSocket, head: bytes) -> None:
    """Send something short that decompresses to much."""
    body = gzip.compress(bytes(64 * 1024**2)).ljust(CHUNK_BYTES, b"\0")
    connection.sendall(answer(body, "Content-Encoding: gzip"))


def _elsewhere(connection: ssl.SSLSocket, head: bytes) -> None:
    """Lead to another place."""
    connection.sendall(answer(b"", "Location: https://127.0.0.1:9/", status="302 Found"))


def _cut(connection: ssl.SSLSocket, head: bytes) -> None:
    """Begin right, and hang up."""
    connection.sendall(answer(IMAGE[:1000], length=CHUNK_BYTES))
    connection.close()


@pytest.mark.parametrize(
    ("misbehave", "fault", "timeout_s"),
    [
        (_corrupt, "wrong chunk", 8),
        (_late, "did not answer within 1.5 s", 1.5),
        (_silent, "did not answer within 1.5 s", 1.5),
        (_endless, "does not say how much", 8),
        (_endless_until_closed, "does not say how much", 8),
        (_too_much, "cannot be right", 8),
        (_bomb, "content coding", 8),
        (_elsewhere, "answers 302", 8),
        (_cut, "connection failed", 8),
    ],
)
def test_a_bad_peer_costs_one_request(
    tmp_path: Path, site: Site, origin: OriginServer, caplog: pytest.LogCaptureFixture,
    misbehave: Misbehaviour, fault: str, timeout_s: float,
) -> None:  # fmt: skip
    """Whatever a peer sends instead of a chunk: the reader gets the origin's, nothing wrong is
    stored, and the next readers do not ask that peer, which is left alone."""
    with FalsePeer(site, misbehave) as false:
        host = _asking(tmp_path, site, false.name, timeout_s=timeout_s)
        identifier = host.add(IMAGE, _raw(origin))

        async def script(host: AskingHost) -> None:
            begun = trio.current_time()
            await host.chunk_fetcher.fetch(identifier, 0)
            assert trio.current_time() - begun < 20  # of a demand time-out of 25
            await _fetch_all(host, identifier)
            assert sum(b"?image=" in head for head in false.heads) == 1
            (statistics,) = host.peers.statistics()
            assert (statistics.asked, statistics.served, statistics.failed) == (1, 0, 1)

        host.run(script)
        assert fault in caplog.text
        assert host.read(identifier) == IMAGE
        assert sum(request.sent_bytes for request in origin.log) == len(IMAGE) - CHUNK_BYTES
        host.close()


def test_a_dead_peer_is_asked_again_by_nobody_who_waits(
    tmp_path: Path, site: Site, origin: OriginServer
) -> None:
    """Sixteen readers at once and others later wait for a host that takes connections and is dead
    once at most, and for one that refuses them not at all; its row says why it is left alone."""
    with socket.create_server((HOST, 0), backlog=64) as dead:
        with socket.create_server((HOST, 0)) as probe:
            closed = f"{HOST}:{probe.getsockname()[1]}"
        host = _asking(tmp_path, site, f"{HOST}:{dead.getsockname()[1]}", closed, timeout_s=1)
        identifier = host.add(IMAGE, _raw(origin))

        async def script(host: AskingHost) -> None:
            async with trio.open_nursery() as nursery:
                begun = trio.current_time()
                for index in [0, 1, 2, 4] * 4:
                    nursery.start_soon(host.chunk_fetcher.fetch, identifier, index)
            assert trio.current_time() - begun < 20
            asked = sum(peer.asked for peer in host.peers.statistics())
            await _fetch_all(host, identifier)
            statistics = host.peers.statistics()
            assert sum(peer.asked for peer in statistics) == asked <= 8
            assert all(peer.fault and peer.rests_s > 0 for peer in statistics)

        host.run(script)
        assert host.read(identifier) == IMAGE
        host.close()


@pytest.mark.root
def test_a_peer_is_asked_again_once_it_is_back(
    tmp_path: Path, site: Site, origin: OriginServer
) -> None:
    """A host that was down is noticed when it serves again, without a reader having waited."""
    peer = PeerHost(tmp_path / "peer", site.settings())
    peer.add(IMAGE, _raw(origin))
    host = _asking(tmp_path, site, peer.name, rest_s=0.1)
    identifier = host.add(IMAGE, _raw(origin))

    async def script(host: AskingHost) -> None:
        await host.chunk_fetcher.fetch(identifier, 0)
        assert len(origin.log) == 1
        assert host.peers.statistics()[0].fault
        with peer.served():
            await host.recovery()
            await _fetch_all(host, identifier)
        assert len(origin.log) == 1
        assert host.peers.statistics()[0].asked == len(STORED)

    host.run(script)
    host.close()
    peer.close()


def test_nothing_is_said_to_who_has_another_certificate(
    tmp_path: Path, site: Site, origin: OriginServer
) -> None:
    """A server with a certificate of another authority, or of another host, gets no request, so no
    token; the reader gets its chunk from the origin."""
    stranger = Site(tmp_path / "other")
    named = Site(site.folder, "elsewhere.example.org")
    with (
        FalsePeer(stranger, _corrupt) as forged,
        FalsePeer(named, _corrupt, "elsewhere.example.org") as renamed,
    ):
        host = _asking(tmp_path, site, forged.name, renamed.name)
        identifier = host.add(IMAGE, _raw(origin))
        host.run(lambda host: _fetch_all(host, identifier))
        assert forged.heads == renamed.heads == []
        for peer in _last_statistics(host):
            assert "certificate is not a peer's" in peer.fault
        assert host.read(identifier) == IMAGE
        host.close()


@pytest.mark.root
def test_a_wrong_token_is_of_no_use(
    tmp_path: Path, site: Site, origin: OriginServer, peer: PeerHost,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A host whose token the peer does not know gets nothing from it; with the peer's second token,
    put into its file while both run, it does."""
    token = tmp_path / "token"
    token.write_text("w" * 40 + "\n")
    token.chmod(0o600)
    host = _asking(tmp_path, site, peer.name, rest_s=0.1, token_file=token)
    identifier = host.add(IMAGE, _raw(origin))

    async def script(host: AskingHost) -> None:
        await host.chunk_fetcher.fetch(identifier, 0)
        assert len(origin.log) == 1
        assert "does not accept our token" in host.peers.statistics()[0].fault
        with peer.configuration.peers.token_file.open("a") as file:
            file.write("w" * 40 + "\n")
        await host.recovery()
        await host.chunk_fetcher.fetch(identifier, 1)
        assert len(origin.log) == 1

    host.run(script)
    assert "w" * 40 not in caplog.text and site.token not in caplog.text
    host.close()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_an_exposed_token_is_not_sent(tmp_path: Path, origin: OriginServer, mode: int) -> None:
    """A token file that others can read or change is not used: peers are not asked."""
    site = Site(tmp_path / "site")
    (site.folder / HOST / "token").chmod(mode)
    with FalsePeer(site, _corrupt) as false:
        host = _asking(tmp_path, site, false.name)
        identifier = host.add(IMAGE, _raw(origin))
        host.run(lambda host: _fetch_all(host, identifier))
        assert false.heads == []
        host.close()


@pytest.mark.root
def test_a_peer_without_the_image_is_left_in_peace(
    tmp_path: Path, site: Site, origin: OriginServer, peer: PeerHost
) -> None:
    """A host that has nothing of an image is asked for it once, not for every chunk; that it lacks
    the image is no failure."""
    host = _asking(tmp_path, site, peer.name)
    identifier = host.add(OTHER, entry_of(OTHER, origin.add("/other", OTHER)))
    host.run(lambda host: _fetch_all(host, identifier))
    (statistics,) = _last_statistics(host)
    assert (statistics.asked, statistics.failed, statistics.fault) == (1, 0, "")
    host.close()


@pytest.mark.root
def test_what_a_peer_lacks_comes_from_the_origin(
    tmp_path: Path, site: Site, origin: OriginServer, peer: PeerHost
) -> None:
    """Chunks that a peer has lost, or that have rotted there, are had from the origin, and the
    others still from the peer."""
    with (
        _damaged(peer, IMAGE[:CHUNK_BYTES], b""),
        _damaged(peer, IMAGE[CHUNK_BYTES : 2 * CHUNK_BYTES], b"rot"),
    ):
        host = _asking(tmp_path, site, peer.name)
        identifier = host.add(IMAGE, _raw(origin))
        host.run(lambda host: _fetch_all(host, identifier))
    assert host.read(identifier) == IMAGE
    assert [request.range for request in origin.log] == [
        f"bytes={index * CHUNK_BYTES}-{(index + 1) * CHUNK_BYTES - 1}" for index in (0, 1)
    ]
    assert _last_statistics(host)[0].failed == 0
    host.close()


@pytest.mark.root
def test_a_manifest_of_another_image_is_the_peers_fault(
    tmp_path: Path, site: Site, origin: OriginServer, peer: PeerHost
) -> None:
    """When every chunk is as a peer's manifest says and the whole is not what was promised, the
    image comes from its origin, the peer is left alone, and nothing of its bytes stays."""
    wanted, given = OTHER[CHUNK_BYTES : 4 * CHUNK_BYTES], OTHER[4 * CHUNK_BYTES : 7 * CHUNK_BYTES]
    entry = entry_of(wanted, origin.add("/wanted.gz", gzip.compress(wanted, 1)), compression="gz")
    draft = peer.images.begin()
    draft.add([given[start : start + CHUNK_BYTES] for start in range(0, len(given), CHUNK_BYTES)])
    peer.images.publish(entry.identifier, draft.manifest())
    peer.insert(entry, "verified")
    host = _asking(tmp_path, site, peer.name)

    async def script(host: AskingHost) -> None:
        await host.fetcher.fetch(entry, lambda *_: None)
        (statistics,) = host.peers.statistics()
        assert statistics.asked == 1 + 3  # the manifest and the chunks
        assert statistics.rests_s > 0 and "promises" in statistics.fault

    host.run(script)
    assert host.read(entry.identifier) == wanted
    assert [request.path for request in origin.log] == ["/wanted.gz"]
    assert host.chunks.statistics().chunks == 3
    host.close()


@pytest.mark.root
def test_a_whole_fetch_survives_a_peer_that_goes(
    tmp_path: Path, site: Site, origin: OriginServer, peer: PeerHost
) -> None:
    """A whole image whose peer lacks a chunk is fetched from its origin instead, and is right."""
    host = _asking(tmp_path, site, peer.name)
    entry = _compressed(origin)

    async def script(host: AskingHost) -> None:
        await host.fetcher.fetch(entry, lambda *_: None)

    with _damaged(peer, IMAGE[8 * CHUNK_BYTES : 9 * CHUNK_BYTES], b""):
        host.run(script)
    assert host.read(entry.identifier) == IMAGE
    assert [request.status for request in origin.log] == [200]
    host.close()


@pytest.mark.root
def test_an_endorsed_index_may_come_from_a_peer(
    tmp_path: Path, site: Site, origin: OriginServer, peer: PeerHost
) -> None:
    """A peer's manifest is used when it has the digest that the endorser signed, and then the
    origin's index is not asked for; any other is refused, and the origin's is read."""
    content = index_of(IMAGE, tmp_path)
    wrong = index_of(OTHER, tmp_path)
    url = origin.add("/image.caibx", content)
    entry = _raw(origin, index=EndorsedIndex(url=url, sha256=hashlib.sha256(content).hexdigest()))
    settings = FetchSettings(attempts=1)

    async def script(host: AskingHost) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await read_index(entry, client, settings, host.peers)) == manifest_of(IMAGE)
            assert not origin.log
            with FalsePeer(site, lambda c, head: c.sendall(answer(wrong))) as false:
                peers = Peers(site.settings(hosts=(false.name,)))
                assert (await read_index(entry, client, settings, peers)) == manifest_of(IMAGE)
                assert peers.statistics()[0].failed == 1
                await peers.client.aclose()
        assert [request.path for request in origin.log] == ["/image.caibx"]

    host = _asking(tmp_path, site, peer.name)
    host.run(script)
    host.close()


def test_a_busy_peer_is_no_bad_peer(tmp_path: Path, site: Site, origin: OriginServer) -> None:
    """Whom a peer sends elsewhere goes to the origin, and asks that peer for the next chunk."""
    body = b'{"code": "peer-busy"}'
    busy = answer(body, status="503 Service Unavailable")
    with FalsePeer(site, lambda connection, head: connection.sendall(busy)) as false:
        host = _asking(tmp_path, site, false.name)
        identifier = host.add(IMAGE, _raw(origin))
        host.run(lambda host: _fetch_all(host, identifier))
        assert len(false.heads) >= len(STORED)
    (statistics,) = _last_statistics(host)
    assert (statistics.failed, statistics.fault, statistics.rests_s) == (0, "", 0)
    assert host.read(identifier) == IMAGE
    host.close()


def test_a_host_does_not_ask_itself(site: Site) -> None:
    """Of the configured hosts, the same list everywhere, the one that is this host is left out; a
    name stands for all its addresses."""
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]

    async def script() -> list[str]:
        hosts = (
            f"localhost:{port}",
            f"127.0.0.1:{port}",
            f"[::1]:{port}",
            "192.0.2.1",
            "localhost",
        )
        peers = Peers(site.settings(hosts=hosts, listen="::", port=port))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peers.run)
            await trio.sleep(0.2)
            nursery.cancel_scope.cancel()
        return [peer.location for peer in peers.statistics()]

    assert trio.run(script) == [f"https://192.0.2.1:{port}"]


def test_hosts_that_lead_nowhere_are_named(site: Site) -> None:
    """A name that no resolver knows, or that cannot be a name, is told with the reason, like an
    address where nobody listens."""

    async def script() -> dict[str, str]:
        hosts = ("nobody.invalid", "a..b", "127.0.0.1:9")
        return await Peers(site.settings(hosts=hosts, timeout_s=8)).survey()

    found = trio.run(script)

    assert set(found) == {"nobody.invalid", "a..b", "127.0.0.1 (https://127.0.0.1:9)"}
    assert all("cannot be resolved" in found[name] for name in ("nobody.invalid", "a..b"))
