"""Peers: other hosts that have chunks and manifests, asked before an image's origin.

A peer is believed nothing: chunks are compared with their digests, manifests with what an endorser
signed. PEERS.md has the protocol, the time-outs and who is left alone for how long.
"""

import hashlib
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from stratocache.cache.chunk_origins import Deliver, Moved, Unavailable, Wanted
from stratocache.cache.chunks import CHUNK_BYTES
from stratocache.cache.configuration import PeersSettings
from stratocache.cache.errors import NotVerified
from stratocache.cache.origin import Backoff
from stratocache.cache.origin_health import OriginHealth
from stratocache.cache.peer_client import Peer, PeerClient

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_ASKED_MAX = 3
"""Peers that are asked for one chunk: what costs a reader time must not grow with the site."""
_LACKS_S = 30.0
"""How long a peer that has nothing of an image is not asked for more of it."""
_LACKS_MAX = 4096
_RESOLVE_INTERVAL_S = 30.0
_LOOK_INTERVAL_S = 0.5
_ADDRESSES_MAX = 256
_PROBE_PATH = f"/v1/chunks/{'0' * 64}"
IMAGE_UNKNOWN = "image-unknown"
"""The code by which a peer says that it has nothing of an image."""


@dataclass(frozen=True)
class PeerStatistics:
    """One peer, since the process started."""

    location: str
    host: str
    asked: int
    served: int
    failed: int
    received_bytes: int
    rests_s: float
    """For how long it is left alone from now on."""
    fault: str
    """How it failed last; empty when it has answered since."""


@dataclass(frozen=True)
class Offer(Generic[_T]):
    """What a peer says that an image is, as far as that could be checked."""

    peer: Peer
    content: _T


class Peers:
    """The peers of one host; `run` keeps them up to date. Belongs to one trio loop."""

    def __init__(self, settings: PeersSettings, *, backoff: Backoff | None = None) -> None:
        self.settings = settings
        self.timeout_s = settings.timeout_s
        self.health = OriginHealth(backoff or Backoff())
        self.client = PeerClient(settings)
        self.unresolved: dict[str, str] = {}
        """Hosts whose names lead nowhere, and why."""
        self._peers: dict[str, Peer] = {}
        for host, port in map(self._split, settings.hosts):
            if _is_address(host):  # known before anybody reads
                self._take(host, port, [host])

    # Whom to ask.

    def origins(self, image_id: str, digest: bytes) -> "list[PeerOrigin]":
        """Return the peers to ask for a chunk: some that are well and do not lack the image."""
        well = [peer for peer in self._peers.values() if self._is_well(peer)]
        return self._some(well, image_id, digest, _ASKED_MAX)

    def last_resort(self, image_id: str, digest: bytes) -> "list[PeerOrigin]":
        """Return a peer that has failed, for when nobody else gives a chunk."""
        ill = [peer for peer in self._peers.values() if not self._is_well(peer)]
        return self._some(ill, image_id, digest, 1)

    def _some(
        self, peers: Sequence[Peer], image_id: str, digest: bytes, count: int
    ) -> "list[PeerOrigin]":
        now = trio.current_time()
        asked = [peer for peer in peers if peer.lacks.get(image_id, 0.0) <= now]
        # by chunk, so that all peers that have an image serve a part of it
        asked.sort(key=lambda peer: hashlib.sha256(digest + peer.location.encode()).digest())
        return [PeerOrigin(self, peer, image_id) for peer in asked[:count]]

    def _is_well(self, peer: Peer) -> bool:
        resting = self.health.rests_until(peer.location) > trio.current_time()
        return not resting and not self.health.fault(peer.location)

    # Asking.

    async def chunk(self, peer: Peer, image_id: str, item: Wanted, moved: Moved) -> bytes:
        """Return what a peer gives for a chunk, of the right length; raises `Unavailable`."""
        path = f"/v1/chunks/{item.digest.hex()}?image={image_id}"
        data = await self._ask(peer, path, image_id, item.size_bytes)
        moved(len(data))
        return data

    async def manifest(
        self, image_id: str, index_bytes: int, check: Callable[[bytes], _T]
    ) -> Offer[_T] | None:
        """Return the first manifest of an image, of so many bytes, that `check` accepts.

        All peers that are well are asked at once. `check` runs in a thread and raises `NotVerified`
        for what cannot be; whoever sent that is left alone.
        """
        found: list[Offer[_T]] = []

        async def ask(peer: Peer, nursery: trio.Nursery) -> None:
            offer = await self._offer(peer, image_id, index_bytes, check)
            if offer is not None:
                found.append(offer)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for peer in self._peers.values():
                if self._is_well(peer):
                    nursery.start_soon(ask, peer, nursery)
        return found[0] if found else None

    async def _offer(
        self, peer: Peer, image_id: str, index_bytes: int, check: Callable[[bytes], _T]
    ) -> Offer[_T] | None:
        path = f"/v1/images/{image_id}/manifest"
        try:
            content = await self._ask(peer, path, image_id, index_bytes)
        except Unavailable as error:
            self.note(peer.location, error)
            return None
        try:
            checked = await trio.to_thread.run_sync(check, content)
        except NotVerified as error:
            self.blame(peer, f"its manifest of {image_id} is wrong: {error.message}")
            return None
        self.succeeded(peer)
        return Offer(peer, checked)

    async def _ask(self, peer: Peer, path: str, image_id: str, size_bytes: int) -> bytes:
        """Return what a peer gives, which has so many bytes, and count it."""
        peer.asked += 1
        timeout_s = self.timeout_s * -(-size_bytes // CHUNK_BYTES)
        try:
            content = await self.client.get(peer, path, lambda size: size == size_bytes, timeout_s)
        except Unavailable as error:
            if error.kind != "absent":
                peer.failed += 1
            elif str(error) == IMAGE_UNKNOWN:
                if len(peer.lacks) >= _LACKS_MAX:
                    peer.lacks.clear()
                peer.lacks[image_id] = trio.current_time() + _LACKS_S
            raise
        peer.received_bytes += len(content)
        return content

    def note(self, location: str, error: Unavailable) -> None:
        """Leave a peer alone that has failed; that it lacks something is no failure."""
        if error.kind != "absent":
            self.health.failed(location, error)

    def succeeded(self, peer: Peer) -> None:
        """Count an answer whose bytes are right."""
        peer.served += 1
        self.health.succeeded(peer.location)

    def blame(self, peer: Peer, reason: str) -> None:
        """Leave a peer alone that has served something wrong."""
        peer.failed += 1
        self.health.failed(peer.location, Unavailable(reason, "wrong"))

    # Keeping up to date.

    async def run(self) -> None:
        """Find the addresses of names, and ask those that have failed whether they are back."""
        try:
            resolve_at = trio.current_time()
            while True:
                try:
                    if trio.current_time() >= resolve_at:
                        resolve_at = trio.current_time() + _RESOLVE_INTERVAL_S
                        await self._resolve()
                    await self._probe_ill()
                except Exception:
                    log.exception("looking after peers failed")  # which nothing else ends for
                await trio.sleep(_LOOK_INTERVAL_S)
        finally:
            await self.client.aclose()

    async def _probe_ill(self) -> None:
        async with trio.open_nursery() as nursery:
            for peer in list(self._peers.values()):
                if self._is_to_be_probed(peer):
                    nursery.start_soon(self._probe, peer)

    async def survey(self) -> dict[str, str]:
        """Return, by address, or by host whose name leads nowhere, why a peer cannot be asked; for
        who does not `run`."""
        faults: dict[str, str] = {}

        async def look(peer: Peer) -> None:
            await self._probe(peer)
            fault = self.health.fault(peer.location)
            if fault:
                faults[f"{peer.host} ({peer.location})"] = fault

        await self._resolve()
        async with trio.open_nursery() as nursery:
            for peer in self._peers.values():
                nursery.start_soon(look, peer)
        await self.client.aclose()
        return {**faults, **self.unresolved}

    def _is_to_be_probed(self, peer: Peer) -> bool:
        resting = self.health.rests_until(peer.location) > trio.current_time()
        return bool(self.health.fault(peer.location)) and not resting

    async def _probe(self, peer: Peer) -> None:
        """Ask for a chunk that does not exist; nobody's read waits for that."""
        try:
            await self.client.get(peer, _PROBE_PATH, lambda size: False, self.timeout_s)
        except Unavailable as error:
            if error.kind == "absent":
                self.health.answers(peer.location)
            else:
                self.health.failed(peer.location, error)

    async def _resolve(self) -> None:
        """Look up all names; what one of them led to stays while it leads nowhere."""
        named = [
            (host, port)
            for host, port in map(self._split, self.settings.hosts)
            if not _is_address(host)
        ]
        async with trio.open_nursery() as nursery:
            for host, port in named:
                nursery.start_soon(self._resolve_name, host, port)

    async def _resolve_name(self, host: str, port: int) -> None:
        try:
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            self.unresolved[host] = f"its name cannot be resolved: {error}"
            return
        self.unresolved.pop(host, None)
        addresses = list(dict.fromkeys(str(item[4][0]) for item in found))
        for location, peer in list(self._peers.items()):
            if peer.host == host and peer.port == port and peer.address not in addresses:
                del self._peers[location]
                self.health.forget(location)
        self._take(host, port, addresses)

    def _take(self, host: str, port: int, addresses: Sequence[str]) -> None:
        for address in addresses:
            peer = Peer(host, address, port)
            itself = port == self.settings.port and bool(self.settings.listen) and _is_ours(address)
            if not itself and len(self._peers) < _ADDRESSES_MAX:
                self._peers.setdefault(peer.location, peer)

    def _split(self, text: str) -> tuple[str, int]:
        """Return name or address, and port, of a configured host."""
        host, colon, port = text.rpartition(":")
        if not colon or text.endswith("]"):
            host, port = text, str(self.settings.port)
        return host.strip("[]"), int(port)

    def statistics(self) -> list[PeerStatistics]:
        """Return what each peer did, in the order of the configuration."""
        now = trio.current_time()
        return [
            PeerStatistics(
                location=peer.location,
                host=peer.host,
                asked=peer.asked,
                served=peer.served,
                failed=peer.failed,
                received_bytes=peer.received_bytes,
                rests_s=max(0.0, self.health.rests_until(peer.location) - now),
                fault=self.health.fault(peer.location),
            )
            for peer in self._peers.values()
        ]


class PeerOrigin:
    """One peer as the origin of an image's chunks; see `ChunkOrigin`."""

    run_max = 1
    of_peer = True

    def __init__(self, peers: Peers, peer: Peer, image_id: str) -> None:
        self.location = peer.location
        self._peers = peers
        self._peer = peer
        self._image_id = image_id

    async def read(self, wanted: Sequence[Wanted], deliver: Deliver, moved: Moved) -> None:
        """Deliver chunks by a request for each."""
        for item in wanted:
            if self._peer.lacks.get(self._image_id, 0.0) > trio.current_time():
                raise Unavailable(IMAGE_UNKNOWN, "absent")
            data = await self._peers.chunk(self._peer, self._image_id, item, moved)
            try:
                await deliver(item, data)
            except Unavailable as error:
                self._peer.failed += error.kind == "wrong"
                raise
            self._peer.served += 1


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_ours(address: str) -> bool:
    """Tell whether an address is this host's: only those can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
