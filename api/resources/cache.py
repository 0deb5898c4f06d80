"""`/v1/cache`: where the space has gone, what keeps each image, eviction, and the scrubber."""

from dataclasses import asdict, replace
from typing import Literal, Self

import falcon

from stratocache.api import answers, query
from stratocache.api.models import EvictionRequest, ScrubRequest, read_body
from stratocache.api.representations import OperationView, Representation
from stratocache.api.service import Service, require_success
from stratocache.cache.configuration import CacheSettings
from stratocache.fs import eviction, fetch_account, inventory, scrubbing, space_plan
from stratocache.fs.intents import require_operator
from stratocache.fs.keep_plan import Candidate, choose, eviction_plan
from stratocache.fs.losses import Loss, losses
from stratocache.fs.offline_plan import Weakness, weaknesses
from stratocache.fs.peer_record import PeerService, PeerState, peer_service, peer_states
from stratocache.fs.poke import poke
from stratocache.fs.records import Caller
from stratocache.fs.scrubbing import ScrubState
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

    @classmethod
    def of(cls, state: ScrubState) -> Self:
        """Show the scrubber."""
        fields = {name: value for name, value in asdict(state).items() if name in cls.model_fields}
        return cls(**{**fields, "state": state.state})


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
        return cls(**{
            **asdict(loss), "images": list(loss.images), "disk_count": len(disks), "disks": seen
        })  # fmt: skip


class CacheView(Representation):
    """The account of space; `stratocache.fs.space_plan.SpaceAccount` says what each field counts."""

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
    overcommit_ratio: float
    promise_limit_bytes: int
    cache_limit_bytes: int
    """What all chunks may have; 0 = no limit."""
    free_floor_bytes: int
    """Free space below which cold images go; 0 = none."""

    @classmethod
    def of(cls, account: SpaceAccount, settings: CacheSettings) -> Self:
        """Show an account."""
        return cls(
            **asdict(account),
            cache_limit_bytes=settings.max_bytes,
            free_floor_bytes=settings.min_free_bytes,
        )


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

    @classmethod
    def of(cls, peer: PeerState) -> Self:
        """Show a peer."""
        return cls(**asdict(peer))


class PeerServiceView(Representation):
    """What this host gave its peers; see the table `peer_service`."""

    chunks: int
    manifests: int
    sent_bytes: int
    absent: int
    busy: int
    refused: int

    @classmethod
    def of(cls, service: PeerService) -> Self:
        """Show what was given."""
        return cls(**asdict(service))


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
        return cls(
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
            order=candidate.order,
            kept_because=reason,
            stored_bytes=candidate.footprint.stored_bytes,
            freed_bytes=candidate.freed_bytes,
            boot_bytes=candidate.boot_bytes,
            skeleton=image.asleep,
            refetch_bytes=candidate.refetch_bytes,
            origin=candidate.origin,
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
        return cls(
            image=holding.image.id,
            title=holding.image.entry.title or "",
            reason=weakness.reason,
            pinned=holding.image.pinned,
            disk_count=len(holding.disks),
            instance_count=len({item.instance for item in holding.attachments}),
            missing_chunks=weakness.missing_chunks,
            missing_bytes=weakness.missing_bytes,
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


class CacheStatus:
    """`/v1/cache`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Show where the space has gone, what the scrubber does, what is lost, and the peers."""
        query.require_known(request)
        service, caller = self._service, answers.caller(request)
        asks = bool(service.configuration.peers.hosts)
        account = space_plan.account(service.configuration, service.db)
        shown = CacheView.of(account, service.configuration.cache)
        status = StatusView(
            **shown.model_dump(),
            **asdict(fetch_account.of_host(service.db, account.chunk_bytes)),
            scrub=ScrubView.of(scrubbing.scrub_state(service.db)),
            losses=[LossView.of(loss, service.db, caller) for loss in losses(service.db)],
            peers=[PeerView.of(peer) for peer in peer_states(service.db)] if asks else [],
            peer_service=PeerServiceView.of(peer_service(service.db)),
        )
        answers.show(response, status)


class CachePlan:
    """`/v1/cache/plan`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Show the account and each image with what keeps it; with `?offline=true` what would fail
        without its origins."""
        query.require_known(request, "offline")
        configuration, db = self._service.configuration, self._service.db
        if request.get_param_as_bool("offline"):
            found = weaknesses(configuration, db)
            answers.show(response, OfflineView(images=[WeaknessView.of(item) for item in found]))
            return
        caller = answers.caller(request)
        account = space_plan.account(configuration, db)
        plan = PlanView(
            space=CacheView.of(account, configuration.cache),
            images=[HoldingView.of(item, db, caller) for item in eviction_plan(configuration, db)],
        )
        answers.show(response, plan)


class CacheEviction:
    """`/v1/cache/evict`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Evict an image, or so many bytes, or what is over the marks: 200 with the operation when
        it ends within `?wait=`, else 202. With `dry_run` say what would go."""
        query.require_known(request, "wait")
        wait_s = query.wait_seconds(request, default=0)
        wanted = read_body(request, EvictionRequest)
        caller, db = answers.caller(request), self._service.db
        if wanted.dry_run:
            require_operator(caller)
            answers.show(response, self._preview(wanted, caller))
            return
        operation = self._service.start(
            eviction.request_eviction(db, caller, image_id=wanted.image, size_bytes=wanted.bytes),
            wait_s,
        )
        require_success(operation)
        if operation.finished:
            answers.show(response, OperationView.of(operation))
        else:
            answers.accept(response, operation)

    def _preview(self, wanted: EvictionRequest, caller: Caller) -> EvictionView:
        configuration, db = self._service.configuration, self._service.db
        plan = eviction_plan(configuration, db)
        if wanted.image is not None:
            eviction.require_free(db, wanted.image)
            chosen = [replace(item, boot_bytes=0) for item in plan if item.image.id == wanted.image]
        else:
            wanted_bytes = wanted.bytes
            if wanted_bytes is None:
                account = space_plan.account(configuration, db)
                used_bytes, free_bytes = account.chunk_bytes, account.free_bytes
                wanted_bytes = eviction.surplus_bytes(configuration, used_bytes, free_bytes)
            chosen = choose(plan, wanted_bytes)
        return EvictionView(
            images=[HoldingView.of(item, db, caller) for item in chosen],
            freed_bytes=sum(item.freed_bytes for item in chosen),
        )


class CacheScrub:
    """`/v1/cache/scrub`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Begin a pass now, pause the scrubber, or let it go on; answer with what it does."""
        query.require_known(request)
        wanted = read_body(request, ScrubRequest)
        state = scrubbing.request_scrub(self._service.db, answers.caller(request), wanted.action)
        poke(self._service.configuration.poke_socket)
        answers.show(response, ScrubView.of(state))
