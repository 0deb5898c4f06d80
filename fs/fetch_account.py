"""What fetching cost an image, a disk and the host, and what the cache saved, as `blockd` recorded it
(`stratocache.fs.traffic_record`)."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from stratocache.fs.manifest_sizes import shared_bytes
from stratocache.fs.pace import remaining_s
from stratocache.fs.records import COMPLETE, Disk, Image
from stratocache.fs.state import Database, timestamp
from stratocache.fs.tallies import tallies


@dataclass(frozen=True, slots=True)
class Sample:
    """What came within one period of ten seconds."""

    at: str
    """Its beginning, RFC 3339, UTC."""
    remote_bytes: int
    remote_wait_s: float


@dataclass(frozen=True, slots=True)
class ImageAccount:
    """One image."""

    remote_bytes: int
    """Moved from origins and peers, as they sent them."""
    peer_bytes: int
    """Of them, from peers."""
    remote_wait_s: float
    """That readers waited for chunks, all together."""
    dedup_bytes: int
    """That other images' chunks provided when the image landed, so that nobody fetched them."""
    stored_bytes: int | None
    """Its chunks, each once, zeros left out; None until they have been counted."""
    cache_saved_bytes: int
    """That were here when a launch, a clone or a fetch asked for the image, each time."""
    hits: int
    """Reads of chunks that were here."""
    hit_bytes: int
    misses: int
    """Reads of chunks that were fetched while the reader waited."""
    miss_bytes: int
    hit_ratio: float | None
    """Of the reads; None before the first."""
    local_bytes: int | None
    """Of the image that are here; None while nothing can be read."""
    rate_bytes_s: float
    """At which the rest came lately."""
    complete_in_s: float | None
    """When the rest is here at that rate; 0 when it is, None when nobody knows."""
    traffic_history: tuple[Sample, ...]
    """The latest periods in which anything was fetched or waited for, oldest first."""


@dataclass(frozen=True, slots=True)
class DiskAccount:
    """One disk."""

    remote_bytes: int
    """Of its image, fetched because a read of this disk waited for them."""
    remote_wait_s: float
    boot_remote_bytes: int
    """The same since the disk was attached last."""
    boot_remote_wait_s: float
    cache_saved_bytes: int
    """Of its image that were here when it was cloned."""
    traffic_history: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class HostAccount:
    """Everything since the state database was made; images that are gone count too."""

    remote_bytes: int
    remote_wait_s: float
    cache_saved_bytes: int
    dedup_saved_bytes: int
    shared_bytes: int
    """Space that images and snapshots would take more if each had chunks of its own."""
    evicted_bytes: int
    hits: int
    hit_bytes: int
    misses: int
    miss_bytes: int
    hit_ratio: float | None


def of_image(db: Database, image: Image) -> ImageAccount:
    """Return an image's account."""
    row = _row(db, "SELECT * FROM image_traffic WHERE image_id = ?", image.id)
    size = db.row("SELECT stored_bytes FROM manifest_sizes WHERE name = ?", image.id)
    complete = image.state in COMPLETE
    known = image.size_bytes if complete else row.get("local_bytes")
    rate_bytes_s = row.get("rate_bytes_s", 0.0) if image.state == "provisional" else 0.0
    complete_in_s = 0.0 if complete else None
    if image.state == "provisional":
        complete_in_s = remaining_s((image.size_bytes or 0) - (known or 0), rate_bytes_s)
    return ImageAccount(
        remote_bytes=row.get("remote_bytes", 0),
        peer_bytes=row.get("peer_bytes", 0),
        remote_wait_s=round(row.get("remote_wait_s", 0.0), 3),
        dedup_bytes=row.get("dedup_bytes", 0),
        stored_bytes=None if size is None else size["stored_bytes"],
        cache_saved_bytes=row.get("cache_saved_bytes", 0),
        hits=row.get("hits", 0),
        hit_bytes=row.get("hit_bytes", 0),
        misses=row.get("misses", 0),
        miss_bytes=row.get("miss_bytes", 0),
        hit_ratio=hit_ratio(row.get("hits", 0), row.get("misses", 0)),
        local_bytes=known,
        rate_bytes_s=round(rate_bytes_s, 1),
        complete_in_s=complete_in_s,
        traffic_history=_history(row),
    )


def of_disk(db: Database, disk: Disk) -> DiskAccount:
    """Return a disk's account."""
    row = _row(db, "SELECT * FROM disk_traffic WHERE disk_number = ?", disk.number)
    boot = row if row.get("boot_epoch") == disk.epoch else {}
    return DiskAccount(
        remote_bytes=row.get("remote_bytes", 0),
        remote_wait_s=round(row.get("remote_wait_s", 0.0), 3),
        boot_remote_bytes=boot.get("boot_remote_bytes", 0),
        boot_remote_wait_s=round(boot.get("boot_remote_wait_s", 0.0), 3),
        cache_saved_bytes=row.get("cache_saved_bytes", 0),
        traffic_history=_history(row),
    )


def of_host(db: Database, chunk_bytes: int) -> HostAccount:
    """Return the host's account; `chunk_bytes` is what all chunks take."""
    counted = {name: values.get("", 0) for name, values in tallies(db).items()}

    def whole(name: str) -> int:
        return int(counted.get(name, 0))

    return HostAccount(
        remote_bytes=whole("remote_bytes"),
        remote_wait_s=round(counted.get("remote_wait_s", 0.0), 3),
        cache_saved_bytes=whole("cache_saved_bytes"),
        dedup_saved_bytes=whole("dedup_saved_bytes"),
        shared_bytes=shared_bytes(db, chunk_bytes),
        evicted_bytes=whole("evicted_bytes"),
        hits=whole("hits"),
        hit_bytes=whole("hit_bytes"),
        misses=whole("misses"),
        miss_bytes=whole("miss_bytes"),
        hit_ratio=hit_ratio(whole("hits"), whole("misses")),
    )


def hit_ratio(hits: int, misses: int) -> float | None:
    """Return the share of reads that found what they needed; None before the first."""
    return round(hits / (hits + misses), 4) if hits + misses else None


def _row(db: Database, query: str, value: object) -> dict[str, Any]:
    row = db.row(query, value)
    return {} if row is None else dict(row)


def _history(row: dict[str, Any]) -> tuple[Sample, ...]:
    return tuple(
        Sample(timestamp(datetime.fromtimestamp(second, UTC)), remote_bytes, remote_wait_s)
        for second, remote_bytes, remote_wait_s in json.loads(row.get("history", "[]"))
    )
