"""`/`: where space went, what the cache is worth, and what is happening now."""

import falcon

from stratocache.api import answers
from stratocache.api.pages.pictures import Segment, meter, sparkline, stacked_bar
from stratocache.api.pages.rendering import Pages
from stratocache.api.resources.overview import OverviewSpace, ProblemView, overview_of
from stratocache.fs.host_traffic import PERIOD_S, recent_traffic

_EVENTS_MAX = 10
_TRAFFIC_PERIODS = 360
_ADDRESSES = {
    "disk": "/disks/",
    "chunk": "/cache",
    "manifest": "/cache",
    "attachment": "/attachments",
}


class OverviewPage:
    """`/`."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Show how things are, of what the caller may see."""
        service, caller = self._pages.service, answers.caller(request)
        view = overview_of(service, caller)
        values = recent_traffic(service.db, _TRAFFIC_PERIODS)
        segments = space_segments(view.space)
        space = view.space
        self._pages.show(
            request, response, "overview", busy=bool(view.operations),
            view=view, segments=segments,
            image_count=sum(view.counts.images.values()),
            disk_count=sum(view.counts.disks.values()),
            attachment_count=sum(view.counts.attachments.values()),
            problems=[(problem, _address(problem)) for problem in view.problems],
            events=view.events[:_EVENTS_MAX],
            space_bar=stacked_bar("What takes the space", segments, space.total_bytes),
            promise_bar=meter("Promised to disks", space.promised_bytes, space.promise_limit_bytes),
            overcommit_ratio=service.configuration.space.overcommit_ratio,
            traffic_bytes=int(sum(values)),
            traffic_picture=sparkline(
                f"Bytes fetched in each {PERIOD_S} seconds of the last hour", values
            ),
        )  # fmt: skip


def space_segments(space: OverviewSpace) -> list[Segment]:
    """Return what takes the space of the file system, without overlaps, as far as that is known."""
    ours = [
        Segment("Images and snapshots", space.chunk_bytes + space.manifest_bytes, "images"),
        Segment("Disks", space.disk_allocated_bytes, "disks"),
        Segment("On its way", space.stage_bytes, "stage"),
        Segment("Quarantine", space.quarantine_bytes, "quarantine"),
    ]
    kept = [
        segment for segment in ours if segment.size_bytes or segment.kind in ("images", "disks")
    ]
    used_bytes = space.total_bytes - space.free_bytes
    other_bytes = max(0, used_bytes - sum(segment.size_bytes for segment in ours))
    reserve_bytes = min(space.reserve_bytes, space.free_bytes)
    return [
        *kept,
        Segment("Others on this file system", other_bytes, "other"),
        Segment("Reserve for disks", reserve_bytes, "reserve"),
        Segment("Free", space.free_bytes - reserve_bytes, "free"),
    ]


def _address(problem: ProblemView) -> str:
    address = _ADDRESSES.get(problem.kind, "")
    return f"{address}{problem.subject}" if address.endswith("/") else address
