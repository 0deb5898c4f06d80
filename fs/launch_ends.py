"""When a launch is active, and when nothing of it is left."""

import sqlite3
from typing import cast

from stratocache.cache.errors import ErrorRecord, from_record
from stratocache.fs import inventory, records
from stratocache.fs.operation_ends import fail, finish
from stratocache.fs.records import Launch
from stratocache.fs.state import Database, later, record_event

_READY = """
    FROM launches WHERE state = 'preparing' AND boot_disk IS NOT NULL AND NOT EXISTS (
        SELECT 1 FROM attachments WHERE instance = launches.instance AND state <> 'ready')
"""
# a disk that is there for good is in quarantine, or was
_GONE = """
    FROM launches WHERE state = 'ending'
    AND NOT EXISTS (SELECT 1 FROM attachments WHERE instance = launches.instance)
    AND NOT EXISTS (SELECT 1 FROM disks WHERE uuid = boot_disk AND state <> 'available')
"""


def unsettled(db: Database) -> bool:
    """Tell whether `settle` has something to do."""
    return db.row(f"SELECT 1 {_READY} UNION ALL SELECT 1 {_GONE}") is not None


def settle(db: Database) -> None:
    """Call launches active whose attachments are ready, drop those of which nothing is left."""
    with db.transaction() as connection:
        settle_ready(connection)
        for row in connection.execute(f"SELECT * {_GONE}").fetchall():
            _drop(connection, db, records.launch_from(row))


def settle_ready(connection: sqlite3.Connection) -> None:
    """Call launches active whose attachments are ready, within the caller's transaction."""
    for row in connection.execute(f"SELECT instance, lease_s {_READY}").fetchall():
        instance, lease_s = row["instance"], row["lease_s"]
        connection.execute(
            "UPDATE launches SET state = 'active', lease_expires_at = ? WHERE instance = ?",
            (None if lease_s is None else later(lease_s), instance),
        )
        finish(connection, "launch", instance, {"instance": instance})


def _drop(connection: sqlite3.Connection, db: Database, launch: Launch) -> None:
    connection.execute("DELETE FROM launches WHERE instance = ?", (launch.instance,))
    finish(connection, "halt", launch.instance, {})
    started = inventory.operation(db, launch.operation_id)
    if started.error is not None:
        error = from_record(cast(ErrorRecord, started.error))
        fail(connection, "launch", launch.instance, error)
    record_event(
        connection, "launch.ended", launch.instance,
        f"Nothing of instance {launch.instance} is left.",
    )  # fmt: skip
