"""What responses carry about the cache: its space, what keeps each image, losses, and peers."""

from typing import Literal, Self

from stratocache.api.representations import Representation
from stratocache.cache.configuration import CacheSettings
from stratocache.fs import inventory
from stratocache.fs.keep_plan import Candidate
from stratocache.fs.losses import Loss
from stratocache.fs.offline_plan import Weakness
from stratocache.fs.records import Caller
from stratocache.fs.space_plan import SpaceAccount
from stratocache.fs.state import Database


class ScrubView(Representation):
    """What the scrubber does; `stratocache.fs.scrubbing.ScrubState` says what each field counts."""

    state: Literal["running", "paused", "idle"]
    position: str | None
    started_at: str | None
    finished_at: str | None
    chunks: int
    chunk_bytes: int
    manifests: int
    damaged: int
    repaired: int


class LossView(Representation):
    """A chunk or manifest that is damaged or gone, and that no origin has."""

    name: str
    kind: Literal["chunk", "manifest"]
    found_at: str
    images: list[str]
    disk_count: int
    disks: list[str]
    """UUIDs of the disks that read from it and that the caller may see."""
    reason: str

    @classmethod
    def of(cls, loss: Loss, db: Database, caller: Caller) -> Self:
        """Show a loss as a caller may see it."""
        disks = [inventory.find_disk(db, uuid) for uuid in loss.disks]
        seen = [disk.uuid for disk in disks if disk and inventory.may_see(db, caller, disk)]
        return cls.from_record(loss, disk_count=len(disks), disks=seen)


class SpaceView(Representation):
    """Where the space is; `stratocache.fs.space_plan.SpaceAccount` says what each field counts."""

    total_bytes: int
    free_bytes: int
    reserve_bytes: int
    available_bytes: int
    chunk_bytes: int
    manifest_bytes: int
    stage_bytes: int
    quarantine_bytes: int
    disk_allocated_bytes: int
    disk_size_bytes: int
    promised_bytes: int
    promise_limit_bytes: int
    cache_limit_bytes: int
    """What all chunks may have; 0 = no limit."""
    free_floor_bytes: int
    """Free space below which cold images go; 0 = none."""

    @classmethod
    def of(cls, account: SpaceAccount, settings: CacheSettings, **others: int) -> Self:
        """Show an account, and the limits that are set."""
        return cls.from_record(
            account,
            cache_limit_bytes=settings.max_bytes,
            free_floor_bytes=settings.min_free_bytes,
            **others,
        )


class CacheView(SpaceView):
    """The account of space, with what disks may be promised."""

    overcommit_ratio: float


class PeerView(Representation):
    """What one peer did for us; the table `peers` of `stratocache.fs.schema` says what each field
    counts."""

    location: str
    host: str
    asked: int
    served: int
    failed: int
    received_bytes: int
    rests_until: str | None
    fault: str | None


class PeerServiceView(Representation):
    """What this host gave its peers; see the table `peer_service`."""

    chunks: int
    manifests: int
    sent_bytes: int
    absent: int
    busy: int
    refused: int


class FetchView(Representation):
    """What fetching cost and the cache saved; `stratocache.fs.fetch_account.HostAccount` says what
    each of the sums counts."""

    remote_bytes: int
    remote_wait_s: float
    cache_saved_bytes: int
    dedup_saved_bytes: int
    shared_bytes: int
    evicted_bytes: int
    hits: int
    hit_bytes: int
    misses: int
    miss_bytes: int
    hit_ratio: float | None


class StatusView(FetchView, CacheView):
    """The account, what fetching cost and the cache saved, the scrubber, what is lost, and the
    peers."""

    scrub: ScrubView
    losses: list[LossView]
    peers: list[PeerView]
    peer_service: PeerServiceView


class HoldingView(Representation):
    """One image and what keeps it in the cache."""

    image: str
    title: str
    state: str
    size_bytes: int | None
    pinned: bool
    held: bool
    """Whether anything keeps it."""
    disk_count: int
    disks: list[str]
    """UUIDs of the disks that read from it and that the caller may see."""
    instances: list[str]
    """Instances that have it attached, read-only; for operators."""
    instance_count: int
    snapshot_count: int
    created_at: str
    last_used_at: str | None
    order: int | None
    """Its turn to be evicted, from 1; None = it stays."""
    kept_because: str | None
    """Why it stays, with the names of what holds it; for others than operators without."""
    stored_bytes: int
    """All chunks that it names."""
    freed_bytes: int
    """What its turn would free, those before it in the order having had theirs."""
    boot_bytes: int
    """What its boot reads, which stays at this turn and goes after all others; 0 = it goes whole."""
    skeleton: bool
    """Whether only what its boot reads has been left of it."""
    refetch_bytes: int
    """What fetching it again would move, at most."""
    origin: str | None
    """Where it would come from."""

    @classmethod
    def of(cls, candidate: Candidate, db: Database, caller: Caller) -> Self:
        """Show an image as a caller may see it."""
        holding, image = candidate.holding, candidate.image
        reason = candidate.kept_because
        if reason is not None and holding.held and not caller.operator:
            reason = "pinned" if image.pinned else "in use"
        instances = sorted({attachment.instance for attachment in holding.attachments})
        return cls.from_record(
            candidate,
            image=image.id,
            title=image.entry.title or "",
            state=image.state,
            size_bytes=image.size_bytes,
            pinned=image.pinned,
            held=holding.held,
            disk_count=len(holding.disks),
            disks=[disk.uuid for disk in holding.disks if inventory.may_see(db, caller, disk)],
            instances=instances if caller.operator else [],
            instance_count=len(instances),
            snapshot_count=len(holding.snapshots),
            created_at=image.created_at,
            last_used_at=image.last_used_at,
            kept_because=reason,
            stored_bytes=candidate.footprint.stored_bytes,
            skeleton=image.asleep,
        )


class WeaknessView(Representation):
    """An image that is needed and would fail without its origins."""

    image: str
    title: str
    reason: str
    pinned: bool
    disk_count: int
    instance_count: int
    missing_chunks: int
    missing_bytes: int

    @classmethod
    def of(cls, weakness: Weakness) -> Self:
        """Show a weakness."""
        holding = weakness.holding
        return cls.from_record(
            weakness,
            image=holding.image.id,
            title=holding.image.entry.title or "",
            pinned=holding.image.pinned,
            disk_count=len(holding.disks),
            instance_count=len({item.instance for item in holding.attachments}),
        )


class OfflineView(Representation):
    """Every image that is needed and would fail without its origins."""

    images: list[WeaknessView]


class EvictionView(Representation):
    """What an eviction would take."""

    images: list[HoldingView]
    freed_bytes: int


class PlanView(Representation):
    """The account, and every image: in the order of eviction, then those that stay."""

    space: CacheView
    images: list[HoldingView]
