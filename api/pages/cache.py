"""`/cache`: what eviction would take, as a picture; the scrubber, losses and peers."""

from collections.abc import Collection
from dataclasses import dataclass

import falcon
from markupsafe import Markup

from stratocache.api import answers
from stratocache.api.cache_views import CacheView, HoldingView, LossView, PeerView, ScrubView
from stratocache.api.pages.pictures import Segment, span_bar, stacked_bar
from stratocache.api.pages.rendering import Pages
from stratocache.fs import eviction, scrubbing
from stratocache.fs.keep_plan import Candidate, choose, eviction_plan
from stratocache.fs.losses import losses
from stratocache.fs.peer_record import peer_states
from stratocache.fs.records import Caller


@dataclass(frozen=True, slots=True)
class _Row:
    item: HoldingView
    bar: Markup
    going: bool
    """Whether it would go now."""


class CachePage:
    """`/cache`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Show the plan of eviction, what the scrubber does, what is lost, and the peers."""
        service, caller = self._pages.service, answers.caller(request)
        configuration, db = service.configuration, service.db
        plan = eviction_plan(configuration, db)
        account = service.space.recent()
        surplus_bytes = eviction.surplus_bytes(
            configuration, account.chunk_bytes, account.free_bytes
        )
        going = {item.image.id for item in choose(plan, surplus_bytes)}
        segments = plan_segments(plan, going, account.chunk_bytes)
        scrub = ScrubView.from_record(scrubbing.scrub_state(db))
        self._pages.show(
            request, response, "cache",
            space=CacheView.of(account, configuration.cache), surplus_bytes=surplus_bytes,
            segments=segments, plan_bar=stacked_bar("What chunks are there for", segments),
            rows=self._rows(plan, going, caller), scrub=scrub,
            losses=[LossView.of(loss, db, caller) for loss in losses(db)],
            peers=[PeerView.from_record(p) for p in peer_states(db)] if configuration.peers.hosts else [],
        )  # fmt: skip

    def _rows(self, plan: list[Candidate], going: Collection[str], caller: Caller) -> list[_Row]:
        views = [HoldingView.of(item, self._pages.service.db, caller) for item in plan]
        return [
            _Row(view, bar, view.image in going)
            for view, bar in zip(views, plan_bars(plan, going), strict=True)
        ]


def plan_segments(plan: list[Candidate], going: Collection[str], chunk_bytes: int) -> list[Segment]:
    """Return what all chunks are there for: to go now, to go later, boot sets, and what stays."""
    turns = [item for item in plan if item.order is not None]
    now_bytes = sum(item.freed_bytes for item in turns if item.image.id in going)
    later_bytes = sum(item.freed_bytes for item in turns if item.image.id not in going)
    boot_bytes = sum(item.boot_bytes for item in turns)
    kept_bytes = max(0, chunk_bytes - now_bytes - later_bytes - boot_bytes)
    return [
        Segment("Goes now", now_bytes, "going"),
        Segment("Goes when room is needed", later_bytes, "cold"),
        Segment("Boot sets, which go last", boot_bytes, "boots"),
        Segment("Stays: in use, pinned or made here", kept_bytes, "images"),
    ]


def plan_bars(plan: list[Candidate], going: Collection[str]) -> list[Markup]:
    """Return a bar for each image: what its turn frees begins where the turn before it ended."""
    whole_bytes = sum(item.freed_bytes for item in plan if item.order is not None)
    freed_bytes, bars = 0, []
    for item in plan:
        if item.order is None or not whole_bytes:
            bars.append(span_bar("stays", 0.0, []))
            continue
        kind = "going" if item.image.id in going else "cold"
        part = (item.freed_bytes / whole_bytes, kind)
        bars.append(span_bar(f"turn {item.order}", freed_bytes / whole_bytes, [part]))
        freed_bytes += item.freed_bytes
    return bars
