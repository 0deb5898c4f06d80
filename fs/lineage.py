"""What was made of an image: its disks, their snapshots, the disks cloned of those, and so on."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from stratocache.fs import inventory, records
from stratocache.fs.records import Caller, Disk, Snapshot
from stratocache.fs.state import Database

NODES_MAX = 1000
"""Disks, and snapshots, that are named; the others are counted."""
DEPTH_MAX = 32
"""Disks between an image and a disk that is named."""


@dataclass(frozen=True, slots=True)
class SnapshotNode:
    """A snapshot and the disks that were cloned of it."""

    snapshot: Snapshot
    disks: tuple["DiskNode", ...]


@dataclass(frozen=True, slots=True)
class DiskNode:
    """A disk, who has it, and its snapshots."""

    disk: Disk
    attached_to: tuple[str, ...]
    snapshots: tuple[SnapshotNode, ...]


@dataclass(frozen=True, slots=True)
class Lineage:
    """The disks of an image that a caller may see, oldest first."""

    disks: tuple[DiskNode, ...]
    """Those cloned of the image, and those whose snapshot is gone or not for the caller."""
    disk_count: int
    snapshot_count: int
    """All of the image's that the caller may see, named or not."""
    omitted_count: int
    """Disks and snapshots that are not named: there are too many."""


def lineage_of(
    db: Database, caller: Caller, image_id: str, *, nodes_max: int = NODES_MAX
) -> Lineage:
    """Return what was made of an image, as far as the caller may see it."""
    visible = inventory.visible_disks(caller)
    wanted, given = f"base_image = ? AND {visible.text}", (image_id, *visible.values)
    disks = [
        records.disk_from(row)
        for row in db.rows(
            f"SELECT * FROM disks WHERE {wanted} ORDER BY number LIMIT ?",  # nosec B608 # no value in it
            *given,
            nodes_max,
        )
    ]
    snapshots = [
        records.snapshot_from(row)
        for row in db.rows(
            "SELECT * FROM snapshots WHERE disk_uuid IN (SELECT value FROM json_each(?)) "
            "ORDER BY number LIMIT ?",
            json.dumps([disk.uuid for disk in disks]),
            nodes_max,
        )
    ]
    counted = db.row(
        f"SELECT count(*), coalesce(sum((SELECT count(*) FROM snapshots WHERE disk_uuid = uuid)), 0) "  # nosec B608 # no value in it
        f"FROM disks WHERE {wanted}",
        *given,
    )
    assert counted is not None
    roots = _Tree(db, disks, snapshots).roots()
    named = sum(1 for root in roots for _ in _nodes(root))
    return Lineage(roots, counted[0], counted[1], counted[0] + counted[1] - named)


class _Tree:
    """Disks and snapshots by what they were made of."""

    def __init__(self, db: Database, disks: list[Disk], snapshots: list[Snapshot]) -> None:
        self._held = inventory.attachments_of(db, disks)
        self._snapshots: dict[str, list[Snapshot]] = defaultdict(list)
        for snapshot in snapshots:
            self._snapshots[snapshot.disk_uuid].append(snapshot)
        known = {snapshot.id for snapshot in snapshots}
        self._clones: dict[str | None, list[Disk]] = defaultdict(list)
        for disk in disks:
            self._clones[disk.base_snapshot if disk.base_snapshot in known else None].append(disk)

    def roots(self) -> tuple[DiskNode, ...]:
        return tuple(self._disk(disk, 1) for disk in self._clones[None])

    def _disk(self, disk: Disk, depth: int) -> DiskNode:
        held = tuple(item.instance for item in self._held[disk.uuid])
        snapshots = self._snapshots[disk.uuid]
        return DiskNode(disk, held, tuple(self._snapshot(item, depth) for item in snapshots))

    def _snapshot(self, snapshot: Snapshot, depth: int) -> SnapshotNode:
        clones = self._clones[snapshot.id] if depth < DEPTH_MAX else []
        return SnapshotNode(snapshot, tuple(self._disk(disk, depth + 1) for disk in clones))


def _nodes(node: DiskNode) -> Iterator[DiskNode | SnapshotNode]:
    yield node
    for snapshot in node.snapshots:
        yield snapshot
        for disk in snapshot.disks:
            yield from _nodes(disk)
