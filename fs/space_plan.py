"""The account of space: what is taken and by what, what disks are promised, what is there.

A disk is *promised* the bytes that it may still have to be given: its size less what is its own.
Extents that it shares (with chunks, by reflink, or with a snapshot of it) are not its own: writing
to them takes new space.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from stratocache.cache.configuration import Configuration
from stratocache.cache.errors import NoSpace
from stratocache.cache.space import no_space
from stratocache.fs import inventory, records, reflink
from stratocache.fs.records import Attachment, Disk, Image
from stratocache.fs.state import Database

_SECTOR_BYTES = 512  # stat(2), st_blocks
_SNAPSHOTS = "snapshots"
_UNFINISHED = ("stage", "transfers")
_SIZED = "SELECT uuid, size_bytes, form, base_image, base_snapshot"


@dataclass(frozen=True, slots=True)
class SpaceAccount:
    """The bytes of one state directory by kind, and those of its file system."""

    total_bytes: int
    free_bytes: int
    reserve_bytes: int
    """Of the free ones, kept for what disks that exist still have to be given."""
    available_bytes: int
    """Free less reserve, never below zero: what fetches and new disks may count on."""
    chunk_bytes: int
    manifest_bytes: int
    stage_bytes: int
    """Fetches, uploads and disks that are not finished."""
    quarantine_bytes: int
    disk_allocated_bytes: int
    """What disks and their snapshots take; extents shared by several count for each."""
    disk_size_bytes: int
    """What all disks are together when full."""
    promised_bytes: int
    overcommit_ratio: float
    """How many times the available bytes may be promised."""
    promise_limit_bytes: int


@dataclass(frozen=True, slots=True)
class ImageHolding:
    """One image: what it takes and who keeps it."""

    image: Image
    disks: tuple[Disk, ...]
    """Disks that read from it."""
    attachments: tuple[Attachment, ...]
    """Instances that have it, read-only."""
    snapshots: tuple[str, ...] = ()
    """Ids of snapshots that share its chunks."""

    @property
    def held(self) -> bool:
        """Whether it must stay."""
        return bool(self.image.pinned or self.disks or self.attachments or self.snapshots)


def account(configuration: Configuration, db: Database) -> SpaceAccount:
    """Count everything: the files of each disk, one query for all chunks."""
    state_dir = configuration.state_dir
    total_bytes, free_bytes = file_system(state_dir)
    available_bytes = available(configuration, free_bytes)
    promised_bytes = allocated_bytes = size_bytes = 0
    bases = _bases(configuration, db)
    for disk in db.rows(f"{_SIZED} FROM disks"):
        own_bytes, taken_bytes = _taken(state_dir, disk, bases)
        allocated_bytes += taken_bytes
        size_bytes += disk["size_bytes"]
        promised_bytes += max(0, disk["size_bytes"] - own_bytes)
    return SpaceAccount(
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        reserve_bytes=configuration.space.reserve_bytes,
        available_bytes=available_bytes,
        chunk_bytes=_chunk_bytes(state_dir / "chunks"),
        manifest_bytes=_tree_bytes(state_dir / "manifests"),
        stage_bytes=sum(_tree_bytes(state_dir / name) for name in _UNFINISHED),
        quarantine_bytes=_tree_bytes(state_dir / "quarantine"),
        disk_allocated_bytes=allocated_bytes,
        disk_size_bytes=size_bytes,
        promised_bytes=promised_bytes,
        overcommit_ratio=configuration.space.overcommit_ratio,
        promise_limit_bytes=promise_limit(configuration, available_bytes),
    )


def admit(configuration: Configuration, db: Database, uuid: str, size_bytes: int) -> None:
    """Let a disk that has its row be made or grow to a size, unless too much is promised then.

    Of several new disks the first ones are admitted: only rows before its own count. Raises
    `NoSpace`: `no-space` when the reserve is reached, `overcommit` with the numbers.
    """
    _, free_bytes = file_system(configuration.state_dir)
    reserve_bytes = configuration.space.reserve_bytes
    if free_bytes < reserve_bytes:
        raise no_space(
            configuration.state_dir,
            f"{free_bytes} bytes are free, {reserve_bytes} are kept for disks that exist",
        )
    available_bytes = available(configuration, free_bytes)
    limit_bytes = promise_limit(configuration, available_bytes)
    earlier = (
        "FROM disks WHERE uuid <> ?1 AND state <> 'deleting' AND NOT (state = 'creating' AND "
        "number > coalesce((SELECT number FROM disks WHERE uuid = ?1), number))"
    )
    others = db.row(f"SELECT coalesce(sum(size_bytes), 0) {earlier}", uuid)
    assert others is not None
    if others[0] + size_bytes <= limit_bytes:
        return  # also if nobody had a byte of his own yet: no file needs to be looked at
    bases = _bases(configuration, db)
    promised_bytes = sum(
        max(0, disk["size_bytes"] - _taken(configuration.state_dir, disk, bases)[0])
        for disk in db.rows(f"{_SIZED} {earlier}", uuid)
    )
    if promised_bytes + size_bytes > limit_bytes:
        raise NoSpace(
            "overcommit",
            f"A disk of {size_bytes} bytes is too much: disks are promised {promised_bytes} bytes "
            f"more than they have, {available_bytes} are available, and "
            f"{configuration.space.overcommit_ratio:g} times that may be promised; delete disks or "
            "images, add space, or raise space.overcommit_ratio.",
            field="size_bytes",
        )


def admits_all(configuration: Configuration, db: Database) -> bool:
    """Tell whether every disk of the database could be given its whole size; then `admit` admits
    each of those that are being made."""
    _, free_bytes = file_system(configuration.state_dir)
    if free_bytes < configuration.space.reserve_bytes:
        return False
    limit_bytes = promise_limit(configuration, available(configuration, free_bytes))
    every = db.row("SELECT coalesce(sum(size_bytes), 0) FROM disks WHERE state <> 'deleting'")
    assert every is not None
    return bool(every[0] <= limit_bytes)


def holdings(db: Database) -> list[ImageHolding]:
    """Return every image with what keeps it, the longest unused first."""
    found = [holding_of(db, image) for image in inventory.images(db)]
    return sorted(found, key=lambda item: item.image.last_used_at or item.image.created_at)


def holding_of(db: Database, image: Image) -> ImageHolding:
    """Return an image with what keeps it."""
    disks = db.rows(
        "SELECT * FROM disks WHERE (base_image = ?1 OR base_manifest = ?1) AND form IS NOT 'raw' "
        "ORDER BY number",
        image.id,
    )
    snapshots = db.rows(
        "SELECT snapshots.id FROM snapshots JOIN disks ON disks.uuid = disk_uuid "
        "WHERE base_image = ? AND snapshots.form IS NOT 'file' ORDER BY snapshots.number",
        image.id,
    )
    return ImageHolding(
        image,
        tuple(records.disk_from(row) for row in disks),
        tuple(inventory.attachments(db, image_id=image.id)),
        tuple(row["id"] for row in snapshots),
    )


def file_system(directory: Path) -> tuple[int, int]:
    """Return the size of a directory's file system and what is free there, in bytes."""
    status = os.statvfs(directory)
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def available(configuration: Configuration, free_bytes: int) -> int:
    """Return what fetches and new disks may count on."""
    return max(0, free_bytes - configuration.space.reserve_bytes)


def promise_limit(configuration: Configuration, available_bytes: int) -> int:
    """Return how many bytes disks may be promised."""
    return int(available_bytes * configuration.space.overcommit_ratio)


def _bases(configuration: Configuration, db: Database) -> dict[str | None, int]:
    """Return the sizes of what raw disks may share extents with: images and snapshots."""
    if not _shares_extents(configuration.state_dir):
        return {}
    rows = db.rows(
        "SELECT id, size_bytes FROM images WHERE size_bytes IS NOT NULL "
        "UNION ALL SELECT id, size_bytes FROM snapshots"
    )
    return {row["id"]: row["size_bytes"] for row in rows}


@lru_cache(maxsize=8)
def _shares_extents(state_dir: Path) -> bool:
    return reflink.supported(state_dir, state_dir)


def taken_bytes(configuration: Configuration, disk: Disk) -> int:
    """Return what the files of a disk and of its snapshots take."""
    return sum(_disk_bytes(_directory(configuration.state_dir, disk.uuid)))


def _taken(state_dir: Path, disk: sqlite3.Row, bases: dict[str | None, int]) -> tuple[int, int]:
    """Return the bytes that are a disk's own, and those that its files take."""
    own_bytes, snapshots_bytes = _disk_bytes(_directory(state_dir, disk["uuid"]))
    if snapshots_bytes:
        # all of it may be shared with the snapshots
        return 0, own_bytes + snapshots_bytes
    if disk["form"] == "raw":
        shared_bytes = max(bases.get(disk["base_image"], 0), bases.get(disk["base_snapshot"], 0))
        return max(0, own_bytes - shared_bytes), own_bytes
    return own_bytes, own_bytes


def _directory(state_dir: Path, uuid: str) -> str:
    return f"{state_dir}/disks/{uuid}"  # text: there may be tens of thousands


def _disk_bytes(directory: str) -> tuple[int, int]:
    """Return what the files of a disk take, and those of its snapshots."""
    disk_bytes = snapshots_bytes = 0
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                disk_bytes += entry.stat(follow_symlinks=False).st_blocks * _SECTOR_BYTES
            elif entry.name == _SNAPSHOTS:
                snapshots_bytes = _directory_bytes(entry.path)
    return disk_bytes, snapshots_bytes


def _directory_bytes(directory: str) -> int:
    """Return what the files right in a directory take; one that is going has none."""
    try:
        with os.scandir(directory) as entries:
            return sum(
                entry.stat(follow_symlinks=False).st_blocks * _SECTOR_BYTES
                for entry in entries
                if entry.is_file(follow_symlinks=False)
            )
    except FileNotFoundError:
        return 0


def _tree_bytes(directory: Path) -> int:
    return sum(_directory_bytes(found) for found in _directories(directory))


def _directories(directory: Path) -> Iterator[str]:
    for found, _, _ in os.walk(directory):
        yield found


def _chunk_bytes(directory: Path) -> int:
    """Return what diskcache counts the chunks to be; there may be millions of them."""
    try:
        with closing(sqlite3.connect(f"file:{directory / 'cache.db'}?mode=ro", uri=True)) as index:
            row = index.execute("SELECT value FROM Settings WHERE key = 'size'").fetchone()
    except sqlite3.Error:
        return _tree_bytes(directory)
    return int(row[0]) if row else 0
