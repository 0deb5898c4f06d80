"""`/v1/overview`: one document for whoever wants to see how things are."""

from dataclasses import asdict
from typing import Self

import falcon

from stratocache import __version__
from stratocache.api import answers, query, readiness
from stratocache.api.representations import EventView, OperationView, Representation
from stratocache.api.resources.cache import FetchView
from stratocache.api.service import Service
from stratocache.cache.configuration import CacheSettings
from stratocache.fs import fetch_account, overview
from stratocache.fs.overview import Counts, Problem
from stratocache.fs.records import Caller
from stratocache.fs.space_plan import SpaceAccount
from stratocache.fs.state import now

_SHOWN_MAX = 20


class OverviewSpace(Representation):
    """Where the space is; `stratocache.fs.space_plan.SpaceAccount` says what each field counts."""

    total_bytes: int
    free_bytes: int
    reserve_bytes: int
    available_bytes: int
    chunk_bytes: int
    """All chunks: of images and of snapshots, each once."""
    image_bytes: int
    """Chunks of images, as if none were shared."""
    snapshot_bytes: int
    """Chunks of snapshots, as if none were shared."""
    manifest_bytes: int
    stage_bytes: int
    quarantine_bytes: int
    disk_allocated_bytes: int
    disk_size_bytes: int
    promised_bytes: int
    promise_limit_bytes: int
    cache_limit_bytes: int
    """0 = no limit."""
    free_floor_bytes: int

    @classmethod
    def of(
        cls, account: SpaceAccount, stored_bytes: tuple[int, int], settings: CacheSettings
    ) -> Self:
        """Show an account."""
        known = {name: value for name, value in asdict(account).items() if name in cls.model_fields}
        return cls(
            **known,
            image_bytes=stored_bytes[0],
            snapshot_bytes=stored_bytes[1],
            cache_limit_bytes=settings.max_bytes,
            free_floor_bytes=settings.min_free_bytes,
        )


class OverviewCounts(Representation):
    """How many there are that the caller may see, by state; open operations by kind."""

    images: dict[str, int]
    disks: dict[str, int]
    snapshots: dict[str, int]
    attachments: dict[str, int]
    launches: dict[str, int]
    operations: dict[str, int]

    @classmethod
    def of(cls, counts: Counts) -> Self:
        """Show counts."""
        return cls(**asdict(counts))


class ProblemView(Representation):
    """Something that somebody should look at."""

    kind: str
    """disk, attachment, chunk, manifest, or `part` for one of the appliance."""
    subject: str
    message: str

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """Show a problem."""
        return cls(**asdict(problem))


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
    faults = [
        ProblemView(kind="part", subject=part, message=sentence)
        for part, sentence in readiness.faults(configuration, db).items()
    ]
    return OverviewView(
        version=__version__,
        at=now(),
        space=OverviewSpace.of(account, overview.stored_bytes(db), configuration.cache),
        counts=OverviewCounts.of(overview.counts(db, caller)),
        cache=FetchView(**asdict(fetch_account.of_host(db, account.chunk_bytes))),
        operations=[OperationView.of(item) for item in overview.under_way(db, caller, _SHOWN_MAX)],
        events=[
            EventView(**asdict(item)) for item in overview.latest_events(db, caller, _SHOWN_MAX)
        ],
        problems=faults + [ProblemView.of(problem) for problem in overview.problems(db, caller)],
    )
