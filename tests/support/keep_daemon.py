"""The part of `blockd` that keeps the cache, in this process and without FUSE: fetches of files,
clones, evictions, repairs, scrubs and checks on a state directory."""

import hashlib
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import httpx
import trio

from stratocache.cache.catalogue import Standing
from stratocache.cache.chunks import ChunkStore
from stratocache.cache.configuration import (
    CacheSettings,
    CatalogueSettings,
    Configuration,
    FetchSettings,
    RecheckSettings,
    ScrubSettings,
    SpaceSettings,
)
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.entry import Endorser, Entry
from stratocache.cache.errors import NotFound, NotVerified, OriginFailed, Refused
from stratocache.cache.fetch import Fetcher
from stratocache.cache.identifier import encode
from stratocache.cache.images import ImageStore
from stratocache.cache.supply import Supply
from stratocache.fs import inventory
from stratocache.fs.acquisition import Acquisition
from stratocache.fs.blocks import Blocks
from stratocache.fs.boot_sets import BootSets
from stratocache.fs.disk_work import DiskWork
from stratocache.fs.disks import DiskStore
from stratocache.fs.image_lookup import awaited_finder, entry_finder
from stratocache.fs.keeping import Keeping
from stratocache.fs.operation_watch import OperationWatch
from stratocache.fs.operations import Operations
from stratocache.fs.provisional import ProvisionalImages
from stratocache.fs.recheck import Recheck
from stratocache.fs.reconciler import Reconciler
from stratocache.fs.records import Caller, Operation
from stratocache.fs.state import Database, now
from stratocache.fs.traffic_record import TrafficRecord
from support.crashing import CrashingDatabase, CrashingImages, Fuse
from support.disk_daemon import MemoryTargets

ROOT = Caller("root", "admin")
_TIMEOUT_S = 120

Verdict = Literal["current", "unlisted", "taken-back", "unknown"]


class Shelf:
    """A catalogue in memory: images as files that entries point to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self.contents: dict[str, bytes] = {}
        self.reachable = True
        self.verdicts: dict[str, Verdict] = {}
        """What is said of images that are not current."""
        self.asks: Counter[str] = Counter()
        """How often each image was asked about since `say`."""

    def say(self, identifier: str, verdict: Verdict) -> None:
        """Say something else of an image from now on."""
        self.verdicts[identifier] = verdict
        del self.asks[identifier]

    def add(self, content: bytes) -> str:
        """Offer an image; return its identifier."""
        identifier = encode(hashlib.sha1(content).hexdigest())
        self.contents[identifier] = content
        self.bring_back(identifier)
        return identifier

    def path(self, identifier: str) -> Path:
        """Return the file that an image is fetched from."""
        return self._folder / identifier

    def take_away(self, identifier: str) -> None:
        """Let an image's origin be gone."""
        self.path(identifier).unlink(missing_ok=True)

    def bring_back(self, identifier: str) -> None:
        """Let an image's origin be there."""
        self.path(identifier).write_bytes(self.contents[identifier])

    async def resolve(self, text: str, *, now: datetime) -> Entry:
        """Return the entry of an identifier."""
        self._require_reachable()
        content = self.contents.get(text)
        verdict = self.verdicts.get(text, "current")
        if content is None or verdict == "unlisted":
            raise NotFound("reference-unknown", f"There is no {text}.")
        if verdict == "taken-back":
            raise Refused("entry-deprecated", f"{text} is deprecated.")
        if verdict == "unknown":
            raise NotVerified("signature-invalid", f"The entry of {text} is forged.")
        return Entry(
            catalogue="stratuslab", identifier=text, size_bytes=len(content),
            digests={"sha256": hashlib.sha256(content).hexdigest()},
            locations=(self.path(text).as_uri(),),
            endorser=Endorser(email="a@example.org", subject="", issuer=""),
            endorsed_at=datetime(2026, 1, 1, tzinfo=UTC), trust="signed",
        )  # fmt: skip

    async def standing(self, entry: Entry, *, now: datetime) -> Standing:
        """Return what is said of an image."""
        self._require_reachable()
        self.asks[entry.identifier] += 1
        return Standing(self.verdicts.get(entry.identifier, "current"), reason="The shelf says so.")

    def _require_reachable(self) -> None:
        if not self.reachable:
            raise OriginFailed("catalogue-unreachable", "Nobody answers.")

    def recheck(self, entry: Entry, *, now: datetime) -> None:
        """Find nothing wrong."""


class KeepHost:
    """A state directory, and a new process on it for every script."""

    def __init__(
        self, root: Path, *, max_bytes: int = 0, hysteresis_ratio: float = 0.1,
        bytes_per_s: int = 2**40, fuse: Fuse | None = None, asking: bool = False,
    ) -> None:  # fmt: skip
        self.root = root
        self.asking = asking
        """Whether a process asks once about every image before it rests."""
        self.configuration = Configuration(
            state_dir=root / "state",
            run_dir=root / "run",
            fetch=FetchSettings(attempts=1, quiet_s=0.5),
            space=SpaceSettings(reserve_bytes=0),
            cache=CacheSettings(max_bytes=max_bytes, hysteresis_ratio=hysteresis_ratio),
            catalogues={"stratuslab": CatalogueSettings(endpoint=root.as_uri())},
            scrub=ScrubSettings(bytes_per_s=bytes_per_s, interval_s=1e6),
            recheck=RecheckSettings(interval_s=1e6, confirm_s=0, pause_s=0),
        )
        for directory in (self.configuration.state_dir, self.configuration.run_dir):
            directory.mkdir()
        self.shelf = Shelf(root / "origin")
        self.fuse = fuse or Fuse()
        self.db = CrashingDatabase(self.configuration.database, self.fuse)
        self.db.migrate()
        self.targets = MemoryTargets()

    def close(self) -> None:
        """Close the database."""
        self.db.close()

    def run(self, script: Callable[["KeepDaemon"], Awaitable[None]]) -> None:
        """Run a script in a process that then ends."""
        chunks = ChunkStore(self.configuration.state_dir / "chunks")
        try:
            images = CrashingImages(self.configuration.state_dir, chunks, self.fuse)
            trio.run(KeepDaemon(self, chunks, images).live, script)
        finally:
            chunks.close()

    def rest(self) -> None:
        """Let a process do all that there is to do."""
        self.run(KeepDaemon.rest)

    def chunk_files(self) -> list[Path]:
        """Return the files of all chunks."""
        found = (self.configuration.state_dir / "chunks").rglob("*")
        return sorted(path for path in found if len(path.name) == 64)

    def states(self) -> dict[str, str]:
        """Return the states of all images."""
        return {image.id: image.state for image in inventory.images(self.db)}


class KeepDaemon:
    """One process' worth of keeping."""

    def __init__(self, host: KeepHost, chunks: ChunkStore, images: ImageStore) -> None:
        self.host = host
        self.db: Database = host.db
        self.images = images
        self.chunks = chunks
        self.disks = DiskStore(host.configuration.state_dir, host.configuration.run_dir)
        self.blocks = Blocks(host.configuration, host.db, images, self.disks)
        self.keeping: Keeping | None = None
        self._woken = trio.Event()
        self._rested = trio.Event()
        self._recheck: Recheck | None = None
        self._began = now()
        self._asked: set[int] = set()
        """Numbers of images that are, or were, asked about."""

    def wake(self) -> None:
        """Let the next pass begin."""
        self._woken.set()

    async def rest(self) -> None:
        """Wait until nothing is left to do."""
        self._rested = trio.Event()
        self.wake()
        with trio.fail_after(_TIMEOUT_S):
            await self._rested.wait()

    async def end(self, operation: Operation) -> Operation:
        """Wait until an operation has ended."""
        self.wake()
        return await trio.to_thread.run_sync(
            OperationWatch(self.db).wait, operation.id, float(_TIMEOUT_S)
        )

    async def read_image(self, identifier: str) -> bytes:
        """Read all of an image, by way of the tree's inventory."""
        image = self.blocks.image_by_id(identifier)
        assert image is not None, f"{identifier} cannot be read"
        reader = await self.blocks.open_reader(image.number)
        return bytes(await reader.read(0, reader.size_bytes))

    async def read_disk(self, number: int) -> bytes:
        """Read all of an overlay."""
        overlay = await self.blocks.open_overlay(number)
        return bytes(await overlay.read(0, overlay.size_bytes))

    async def live(self, script: Callable[["KeepDaemon"], Awaitable[None]]) -> None:
        """Run a script beside the work, then end."""
        async with httpx.AsyncClient(trust_env=False) as client, trio.open_nursery() as nursery:
            await nursery.start(self._work, client, nursery)
            await script(self)
            nursery.cancel_scope.cancel()
        await self.blocks.aclose()

    async def _work(
        self, client: httpx.AsyncClient, nursery: trio.Nursery,
        *, task_status: trio.TaskStatus[None],
    ) -> None:  # fmt: skip
        configuration, db, images = self.host.configuration, self.db, self.images
        fetcher = Fetcher(configuration, images, self.chunks, client)
        chunk_fetcher = ChunkFetcher(
            configuration, images, client, nursery, entry_finder(db), fetcher.chunk_space
        )
        supply = Supply(images, chunk_fetcher, awaited_finder(db))
        images.set_supplier(supply)
        provisional = ProvisionalImages(
            configuration, db, images, client, chunk_fetcher,
            BootSets(configuration, images, nursery), TrafficRecord(db, chunk_fetcher.traffic, images.reads),
            nursery, self.wake,
        )  # fmt: skip
        shelf: Any = self.host.shelf
        recheck = self._recheck = Recheck(configuration, db, shelf)
        acquisition = Acquisition(
            configuration, db, shelf, fetcher, images, provisional, recheck, nursery
        )
        keeping = self.keeping = Keeping(
            configuration, db, images, self.disks, fetcher, chunk_fetcher, supply, acquisition,
            provisional, nursery, self.wake,
        )  # fmt: skip
        reconciler = Reconciler(
            configuration, db, images, self.disks, self.host.targets, self.blocks, DiskWork(),
            before_removal=provisional.stop,
        )  # fmt: skip
        operations = Operations(db, acquisition, nursery, self.wake, keeping.performers)
        known = {row["uuid"] for row in db.rows("SELECT uuid FROM disks")}
        await trio.to_thread.run_sync(self.disks.sweep, known)
        await trio.to_thread.run_sync(acquisition.sweep)
        await reconciler.adopt()
        keeping.start()
        if self.host.asking:
            nursery.start_soon(recheck.run)
        task_status.started()
        while True:
            self._woken = trio.Event()
            await operations.look()
            provisional.look()
            keeping.scrubbing.look()
            unsettled = await reconciler.reconcile()
            if not unsettled and self._is_at_rest() and self._has_asked():
                self._rested.set()
            with trio.move_on_after(0.02):
                await self._woken.wait()

    def _has_asked(self) -> bool:
        """Tell whether the catalogue has been asked about all images, or does not answer."""
        recheck = self._recheck
        assert recheck is not None
        if not self.host.asking or recheck.resting():
            return True
        rows = self.db.rows(
            "SELECT id, number FROM images WHERE coalesce(checked_at, '') < ? "
            "AND state IN ('verified', 'withdrawn')",
            self._began,
        )
        for row in rows:
            if row["number"] not in self._asked:
                self._asked.add(row["number"])
                recheck.note(row["id"])
        return not rows

    def _is_at_rest(self) -> bool:
        return (
            self.db.row(
                "SELECT 1 FROM operations WHERE state IN ('pending', 'running') "
                "UNION ALL SELECT 1 FROM disks WHERE state <> 'available' "
                "UNION ALL SELECT 1 FROM images WHERE state NOT IN ('verified', 'withdrawn') "
                "AND (skeleton_since IS NULL OR last_used_at > skeleton_since) "
                "UNION ALL SELECT 1 FROM launches WHERE state <> 'active' "
                "UNION ALL SELECT 1 FROM scrub WHERE NOT paused AND (requested OR position "
                "IS NOT NULL OR started_at IS NULL) LIMIT 1"
            )
            is None
        )


def real_bytes(state_dir: Path, rooms: Collection[str]) -> int:
    """Return the bytes of all files below some rooms of a state directory."""
    total = 0
    for room in rooms:
        for folder, _, names in os.walk(state_dir / room):
            total += sum(os.lstat(Path(folder, name)).st_size for name in names)
    return total
