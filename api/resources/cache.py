"""`/v1/cache`: where the space has gone, what disks are promised, and what keeps each image."""

from dataclasses import asdict
from typing import Self

import falcon

from stratocache.api import answers, query
from stratocache.api.representations import Representation
from stratocache.api.service import Service
from stratocache.fs import inventory, space_plan
from stratocache.fs.records import Caller
from stratocache.fs.space_plan import ImageHolding, SpaceAccount


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

    @classmethod
    def of(cls, account: SpaceAccount) -> Self:
        """Show an account."""
        return cls(**asdict(account))


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
    """Instances that have it attached, read-only; for administrators."""
    instance_count: int
    created_at: str
    last_used_at: str | None

    @classmethod
    def of(cls, holding: ImageHolding, caller: Caller) -> Self:
        """Show an image as a caller may see it."""
        image = holding.image
        instances = sorted({attachment.instance for attachment in holding.attachments})
        return cls(
            image=image.id,
            title=image.entry.title or "",
            state=image.state,
            size_bytes=image.size_bytes,
            pinned=image.pinned,
            held=holding.held,
            disk_count=len(holding.disks),
            disks=[disk.uuid for disk in holding.disks if inventory.may_see(caller, disk)],
            instances=instances if caller.administrator else [],
            instance_count=len(instances),
            created_at=image.created_at,
            last_used_at=image.last_used_at,
        )


class PlanView(Representation):
    """The account, and every image with its holders, the longest unused first."""

    space: CacheView
    images: list[HoldingView]


class CacheStatus:
    """`/v1/cache`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Show where the space has gone."""
        query.require_known(request)
        account = space_plan.account(self._service.configuration, self._service.db)
        answers.show(response, CacheView.of(account))


class CachePlan:
    """`/v1/cache/plan`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, request: falcon.Request, response: falcon.Response) -> None:
        """Show the account and what keeps each image."""
        query.require_known(request)
        service, caller = self._service, answers.caller(request)
        plan = PlanView(
            space=CacheView.of(space_plan.account(service.configuration, service.db)),
            images=[HoldingView.of(item, caller) for item in space_plan.holdings(service.db)],
        )
        answers.show(response, plan)
