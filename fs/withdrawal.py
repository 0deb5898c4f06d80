"""Images that their catalogue takes back: no new disks are made of them, what runs goes on.

A deprecation that the endorser signed withdraws an image at once; that its catalogue does not list
it any more does so only when it is still so a while later. What is listed again is verified again,
as it has been all the time. When catalogues are asked is in `stratocache.fs.recheck`.
"""

import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime

from stratocache.cache.catalogue import Standing
from stratocache.cache.entry import Entry, same_content
from stratocache.cache.errors import Refused
from stratocache.fs import inventory
from stratocache.fs.records import Image
from stratocache.fs.state import Database, now, record_event

_NAMED_MAX = 20


def withdrawn(image: Image) -> Refused:
    """Return the error for whoever wants a new disk of a withdrawn image."""
    return Refused(
        "image-withdrawn",
        f"Image {image.id} was withdrawn: {image.withdrawn_because} Should it be listed again, "
        f"`stratocache image fetch {image.id}` asks its catalogue.",
    )


def record(db: Database, image: Image, standing: Standing, *, confirm_s: float) -> None:
    """Record what the catalogue of a complete image says of it.

    Absence counts once it has been observed for `confirm_s`. What was decided otherwise meanwhile
    stays.
    """
    with db.transaction() as connection:
        present = inventory.find_image(db, image.id)
        if present is None or not present.settled or present.entry != image.entry:
            return
        connection.execute("UPDATE images SET checked_at = ? WHERE id = ?", (now(), image.id))
        if standing.verdict == "unlisted":
            _note_absence(connection, db, present, confirm_s)
            return
        connection.execute("UPDATE images SET unlisted_since = NULL WHERE id = ?", (image.id,))
        if standing.verdict == "taken-back":
            _withdraw(connection, db, present, standing.reason)
        elif standing.verdict == "current":
            _relist(connection, present, standing.entry or present.entry)


def reinstate(db: Database, image: Image, entry: Entry) -> bool:
    """Verify a withdrawn image again by an entry that was resolved now; tell whether it may be."""
    if not same_content(image.entry, entry):
        return False
    with db.transaction() as connection:
        present = inventory.find_image(db, image.id)
        if present is not None and present.state == "withdrawn":
            _relist(connection, present, entry)
    return True


def _note_absence(
    connection: sqlite3.Connection, db: Database, image: Image, confirm_s: float
) -> None:
    if image.unlisted_since is None:
        connection.execute("UPDATE images SET unlisted_since = ? WHERE id = ?", (now(), image.id))
        return
    absent_s = (datetime.now(UTC) - datetime.fromisoformat(image.unlisted_since)).total_seconds()
    if absent_s >= confirm_s:
        reason = f"The catalogue {image.entry.catalogue} does not list it any more."
        _withdraw(connection, db, image, reason)


def _withdraw(connection: sqlite3.Connection, db: Database, image: Image, reason: str) -> None:
    if image.state == "withdrawn":
        return
    if image.asleep:
        # nothing reads what is left of it, and nobody may any more
        connection.execute("UPDATE images SET state = 'deleting' WHERE id = ?", (image.id,))
        record_event(
            connection, "image.withdrawn", image.id,
            f"Image {image.id} is withdrawn, and what was left of it removed: {reason}",
        )  # fmt: skip
        return
    connection.execute(
        "UPDATE images SET state = 'withdrawn', withdrawn_at = ?, withdrawn_because = ? "
        "WHERE id = ?",
        (now(), reason, image.id),
    )
    record_event(
        connection, "image.withdrawn", image.id,
        f"Image {image.id} is withdrawn: {reason} {_going_on(inventory.disks_of_image(db, image.id))}",
    )  # fmt: skip


def _relist(connection: sqlite3.Connection, image: Image, entry: Entry) -> None:
    connection.execute(
        "UPDATE images SET state = iif(state = 'withdrawn', 'verified', state), entry = ?, checked_at = ?, unlisted_since = NULL, "
        "withdrawn_at = NULL, withdrawn_because = NULL WHERE id = ?",
        (entry.model_dump_json(), now(), image.id),
    )
    if image.state == "withdrawn":
        record_event(
            connection, "image.reinstated", image.id,
            f"Image {image.id} is listed again, by {entry.endorser.email}; it is verified.",
        )  # fmt: skip


def _going_on(disks: Sequence[str]) -> str:
    if not disks:
        return "No disk was made of it."
    more = f" and {len(disks) - _NAMED_MAX} more" if len(disks) > _NAMED_MAX else ""
    return f"Disks of it go on: {', '.join(disks[:_NAMED_MAX])}{more}."
