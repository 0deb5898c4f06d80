"""What tests of single chunks share: an image, its index, its entry, and a fetcher on a store."""

import hashlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx
import trio

from stratocache.cache.chunks import CHUNK_BYTES, ChunkStore
from stratocache.cache.configuration import Configuration, FetchSettings, SpaceSettings
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.entry import EndorsedIndex, Endorser, Entry
from stratocache.cache.identifier import encode
from stratocache.cache.images import ImageStore
from stratocache.cache.manifest import Manifest
from stratocache.cache.origin import Backoff
from stratocache.cache.patience import Patience
from stratocache.cache.room import CacheSpace
from stratocache.cache.supply import Supply


def some_image(chunks: int, *, tail_bytes: int = 0, zero: tuple[int, ...] = ()) -> bytes:
    """Return an image of so many different chunks, some all zeros, and a shorter one at the end."""
    pieces = [
        bytes(CHUNK_BYTES)
        if index in zero
        else hashlib.shake_128(f"chunk {index}".encode()).digest(CHUNK_BYTES)
        for index in range(chunks)
    ]
    return b"".join(pieces) + hashlib.shake_128(b"tail").digest(tail_bytes)


def manifest_of(image: bytes) -> Manifest:
    """Return the manifest of an image, computed here."""
    digests = [
        hashlib.sha256(image[start : start + CHUNK_BYTES]).digest()
        for start in range(0, len(image), CHUNK_BYTES)
    ]
    return Manifest(len(image), b"".join(digests))


def index_of(image: bytes, folder: Path) -> bytes:
    """Return the `.caibx` file of an image."""
    path = folder / "some.caibx"
    manifest_of(image).write(path)
    return path.read_bytes()


def entry_of(
    image: bytes, *locations: str, index: EndorsedIndex | None = None, **changes: object
) -> Entry:
    """Return an entry of an image that is what it says."""
    digests = {name: hashlib.new(name, image).hexdigest() for name in ("sha1", "sha256", "sha512")}
    entry = Entry(
        catalogue="test",
        identifier=encode(digests["sha1"]),
        size_bytes=len(image),
        digests=digests,
        locations=locations,
        index=index,
        endorser=Endorser(email="a@example.org", subject="CN=a", issuer="CN=a"),
        endorsed_at=datetime(2026, 11, 1, tzinfo=UTC),
        trust="signed",
    )
    return entry.model_copy(update=changes)


class LazyHost:
    """A state directory whose images are on their way through a `ChunkFetcher`."""

    def __init__(self, state_dir: Path, *, demand_timeout_s: float = 20, parallel: int = 8) -> None:
        self.configuration = Configuration(
            state_dir=state_dir,
            fetch=FetchSettings(
                attempts=3, demand_timeout_s=demand_timeout_s, origin_parallel=parallel
            ),
            space=SpaceSettings(reserve_bytes=0),
        )
        self.state_dir = state_dir
        self.entries: dict[str, Entry] = {}
        self.room = CacheSpace(state_dir, 0)
        self.open()

    def open(self) -> None:
        """Open the stores, as a new process does."""
        self.chunks = ChunkStore(self.state_dir / "chunks")
        self.images = ImageStore(self.state_dir, self.chunks)

    def close(self) -> None:
        """Close the stores."""
        self.chunks.close()

    def add(self, image: bytes, entry: Entry) -> str:
        """Publish the manifest of an image of which no chunk is here; return its identifier."""
        self.entries[entry.identifier] = entry
        self.images.publish(entry.identifier, manifest_of(image))
        return entry.identifier

    def _awaited(self, name: str) -> list[str]:
        return [name] if name in self.entries else list(self.entries)

    def run(self, script: Callable[[ChunkFetcher], Awaitable[None]]) -> None:
        """Run a script with a fetcher; its end is the death of the process."""

        async def main() -> None:
            async with httpx.AsyncClient(trust_env=False) as client, trio.open_nursery() as nursery:
                fetcher = ChunkFetcher(
                    self.configuration, self.images, client, nursery, self.entries.get,
                    self.room, backoff=Backoff(base_s=0.01, limit_s=0.1), patience=Patience(0.5, 15),
                )  # fmt: skip
                self.images.set_supplier(Supply(self.images, fetcher, self._awaited))
                with trio.fail_after(90):
                    await script(fetcher)
                nursery.cancel_scope.cancel()

        trio.run(main)
