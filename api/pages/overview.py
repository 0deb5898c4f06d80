"""`/`: where space went, what the cache is worth, and what is happening now."""

import falcon

from stratocache.api import answers
from stratocache.api.pages.pictures import Segment, meter, sparkline, stacked_bar
from stratocache.api.pages.rendering import Pages
from stratocache.api.resources.overview import ProblemView, overview_of
from stratocache.api.space_parts import space_parts
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
        segments = [Segment(*part) for part in space_parts(view.space.model_dump())]
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


def _address(problem: ProblemView) -> str:
    address = _ADDRESSES.get(problem.kind, "")
    return f"{address}{problem.subject}" if address.endswith("/") else address
