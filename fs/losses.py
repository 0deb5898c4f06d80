"""What could not be repaired: told as events, kept until it is repaired or no longer needed."""

import json
import logging
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stratocache.fs.state import Database, now, record_event

log = logging.getLogger(__name__)

_NAMED_MAX = 20


@dataclass(frozen=True, slots=True)
class Loss:
    """One chunk or manifest that is damaged or gone, and that no origin has."""

    name: str
    """A chunk's digest in hexadecimal, or a manifest's name."""
    kind: str
    found_at: str
    images: tuple[str, ...]
    """Names of the manifests that need it."""
    disks: tuple[str, ...]
    """UUIDs of the disks that read from these."""
    reason: str


def losses(db: Database) -> list[Loss]:
    """Return what is lost and still needed, the oldest first."""
    found = []
    for row in db.rows("SELECT * FROM losses ORDER BY found_at, name"):
        images = tuple(name for name in json.loads(row["images"]) if _is_named(db, name))
        if images:
            disks = tuple(_disks_on(db, images))
            found.append(
                Loss(row["name"], row["kind"], row["found_at"], images, disks, row["reason"])
            )
    return found


class RepairRecord:
    """Writes repairs and losses into the state database; a `Witness` of repairs. Methods block.

    `on_damage` is called for each chunk that was damaged or gone.
    """

    def __init__(self, db: Database, on_damage: Callable[[], None]) -> None:
        self._db = db
        self._on_damage = on_damage

    def chunk_repaired(self, digest: bytes, identifier: str) -> None:
        """A chunk is whole again, from an image's origin."""
        self._on_damage()
        shared = _reflinked(self._db, identifier)
        warning = (
            f" Disks that were cloned by sharing its extents may have it: {_list(shared)}."
            if shared
            else ""
        )
        self._write(
            "chunk.repaired", identifier, digest.hex(),
            f"Chunk {digest.hex()} of image {identifier} was damaged or gone and was fetched "
            f"again.{warning}",
        )  # fmt: skip

    def chunk_lost(self, digest: bytes, identifiers: Sequence[str], reason: str) -> None:
        """No origin has a chunk of these images."""
        self._on_damage()
        disks = _disks_on(self._db, identifiers)
        message = (
            f"Chunk {digest.hex()} of {_list(identifiers)} is lost; needed by disks: "
            f"{_list(disks)}. {reason}"
        )
        self._write(
            "chunk.lost", digest.hex(), digest.hex(), message, kind="chunk",
            images=identifiers, reason=reason,
        )  # fmt: skip

    def manifest_repaired(self, identifier: str) -> None:
        """A manifest is whole again."""
        self._write(
            "manifest.repaired", identifier, identifier,
            f"The manifest of image {identifier} was damaged or gone and was made again.",
        )  # fmt: skip

    def manifest_lost(self, identifier: str, reason: str) -> None:
        """A manifest cannot be made again."""
        disks = _disks_on(self._db, [identifier])
        message = f"The manifest {identifier} is lost; needed by disks: {_list(disks)}. {reason}"
        self._write(
            "manifest.lost", identifier, identifier, message, kind="manifest",
            images=[identifier], reason=reason,
        )  # fmt: skip

    def forget_unneeded(self) -> None:
        """Drop losses of what nothing names any more."""
        for row in self._db.rows("SELECT name, images FROM losses"):
            if not any(_is_named(self._db, name) for name in json.loads(row["images"])):
                with self._db.transaction() as connection:
                    connection.execute("DELETE FROM losses WHERE name = ?", (row["name"],))

    def _write(
        self, event: str, subject: str, name: str, message: str, *,
        kind: str = "", images: Sequence[str] = (), reason: str = "",
    ) -> None:  # fmt: skip
        log.warning("%s: %s", event, message)
        try:
            with self._db.transaction() as connection:
                if not kind:
                    connection.execute("DELETE FROM losses WHERE name = ?", (name,))
                    record_event(connection, event, subject, message)
                elif self._note_loss(connection, name, kind, images, reason):
                    record_event(connection, event, subject, message)
        except sqlite3.Error:
            log.exception("%s of %s could not be recorded", event, subject)

    def _note_loss(
        self, connection: sqlite3.Connection, name: str, kind: str, images: Sequence[str],
        reason: str,
    ) -> bool:  # fmt: skip
        """Keep a loss; tell whether it is a new one, which is worth an event."""
        known = connection.execute("SELECT 1 FROM losses WHERE name = ?", (name,)).fetchone()
        connection.execute(
            "INSERT INTO losses (name, kind, found_at, images, reason) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET images = excluded.images, reason = excluded.reason",
            (name, kind, now(), json.dumps(list(images)), reason),
        )
        return known is None


def _disks_on(db: Database, manifests: Sequence[str]) -> list[str]:
    rows = db.rows(
        "SELECT uuid FROM disks WHERE base_manifest IN (SELECT value FROM json_each(?)) "
        "ORDER BY number",
        json.dumps(list(manifests)),
    )
    return [row["uuid"] for row in rows]


def _reflinked(db: Database, image_id: str) -> list[str]:
    rows = db.rows(
        "SELECT uuid FROM disks WHERE base_image = ? AND form = 'raw' ORDER BY number", image_id
    )
    return [row["uuid"] for row in rows]


def _is_named(db: Database, name: str) -> bool:
    return (
        db.row(
            "SELECT 1 FROM images WHERE id = ?1 AND state NOT IN ('rejected', 'deleting') "
            "UNION ALL SELECT 1 FROM snapshots WHERE id = ?1 AND state <> 'deleting' "
            "UNION ALL SELECT 1 FROM disks WHERE base_manifest = ?1",
            name,
        )
        is not None
    )


def _list(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return ", ".join(names[:_NAMED_MAX]) + more
