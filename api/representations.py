"""What responses carry: one pydantic model per resource, and its entity tag."""

import hashlib
from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from stratocache.fs.fetch_account import DiskAccount
from stratocache.fs.pace import remaining_s
from stratocache.fs.records import Attachment, Disk, Operation


class Representation(BaseModel):
    """Base of everything that is answered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_record(cls, record: object, **others: Any) -> Self:
        """Show a record: each field is what the record has by that name, but for the `others`."""
        names = cls.model_fields.keys() - others.keys()
        return cls(**{name: getattr(record, name) for name in names}, **others)

    def to_json(self) -> bytes:
        """Return the bytes of the response."""
        return self.model_dump_json().encode()

    @property
    def etag(self) -> str:
        """A strong validator (RFC 9110 section 8.8.3): the digest of the representation."""
        return self.to_json_and_etag()[1]

    def to_json_and_etag(self) -> tuple[bytes, str]:
        """Return both, for the price of one."""
        content = self.to_json()
        return content, hashlib.sha256(content).hexdigest()[:32]


class TrafficSample(Representation):
    """What was fetched, and waited for, in ten seconds."""

    at: str
    remote_bytes: int
    remote_wait_s: float


class DiskView(Representation):
    """A disk."""

    uuid: str
    state: Literal["creating", "available", "deleting"]
    size_bytes: int
    base_image: str | None
    base_snapshot: str | None
    form: Literal["overlay", "raw"] | None
    owner: str
    tag: str
    visibility: Literal["private", "public"]
    kind: Literal["machine", "data", "readonly"]
    volatile: bool
    quarantined_at: str | None
    """When it was kept as its instance had failed; None = it is not in quarantine."""
    created_at: str
    attached_to: list[str]
    """Instances that have it now."""
    epoch: int
    """That of its latest attachment."""
    problems: list[str]
    """What is wrong with it and its attachments, sentences for people."""

    @classmethod
    def of(cls, disk: Disk, attachments: list[Attachment]) -> Self:
        """Show a disk; `attachments` are its own."""
        problems = [disk.problem, *(item.problem for item in attachments)]
        return cls.from_record(
            disk,
            attached_to=[attachment.instance for attachment in attachments],
            problems=[problem for problem in dict.fromkeys(problems) if problem is not None],
        )


class DiskDetails(DiskView):
    """A disk, and what fetching cost it."""

    remote_bytes: int
    """Of its image, fetched because a read of this disk waited for them."""
    remote_wait_s: float
    boot_remote_bytes: int
    """The same since the disk was attached last."""
    boot_remote_wait_s: float
    cache_saved_bytes: int
    """Of its image that were here when it was cloned."""
    traffic_history: list[TrafficSample]
    fenced: bool
    """Whether its image was rejected, so that it cannot be attached."""

    @classmethod
    def with_account(
        cls, disk: Disk, attachments: list[Attachment], account: DiskAccount, *, fenced: bool
    ) -> Self:
        """Show a disk with its account."""
        return cls(**dict(DiskView.of(disk, attachments)), **asdict(account), fenced=fenced)

    def to_json_and_etag(self) -> tuple[bytes, str]:
        """Return both; the validator is of the disk alone: what it cost changes all the time."""
        return self.to_json(), DiskView.from_record(self).etag


class ShareView(Representation):
    """Who else may use a disk."""

    user: str
    access: Literal["read", "write"]
    """read: see, clone, download, attach read-only; write: also attach, upload, take snapshots."""
    created_at: str


class SnapshotView(Representation):
    """A snapshot."""

    id: str
    disk_uuid: str
    state: Literal["creating", "absorbing", "available", "deleting"]
    size_bytes: int
    tag: str
    owner: str
    created_at: str
    frozen_at: str | None
    """From when on the disk may differ from it."""


class OperationView(Representation):
    """An operation."""

    id: str
    kind: str
    subject: str
    state: Literal["pending", "running", "done", "failed", "cancelled"]
    progress_bytes: int
    total_bytes: int | None
    rate_bytes_s: float
    """At which progress grew lately."""
    complete_in_s: float | None
    """When it is done at that rate; None when nobody knows."""
    cancel_requested: bool
    owner: str
    created_at: str
    updated_at: str
    request: dict[str, Any]
    result: dict[str, Any] | None
    error: dict[str, Any] | None

    @classmethod
    def of(cls, operation: Operation) -> Self:
        """Show an operation."""
        return cls.from_record(
            operation,
            rate_bytes_s=0.0 if operation.finished else round(operation.rate_bytes_s, 1),
            complete_in_s=_complete_in_s(operation),
        )


class EventView(Representation):
    """Something that happened."""

    number: int
    """Greater than that of any event before."""
    at: str
    kind: str
    """Stable and dotted: `disk.created`, `fetch.done`."""
    subject: str
    """The image, disk, snapshot, attachment or instance that it happened to."""
    message: str
    """A sentence for people."""
    owner: str | None
    """Whose the subject was; null = nobody's."""


def _complete_in_s(operation: Operation) -> float | None:
    if operation.finished:
        return 0.0
    if operation.total_bytes is None or not operation.rate_bytes_s:
        return None
    missing_bytes = operation.total_bytes - operation.progress_bytes
    return remaining_s(missing_bytes, operation.rate_bytes_s)
