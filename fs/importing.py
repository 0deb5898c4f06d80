"""The operation that makes a disk of a file of an HTTP(S) server."""

import trio

from stratocache.fs import inventory, quotas
from stratocache.fs.acquisition import Report
from stratocache.fs.content_import import Importer
from stratocache.fs.disk_intents import insert_disk
from stratocache.fs.disks import DiskStore
from stratocache.fs.import_intents import IMPORT_DISK, ImportRequest
from stratocache.fs.operation_ends import finish
from stratocache.fs.quotas import Amounts
from stratocache.fs.records import DiskRequest, Operation
from stratocache.fs.state import Database, record_event


class Importing:
    """Performs `import-disk`: the disk gets its row when its files are there."""

    def __init__(self, db: Database, disks: DiskStore, importer: Importer) -> None:
        self._db = db
        self._disks = disks
        self._importer = importer

    async def perform(self, operation: Operation, report: Report) -> None:
        """Fetch, install and record; raises what `Importer.fetch` raises.

        When the process stops, what was downloaded stays for the next; when the operation is
        cancelled, nothing does.
        """
        wanted = ImportRequest(**operation.request["import"])
        try:
            size_bytes = await self._importer.fetch(operation.subject, wanted, report)
            await trio.to_thread.run_sync(self._make, operation, size_bytes)
        except trio.Cancelled:
            if inventory.operation(self._db, operation.id).cancel_requested:
                self._importer.discard(operation.subject)
            raise

    def _make(self, operation: Operation, size_bytes: int) -> None:
        uuid = operation.subject
        with self._db.transaction() as connection:  # before there are files
            wanted = Amounts(bytes=size_bytes, disks=1)
            quotas.require(connection, operation.owner, wanted)
        form = self._importer.install(self._disks, uuid, size_bytes)
        disk = DiskRequest(**operation.request["disk"])
        with self._db.transaction() as connection:
            insert_disk(connection, operation.owner, uuid, disk, size_bytes=size_bytes)
            connection.execute(
                "UPDATE disks SET state = 'available', form = ? WHERE uuid = ?", (form, uuid)
            )
            finish(connection, IMPORT_DISK, uuid, {"disk": uuid}, operation.id)
            record_event(connection, "disk.created", uuid, f"Disk {uuid} was imported.")
        self._importer.discard(uuid)
