"""What each account may have at most, enforced in the transaction that would take more.

Disks count for who owns them, by their size, and by what they are being grown to; attachments for
who asked for them. Who has no account, or one without quotas, has no limit.
"""

import sqlite3
from dataclasses import dataclass

from stratocache.cache.errors import Refused

_USED = """
    SELECT
        (SELECT coalesce(sum(size_bytes), 0) FROM disks
         WHERE owner = ?1 AND state <> 'deleting')
        + (SELECT coalesce(sum(growth), 0) FROM (
            SELECT max(0, max(json_extract(request, '$.size_bytes')) - size_bytes) AS growth
            FROM operations JOIN disks ON uuid = subject
            WHERE operations.kind = 'resize' AND operations.state IN ('pending', 'running')
            AND disks.owner = ?1 AND disks.state <> 'deleting' GROUP BY uuid)) AS bytes,
        (SELECT count(*) FROM disks WHERE owner = ?1 AND state <> 'deleting') AS disks,
        (SELECT count(*) FROM attachments
         WHERE owner = ?1 AND state <> 'removing' AND migrates IS NULL) AS attachments
"""


@dataclass(frozen=True, slots=True)
class Amounts:
    """What quotas are about."""

    bytes: int = 0
    disks: int = 0
    attachments: int = 0


def require(connection: sqlite3.Connection, owner: str, wanted: Amounts) -> None:
    """Raise `Refused` (`quota-bytes`, `quota-disks`, `quota-attachments`) when it is too much.

    Call within the transaction that records what is wanted, before it does.
    """
    limits = connection.execute(
        "SELECT quota_bytes AS bytes, quota_disks AS disks, quota_attachments AS attachments "
        "FROM accounts WHERE name = ?",
        (owner,),
    ).fetchone()
    if limits is None or all(limit is None for limit in limits):
        return
    present = used(connection, owner)
    for name in ("disks", "bytes", "attachments"):
        limit, more, has = limits[name], getattr(wanted, name), getattr(present, name)
        if limit is not None and more > 0 and has + more > limit:
            raise Refused(
                f"quota-{name}",
                f"{owner} has {_amount(has, name)} and may have {_amount(limit, name)}; "
                f"{_amount(more, name)} more are too much. Delete some, or ask an administrator.",
            )


def used(connection: sqlite3.Connection, owner: str) -> Amounts:
    """Return what counts for somebody now."""
    return Amounts(*connection.execute(_USED, (owner,)).fetchone())


def _amount(number: int, name: str) -> str:
    return f"{number} {'bytes of disks' if name == 'bytes' else name}"
