"""The part of `blockd` that runs operations, on a real catalogue folder and a real HTTP origin."""

import hashlib
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import trio

from stratocache.cache.catalogue import Catalogues
from stratocache.cache.chunks import ChunkStore
from stratocache.cache.configuration import (
    CatalogueSettings,
    Configuration,
    FetchSettings,
    SpaceSettings,
)
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.fetch import Fetcher
from stratocache.cache.identifier import encode
from stratocache.cache.images import ImageStore
from stratocache.cache.origin import Backoff
from stratocache.cache.patience import Patience
from stratocache.cache.supply import Supply
from stratocache.cache.traffic import Traffic
from stratocache.fs.acquisition import Acquisition
from stratocache.fs.boot_sets import BootSets
from stratocache.fs.image_lookup import awaited_finder, entry_finder
from stratocache.fs.operation_watch import OperationWatch
from stratocache.fs.operations import Operations
from stratocache.fs.provisional import ProvisionalImages
from stratocache.fs.recheck import Recheck
from stratocache.fs.records import Caller, Operation
from stratocache.fs.state import Database
from stratocache.fs.traffic_record import TrafficRecord
from support.documents import EMAIL, make_endorser, shelve, signed_document, unsigned_document
from support.origins import Fault, OriginServer, Resource, origin_server

ROOT_CALLER = Caller("root", "admin")
IMAGE = os.urandom(9 * 512 * 1024 + 1234)
IDENTIFIER = encode(hashlib.sha1(IMAGE).hexdigest())
NOW = datetime.now(UTC).replace(microsecond=0)


@dataclass
class Host:
    """The part of `blockd` that runs operations, on directories of its own."""

    folder: Path
    origin: OriginServer
    resource: Resource
    db: Database
    chunks: ChunkStore
    images: ImageStore
    configuration: Configuration
    woken: list[None] = field(default_factory=list)
    acquisition: Acquisition | None = None
    provisional: ProvisionalImages | None = None
    record: TrafficRecord | None = None
    catalogues: Catalogues | None = None
    recheck: Recheck | None = None
    """Asks nobody unless a script runs it."""

    def publish(self, file: bytes = IMAGE, /, **fields: object) -> str:
        """Offer the image, or a description of it that is wrong in some way; return its id."""
        url = self.origin.url + "/image"
        unsigned = unsigned_document(file, **{"locations": [url], **fields})  # type: ignore[arg-type]
        document = signed_document(make_endorser(), unsigned, created=NOW - timedelta(days=1))
        identifier = encode(hashlib.sha1(file).hexdigest())
        shelve(self.folder / "entries", document, identifier, EMAIL, NOW - timedelta(days=1))
        return identifier

    def run(self, script: Callable[[Operations], Awaitable[None]]) -> None:
        """Run a script beside the operations, as one process would; its end is their death."""

        async def main() -> None:
            async with httpx.AsyncClient() as client, trio.open_nursery() as nursery:
                traffic = Traffic()
                fetcher = Fetcher(
                    self.configuration, self.images, self.chunks, client, traffic=traffic
                )
                chunk_fetcher = ChunkFetcher(
                    self.configuration, self.images, client, nursery, entry_finder(self.db),
                    fetcher.chunk_space,
                    traffic=traffic,
                    backoff=Backoff(base_s=0.01, limit_s=0.1),
                    patience=Patience(quiet_s=0.1, expect_s=0.1),
                )  # fmt: skip
                supply = Supply(self.images, chunk_fetcher, awaited_finder(self.db))
                self.images.set_supplier(supply)
                self.record = TrafficRecord(self.db, traffic, self.images.reads)
                self.provisional = ProvisionalImages(
                    self.configuration, self.db, self.images, client, chunk_fetcher,
                    BootSets(self.configuration, self.images, nursery), self.record, nursery,
                    lambda: self.woken.append(None),
                )  # fmt: skip
                self.catalogues = catalogues = Catalogues(self.configuration, client)
                self.recheck = Recheck(self.configuration, self.db, catalogues)
                acquisition = Acquisition(
                    self.configuration, self.db, catalogues, fetcher, self.images,
                    self.provisional, self.recheck, nursery,
                )  # fmt: skip
                acquisition.sweep()
                self.acquisition = acquisition
                operations = Operations(
                    self.db, acquisition, nursery, lambda: self.woken.append(None)
                )
                await operations.look()
                with trio.fail_after(60):
                    await script(operations)
                nursery.cancel_scope.cancel()

        trio.run(main)

    async def end(self, operation: Operation) -> Operation:
        """Wait until an operation has ended."""
        return await trio.to_thread.run_sync(OperationWatch(self.db).wait, operation.id, 60.0)

    async def sent(self, held: Fault) -> None:
        """Wait until an answer has been sent up to where it is held."""
        while not any(line.sent_bytes == held.cut_after_bytes for line in self.origin.log):
            await trio.lowlevel.checkpoint()

    def leftovers(self) -> list[str]:
        """Return what is below the state directory that belongs to images."""
        found = os.listdir(self.configuration.state_dir / "stage")
        found += os.listdir(self.configuration.state_dir / "manifests")
        chunks = (self.configuration.state_dir / "chunks").rglob("*")
        return found + [path.name for path in chunks if len(path.name) == 64]


@contextmanager
def operation_host(tmp_path: Path) -> Iterator[Host]:
    """A host whose catalogue is a folder and whose origin serves one image."""
    state = tmp_path / "state"
    state.mkdir()
    (tmp_path / "entries").mkdir()
    db = Database(state / "state.db")
    db.migrate()
    chunks = ChunkStore(state / "chunks")
    configuration = Configuration(
        state_dir=state,
        run_dir=tmp_path / "run",
        fetch=FetchSettings(attempts=2),
        space=SpaceSettings(reserve_bytes=0),
        catalogues={
            "stratuslab": CatalogueSettings(
                endpoint=(tmp_path / "entries").as_uri(),
                trusted_fingerprints=(make_endorser().fingerprint,),
            )
        },
    )
    with origin_server() as origin:
        resource = Resource(IMAGE)
        origin.add("/image", resource)
        images = ImageStore(state, chunks)
        yield Host(tmp_path, origin, resource, db, chunks, images, configuration)
    chunks.close()
    db.close()
