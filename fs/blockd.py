"""`blockd`: the process that serves blocks and makes the state real.

    python -m stratocache.fs.blockd --config-json FILE --fuse-fd N --ready-fd M

One trio loop runs the FUSE tree and, in `housekeeping`, everything else. The supervisor starts it,
owns the FUSE connection, and starts it again when it dies.
"""

import argparse
import importlib
import logging
import os
import resource
import signal
import sqlite3
from pathlib import Path

import trio

from stratocache.cache.chunks import ChunkStore
from stratocache.cache.configuration import Configuration
from stratocache.cache.images import ImageStore
from stratocache.cache.structured_log import configure_log
from stratocache.fs.blocks import Blocks
from stratocache.fs.disk_io import DiskIo
from stratocache.fs.disks import DiskStore
from stratocache.fs.fuse_connection import serve_inherited
from stratocache.fs.poke import PokeListener
from stratocache.fs.resident import keep_resident
from stratocache.fs.run_directory import RunDirectory
from stratocache.fs.state import Database, record_event
from stratocache.fs.tree import Tree

log = logging.getLogger(__name__)

_HOUSEKEEPING = "stratocache.fs.housekeeping"


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
        self._io = DiskIo()

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
        with PokeListener(self._configuration.poke_socket) as pokes:
            async with trio.open_nursery() as nursery:
                # before the first request: the one that a process died of is repeated at once
                self._images.expect_supplier()
                await nursery.start(self._serve, fuse_fd, nursery.cancel_scope)
                os.write(ready_fd, b"R")
                os.close(ready_fd)
                nursery.start_soon(self._stop_on_signal, nursery)
                await self._keep_house(pokes, nursery)
        await self.blocks.aclose()
        self._chunks.close()
        self._db.close()

    async def _serve(
        self,
        fuse_fd: int,
        everything: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        init_request = self._directory.init_request.read_bytes()
        by_kernel = self._configuration.iscsi.backend == "lio"
        tree = Tree(self.blocks, opened_by_kernel=by_kernel, io=self._io)
        await serve_inherited(tree, fuse_fd, init_request, task_status=task_status)
        log.info("the FUSE connection has ended")
        everything.cancel()

    async def _stop_on_signal(self, nursery: trio.Nursery) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                log.info("stopping")
                nursery.cancel_scope.cancel()

    async def _keep_house(self, pokes: PokeListener, nursery: trio.Nursery) -> None:
        """Do everything else: imported now, in a thread, as guests wait for blocks alone."""
        await trio.to_thread.run_sync(importlib.import_module, _HOUSEKEEPING)
        from stratocache.fs.housekeeping import Housekeeping

        house = Housekeeping(
            self._configuration, self._db, self._images, self._chunks, self._disks, self.blocks,
            self._io,
        )  # fmt: skip
        await house.keep(pokes, nursery)


def prepare() -> None:
    """Do what serving blocks does not need at once; a spare has the time, a late start has not."""
    keep_resident()
    importlib.import_module(_HOUSEKEEPING)


def main() -> None:
    """Run `blockd` until it is told to stop."""
    parser = argparse.ArgumentParser(prog="blockd")
    parser.add_argument("--config-json", type=Path, required=True)
    parser.add_argument("--fuse-fd", type=int, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    options = parser.parse_args()
    configuration = Configuration.model_validate_json(options.config_json.read_text())
    configure_log("blockd", configuration.log_level, configuration.log.format)
    keep_resident()  # a spare has done so

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each open chunk is a descriptor

    async def run() -> None:
        await Blockd(configuration).run(options.fuse_fd, options.ready_fd)

    trio.run(run)


if __name__ == "__main__":
    main()
