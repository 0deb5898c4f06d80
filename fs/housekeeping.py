"""What `blockd` does beside serving blocks: operations with their fetches, and the reconciler.

A module of its own because its libraries take longer to import than a guest should wait for blocks.
"""

import logging
from collections.abc import Callable
from functools import partial

import httpx
import trio

from stratocache.cache.catalogue import Catalogues
from stratocache.cache.chunks import ChunkStore
from stratocache.cache.configuration import Configuration
from stratocache.cache.demand import ChunkFetcher
from stratocache.cache.fetch import Fetcher
from stratocache.cache.images import ImageStore
from stratocache.cache.outgoing import import_client, source_client
from stratocache.cache.peers import Peers
from stratocache.cache.supply import Supply
from stratocache.cache.traffic import Traffic
from stratocache.fs import inventory, transfers
from stratocache.fs.acquisition import Acquisition
from stratocache.fs.blockd_counts import BlockdCounts
from stratocache.fs.blocks import Blocks
from stratocache.fs.boot_sets import BootSets
from stratocache.fs.content_import import Importer
from stratocache.fs.disk_io import DiskIo
from stratocache.fs.disk_work import DiskWork
from stratocache.fs.disks import DiskStore
from stratocache.fs.image_lookup import awaited_finder, entry_finder
from stratocache.fs.import_intents import IMPORT_DISK
from stratocache.fs.importing import Importing
from stratocache.fs.keeping import Keeping
from stratocache.fs.lio import Lio
from stratocache.fs.manifest_sizes import ManifestSizes
from stratocache.fs.mount_watch import MountWatch
from stratocache.fs.operations import Operations, Performer
from stratocache.fs.peer_record import PeerRecord
from stratocache.fs.poke import PokeListener
from stratocache.fs.portal import Portal
from stratocache.fs.promotion import Promotion
from stratocache.fs.provisional import ProvisionalImages
from stratocache.fs.recheck import Recheck
from stratocache.fs.reconciler import Reconciler
from stratocache.fs.records import Caller
from stratocache.fs.rejected_pages import RejectedPages
from stratocache.fs.resolution import RESOLVE, Resolution
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.saving import Saving
from stratocache.fs.snapshots import Snapshots
from stratocache.fs.state import Database
from stratocache.fs.target import TargetDaemon
from stratocache.fs.tgt import Tgt
from stratocache.fs.traffic_record import TrafficRecord

log = logging.getLogger(__name__)

_RETRY_INTERVAL_S = 0.5
_IDLE_INTERVAL_S = 30.0
_LEASE_GRACE_S = 0.01
"""So that what is over is so at the next look."""
_SELF = Caller("blockd", "admin")


class Housekeeping:
    """Makes real what the state says, over the stores that serve blocks."""

    def __init__(
        self,
        configuration: Configuration,
        db: Database,
        images: ImageStore,
        chunks: ChunkStore,
        disks: DiskStore,
        blocks: Blocks,
        io: DiskIo,
    ) -> None:
        self._configuration = configuration
        self._directory = RunDirectory(configuration.run_dir)
        self._db = db
        self._images = images
        self._chunks = chunks
        self._disks = disks
        self.blocks = blocks
        self._counts = BlockdCounts(self._directory.counts, db, chunks, io)
        self._woken = trio.Event()

    def _target_daemon(self) -> TargetDaemon:
        if self._configuration.iscsi.backend == "lio":
            return Lio(self._directory.lio_control)
        iscsi = self._configuration.iscsi
        return Tgt(self._directory.tgt_control, Portal(iscsi.address, iscsi.port))

    def _wake(self) -> None:
        self._woken.set()

    async def keep(self, pokes: PokeListener, nursery: trio.Nursery) -> None:
        """Work until cancelled."""
        nursery.start_soon(self._listen, pokes)
        nursery.start_soon(self._counts.run)
        settings = self._configuration.fetch
        async with source_client(settings) as client, import_client(settings) as imports:
            await self._work(client, Importer(self._configuration, imports), nursery)

    async def _listen(self, pokes: PokeListener) -> None:
        while True:
            await pokes.wait()
            self._wake()

    async def _work(
        self, client: httpx.AsyncClient, importer: Importer, nursery: trio.Nursery
    ) -> None:
        """Sweep once, then look at the state whenever somebody says so, and now and then."""
        traffic, peers = Traffic(), self._peers(nursery)
        fetcher = Fetcher(
            self._configuration, self._images, self._chunks, client, traffic=traffic, peers=peers
        )  # fmt: skip
        chunk_fetcher = ChunkFetcher(
            self._configuration, self._images, client, nursery, entry_finder(self._db),
            fetcher.chunk_space, traffic=traffic, peers=peers,
        )  # fmt: skip
        supply = Supply(self._images, chunk_fetcher, awaited_finder(self._db))
        self._images.set_supplier(supply)
        record = TrafficRecord(self._db, traffic, self._images.reads)
        provisional = ProvisionalImages(
            self._configuration, self._db, self._images, client, chunk_fetcher,
            BootSets(self._configuration, self._images, nursery), record, nursery, self._wake,
        )  # fmt: skip
        catalogues = Catalogues(self._configuration, client)
        recheck = Recheck(self._configuration, self._db, catalogues)
        acquisition = Acquisition(
            self._configuration, self._db, catalogues, fetcher, self._images, provisional, recheck,
            nursery,
        )  # fmt: skip
        keeping = Keeping(
            self._configuration, self._db, self._images, self._disks, fetcher, chunk_fetcher,
            supply, acquisition, provisional, nursery, self._wake,
        )  # fmt: skip
        work = DiskWork()
        reconciler = Reconciler(
            self._configuration, self._db, self._images, self._disks, self._target_daemon(),
            self.blocks, work, before_removal=provisional.stop,
        )  # fmt: skip
        snapshots = Snapshots(
            self._db, self._images, self._disks, self.blocks, work, nursery, self._wake
        )
        promotion = Promotion(
            self._configuration, self._db, self._disks, self.blocks, reconciler.manifests, work,
            reconciler.targets, reconciler.exclusive, self._wake,
        )  # fmt: skip
        performers: dict[str, Performer] = {
            "hydrate": promotion,
            IMPORT_DISK: Importing(self._db, self._disks, importer),
            "save": Saving(self._db, self._images, self._disks),
            RESOLVE: Resolution(self._db, acquisition, catalogues),
            **keeping.performers,
        }
        operations = Operations(self._db, acquisition, nursery, self._wake, performers)
        await self._sweep(acquisition)
        keeping.start()
        await reconciler.adopt()
        nursery.start_soon(record.run)
        nursery.start_soon(recheck.run)
        rejected = RejectedPages(self._db, self.blocks, nursery)
        await self._rounds(
            operations, provisional, rejected, keeping, reconciler, snapshots, promotion
        )

    async def _rounds(
        self, operations: Operations, provisional: ProvisionalImages, rejected: RejectedPages,
        keeping: Keeping, reconciler: Reconciler, snapshots: Snapshots, promotion: Promotion,
    ) -> None:  # fmt: skip
        """Let everybody look at the state, again and again, until cancelled."""
        sizes = ManifestSizes(self._db, self._images)
        mount = MountWatch(self._db, self._configuration.blocks)
        while True:
            self._woken = trio.Event()
            await operations.look()
            provisional.look()
            rejected.look()
            keeping.scrubbing.look()
            with self._counts.reconciling():
                unsettled = await reconciler.reconcile()
            snapshots.look()
            await promotion.look()
            if mount.is_due():
                await trio.to_thread.run_sync(mount.look)
            await sizes.look()  # last: no target waits until manifests are read
            interval_s = _RETRY_INTERVAL_S if unsettled else _IDLE_INTERVAL_S
            lease_s = reconciler.leases.remaining_s()
            if lease_s is not None:
                interval_s = min(interval_s, lease_s + _LEASE_GRACE_S)
            with trio.move_on_after(interval_s):
                await self._woken.wait()

    def _peers(self, nursery: trio.Nursery) -> Peers | None:
        """Return the peers that are configured, who are looked after from now on."""
        if not self._configuration.peers.hosts:
            return None
        peers = Peers(self._configuration.peers)
        nursery.start_soon(peers.run)
        nursery.start_soon(PeerRecord(self._db, peers).run)
        return peers

    async def _sweep(self, acquisition: Acquisition) -> None:
        known = {disk.uuid for disk in inventory.disks(self._db, _SELF)}
        await sweep(partial(self._disks.sweep, known))
        await sweep(acquisition.sweep)
        await sweep(partial(transfers.sweep, self._configuration, self._db))


async def sweep(remove: Callable[[], object]) -> None:
    """Remove what a crash left; where that cannot be done it costs space, and disks are served."""
    try:
        await trio.to_thread.run_sync(remove)
    except OSError:
        log.exception("what a crash left stays until the next start")
