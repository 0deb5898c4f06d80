"""`blockd`: the process that serves blocks and makes the state real.

    python -m stratocache.fs.blockd --config-json FILE --fuse-fd N --ready-fd M

One trio loop runs the FUSE tree, the operations with their fetches, and the reconciler. The
supervisor starts it, owns the FUSE connection, and starts it again when it dies.
"""

import argparse
import logging
import os
import resource
import signal
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import trio

from stratocache.cache.catalogue import Catalogues
from stratocache.cache.chunks import ChunkStore
from stratocache.cache.configuration import Configuration
from stratocache.cache.fetch import Fetcher
from stratocache.cache.images import ImageStore
from stratocache.fs import inventory, transfers
from stratocache.fs.acquisition import Acquisition
from stratocache.fs.blocks import Blocks
from stratocache.fs.content_import import Importer
from stratocache.fs.disk_work import DiskWork
from stratocache.fs.disks import DiskStore
from stratocache.fs.fuse_connection import serve_inherited
from stratocache.fs.import_intents import IMPORT_DISK
from stratocache.fs.importing import Importing
from stratocache.fs.lio import Lio
from stratocache.fs.operations import Operations, Performer
from stratocache.fs.poke import PokeListener
from stratocache.fs.promotion import Promotion
from stratocache.fs.reconciler import Reconciler
from stratocache.fs.records import Caller
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.saving import Saving
from stratocache.fs.snapshots import Snapshots
from stratocache.fs.state import Database, record_event
from stratocache.fs.target import TargetDaemon
from stratocache.fs.tgt import Tgt
from stratocache.fs.tree import Tree

log = logging.getLogger(__name__)

_RETRY_INTERVAL_S = 0.5
_IDLE_INTERVAL_S = 30.0
_SELF = Caller("blockd", True)


class Blockd:
    """The parts of one `blockd` and the loop that keeps them going."""

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration
        self._directory = RunDirectory(configuration.run_dir)
        self._db = Database(configuration.database)
        self._db.migrate()
        self._chunks = ChunkStore(configuration.state_dir / "chunks")
        self._images = ImageStore(configuration.state_dir, self._chunks)
        self._disks = DiskStore(
            configuration.state_dir,
            configuration.run_dir,
            write_wait_s=configuration.space.write_wait_s,
            on_full=self._note_full,
        )
        self.blocks = Blocks(configuration, self._db, self._images, self._disks)
        self._woken = trio.Event()

    def _wake(self) -> None:
        self._woken.set()

    def _note_full(self, uuid: str) -> None:
        """Record, beside the write that waits, that a disk's file system is full."""
        trio.lowlevel.spawn_system_task(trio.to_thread.run_sync, self._record_full, uuid)

    def _record_full(self, uuid: str) -> None:
        try:
            with self._db.transaction() as connection:
                record_event(
                    connection, "disk.full", uuid,
                    f"A write to disk {uuid} waits for space; free some.",
                )  # fmt: skip
        except sqlite3.Error:
            log.exception("the event of disk %s could not be recorded", uuid)

    async def run(self, fuse_fd: int, ready_fd: int) -> None:
        """Serve until SIGTERM or until the connection ends; flush and close every overlay."""
        timeouts = self._configuration.fetch
        limits = httpx.Timeout(timeouts.read_timeout_s, connect=timeouts.connect_timeout_s)
        with PokeListener(self._configuration.poke_socket) as pokes:
            async with httpx.AsyncClient(timeout=limits) as client, trio.open_nursery() as nursery:
                await nursery.start(self._serve, fuse_fd, nursery.cancel_scope)
                os.write(ready_fd, b"R")
                os.close(ready_fd)
                nursery.start_soon(self._stop_on_signal, nursery)
                nursery.start_soon(self._listen, pokes)
                await self._work(client, nursery)
        await self.blocks.aclose()
        self._chunks.close()
        self._db.close()

    def _target_daemon(self) -> TargetDaemon:
        if self._configuration.iscsi.backend == "lio":
            return Lio(self._directory.lio_control)
        return Tgt(self._directory.tgt_control)

    async def _serve(
        self,
        fuse_fd: int,
        everything: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        init_request = self._directory.init_request.read_bytes()
        tree = Tree(self.blocks, opened_by_kernel=self._configuration.iscsi.backend == "lio")
        await serve_inherited(tree, fuse_fd, init_request, task_status=task_status)
        log.info("the FUSE connection has ended")
        everything.cancel()

    async def _stop_on_signal(self, nursery: trio.Nursery) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                log.info("stopping")
                nursery.cancel_scope.cancel()

    async def _listen(self, pokes: PokeListener) -> None:
        while True:
            await pokes.wait()
            self._wake()

    async def _work(self, client: httpx.AsyncClient, nursery: trio.Nursery) -> None:
        """Sweep once, then look at the state whenever somebody says so, and now and then."""
        acquisition = Acquisition(
            self._configuration,
            self._db,
            Catalogues(self._configuration, client),
            Fetcher(self._configuration, self._images, self._chunks, client),
            self._images,
            nursery,
        )
        work = DiskWork()
        reconciler = Reconciler(
            self._configuration,
            self._db,
            self._images,
            self._disks,
            self._target_daemon(),
            self.blocks,
            work,
        )
        snapshots = Snapshots(
            self._db, self._images, self._disks, self.blocks, work, nursery, self._wake
        )
        promotion = Promotion(
            self._configuration, self._db, self._disks, self.blocks, reconciler.manifests, work,
            reconciler.targets, reconciler.exclusive, self._wake,
        )  # fmt: skip
        performers: dict[str, Performer] = {
            "hydrate": promotion,
            IMPORT_DISK: Importing(self._db, self._disks, Importer(self._configuration, client)),
            "save": Saving(self._db, self._images, self._disks),
        }
        operations = Operations(self._db, acquisition, nursery, self._wake, performers)
        known = {disk.uuid for disk in inventory.disks(self._db, _SELF)}
        await sweep(partial(self._disks.sweep, known))
        await sweep(acquisition.sweep)
        await sweep(partial(transfers.sweep, self._configuration, self._db))
        await reconciler.adopt()
        while True:
            self._woken = trio.Event()
            operations.look()
            unsettled = await reconciler.reconcile()
            snapshots.look()
            await promotion.look()
            interval_s = _RETRY_INTERVAL_S if unsettled else _IDLE_INTERVAL_S
            with trio.move_on_after(interval_s):
                await self._woken.wait()


async def sweep(remove: Callable[[], object]) -> None:
    """Remove what a crash left; where that cannot be done it costs space, and disks are served."""
    try:
        await trio.to_thread.run_sync(remove)
    except OSError:
        log.exception("what a crash left stays until the next start")


def main() -> None:
    """Run `blockd` until it is told to stop."""
    parser = argparse.ArgumentParser(prog="blockd")
    parser.add_argument("--config-json", type=Path, required=True)
    parser.add_argument("--fuse-fd", type=int, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    options = parser.parse_args()
    configuration = Configuration.model_validate_json(options.config_json.read_text())
    logging.basicConfig(
        level=configuration.log_level.upper(), format="blockd: %(levelname)s: %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("httpcore").setLevel(logging.WARNING)

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each open chunk is a descriptor

    async def run() -> None:
        await Blockd(configuration).run(options.fuse_fd, options.ready_fd)

    trio.run(run)


if __name__ == "__main__":
    main()
