"""What responses carry about images: what they cost to fetch, and what was made of them."""

from dataclasses import asdict
from typing import Literal, Self

from stratocache.api.representations import Representation, TrafficSample
from stratocache.cache.entry import Entry
from stratocache.fs.fetch_account import ImageAccount
from stratocache.fs.lineage import DiskNode, Lineage, SnapshotNode
from stratocache.fs.records import Image, ImageState


class ImageView(Representation):
    """An image."""

    id: str
    state: ImageState
    size_bytes: int | None
    sha256: str | None
    pinned: bool
    created_at: str
    verified_at: str | None
    last_used_at: str | None
    withdrawn_at: str | None
    withdrawn_because: str | None
    """Why its catalogue took it back, a sentence."""
    entry: Entry


class LineageSnapshot(Representation):
    """A snapshot, and the disks that were cloned of it."""

    id: str
    state: Literal["creating", "absorbing", "available", "deleting"]
    tag: str
    created_at: str
    disks: "list[LineageDisk]"

    @classmethod
    def of(cls, node: SnapshotNode) -> Self:
        """Show a snapshot with its clones."""
        return cls.from_record(node.snapshot, disks=[LineageDisk.of(disk) for disk in node.disks])


class LineageDisk(Representation):
    """A disk that began as an image, who has it, and its snapshots."""

    uuid: str
    state: Literal["creating", "available", "deleting"]
    form: Literal["overlay", "raw"] | None
    owner: str
    tag: str
    attached_to: list[str]
    snapshots: list[LineageSnapshot]

    @classmethod
    def of(cls, node: DiskNode) -> Self:
        """Show a disk with what was made of it."""
        return cls.from_record(
            node.disk,
            attached_to=list(node.attached_to),
            snapshots=[LineageSnapshot.of(snapshot) for snapshot in node.snapshots],
        )


class ImageDetails(ImageView):
    """An image, what it cost to fetch, and what was made of it."""

    remote_bytes: int
    peer_bytes: int
    remote_wait_s: float
    dedup_bytes: int
    shared_bytes: int | None
    """Of its chunks that others have too; None when it is not known."""
    stored_bytes: int | None
    cache_saved_bytes: int
    hits: int
    hit_bytes: int
    misses: int
    miss_bytes: int
    hit_ratio: float | None
    local_bytes: int | None
    rate_bytes_s: float
    complete_in_s: float | None
    traffic_history: list[TrafficSample]
    local_map: list[float] | None = None
    """With `?map=N`: the share that is here of each of N equal parts."""
    checked_at: str | None
    """When its catalogue last answered a question about it; None = not since it was fetched."""
    attached_to: list[str]
    """Instances that have it read-only; for operators."""
    disks: list[LineageDisk]
    """Made of it, and visible to the caller: oldest first, clones of a snapshot below it."""
    disk_count: int
    snapshot_count: int
    omitted_count: int
    """Of these, those that are not named here as there are too many."""

    def to_json_and_etag(self) -> tuple[bytes, str]:
        """Return both; the validator is of the image alone: what it cost changes all the time."""
        return self.to_json(), ImageView.from_record(self).etag

    @classmethod
    def with_account(
        cls,
        image: Image,
        account: ImageAccount,
        lineage: Lineage,
        attached_to: list[str],
        *,
        shared_bytes: int | None,
        local_map: list[float] | None = None,
    ) -> Self:
        """Show an image with its account and what was made of it."""
        return cls.from_record(
            image,
            **asdict(account),
            shared_bytes=shared_bytes,
            local_map=local_map,
            attached_to=attached_to,
            disks=[LineageDisk.of(disk) for disk in lineage.disks],
            disk_count=lineage.disk_count,
            snapshot_count=lineage.snapshot_count,
            omitted_count=lineage.omitted_count,
        )
