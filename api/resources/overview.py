"""`/v1/overview`: one document for whoever wants to see how things are."""

import falcon

from stratocache import __version__
from stratocache.api import answers, query, readiness
from stratocache.api.cache_views import FetchView, SpaceView
from stratocache.api.representations import EventView, OperationView, Representation
from stratocache.api.service import Service
from stratocache.fs import fetch_account, overview
from stratocache.fs.records import Caller
from stratocache.fs.state import now

_SHOWN_MAX = 20


class OverviewSpace(SpaceView):
    """Where the space is, and how much of the chunks is whose."""

    image_bytes: int
    """Chunks of images, as if none were shared."""
    snapshot_bytes: int
    """Chunks of snapshots, as if none were shared."""


class OverviewCounts(Representation):
    """How many there are that the caller may see, by state; open operations by kind."""

    images: dict[str, int]
    disks: dict[str, int]
    snapshots: dict[str, int]
    attachments: dict[str, int]
    launches: dict[str, int]
    operations: dict[str, int]


class ProblemView(Representation):
    """Something that somebody should look at."""

    kind: str
    """disk, attachment, chunk, manifest, or `part` for one of the appliance."""
    subject: str
    message: str


class OverviewView(Representation):
    """How things are."""

    version: str
    at: str
    space: OverviewSpace
    counts: OverviewCounts
    cache: FetchView
    operations: list[OperationView]
    """Under way, newest first."""
    events: list[EventView]
    """The latest, newest first."""
    problems: list[ProblemView]


class Overview:
    """`/v1/overview`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Show space, counts, what is under way, what happened last, and what is wrong."""
        query.require_known(request)
        answers.show(response, overview_of(self._service, answers.caller(request)))


def overview_of(service: Service, caller: Caller) -> OverviewView:
    """Return how things are, of what the caller may see."""
    configuration, db = service.configuration, service.db
    account = service.space.recent()
    image_bytes, snapshot_bytes = overview.stored_bytes(db)
    faults = [
        ProblemView(kind="part", subject=part, message=sentence)
        for part, sentence in readiness.faults(configuration, db).items()
    ]
    return OverviewView(
        version=__version__,
        at=now(),
        space=OverviewSpace.of(
            account, configuration.cache, image_bytes=image_bytes, snapshot_bytes=snapshot_bytes
        ),
        counts=OverviewCounts.from_record(overview.counts(db, caller)),
        cache=FetchView.from_record(fetch_account.of_host(db, account.chunk_bytes)),
        operations=[OperationView.of(item) for item in overview.under_way(db, caller, _SHOWN_MAX)],
        events=[
            EventView.from_record(item) for item in overview.latest_events(db, caller, _SHOWN_MAX)
        ],
        problems=[
            *faults,
            *(ProblemView.from_record(item) for item in overview.problems(db, caller)),
        ],
    )
