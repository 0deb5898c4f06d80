"""The part of `blockd` that makes disks what they should be, in this process and without FUSE."""

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from stratocache.cache.chunks import ChunkStore
from stratocache.cache.configuration import Configuration, SpaceSettings
from stratocache.cache.entry import Endorser, Entry
from stratocache.cache.images import ImageStore
from stratocache.fs import inventory
from stratocache.fs.blocks import Blocks
from stratocache.fs.disk_work import DiskWork
from stratocache.fs.disks import DiskStore
from stratocache.fs.housekeeping import sweep
from stratocache.fs.manifests import named_manifests
from stratocache.fs.operations import Operations
from stratocache.fs.overlay import Overlay
from stratocache.fs.promotion import Promotion
from stratocache.fs.reconciler import Reconciler
from stratocache.fs.records import Caller, Disk, Operation
from stratocache.fs.saving import Saving
from stratocache.fs.snapshots import Snapshots
from stratocache.fs.state import Database, now
from stratocache.fs.target import LUN, ActualTarget, Session, Target, TargetDaemon
from support.images import store_image

ROOT = Caller("root", "admin")
IMAGE = "MMZu9WvwKIro-rtBQfDk4PsKO7_"
_REST_TIMEOUT_S = 60
_NOT_AT_REST = """
    SELECT 1 FROM operations WHERE state IN ('pending', 'running')
    UNION ALL SELECT 1 FROM snapshots WHERE state <> 'available' OR transient
    UNION ALL SELECT 1 FROM disks WHERE state <> 'available'
    UNION ALL SELECT 1 FROM attachments WHERE state <> 'ready'
    UNION ALL SELECT 1 FROM launches WHERE state <> 'active' LIMIT 1
"""


class MemoryTargets:
    """A target daemon's memory, which outlives `blockd`."""

    def __init__(self) -> None:
        self.made: dict[int, Target] = {}
        self.log: list[str] = []
        """What was done, in order: `create NAME OF BACKING` and `remove`."""

    async def ping(self) -> None:
        """Answer."""

    def incarnation(self) -> object:
        """It dies only while no process is there."""
        return self

    async def open_portal(self) -> None:
        """There is none."""

    async def sessions(self, number: int) -> tuple[Session, ...]:
        """Nobody is logged in."""
        return ()

    async def list(self) -> dict[int, ActualTarget]:
        """Return what there is."""
        return {number: actual_of(target) for number, target in self.made.items()}

    async def create(self, target: Target) -> None:
        """Make or remake a target."""
        assert target.backing.parent.name in ("disks", "images") or target.backing.exists()
        self.made[target.number] = target
        self.log.append(f"create {target.backing.name}")

    async def remove(self, number: int) -> None:
        """Remove a target."""
        if self.made.pop(number, None) is not None:
            self.log.append("remove")


def actual_of(target: Target) -> ActualTarget:
    """Describe a target as a daemon that has it would."""
    return ActualTarget(
        number=target.number,
        iqn=target.iqn,
        luns=(LUN,),
        backing=str(target.backing),
        online=True,
        read_only=target.read_only,
        serial=target.serial,
        accounts=(target.chap_username,),
        acl=(target.initiator or "ALL",),
    )


class Idle:
    """Stands where images are acquired: nothing is fetched here."""

    def tidy(self) -> None:
        """Do nothing."""


class DiskDaemon:
    """One process' worth of disk work."""

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        images: ImageStore,
        disks: DiskStore,
        targets: TargetDaemon,
    ) -> None:
        self._configuration = configuration
        self._db = db
        self._images = images
        self._disks = disks
        self._targets = targets
        self.blocks = Blocks(configuration, db, images, disks)
        self._woken = trio.Event()
        self._rested = trio.Event()

    def wake(self) -> None:
        """Let the next pass begin."""
        self._woken.set()

    async def rest(self) -> None:
        """Wait until nothing is left to do."""
        self._rested = trio.Event()
        self.wake()
        with trio.fail_after(_REST_TIMEOUT_S):
            await self._rested.wait()

    def _sweep_disks(self) -> None:
        self._disks.sweep({row["uuid"] for row in self._db.rows("SELECT uuid FROM disks")})

    def _sweep_images(self) -> None:
        for name in set(self._images.identifiers()) - named_manifests(self._db):
            self._images.remove(name)
        self._images.sweep()

    async def work(self, nursery: trio.Nursery) -> None:
        """Make passes for ever."""
        db, disks, blocks, work = self._db, self._disks, self.blocks, DiskWork()
        reconciler = Reconciler(
            self._configuration, db, self._images, disks, self._targets, blocks, work
        )
        snapshots = Snapshots(db, self._images, disks, blocks, work, nursery, self.wake)
        promotion = Promotion(
            self._configuration, db, disks, blocks, reconciler.manifests, work,
            reconciler.targets, reconciler.exclusive, self.wake,
        )  # fmt: skip
        operations = Operations(
            db, Idle(), nursery, self.wake,  # type: ignore[arg-type]
            {"hydrate": promotion, "save": Saving(db, self._images, disks)},
        )  # fmt: skip
        # what a process does first: delete what no row accounts for
        await sweep(self._sweep_disks)
        await sweep(self._sweep_images)
        await reconciler.adopt()
        while True:
            self._woken = trio.Event()
            await operations.look()
            unsettled = await reconciler.reconcile()
            snapshots.look()
            await promotion.look()
            if not unsettled and db.row(_NOT_AT_REST) is None:
                self._rested.set()
            with trio.move_on_after(0.02):
                await self._woken.wait()

    async def live(self, script: Callable[["DiskDaemon"], Awaitable[None]]) -> None:
        """Run a script beside the work, then end in order."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.work, nursery)
            await script(self)
            nursery.cancel_scope.cancel()
        await self.blocks.aclose()


class DiskHost:
    """A state directory, and a new process on it whenever something is to be done."""

    def __init__(self, root: Path, state_dir: Path) -> None:
        self.configuration = Configuration(
            state_dir=state_dir, run_dir=root / "run", space=SpaceSettings(reserve_bytes=0)
        )
        state_dir.mkdir(exist_ok=True)
        self.configuration.run_dir.mkdir(exist_ok=True)
        self.db = Database(self.configuration.database)
        self.db.migrate()
        self.chunks = ChunkStore(state_dir / "chunks")
        self.targets = MemoryTargets()

    def close(self) -> None:
        """Close the databases."""
        self.db.close()
        self.chunks.close()

    def images(self) -> ImageStore:
        """Return the images as a new process sees them."""
        return ImageStore(self.configuration.state_dir, self.chunks)

    def disks(self) -> DiskStore:
        """Return the disks as a new process sees them."""
        return DiskStore(self.configuration.state_dir, self.configuration.run_dir)

    def publish(self, content: bytes, identifier: str = IMAGE) -> None:
        """Let the cache have a verified image."""
        store_image(self.images(), identifier, content)
        entry = Entry(
            catalogue="stratuslab", identifier=identifier, size_bytes=len(content), digests={},
            locations=(), endorser=Endorser(email="a@example.org", subject="", issuer=""),
            endorsed_at="2026-01-01T00:00:00Z", trust="signed",  # type: ignore[arg-type]
        )  # fmt: skip
        self.db.connection.execute(
            "INSERT INTO images (id, state, size_bytes, entry, created_at) "
            "VALUES (?, 'verified', ?, ?, ?)",
            (identifier, len(content), entry.model_dump_json(), now()),
        )

    def run(self, script: Callable[[DiskDaemon], Awaitable[None]]) -> None:
        """Run a script in a process that then ends in order."""
        trio.run(self._daemon().live, script)

    def rest(self) -> None:
        """Let a process do all that there is to do."""
        self.run(DiskDaemon.rest)

    def end(self, operation: Operation) -> Operation:
        """Let a process do all that there is to do; return the operation, which has ended."""
        self.rest()
        ended = inventory.operation(self.db, operation.id)
        assert ended.finished
        return ended

    def _daemon(self) -> DiskDaemon:
        return DiskDaemon(self.configuration, self.db, self.images(), self.disks(), self.targets)

    def disk(self, uuid: str) -> Disk:
        """Return a disk's row."""
        found = inventory.find_disk(self.db, uuid)
        assert found is not None
        return found

    def content(self, uuid: str) -> bytes:
        """Return what a guest reads from a disk, while no process runs."""
        store = self.disks()
        if store.form(uuid) == "raw":
            return store.data_path(uuid).read_bytes()

        async def read(overlay: Overlay) -> bytes:
            return bytes(await overlay.read(0, overlay.size_bytes))

        content: bytes = self._with_overlay(uuid, read)
        return content

    def write(self, uuid: str, offset: int, piece: bytes) -> None:
        """Write as a guest would, with a flush, while no process runs."""
        store = self.disks()
        if store.form(uuid) == "raw":
            with store.data_path(uuid).open("r+b") as file:
                file.seek(offset)
                file.write(piece)
            return

        async def write(overlay: Overlay) -> None:
            await overlay.write(offset, piece)
            await overlay.flush()

        self._with_overlay(uuid, write)

    def _with_overlay(self, uuid: str, use: Callable[[Overlay], Awaitable[Any]]) -> Any:
        images, store = self.images(), self.disks()

        async def main() -> Any:
            overlay = store.open_overlay(uuid, images.reader)
            with contextlib.closing(overlay):
                return await use(overlay)

        return trio.run(main)

    def manifests(self) -> set[str]:
        """Return the names of the manifests that are there."""
        return set(self.images().identifiers())

    def stored_chunks(self) -> set[str]:
        """Return the digests of the chunks that are there."""
        chunks = (self.configuration.state_dir / "chunks").rglob("*")
        return {path.name for path in chunks if len(path.name) == 64}
