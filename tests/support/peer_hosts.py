"""Real peer servers for tests: state directories whose images are whole, and what goes wrong with
peers."""

import hashlib
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import httpx
import trio

from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.configuration import (
    Configuration,
    FetchSettings,
    PeersSettings,
    SpaceSettings,
)
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.entry import Entry
from stratocache.cache.fetch import Fetcher
from stratocache.cache.images import ImageStore
from stratocache.cache.origin import Backoff
from stratocache.cache.peers import Peers
from stratocache.cache.supply import Supply
from stratocache.fs.listener import listen_tcp
from stratocache.fs.state import Database, now
from support.appliance import free_port
from support.command_line import run_alone
from support.lazy import manifest_of

HOST = "127.0.0.1"
_END_TIMEOUT_S = 30


class Site:
    """What `peers init` makes for some hosts, and the settings of each."""

    def __init__(self, folder: Path, *hosts: str) -> None:
        self.folder = folder
        done = run_alone("peers", "init", *(hosts or (HOST,)), "--output", str(folder))
        assert done.exit_code == 0, done.output

    @property
    def token(self) -> str:
        """The token of all."""
        return (self.folder / "token").read_text().strip()

    def settings(self, **changes: object) -> PeersSettings:
        """Return the settings of the host at `HOST`, with changes."""
        place = self.folder / HOST
        files = {
            "token_file": place / "token",
            "ca_file": place / "ca.pem",
            "certificate_file": place / "host.pem",
            "key_file": place / "host.key",
        }
        return PeersSettings.model_validate({**files, **changes})


class PeerHost:
    """A state directory with images, whose peers are served by the real process."""

    def __init__(self, root: Path, settings: PeersSettings) -> None:
        root.mkdir()
        self.port = free_port()
        peers = settings.model_copy(update={"listen": HOST, "port": self.port})
        self.configuration = Configuration(
            state_dir=root / "state", run_dir=root / "run", peers=peers
        )
        self.configuration.state_dir.mkdir()
        self.configuration.run_dir.mkdir()
        self.db = Database(self.configuration.database)
        self.db.migrate()
        self.chunks = ChunkStore(self.configuration.state_dir / "chunks")
        self.images = ImageStore(self.configuration.state_dir, self.chunks)
        self.log = root / "peers.log"

    @property
    def url(self) -> str:
        """Where it is served, without a trailing slash."""
        return f"https://{HOST}:{self.port}"

    @property
    def name(self) -> str:
        """What `peers.hosts` calls it."""
        return f"{HOST}:{self.port}"

    def add(self, image: bytes, entry: Entry, *, state: str = "verified") -> None:
        """Have an image."""
        draft = self.images.begin()
        starts = range(0, len(image), CHUNK_BYTES)
        draft.add([image[start : start + CHUNK_BYTES] for start in starts])
        self.images.publish(entry.identifier, draft.manifest())
        self.images.finish(draft)
        assert draft.manifest() == manifest_of(image)
        self.insert(entry, state)

    def insert(self, entry: Entry, state: str) -> None:
        """Let the state know of an image."""
        self.db.connection.execute(
            "INSERT INTO images (id, state, size_bytes, sha256, entry, created_at) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (
                entry.identifier, state, entry.size_bytes, entry.digests["sha256"],
                entry.model_dump_json(), now(),
            ),
        )  # fmt: skip

    def chunk_path(self, data: bytes) -> Path:
        """Return the file of a chunk."""
        return self.chunks.path(hashlib.sha256(data).digest())

    @contextmanager
    def served(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run the real process until the end of the block."""
        path = self.configuration.run_dir / "configuration.json"
        path.write_text(self.configuration.model_dump_json())
        reports, ready = os.pipe()
        with listen_tcp(HOST, self.port) as listener, self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "stratocache.api.peer_server", "--config-json", str(path),
                 "--listen-fd", str(listener.fileno()), "--ready-fd", str(ready)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=(listener.fileno(), ready),
            )  # fmt: skip
        os.close(ready)
        try:
            with open(reports, "rb") as pipe:
                assert pipe.read(1) == b"R", self.log.read_text()
            yield process
        finally:
            process.kill()
            process.wait(_END_TIMEOUT_S)

    def close(self) -> None:
        """Close the stores."""
        self.chunks.close()
        self.db.close()


class AskingHost:
    """A state directory that gets its images from peers, else from their origins."""

    def __init__(
        self, state_dir: Path, settings: PeersSettings, *, backoff: Backoff | None = None
    ) -> None:
        self.configuration = Configuration(
            state_dir=state_dir, peers=settings,
            fetch=FetchSettings(attempts=2, quiet_s=0.1), space=SpaceSettings(reserve_bytes=0),
        )  # fmt: skip
        self._backoff = backoff or Backoff()
        self.chunks = ChunkStore(state_dir / "chunks")
        self.images = ImageStore(state_dir, self.chunks)
        self.entries: dict[str, Entry] = {}
        self.peers: Peers
        self.chunk_fetcher: ChunkFetcher
        self.fetcher: Fetcher

    def add(self, image: bytes, entry: Entry) -> str:
        """Publish the manifest of an image of which no chunk is here; return its identifier."""
        self.entries[entry.identifier] = entry
        self.images.publish(entry.identifier, manifest_of(image))
        return entry.identifier

    def run(self, script: Callable[["AskingHost"], Awaitable[None]]) -> None:
        """Run a script beside what looks after the peers."""

        async def main() -> None:
            async with httpx.AsyncClient(trust_env=False) as client, trio.open_nursery() as nursery:
                images, configuration = self.images, self.configuration
                self.peers = Peers(configuration.peers, backoff=self._backoff)
                self.fetcher = Fetcher(configuration, images, self.chunks, client, peers=self.peers)
                self.chunk_fetcher = ChunkFetcher(
                    configuration, images, client, nursery, self.entries.get,
                    self.fetcher.chunk_space, peers=self.peers,
                )  # fmt: skip
                images.set_supplier(Supply(images, self.chunk_fetcher, lambda name: [name]))
                nursery.start_soon(self.peers.run)
                with trio.fail_after(90):
                    await script(self)
                nursery.cancel_scope.cancel()

        trio.run(main)

    async def recovery(self) -> None:
        """Return when no peer is known to be ill."""
        while True:
            if not any(peer.fault for peer in self.peers.statistics()):
                return
            await trio.sleep(0.05)

    def read(self, identifier: str) -> bytes:
        """Return all of an image that is whole here."""
        reader = self.images.reader(identifier)
        return bytes(reader.read_blocking(0, reader.size_bytes))

    def close(self) -> None:
        """Close the stores."""
        self.chunks.close()


Misbehaviour = Callable[[ssl.SSLSocket, bytes], None]
"""What is done with a connection whose request's head has come."""


class FalsePeer:
    """Listens with a certificate and does what a test says with every request."""

    def __init__(self, site: Site, misbehave: Misbehaviour, host: str = HOST) -> None:
        place = site.folder / host
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(place / "host.pem", place / "host.key")
        self._misbehave = misbehave
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.heads: list[bytes] = []
        """What has been asked."""
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []

    @property
    def name(self) -> str:
        """What `peers.hosts` calls it."""
        return f"{HOST}:{self.port}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_END_TIMEOUT_S)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._start(self._serve, connection)

    def _serve(self, plain: socket.socket) -> None:
        with plain, suppress(OSError):
            connection = self._context.wrap_socket(plain, server_side=True)
            with connection:
                self._connections.append(connection)
                while head := _head(connection):
                    self.heads.append(head)
                    self._misbehave(connection, head)


def _head(connection: ssl.SSLSocket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        data = connection.recv(4096)
        if not data:
            return b""
        head += data
    return head


def answer(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """Return an answer, whose length may be a lie."""
    declared = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {declared}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
