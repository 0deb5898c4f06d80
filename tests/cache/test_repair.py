"""Chunks and manifests that are damaged or gone come back from where they came from."""

import gzip
import hashlib
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import httpx
import pytest
import trio
from support.origins import Fault, OriginServer, Resource

from stratocache.cache import seals
from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.configuration import Configuration, FetchSettings, SpaceSettings
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.entry import LOCAL_CATALOGUE, Compression, Endorser, Entry
from stratocache.cache.errors import NotVerified, OriginFailed
from stratocache.cache.fetch import Fetcher
from stratocache.cache.image_reader import ImageReader
from stratocache.cache.images import ImageStore
from stratocache.cache.origin import Backoff
from stratocache.cache.repair import Repairer
from stratocache.cache.restoration import EntryOrigins
from stratocache.cache.supply import Supply

IMAGE = "MMZu9WvwKIro-rtBQfDk4PsKO7_"
CONTENT = Random(1).randbytes(5 * CHUNK_BYTES + 4096)
Script = Callable[["Site"], Awaitable[None]]


@dataclass
class Told:
    """What a witness was told."""

    repaired: list[bytes] = field(default_factory=list)
    lost: list[bytes] = field(default_factory=list)
    manifests: list[str] = field(default_factory=list)
    lost_manifests: list[str] = field(default_factory=list)

    def chunk_repaired(self, digest: bytes, identifier: str) -> None:
        """Remember."""
        self.repaired.append(digest)

    def chunk_lost(self, digest: bytes, identifiers: Sequence[str], reason: str) -> None:
        """Remember."""
        assert identifiers == [IMAGE] and reason
        self.lost.append(digest)

    def manifest_repaired(self, identifier: str) -> None:
        """Remember."""
        self.manifests.append(identifier)

    def manifest_lost(self, identifier: str, reason: str) -> None:
        """Remember."""
        self.lost_manifests.append(identifier)


class Site:
    """A state directory with one image, and what repairs it."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.configuration = Configuration(
            state_dir=state_dir,
            fetch=FetchSettings(attempts=2, connect_timeout_s=5, read_timeout_s=10),
            space=SpaceSettings(reserve_bytes=0),
        )
        self.chunks = ChunkStore(state_dir / "chunks")
        self.images = ImageStore(state_dir, self.chunks)
        self.told = Told()
        self.entry: Entry | None = None

    def publish(
        self, location: str, source: bytes, compression: Compression = "none", **changes: object
    ) -> None:
        """Fetch the image from a location."""
        entry = Entry(
            catalogue="test", identifier=IMAGE, size_bytes=len(CONTENT),
            digests={"sha256": hashlib.sha256(CONTENT).hexdigest()}, locations=(location,),
            compression=compression, endorser=Endorser(email="a@example.org", subject="", issuer=""),
            endorsed_at=datetime(2026, 11, 1, tzinfo=UTC), trust="signed",
        )  # fmt: skip

        async def fetch() -> None:
            async with httpx.AsyncClient(trust_env=False) as client:
                await self._fetcher(client).fetch(entry, lambda *_: None)

        trio.run(fetch)
        self.entry = entry.model_copy(update=changes)

    def _fetcher(self, client: httpx.AsyncClient) -> Fetcher:
        backoff = Backoff(base_s=0.001, limit_s=0.02)
        return Fetcher(self.configuration, self.images, self.chunks, client, backoff=backoff)

    def run(self, script: Script, *, wait_s: float = 30, retry_s: float = 30) -> None:
        """Run a script beside a repairer."""

        async def main() -> None:
            async with (
                httpx.AsyncClient(trust_env=False) as client,
                trio.open_nursery() as nursery,
            ):
                fetcher = self._fetcher(client)
                chunk_fetcher = ChunkFetcher(
                    self.configuration, self.images, client, nursery, lambda _: self.entry,
                    fetcher.chunk_space,
                )  # fmt: skip
                supply = Supply(self.images, chunk_fetcher, lambda _: ())
                origins = EntryOrigins(
                    self.images, fetcher, chunk_fetcher, lambda _: self.entry, nursery
                )
                repairer = Repairer(
                    self.images, origins, self.told, nursery, wait_s=wait_s, retry_s=retry_s
                )
                self.images.set_supplier(supply)
                supply.begin_repairs(repairer)
                await script(self)
                nursery.cancel_scope.cancel()

        trio.run(main)

    def path(self, index: int) -> Path:
        """Return the file of a chunk."""
        path = self.images.reader(IMAGE).chunk_path(index)
        assert path is not None
        return path


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site of its own."""
    made = Site(tmp_path / "state")
    yield made
    made.chunks.close()


@pytest.fixture
def origin() -> Iterator[OriginServer]:
    """An origin of its own."""
    with OriginServer() as server:
        yield server


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(data)


def _cut(path: Path) -> None:
    os.truncate(path, 1000)


def _lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


DAMAGES = [_flip, _cut, _lengthen, _link, Path.unlink]


async def _read(reader: ImageReader) -> bytes:
    return bytes(await reader.read(0, len(CONTENT)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_chunk_comes_back_by_a_range(
    site: Site, origin: OriginServer, damage: Callable[[Path], None]
) -> None:
    """Only the chunk is fetched again, while the reader waits; what was open is not trusted."""
    site.publish(origin.add("/image", CONTENT), CONTENT)
    reader = site.images.reader(IMAGE)
    assert reader.read_blocking(0, len(CONTENT)) == CONTENT
    fetched_bytes = origin.sent_bytes("/image")
    damage(site.path(2))
    site.chunks.distrust(reader.manifest.digest(2))  # as after a restart
    damage(site.path(5))

    async def script(_: Site) -> None:
        assert await _read(reader) == CONTENT

    site.run(script)
    assert origin.sent_bytes("/image") - fetched_bytes <= CHUNK_BYTES + 4096
    assert reader.manifest.digest(2) in site.told.repaired
    assert site.told.lost == []
    assert hashlib.sha256(site.path(2).read_bytes()).digest() == reader.manifest.digest(2)


@pytest.mark.parametrize("damage", [_flip, _cut])
def test_a_file_that_changes_while_it_is_open_is_never_served(
    site: Site, origin: OriginServer, damage: Callable[[Path], None]
) -> None:
    """Bytes of a chunk that was verified and then written to are dropped and fetched again."""
    site.publish(origin.add("/image", CONTENT), CONTENT)
    reader = site.images.reader(IMAGE)
    assert reader.read_blocking(0, len(CONTENT)) == CONTENT
    damage(site.path(3))
    start = 3 * CHUNK_BYTES
    assert reader.read_nowait(start, CHUNK_BYTES) is None

    async def script(_: Site) -> None:
        assert await reader.read(start, CHUNK_BYTES) == CONTENT[start : start + CHUNK_BYTES]

    site.run(script)
    assert len(site.told.repaired) == 1


@pytest.mark.parametrize("kind", ["file", "gz", "no-ranges"])
def test_other_origins_serve_repairs_too(
    site: Site, origin: OriginServer, tmp_path: Path, kind: str
) -> None:
    """A local file is read in place; what cannot be read by ranges is fetched as a whole."""
    if kind == "file":
        (tmp_path / "image").write_bytes(CONTENT)
        site.publish((tmp_path / "image").as_uri(), CONTENT)
    elif kind == "gz":
        packed = gzip.compress(CONTENT)
        site.publish(origin.add("/image.gz", packed), packed, "gz")
    else:
        resource = Resource(CONTENT)
        site.publish(origin.add("/image", resource), CONTENT)
        resource.faults.extend(Fault(ignore_range=True) for _ in range(8))
    reader = site.images.reader(IMAGE)
    for index in (0, 4):
        _flip(site.path(index))

    async def script(_: Site) -> None:
        assert await _read(reader) == CONTENT

    site.run(script)
    assert site.told.repaired != []
    assert site.told.lost == []


def test_sixteen_readers_wait_for_one_repair(site: Site, origin: OriginServer) -> None:
    """However many need a chunk, it is fetched once."""
    site.publish(origin.add("/image", CONTENT), CONTENT)
    reader = site.images.reader(IMAGE)
    _flip(site.path(1))
    before = len(origin.log)

    async def script(_: Site) -> None:
        async def read() -> None:
            assert await reader.read(CHUNK_BYTES, 4096) == CONTENT[CHUNK_BYTES:][:4096]

        async with trio.open_nursery() as nursery:
            for _reader in range(16):
                nursery.start_soon(read)

    site.run(script)
    assert len(origin.log) - before == 1


def test_threads_wait_for_repairs_as_well(site: Site, origin: OriginServer) -> None:
    """A thread that opens a chunk, to share its extents, gets it mended; forty of them do not
    keep the repair from its end."""
    site.publish(origin.add("/image", CONTENT), CONTENT)
    reader = site.images.reader(IMAGE)
    for index in range(5):
        _flip(site.path(index))

    async def script(_: Site) -> None:
        async def open_one(index: int) -> None:
            assert await trio.to_thread.run_sync(reader.open_chunk, index) is not None

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for index in range(50):
                    nursery.start_soon(open_one, index % 5)

    site.run(script)
    assert len(site.told.repaired) == 5


def test_threads_that_wait_leave_some_for_a_whole_fetch(
    site: Site, origin: OriginServer, tmp_path: Path
) -> None:
    """Fifty threads that wait for a source that has to be unpacked do not keep it from that."""
    packed = gzip.compress(CONTENT)
    site.publish(origin.add("/image.gz", packed), packed, "gz")
    reader = site.images.reader(IMAGE)
    for index in range(5):
        _flip(site.path(index))

    async def script(_: Site) -> None:
        async with trio.open_nursery() as nursery:
            for index in range(50):
                nursery.start_soon(trio.to_thread.run_sync, reader.open_chunk, index % 5)

    site.run(script)
    assert site.told.lost == []


def test_a_chunk_that_no_origin_has_fails_alone(site: Site, origin: OriginServer) -> None:
    """The reader gets an error for that chunk only, the witness is told, and the origin is not
    asked again at once; when it is back, so is the chunk."""
    url = origin.add("/image", CONTENT)
    site.publish(url, CONTENT)
    reader = site.images.reader(IMAGE)
    _flip(site.path(1))
    del origin.resources["/image"]

    async def script(_: Site) -> None:
        with pytest.raises(NotVerified) as caught:
            await reader.read(CHUNK_BYTES, 4096)
        assert caught.value.code == "chunk-lost"
        asked = len(origin.log)
        with pytest.raises(NotVerified):
            await reader.read(CHUNK_BYTES, 4096)
        assert len(origin.log) == asked
        assert await reader.read(0, CHUNK_BYTES) == CONTENT[:CHUNK_BYTES]

    site.run(script)
    assert site.told.lost == [reader.manifest.digest(1)]
    origin.add("/image", CONTENT)

    async def later(_: Site) -> None:
        assert await _read(reader) == CONTENT

    site.run(later)


def test_an_origin_that_serves_other_bytes_repairs_nothing(
    site: Site, origin: OriginServer
) -> None:
    """What comes is compared with the digest before it is stored."""
    site.publish(origin.add("/image", CONTENT), CONTENT)
    reader = site.images.reader(IMAGE)
    _flip(site.path(1))
    origin.add("/image", Random(2).randbytes(len(CONTENT)))

    async def script(_: Site) -> None:
        with pytest.raises(NotVerified):
            await _read(reader)

    site.run(script)
    assert site.told.lost == [reader.manifest.digest(1)]
    assert not site.path(1).exists()


def test_what_was_made_here_is_lost(site: Site, origin: OriginServer) -> None:
    """Nobody else has the chunks of a saved disk: that is said, and no origin is asked."""
    site.publish(origin.add("/image", CONTENT), CONTENT, catalogue=LOCAL_CATALOGUE)
    asked = len(origin.log)
    reader = site.images.reader(IMAGE)
    site.path(0).unlink()

    async def script(_: Site) -> None:
        with pytest.raises(NotVerified) as caught:
            await reader.read(0, 4096)
        assert "made on this host" in caught.value.message

    site.run(script)
    assert len(origin.log) == asked


def test_a_reader_waits_no_longer_than_it_may(site: Site, origin: OriginServer) -> None:
    """A repair that takes long goes on after its reader was told to try again."""
    resource = Resource(CONTENT)
    site.publish(origin.add("/image", resource), CONTENT)
    reader = site.images.reader(IMAGE)
    _flip(site.path(1))
    go_on = Fault(hold=threading.Event(), cut_after_bytes=0)
    resource.faults.append(go_on)

    async def script(_: Site) -> None:
        with pytest.raises(OriginFailed) as caught:
            await reader.read(CHUNK_BYTES, 4096)
        assert caught.value.code == "repair-late"
        assert go_on.hold is not None
        go_on.hold.set()
        with trio.fail_after(30):
            while not site.told.repaired:
                await trio.lowlevel.checkpoint()
        assert await _read(reader) == CONTENT

    site.run(script, wait_s=0.2)


@pytest.mark.parametrize("damage", [_flip, _cut, _lengthen, Path.unlink])
@pytest.mark.parametrize("remembered", [True, False])
def test_a_damaged_manifest_is_made_again(
    site: Site, origin: OriginServer, damage: Callable[[Path], None], remembered: bool
) -> None:
    """From what a reader remembers, without any request, or from the source."""
    site.publish(origin.add("/image", CONTENT), CONTENT)
    path = seals.manifest_path(site.state_dir, IMAGE)
    whole, asked = path.read_bytes(), len(origin.log)
    reader = site.images.reader(IMAGE) if remembered else None
    damage(path)

    async def script(_: Site) -> None:
        if reader is not None:
            await site.images._gate.supply_manifest(IMAGE)
        assert await _read(await site.images.open_reader(IMAGE)) == CONTENT

    site.run(script)
    assert path.read_bytes() == whole
    assert site.told.manifests == [IMAGE]
    assert (len(origin.log) == asked) == remembered


def test_a_digest_that_was_exchanged_is_found(site: Site, origin: OriginServer) -> None:
    """A manifest whose digests all name chunks that are there, but in another order, is damaged:
    its seal says so."""
    site.publish(origin.add("/image", CONTENT), CONTENT)
    path = seals.manifest_path(site.state_dir, IMAGE)
    content = bytearray(path.read_bytes())
    first, second = 64 + 8, 64 + 40 + 8
    content[first : first + 32], content[second : second + 32] = (
        content[second : second + 32], content[first : first + 32],
    )  # fmt: skip
    path.write_bytes(content)
    with pytest.raises(NotVerified) as caught:
        site.images.reader(IMAGE)
    assert caught.value.code == "manifest-invalid"


def test_no_chunk_goes_while_a_manifest_is_damaged(site: Site, origin: OriginServer) -> None:
    """A failed repair leaves the chunks of the image alone."""
    site.publish(origin.add("/image", CONTENT), CONTENT)
    _cut(seals.manifest_path(site.state_dir, IMAGE))
    del origin.resources["/image"]

    async def script(_: Site) -> None:
        with pytest.raises(NotVerified):
            await site.images.open_reader(IMAGE)

    site.run(script)
    assert site.told.lost_manifests == [IMAGE]
    assert site.images.sweep() == 0
    assert site.chunks.statistics().chunks == 6


def test_a_seal_of_the_future_seals_the_manifest_of_the_past(site: Site) -> None:
    """When a process dies between the seal and the manifest, the old manifest stays whole."""
    for content in (CONTENT, CONTENT[:CHUNK_BYTES]):
        draft = site.images.begin()
        draft.add([content[i : i + CHUNK_BYTES] for i in range(0, len(content), CHUNK_BYTES)])
        before = seals.manifest_path(site.state_dir, "x")
        old = before.read_bytes() if before.exists() else b""
        site.images.publish("x", draft.manifest())
        site.images.finish(draft)
    before.write_bytes(old)
    assert site.images.manifest("x").size_bytes == len(CONTENT)


def test_manifests_of_older_versions_are_sealed_by_the_sweep(
    site: Site, origin: OriginServer
) -> None:
    """One without a seal is read, and has one after the next start."""
    site.publish(origin.add("/image", CONTENT), CONTENT)
    _unseal(site.state_dir, IMAGE)
    assert site.images.manifest(IMAGE).size_bytes == len(CONTENT)
    (site.state_dir / "seals" / "stray").write_text("x")
    site.images.sweep()
    assert os.listdir(site.state_dir / "seals") == [IMAGE]


def _unseal(state_dir: Path, identifier: str) -> None:
    """Leave a manifest as older versions wrote it."""
    seals.seal_path(state_dir, identifier).unlink()
    os.removexattr(seals.manifest_path(state_dir, identifier), "user.stratocache.seal")


@pytest.mark.parametrize("damage", [_flip, _cut, _lengthen, Path.unlink])
def test_a_damaged_seal_loses_no_manifest(
    site: Site, origin: OriginServer, damage: Callable[[Path], None]
) -> None:
    """A manifest whose seal is hurt is read all the same, and the scrubber puts the seal back."""
    site.publish(origin.add("/image", CONTENT), CONTENT)
    seal = seals.seal_path(site.state_dir, IMAGE)
    whole = seal.read_text()
    damage(seal)
    assert site.images.manifest(IMAGE).size_bytes == len(CONTENT)

    site.images.seal(IMAGE)
    assert seal.read_text().split("\n")[0] == whole


def test_manifests_that_were_exchanged_are_found_without_their_seals(
    site: Site, origin: OriginServer
) -> None:
    """With all seals gone, manifests that have each other's place are damaged, also for a sweep."""
    site.publish(origin.add("/image", CONTENT), CONTENT)
    draft = site.images.begin()
    draft.add([CONTENT[:CHUNK_BYTES]])
    site.images.publish("other", draft.manifest())
    site.images.finish(draft)
    paths = [seals.manifest_path(site.state_dir, name) for name in (IMAGE, "other")]
    aside = paths[0].rename(paths[0].with_suffix(".aside"))
    paths[1].rename(paths[0])
    aside.rename(paths[1])
    for name in (IMAGE, "other"):
        seals.seal_path(site.state_dir, name).unlink()

    site.images.sweep()
    for name in (IMAGE, "other"):
        with pytest.raises(NotVerified) as caught:
            site.images.manifest(name)
        assert caught.value.code == "manifest-invalid"
