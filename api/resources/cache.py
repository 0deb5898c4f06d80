"""`/v1/cache`: where the space has gone, what keeps each image, eviction, and the scrubber."""

from dataclasses import asdict, replace

import falcon

from stratocache.api import answers, query
from stratocache.api.cache_views import (
    CacheView,
    EvictionView,
    HoldingView,
    LossView,
    OfflineView,
    PeerServiceView,
    PeerView,
    PlanView,
    ScrubView,
    StatusView,
    WeaknessView,
)
from stratocache.api.models import EvictionRequest, ScrubRequest, read_body
from stratocache.api.service import Service, require_success
from stratocache.fs import eviction, fetch_account, scrubbing, space_plan
from stratocache.fs.keep_plan import choose, eviction_plan
from stratocache.fs.losses import losses
from stratocache.fs.offline_plan import weaknesses
from stratocache.fs.peer_record import peer_service, peer_states
from stratocache.fs.poke import poke
from stratocache.fs.records import Caller
from stratocache.fs.rights import require_operator


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
            scrub=ScrubView.from_record(scrubbing.scrub_state(service.db)),
            losses=[LossView.of(loss, service.db, caller) for loss in losses(service.db)],
            peers=[PeerView.from_record(peer) for peer in peer_states(service.db)] if asks else [],
            peer_service=PeerServiceView.from_record(peer_service(service.db)),
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
        answers.show_work(response, operation)

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
        answers.show(response, ScrubView.from_record(state))
